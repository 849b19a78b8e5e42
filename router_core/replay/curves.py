"""Learning curves: accuracy in a running window and cumulative regret along the stream, with bands over passes.

Arithmetic only; `plot` draws them. Called by `service.cli.replay`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_core.intervals import t95
from router_core.replay.table import Table
from router_core.replay.trace import Trace

Array = NDArray[np.float64]

POINTS = 100
"""Points kept of a curve; more are not seen in a picture."""

SMALLEST_WINDOW = 50
"""Fewer steps give an accuracy with a standard error above .05 for one pass."""


@dataclass(frozen=True, slots=True, eq=False)
class Band:
    """Mean over passes and its 95 % interval, each (P,) at the curve's steps; low = mean = high for a single pass."""

    mean: Array
    low: Array
    high: Array


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """One policy along the stream.

    Attributes:
        steps: (P,) int64, instances met so far.
        window: instances that an accuracy is the mean of; fewer at the beginning.
        accuracy: in the window that ends at the step.
        regret: cumulative since the beginning, in instances: Σ (best arm's correctness − the policy's).
    """

    steps: NDArray[np.int64]
    window: int
    accuracy: Band
    regret: Band

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the window stands beside the policies there."""
        out: dict[str, Any] = {"step": self.steps.tolist()}
        for name, band in (("accuracy", self.accuracy), ("regret", self.regret)):
            out[name] = band.mean.tolist()
            out[f"{name}_ci95"] = [[float(low), float(high)] for low, high in zip(band.low, band.high, strict=True)]
        return out


def default_window(length: int) -> int:
    """A tenth of the stream, at least 50 steps, at most all."""
    return min(max(length // 10, SMALLEST_WINDOW), length)


def curve(trace: Trace, table: Table, window: int | None = None) -> Curve:
    """The curve of one policy; passes of unequal length are cut to the shortest.

    Args:
        trace: its passes.
        table: the pairs, for the regret.
        window: of the accuracy; `default_window` if None.
    """
    length = min(len(part.order) for part in trace.passes)
    window = window or default_window(length)
    correct = np.stack([part.correct[:length] for part in trace.passes])
    # A single RM that abstains leaves an even guess.
    correct = np.where(np.isnan(correct), 0.5, correct)
    missed = np.stack([table.oracle[part.order[:length]] for part in trace.passes]) - correct
    steps = np.unique(np.linspace(1, length, min(POINTS, length)).round().astype(np.int64))
    return Curve(
        steps,
        window,
        _band(_running_mean(correct, window)[:, steps - 1], 0.0, 1.0),
        _band(missed.cumsum(axis=1)[:, steps - 1], -np.inf, np.inf),
    )


def _running_mean(values: Array, window: int) -> Array:
    """Mean of the last `window` values up to each step, of all there are before: (P, T) -> (P, T)."""
    sums = np.concatenate([np.zeros((len(values), 1)), values.cumsum(axis=1)], axis=1)
    ends = np.arange(1, values.shape[1] + 1)
    begins = np.maximum(ends - window, 0)
    means: Array = (sums[:, ends] - sums[:, begins]) / (ends - begins)
    return means


def _band(values: Array, lowest: float, highest: float) -> Band:
    """Student's interval of the mean over passes, clipped: (P, T) -> three of (T,)."""
    mean = values.mean(axis=0)
    half = np.zeros_like(mean)
    if len(values) > 1:
        half = t95(len(values) - 1) * values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return Band(mean, np.maximum(mean - half, lowest), np.minimum(mean + half, highest))
