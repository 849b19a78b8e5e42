"""Intervals of means over recorded pairs: groups of pairs that belong together, and seeds, both vary.

Pure arithmetic on arrays; knows nothing of policies or files. Called by `replay`, `offline` and `loadtests`.

Pairs of one group (one task in six languages, one prompt) are right or wrong together, so groups, not pairs, are what
is drawn from the population; and a learning policy has its luck with the order and the draws, so seeds vary too.
`python -m loadtests.soundness intervals` measures how often these intervals hold the truth (docs/soundness.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

Z95 = 1.959963984540054
"""0.975-quantile of the standard normal."""

PSEUDO_PAIRS = 2.0
"""Pairs that the interval of a difference counts besides the real ones, one won and one lost. Where few pairs differ,
or none, the variance between groups says too little; Bonett & Price (2012) add two for paired proportions."""

_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""0.975-quantiles of Student's t with 1 ... 30 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean paired difference: its value, the standard deviation of that, and the degrees of freedom of that."""

    value: float
    deviation: float
    degrees: float

    @property
    def ci95(self) -> tuple[float, float]:
        """Student's 95 % interval."""
        half = t95(self.degrees) * self.deviation
        return self.value - half, self.value + half


def t95(degrees: float) -> float:
    """0.975-quantile of Student's t, at least one degree of freedom; between the tabulated ones linear in 1/degrees.

    >>> t95(4), round(t95(1e9), 4), round(t95(60), 3)
    (2.776, 1.96, 2.001)
    """
    inverse = 1.0 / np.arange(len(_T95), 0, -1)
    return float(np.interp(1.0 / max(degrees, 1.0), [0.0, *inverse], [Z95, *reversed(_T95)]))


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


def effective_groups(groups: Sequence[str]) -> float:
    """N² / Σ_g n_g²: the number of groups, fewer where some are much larger than others (Carter et al. 2017).

    >>> effective_groups(["x", "x", "y", "y"]), effective_groups(["x", "x", "x", "y"])
    (2.0, 1.6)
    """
    sizes = np.bincount(group_index(groups)).astype(np.float64)
    return float(sizes.sum() ** 2 / np.square(sizes).sum())


def mean_spread(values: Array, groups: Sequence[str]) -> tuple[float, float]:
    """Variance of a mean over groups and seeds, and its degrees of freedom.

    Variance = that of the per-pair means over groups (`clustered_variance`) + that of the per-seed means over seeds /
    S. With v_si = m + a_i + b_s + e_si the first estimates (σ_a² + σ_e²/S)/N and the second σ_b²/S + σ_e²/(NS): the sum
    counts the small term σ_e²/(NS) twice, which errs on the wide side. Degrees of freedom: effective groups − 1, and
    S − 1, combined as Welch and Satterthwaite do.

    Args:
        values: (S, N): what seed s earned on pair i.
        groups: N names; "" is a group of its own.
    """
    between = clustered_variance(values.mean(axis=0), groups)
    degrees = max(effective_groups(groups) - 1.0, 1.0)
    if len(values) < 2:
        return between, degrees
    luck = float(values.mean(axis=1).var(ddof=1)) / len(values)
    if not between + luck:
        return 0.0, degrees
    return between + luck, (between + luck) ** 2 / (between**2 / degrees + luck**2 / (len(values) - 1))


def accuracy_interval(values: Array, groups: Sequence[str]) -> tuple[float, float]:
    """95 % interval of an accuracy, inside [0, 1]: Wilson's, at the effective number of pairs and Student's quantile.

    The effective number is n* = p(1 − p)/V, at most N; V and the degrees of freedom are those of `mean_spread`. Where
    all pairs are right, or all wrong, V says nothing, and n* is the effective number of groups. (Korn & Graubard 1998,
    for the idea.)

    Args:
        values: (S, N) in [0, 1], what seed s earned on pair i.
        groups: N names; "" is a group of its own.

    >>> values = np.array([[1.0, 1.0, 0.0, 0.0]])
    >>> independent, grouped = (accuracy_interval(values, names) for names in (["", "", "", ""], ["x", "x", "y", "y"]))
    >>> independent[0] > grouped[0]
    True
    """
    p, n = float(values.mean()), float(values.shape[1])
    variance, degrees = mean_spread(values, groups)
    effective = min(n, p * (1 - p) / variance) if variance > 0 else n
    if not 0 < p < 1:
        effective = effective_groups(groups)
    return wilson_bounds(p, effective, t95(degrees))


def wilson_bounds(p: float, n: float, quantile: float = Z95) -> tuple[float, float]:
    """Wilson's interval of a proportion: (p + q²/2n ± q sqrt(p(1−p)/n + q²/4n²)) / (1 + q²/n), inside [0, 1]; n > 0.

    >>> [round(bound, 3) for bound in wilson_bounds(0.8, 10)]
    [0.49, 0.943]
    """
    square = quantile**2
    centre = p + square / (2 * n)
    half = quantile * (p * (1 - p) / n + square / (4 * n * n)) ** 0.5
    return max(0.0, (centre - half) / (1 + square / n)), min(1.0, (centre + half) / (1 + square / n))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm 1979): below .05, a contrast holds at .05 for all of them together.

    The i-th smallest of m becomes the largest of (m − j + 1) · p_(j) over j <= i, at most 1.

    >>> [round(p, 3) for p in holm([0.04, 0.01, 0.5])]
    [0.08, 0.03, 0.5]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def paired_difference(values: Array, groups: Sequence[str]) -> Difference:
    """Mean of paired differences over groups and seeds; its variance is that of `mean_spread`, with `PSEUDO_PAIRS`.

    Args:
        values: (N,), or (S, N) for S seeds: one policy minus the other, in [−1, 1].
        groups: N names; "" is a group of its own.
    """
    rows = np.atleast_2d(values)
    variance, degrees = mean_spread(rows, groups)
    pseudo = PSEUDO_PAIRS / (rows.shape[1] + PSEUDO_PAIRS) ** 2
    return Difference(float(rows.mean()), (variance + pseudo) ** 0.5, degrees)
