"""Errors of router_core.

    RouterCoreError
    ├── NumericalError           a matrix or number cannot be used
    │   ├── NotFiniteError           NaN or infinity
    │   └── NotPositiveDefiniteError Cholesky failed on finite input
    ├── HyperparameterError      a scalar of the online stage is outside its domain
    ├── ShapeMismatchError       an array has another shape than the posterior
    ├── FeedbackError            a feedback does not fit the run's signal
    ├── UnknownPolicyError       no policy of that name
    ├── DatasetError             a line of a data file cannot be used
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


class UnknownPolicyError(RouterCoreError):
    """No policy of that name."""


class DatasetError(RouterCoreError):
    """A line of a data file cannot be used."""


class SnapshotError(RouterCoreError):
    """Snapshot bytes cannot be read, or belong to another run."""


class CheckpointError(RouterCoreError):
    """A checkpoint cannot be read, or does not fit the pool, the dimension or its own digest."""


class EncoderError(RouterCoreError):
    """An encoder cannot be loaded or fed."""
