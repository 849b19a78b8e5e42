"""Errors of router_core.

    RouterCoreError
    ├── NumericalError           a matrix or number cannot be used
    │   ├── NotFiniteError           NaN or infinity
    │   └── NotPositiveDefiniteError Cholesky failed on finite input
    ├── HyperparameterError      a scalar of the online stage is outside its domain
    ├── ShapeMismatchError       an array has another shape than the posterior
    ├── FeedbackError            a feedback does not fit the run's signal
    ├── UnknownPolicyError       no policy of that name
    ├── DatasetError             a data file, or a line of it, cannot be used
    │   └── BadRowsError             some of its rows cannot; the others could
    ├── SnapshotError            snapshot bytes cannot be read, or belong to another run
    ├── CheckpointError          a checkpoint cannot be read, or does not fit the pool
    └── EncoderError             an encoder cannot be loaded or fed

Messages name the field, the value and the remedy. `service` maps them to HTTP; this package knows nothing of HTTP.
"""

from __future__ import annotations


class RouterCoreError(Exception):
    """Base of every error that router_core raises on purpose."""


class NumericalError(RouterCoreError):
    """A matrix or number cannot be used."""


class NotFiniteError(NumericalError):
    """NaN or infinity where a finite number is needed."""


class NotPositiveDefiniteError(NumericalError):
    """A precision matrix is finite but has no Cholesky factor."""


class HyperparameterError(RouterCoreError):
    """A scalar of the online stage is outside its domain."""


class ShapeMismatchError(RouterCoreError):
    """An array has another shape than the posterior, prior or pool asks for."""


class FeedbackError(RouterCoreError):
    """A feedback does not fit the run's signal or the decision."""


class AuditError(RouterCoreError):
    """An audit's rate, schedule, referee or verdict is outside its domain."""


class UnknownPolicyError(RouterCoreError):
    """No policy of that name."""


class DatasetError(RouterCoreError):
    """A data file, or a line of it, cannot be used."""


class BadRowsError(DatasetError):
    """Some rows of a data file cannot be used.

    Args:
        message: names the rows, up to a bound.
        count: how many they are.
    """

    def __init__(self, message: str, count: int) -> None:
        super().__init__(message)
        self.count = count

    def __reduce__(self) -> tuple[type[BadRowsError], tuple[str, int]]:
        """Errors travel between processes."""
        return type(self), (str(self), self.count)


class SnapshotError(RouterCoreError):
    """Snapshot bytes cannot be read, or belong to another run."""


class CheckpointError(RouterCoreError):
    """A checkpoint cannot be read, or does not fit the pool, the dimension or its own digest."""


class EncoderError(RouterCoreError):
    """An encoder cannot be loaded or fed."""


class UnknownScaleError(RouterCoreError):
    """Rewards of several scorers cannot be compared: nobody knows their scale yet."""
