"""An interval that needs no limit theorem: valid for every number of rows, however the log was collected.

For rewards in [0, 1] only. Wide, and honest where the other intervals are not: few rows of the target's own, weights
that one row decides, a target that the log hardly supports, contexts that drift. Called by `service.lab.estimates` and
`loadtests`.
"""

from __future__ import annotations

import math

import numpy as np

from router_core.errors import FeedbackError
from router_core.ope.data import Array, LoggedData
from router_core.ope.weights import PROPENSITY_FLOOR, Weighted, weigh

BISECTIONS = 60
"""Halvings of the bound on the sum: exact to float64."""

RATES = 0.75 * 0.5 ** np.arange(12)
"""λ of the mixture, from 0.75 down to 4·10⁻⁴. The best one for scores of variance V in all is about √(2 log(2/α)/V), so
these serve V from 10 to 5·10⁷. They do not depend on the log, as the bound must not."""

DEPTH = 2.0
"""The lowest value of a score is −`DEPTH`. A larger one takes more of the weights' variance out, and short logs pay for
it: of 1, 2, 3 and 5 this one gave intervals within 5 % of the narrowest at 300 … 3,000 rows of draws of their own,
and within 10 % where rows share draws, with weights of 4."""


def safe_interval(
    data: LoggedData, pi: Array, *, level: float = 0.95, floor: float = PROPENSITY_FLOOR, baseline: bool = True
) -> tuple[float, float]:
    """Empirical-Bernstein bounds on the mean of the target's values at all rows, which may differ from row to row.

    The score of a row is φ_t = Σ_a w_ta r_ta − m_t (Σ_a w_ta − Σ_a π_a). Given the past, its mean is ν_t, the value at
    that row, or less where support is missing. m_t = min(c_t, `DEPTH` / Σ_a π_a/e_a), where c_t in [0, 1] is what the
    past predicts, so φ_t is at least −`DEPTH`. With y_t = (φ_t − c_t)/(1 + `DEPTH`) and ψ(λ) = −log(1 − λ) − λ,

        exp(λ Σ_t (φ_t − ν_t)/(1 + `DEPTH`) − ψ(λ) Σ_t y_t²)

    is a supermartingale for every λ in (0, 1) (Fan et al. 2015, arXiv 1311.6273; Howard et al. 2021, arXiv 1810.08240),
    and so is its mean over λ (`RATES`). By Ville's inequality that ever exceeds 2/α with probability α/2 at most, which
    bounds Σ ν_t from below; the upper bound is the same for 1 − r. What is bounded is the mean of ν_t, so contexts may
    drift; no bound on the weights is needed (Waudby-Smith et al. 2022, arXiv 2210.10768, whose doubly robust scores
    these are, with a constant as the model); missing support only makes the interval wider; it holds at all lengths of
    the log at once.

    Rows that share a draw (`LoggedData.draws`) have one score, their sum, and all are divided by the size of the
    largest draw. If the two bounds cross, which they do with probability α at most where the propensities are right,
    the interval is what lies between them.

    Args:
        data: the log, rewards in [0, 1].
        pi: (N, K), the target's probabilities.
        level: 1 − α.
        floor: propensities below it get weight zero, which is safe.
        baseline: False: m_t = 0, for weights that only the row's own action has told.

    Returns:
        (low, high) inside [0, 1], low <= high.

    Raises:
        FeedbackError: a reward outside [0, 1], or rows that are a sample (`LoggedData.inclusion`).
        NoSupportError: no row at all.
    """
    if data.inclusion is not None:
        raise FeedbackError("the safe interval is of the rows of the log, and these are a sample of the decisions")
    if not data.unit_rewards:
        raise FeedbackError("the safe interval needs rewards in [0, 1]: this log has others (prior form `paper`)")
    seen = weigh(data, pi, floor=floor, max_lost=1.0)
    threshold = math.log(2.0 / (1.0 - level))
    low = _lower_bound(seen, seen.data.rewards, floor, threshold, baseline)
    high = 1.0 - _lower_bound(seen, 1.0 - seen.data.rewards, floor, threshold, baseline)
    return min(low, high), max(low, high)


def _lower_bound(seen: Weighted, rewards: Array, floor: float, threshold: float, baseline: bool) -> float:
    """Lower bound in [0, 1] on the mean over the rows of ν_t, for these rewards (n, K)."""
    data, earned = seen.data, seen.scored(rewards)
    draws = np.arange(len(data)) if data.draws is None else data.draws
    predicted = _predicted(data.per_draw(earned), data.per_draw(seen.weight))[draws]
    supported = np.where(data.propensities >= floor, seen.target, 0.0)
    steepest = np.divide(supported, data.propensities, out=np.zeros_like(supported), where=supported > 0).sum(axis=1)
    subtracted = np.minimum(predicted, DEPTH / np.maximum(steepest, 1e-12)) if baseline else np.zeros(len(predicted))
    scores = data.per_draw(earned - subtracted * (seen.weight - supported.sum(axis=1)))
    unit = (1.0 + DEPTH) * float(data.per_draw(np.ones(len(data))).max())
    variance = float(np.square((scores - data.per_draw(predicted)) / unit).sum())
    return float(np.clip((scores.sum() - unit * _excess(variance, threshold)) / len(data), 0.0, 1.0))


def _predicted(earned: Array, weight: Array) -> Array:
    """Σ w r / Σ w over the draws before each, and one row of ½ before all: (G,) in [0, 1]."""
    before, carried = np.cumsum(earned) - earned, np.cumsum(weight) - weight
    mean: Array = np.clip((before + 0.5) / (carried + 1.0), 0.0, 1.0)
    return mean


def _excess(variance: float, threshold: float) -> float:
    """The sum u at which log mean_λ exp(λ u − ψ(λ) V) reaches the threshold; the left side grows with u.

    Any one rate reaches it alone at u = (threshold + log m + ψ V)/λ, m rates in all, which bounds the search.
    """
    psi = -np.log1p(-RATES) - RATES
    needed = threshold + math.log(len(RATES))
    low, high = 0.0, float(((needed + psi * variance) / RATES).min())
    for _ in range(BISECTIONS):
        u = 0.5 * (low + high)
        low, high = (low, u) if np.logaddexp.reduce(RATES * u - psi * variance) >= needed else (u, high)
    return high
