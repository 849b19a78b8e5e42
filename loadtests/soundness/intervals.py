"""Intervals of accuracies and of paired differences where there are few groups: how often do they hold the truth?

The population is the recorded pairs of one domain, or of all. Groups are drawn from it with replacement, the intervals
computed, and the population's own figure looked for in them. `percentile` draws groups again with replacement (2,000
replicates) and takes quantiles; `normal` is the mean plus and minus 1.96 deviations between groups: what these figures
were before. Seeds and refitting are not in it: what varies is the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.soundness.report import Options, Report
from loadtests.tables.experiments import K4
from router_core.dataset import load_pairs, pool_matrix
from router_core.intervals import Z95, accuracy_interval, clustered_variance, group_index, paired_difference

Array = NDArray[np.float64]
Bounds = tuple[float, float]
Method = Callable[[Array, Sequence[str], np.random.Generator], Bounds]

GROUPS = (33, 100)
SAMPLES = 400
REPLICATES = 2000


def intervals(options: Options) -> Report:
    """Coverage and mean width of each interval per domain, figure and number of groups."""
    samples, pairs = options.seeds or SAMPLES, load_pairs(options.data)
    correctness = pool_matrix(pairs, K4)
    domains = np.array([pair.domain for pair in pairs])
    figures: dict[str, Any] = {}
    for domain in [*dict.fromkeys(domains.tolist()), "all"]:
        rows = np.flatnonzero((domains == domain) | (domain == "all"))
        groups = group_index([pairs[i].group for i in rows])
        best, second, *_ = np.argsort(-correctness[rows].mean(axis=0), kind="stable").tolist()
        right = correctness[rows, best]
        values = {"accuracy of the best RM": right, "best RM − second": right - correctness[rows, second]}
        figures[domain] = {
            name: {str(n): _coverage(found, groups, n, samples) for n in GROUPS} for name, found in values.items()
        }
    shown = [
        (domain, figure, n, f"{found['truth']:.3f}", *(_cell(found[name]) for name in ("now", "normal", "percentile")))
        for domain, by_figure in figures.items()
        for figure, by_size in by_figure.items()
        for n, found in by_size.items()
    ]
    return Report(
        title=f"intervals with few groups, {samples} samples each",
        columns=("drawn from", "figure", "groups", "truth", "now", "normal", "percentile"),
        rows=tuple(shown),
        notes=("Coverage of the 95 % interval (mean width). Promise: about .95.",),
        figures=figures,
    )


def _cell(found: Mapping[str, float]) -> str:
    return f"{found['coverage']:.3f} ({found['width']:.3f})"


def _coverage(values: Array, groups: NDArray[np.int64], size: int, samples: int) -> dict[str, Any]:
    """Intervals of values (N,) with their groups, drawn `size` groups at a time."""
    members = [np.flatnonzero(groups == group) for group in range(int(groups.max()) + 1)]
    truth = float(values.mean())
    methods: dict[str, Method] = {
        "now": _accuracy if values.min() >= 0 else _difference,
        "normal": _normal,
        "percentile": _percentile,
    }
    hits: dict[str, list[tuple[bool, float]]] = {name: [] for name in methods}
    for seed in range(samples):
        rng = np.random.default_rng(seed)
        drawn = [members[i] for i in rng.integers(len(members), size=size)]
        names = [f"group {number}" for number, rows in enumerate(drawn) for _ in rows]
        sample = values[np.concatenate(drawn)]
        for name, method in methods.items():
            low, high = method(sample, names, rng)
            hits[name].append((low <= truth <= high, high - low))
    return {"truth": truth} | {
        name: dict(zip(("coverage", "width"), np.mean(rows, axis=0).tolist(), strict=True))
        for name, rows in hits.items()
    }


def _accuracy(values: Array, groups: Sequence[str], _: np.random.Generator) -> Bounds:
    return accuracy_interval(values[None], groups)


def _difference(values: Array, groups: Sequence[str], _: np.random.Generator) -> Bounds:
    return paired_difference(values, groups).ci95


def _normal(values: Array, groups: Sequence[str], _: np.random.Generator) -> Bounds:
    half = Z95 * clustered_variance(values, groups) ** 0.5
    return float(values.mean()) - half, float(values.mean()) + half


def _percentile(values: Array, groups: Sequence[str], rng: np.random.Generator) -> Bounds:
    index = group_index(groups)
    counts, sums = np.bincount(index).astype(np.float64), np.bincount(index, values)
    drawn = rng.multinomial(len(counts), np.full(len(counts), 1.0 / len(counts)), size=REPLICATES)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), (0.025, 0.975))
    return float(low), float(high)
