"""An interval that needs no limit theorem: valid for every number of rows, however the log was collected.

For rewards in [0, 1] only. Wide, and honest where the other intervals are not: few rows of the target's own, weights
that one row decides, a target that the log hardly supports. Called by `service.cli.ope` and `loadtests.ope_coverage`.
"""

from __future__ import annotations

import math

import numpy as np

from router_core.errors import FeedbackError
from router_core.ope.data import Array, LoggedData
from router_core.ope.weights import PROPENSITY_FLOOR, weigh

BISECTIONS = 30
"""Halvings of [0, 1]: the bounds are exact to 1e-9."""

STAKE = 0.75
"""Largest share of the capital that one row may cost."""


def safe_interval(
    data: LoggedData, pi: Array, *, level: float = 0.95, floor: float = PROPENSITY_FLOOR
) -> tuple[float, float]:
    """Betting bounds on a policy's value from importance-weighted rewards (Waudby-Smith et al. 2022, arXiv 2210.10768).

    ξ_t = Σ_a w_ta r_ta is at least 0 and, given the past, has mean ν (the value) or less where support is missing. A
    gambler who bets predictable λ_t ≥ 0 on ξ_t > ν has capital Π (1 + λ_t (ξ_t − ν)), a supermartingale, which by
    Ville's inequality ever exceeds 2/α with probability α/2 at most: a ν at which it does is too small. The upper bound
    is the same for 1 − r. No bound on the weights is needed, and missing support only makes the interval wider.

    Args:
        data: the log, rewards in [0, 1].
        pi: (N, K), the target's probabilities.
        level: 1 − α.
        floor: propensities below it get weight zero, which is safe.

    Returns:
        (low, high) inside [0, 1].

    Raises:
        FeedbackError: a reward outside [0, 1].
        NoSupportError: no row at all.
    """
    if not data.unit_rewards:
        raise FeedbackError("the safe interval needs rewards in [0, 1]: this log has others (prior form `paper`)")
    seen = weigh(data, pi, floor=floor, max_lost=1.0)
    threshold = math.log(2.0 / (1.0 - level))
    low = _lower_bound(seen.scored(seen.data.rewards), threshold)
    return low, 1.0 - _lower_bound(seen.scored(1.0 - seen.data.rewards), threshold)


def _lower_bound(xi: Array, threshold: float) -> float:
    """Smallest mean that the bets on ξ do not refute. Capital falls with ν, so it is found by halving."""
    bets = _bets(xi, threshold)
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        nu = 0.5 * (low + high)
        capital = np.cumsum(np.log1p(np.minimum(bets, STAKE / nu) * (xi - nu)))
        if float(capital.max()) >= threshold:
            low = nu
        else:
            high = nu
    return low


def _bets(xi: Array, threshold: float) -> Array:
    """λ_t = √(2 threshold/(n v_t)), v_t the variance of ξ before t with a prior row of 1/4: predictable."""
    n = len(xi)
    t = np.arange(1, n + 1)
    mean = (0.5 + np.cumsum(xi)) / (t + 1)
    variance = (0.25 + np.cumsum(np.square(xi - mean))) / (t + 1)
    before = np.concatenate([[0.25], variance[:-1]])
    bets: Array = np.sqrt(2.0 * threshold / (n * before))
    return bets
