"""Intervals of means over recorded pairs: groups of pairs that belong together, and seeds, both vary.

Pure arithmetic on arrays; knows nothing of policies or files. Called by `replay`, `offline.evaluate` and `loadtests`.

Pairs of one group (one task in six languages, one prompt) are right or wrong together, so groups, not pairs, are what
is drawn from the population; and a learning policy has its luck with the order and the draws, so seeds vary too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

Z95 = 1.959964
"""0.975-quantile of the standard normal."""

BOOTSTRAPS = 2000
"""Enough that the ends of an interval move by about 2 % of its width from one generator to another."""

_CELLS = 1_000_000
"""Replicates times groups that are held in memory at once: 8 MB."""

_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""0.975-quantiles of Student's t with 1 ... 30 degrees of freedom."""


def t95(degrees: int) -> float:
    """0.975-quantile of Student's t; the normal's beyond 30 degrees of freedom.

    >>> t95(4), t95(1000)
    (2.776, 1.959964)
    """
    return _T95[degrees - 1] if degrees <= len(_T95) else Z95


def group_index(groups: Sequence[str]) -> NDArray[np.int64]:
    """The number of each pair's group, (N,) int64 from 0; a pair without a group ("") is a group of its own.

    >>> group_index(["x", "y", "x", ""]).tolist()
    [0, 1, 0, 2]
    """
    numbers: dict[object, int] = {}
    keys = (group or i for i, group in enumerate(groups))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def clustered_variance(values: Array, groups: Sequence[str]) -> float:
    """Variance of the mean of N values whose groups are independent: G/(G − 1) · Σ_g (Σ_{i∈g} (v_i − v̄))² / N².

    With groups of one pair each this is the usual s²/N. (Liang & Zeger 1986, the intercept-only case.)

    Args:
        values: (N,) float64.
        groups: N names; "" is a group of its own.

    Returns:
        The variance; 0 for a single group, which says nothing of the others.
    """
    index = group_index(groups)
    sums = np.bincount(index, values - values.mean())
    n_groups = len(sums)
    if n_groups < 2:
        return 0.0
    return float(n_groups / (n_groups - 1) * np.square(sums).sum() / len(values) ** 2)


def mean_interval(values: Array, groups: Sequence[str]) -> tuple[float, float]:
    """95 % normal interval of an accuracy over groups and seeds, inside [0, 1].

    Variance = that of the per-pair means over groups (`clustered_variance`) + that of the per-seed means over seeds /
    S. With v_si = m + a_i + b_s + e_si the first estimates (σ_a² + σ_e²/S)/N and the second σ_b²/S + σ_e²/(NS): the sum
    counts the small term σ_e²/(NS) twice, which errs on the wide side.

    Args:
        values: (S, N): what seed s earned on pair i.
        groups: N names; "" is a group of its own.
    """
    mean = float(values.mean())
    variance = clustered_variance(values.mean(axis=0), groups)
    if len(values) > 1:
        variance += float(values.mean(axis=1).var(ddof=1)) / len(values)
    half = Z95 * variance**0.5
    return max(mean - half, 0.0), min(mean + half, 1.0)


def grouped_interval(
    difference: Array, groups: Sequence[str], rng: np.random.Generator, bootstraps: int = BOOTSTRAPS
) -> tuple[float, float]:
    """95 % percentile interval of a mean: groups, and seeds if there are several, drawn with replacement.

    For a paired difference of two policies give the differences pair by pair.

    Args:
        difference: (N,), or (S, N) for S seeds.
        groups: N names; "" is a group of its own.
        rng: decides what is drawn.
        bootstraps: number of replicates.
    """
    rows = np.atleast_2d(difference)
    index = group_index(groups)
    counts = np.bincount(index).astype(np.float64)
    sums = np.stack([np.bincount(index, row) for row in rows]).astype(np.float64)
    at_once = max(_CELLS // len(counts), 1)
    means = np.concatenate(
        [_resampled(sums, counts, min(at_once, bootstraps - begin), rng) for begin in range(0, bootstraps, at_once)]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _resampled(sums: Array, counts: Array, replicates: int, rng: np.random.Generator) -> Array:
    """Means of replicates: sums (S, G) and counts (G,) of the groups -> (replicates,)."""
    groups = _drawn_with_replacement(len(counts), replicates, rng)
    seeds = _drawn_with_replacement(len(sums), replicates, rng) / len(sums)
    means: Array = ((groups @ sums.T) * seeds).sum(axis=1) / (groups @ counts)
    return means


def _drawn_with_replacement(n: int, replicates: int, rng: np.random.Generator) -> Array:
    """How often each of n things is drawn when n are drawn: (replicates, n) float64, rows sum to n."""
    cells = rng.integers(n, size=(replicates, n)) + n * np.arange(replicates)[:, None]
    return np.bincount(cells.ravel(), minlength=replicates * n).reshape(replicates, n).astype(np.float64)
