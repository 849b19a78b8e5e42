"""Value of a target policy from another policy's log: IPS, SNIPS, doubly robust (docs/off-policy.md).

Rows that came into the log with a known probability (`LoggedData.inclusion`), as audits do, count by its inverse.

Each is a weighted mean of per-row scores, and its interval the normal one of that mean; rows that share a draw
(`LoggedData.draws`) count as one there. Rows may have been collected by
a policy that learned from the rows before: scores minus the value are then martingale differences, not independent, and
the doubly robust estimator weighs rows so that the limit theorem holds all the same. Called by
`service.lab.estimates` and `loadtests.ope_coverage`.
"""

from __future__ import annotations

import numpy as np

from router_core.errors import ShapeMismatchError
from router_core.ope.data import Array, Estimate, LoggedData, NoSupportError
from router_core.ope.weights import MAX_LOST, PROPENSITY_FLOOR, Weighted, weigh

Z95 = 1.959963984540054
"""Φ⁻¹(0.975)."""

PSEUDO_ROWS = 4.0
"""Effective rows, each half the range of the rewards off, that SNIPS and DR intervals count besides the real ones. With
few rows that agree, the normal interval is far too short; Agresti & Coull (1998) add four for proportions."""

WINDOW = 64
"""Rows at least over which the spread of the weights is averaged."""

WINDOW_SHARE = 0.25
"""The window's length as a share of the rows so far: long where the logging policy has settled."""


def ips(
    data: LoggedData,
    pi: Array,
    *,
    clip: float | None = None,
    floor: float = PROPENSITY_FLOOR,
    max_lost: float = MAX_LOST,
) -> Estimate:
    """Inverse propensity scoring: (1/n) Σ_ta w_ta r_ta (Horvitz & Thompson 1952). Unbiased without clipping.

    Args:
        data: the log.
        pi: (N, K), the target's probabilities.
        clip: largest weight.
        floor: see `weigh`.
        max_lost: see `weigh`.

    Raises:
        NoSupportError: the log says too little about the target.

    >>> log = LoggedData(("a", "b"), np.zeros((2, 1), np.float32), np.array([0, 1]), np.full((2, 2), 0.5),
    ...                  np.ones((2, 2), bool), np.array([[1.0, np.nan], [np.nan, 0.0]]))
    >>> ips(log, np.array([[1.0, 0.0], [1.0, 0.0]])).value
    1.0
    """
    seen = _supported(data, pi, clip, floor, max_lost)
    scores = seen.scored(seen.data.rewards)
    value, half = _weighted_mean(seen.data, scores, seen.data.share)
    worst, best = seen.data.reward_range
    # What the target asks without support has earned nothing here, and between the worst and the best reward in truth.
    interval = (value - half + seen.lost * min(worst, 0.0), value + half + seen.lost * max(best, 0.0))
    return _estimate(seen, value, interval)


def snips(
    data: LoggedData,
    pi: Array,
    *,
    clip: float | None = None,
    floor: float = PROPENSITY_FLOOR,
    max_lost: float = MAX_LOST,
) -> Estimate:
    """Self-normalised IPS: Σ w r / Σ w (Swaminathan & Joachims 2015). Bias O(1/n), and less variance.

    The interval is the delta method's, of residuals Σ_a w_ta (r_ta − value), and counts `PSEUDO_ROWS`. Arguments and
    errors as `ips`.
    """
    seen = _supported(data, pi, clip, floor, max_lost)
    share = seen.data.share
    total = float(share @ seen.weight)
    value = float(share @ seen.scored(seen.data.rewards)) / total
    residuals = seen.data.per_draw(share * seen.scored(seen.data.rewards - value))
    half = Z95 * float(np.sqrt(np.square(residuals).sum())) / total
    return _estimate(seen, value, _widened(value, half, seen))


