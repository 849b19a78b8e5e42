"""Importance weights of a target policy on a log, and whether the log can say anything about that target at all.

Knows `LoggedData` only. Called by the estimators of this package.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.errors import ShapeMismatchError
from router_core.ope.data import Array, LoggedData, NoSupportError, among_available

PROPENSITY_FLOOR = 1e-3
"""Arms that were less likely than this count as never asked: a single such row would weigh a thousand and decide the
estimate alone."""

MAX_LOST = 0.05
"""Largest mean probability of the target on such arms at which an estimate is made; its interval is widened by it."""


@dataclass(frozen=True, slots=True)
class Weighted:
    """A log seen through a target policy. Rows whose target had no arm to ask are left out.

    Attributes:
        data: the rows that are left, n of them.
        kept: (n,) their positions in the log that was given.
        target: (n, K) the target's probabilities among the available arms.
        weights: (n, K) π(a|x)/e(a|x) where the arm's reward is in the log; zero elsewhere and below the floor; clipped.
        spread: (n,) Σ_a π(a|x)²/e(a|x) over the arms above the floor: the weight's second moment at this row.
        clipped: share of the rows with a weight that was clipped.
        lost: mean probability of the target on available arms below the floor.
        dropped: rows left out.
    """

    data: LoggedData
    kept: NDArray[np.int64]
    target: Array
    weights: Array
    spread: Array
    clipped: float
    lost: float
    dropped: int

    @property
    def weight(self) -> Array:
        """(n,) of the whole row."""
        total: Array = self.weights.sum(axis=1)
        return total

    def scored(self, values: Array) -> Array:
        """(n,) Σ_a w_a v_a of (n, K) values, which may be NaN where the weight is zero."""
        scores: Array = np.where(self.weights > 0, self.weights * values, 0.0).sum(axis=1)
        return scores

    @property
    def ess(self) -> float:
        """(Σw)²/Σw² over the draws, rows that share one counted as one; 0 where no row carries weight."""
        weight = self.data.per_draw(self.data.share * self.weight)
        square = float(np.square(weight).sum())
        return float(weight.sum()) ** 2 / square if square else 0.0


def weigh(
    data: LoggedData,
    pi: Array,
    *,
    clip: float | None = None,
    floor: float = PROPENSITY_FLOOR,
    max_lost: float = MAX_LOST,
) -> Weighted:
    """w_ta = π(a|x_t)/e_t(a|x_t) for every arm a whose reward is in the log, among the available arms.

    Args:
        data: the log.
        pi: (N, K), the target's probabilities; rows sum to 1 over the arms of the pool that it may ask.
        clip: largest weight; None for none. Clipping trades variance for a bias that no interval shows.
        floor: propensities below it count as no support.
        max_lost: largest tolerated mean probability of the target without support.

    Raises:
        NoSupportError: no rows, or the target asks for arms that the log (almost) never asked.
        ShapeMismatchError: `pi` does not fit the log or holds no probabilities; `clip` is not positive.
    """
    if pi.shape != data.propensities.shape:
        raise ShapeMismatchError(f"pi has shape {pi.shape}, the log is {data.propensities.shape}: one row per decision")
    if not np.isfinite(pi).all() or (pi < 0).any() or (pi.sum(axis=1) > 1 + 1e-6).any():
        raise ShapeMismatchError("pi must hold probabilities: each at least 0, each row summing to at most 1")
    if clip is not None and not clip > 0:
        raise ShapeMismatchError(f"clip is {clip}: give a positive number, or None")
    given = among_available(pi, data.available)
    kept = np.flatnonzero(given.sum(axis=1) > 0)
    if not kept.size:
        raise NoSupportError(
            f"none of the {len(data)} logged decisions could have been made by this target: it has no feedback yet, or "
            "the target's arms were never available; export a longer log"
        )
    data, given = data.rows(kept), given[kept]
    supported = data.propensities >= floor
    lost = float(np.where(supported, 0.0, given).sum(axis=1).mean())
    if lost > max_lost:
        raise NoSupportError(
            f"{lost:.1%} of what the target would have asked has a propensity below {floor:g} in this log (allowed: "
            f"{max_lost:.1%}), so the log cannot say what that would have earned. Log with a policy that explores "
            "(`random`, `bayesian` with a larger v, or a shadow rate), evaluate a target closer to what was logged, or "
            "replay recorded pairs (`reward-router replay`)"
        )
    inverse = np.divide(1.0, data.propensities, out=np.zeros_like(given), where=supported)
    weights = np.where(data.seen, given * inverse, 0.0)
    clipped = 0.0
    if clip is not None:
        clipped = float((weights > clip).any(axis=1).mean())
        weights = np.minimum(weights, clip)
    spread = (np.square(given) * inverse).sum(axis=1)
    return Weighted(data, kept, given, weights, spread, clipped, lost, len(pi) - len(kept))