def doubly_robust(
    data: LoggedData,
    pi: Array,
    q: Array,
    *,
    stabilise: bool = True,
    clip: float | None = None,
    floor: float = PROPENSITY_FLOOR,
    max_lost: float = MAX_LOST,
) -> Estimate:
    """Γ_t = Σ_a π(a|x_t) q(x_t, a) + Σ_a w_ta (r_ta − q(x_t, a)), averaged (Dudík et al. 2011, arXiv 1103.4601).

    With `stabilise` the value is Σ h_t Γ_t / Σ h_t with h_t = (mean of Σ_a π²/e over a window of earlier rows)^(−1/2),
    so that every row adds the same conditional variance: the condition of the martingale limit theorem that a learning
    policy's log fails otherwise (Hadad et al. 2021, arXiv 1911.02768; Zhan et al. 2021, arXiv 2106.02029, "StableVar").
    Departure: they average over the context distribution at time t, which a log does not hold; the window's mean is as
    predictable, and any predictable h keeps the theorem. Without it every row weighs the same. The interval counts
    `PSEUDO_ROWS` too.

    Args:
        data: the log.
        pi: (N, K), the target's probabilities.
        q: (N, K), predictions that used no reward of their own row or of later ones (`sequential_ridge`).
        stabilise: weigh rows by h_t.
        clip: largest weight w.
        floor: see `weigh`.
        max_lost: see `weigh`.

    Raises:
        NoSupportError: the log says too little about the target.
        ShapeMismatchError: `q` does not fit the log.
    """
    if q.shape != data.propensities.shape:
        raise ShapeMismatchError(f"q has shape {q.shape}, the log is {data.propensities.shape}")
    seen = _supported(data, pi, clip, floor, max_lost)
    mine = q[seen.kept]
    # On arms without support the model's word is all there is.
    scores = (seen.target * mine).sum(axis=1) + seen.scored(seen.data.rewards - mine)
    h = stabilising_weights(seen.spread) if stabilise else np.ones(len(scores))
    value, half = _weighted_mean(seen.data, scores, h * seen.data.share)
    return _estimate(seen, value, _widened(value, half, seen))


def stabilising_weights(spread: Array) -> Array:
    """h_t = (mean of spread_s over the last max(`WINDOW`, `WINDOW_SHARE`·t) rows s < t)^(−1/2); h_0 = h_1.

    Args:
        spread: (n,), Σ_a π(a|x_t)²/e_t(a|x_t).

    Returns:
        (n,) positive float64.
    """
    n = len(spread)
    if n == 0:
        return np.ones(0)
    cumulative = np.concatenate([[0.0], np.cumsum(spread)])
    t = np.arange(n)
    first = np.maximum(t - np.maximum(WINDOW, (WINDOW_SHARE * t).astype(np.int64)), 0)
    # One row of spread 1 stands before the log, so that the first rows have a history too.
    young = first == 0
    mean = (cumulative[t] - cumulative[first] + young) / (t - first + young)
    h: Array = 1.0 / np.sqrt(np.maximum(mean, 1e-12))
    return h


def _supported(data: LoggedData, pi: Array, clip: float | None, floor: float, max_lost: float) -> Weighted:
    """`weigh`, where at least one row carries weight."""
    seen = weigh(data, pi, clip=clip, floor=floor, max_lost=max_lost)
    if not seen.weights.any():
        raise NoSupportError(
            f"none of the {len(seen.data)} logged decisions asked what the target would have asked: export a longer log"
        )
    return seen


def _weighted_mean(data: LoggedData, scores: Array, h: Array) -> tuple[float, float]:
    """Σ h s / Σ h, and half its 95 % interval from Σ_g (Σ_{t∈g} h (s − value))² / (Σ h)²: g are the draws."""
    total = float(h.sum())
    value = float(h @ scores) / total
    return value, Z95 * float(np.sqrt(np.square(data.per_draw(h * (scores - value))).sum())) / total


def _widened(value: float, half: float, seen: Weighted) -> tuple[float, float]:
    """The interval with its pseudo rows, and the largest bias that missing support can cause on either side."""
    worst, best = seen.data.reward_range
    pseudo = Z95 * np.sqrt(PSEUDO_ROWS) * 0.5 * (best - worst) / max(seen.ess, 1.0)
    half = float(np.hypot(half, pseudo)) + seen.lost * (best - worst)
    return value - half, value + half


def _estimate(seen: Weighted, value: float, interval: tuple[float, float]) -> Estimate:
    return Estimate(
        value,
        interval,
        len(seen.data),
        seen.ess,
        float(seen.data.share @ seen.weight) / len(seen.data),
        float(seen.weight.max()),
        seen.clipped,
        seen.lost,
        seen.dropped,
    )
