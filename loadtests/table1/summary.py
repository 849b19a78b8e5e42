"""Results of many runs to the numbers of the table: means over seeds with intervals, and paired differences.

Pure; numpy and scipy only. Called by `report`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from loadtests.table1.rows import OURS
from loadtests.table1.tasks import FAMILIES

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds and the half width of its 95 % interval (Student's t); NaN with a single seed."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        width = "" if np.isnan(self.half_width) else f" ± {100 * self.half_width:.1f}"
        return f"{100 * self.mean:.1f}{width}"


@dataclass(frozen=True, slots=True)
class RowSummary:
    """One row of the table.

    Attributes:
        title, policy: of the row.
        benchmarks: mean accuracy per family.
        average: over the families.
        greedy: the same for the likeliest responses.
        difference: average minus our router's, seed by seed; None for our router itself or where it was not run.
        verdicts: share of right verdicts among pairs with exactly one right response and no tie; None for `sft`.
        verdicts_by_family: the same per family.
        calls: RM calls per run.
        calls_per_pair: the same per judged pair.
        seconds: wall time of a run.
        service_seconds: of which waiting for the service.
        audits: that a run has learned from.
    """

    title: str
    policy: str
    benchmarks: Mapping[str, Estimate]
    average: Estimate
    greedy: Estimate
    difference: Estimate | None
    verdicts: Estimate | None
    verdicts_by_family: Mapping[str, float]
    calls: float
    calls_per_pair: float
    seconds: float
    service_seconds: float
    audits: float


def estimate(values: Sequence[float] | NDArray[np.float64]) -> Estimate:
    """Mean with the t interval over seeds.

    >>> str(estimate([0.5, 0.5]))
    '50.0 ± 0.0'
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return Estimate(float(x.mean()), float("nan"))
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1))
    return Estimate(float(x.mean()), t * float(x.std(ddof=1)) / float(np.sqrt(len(x))))


def summarise(results: Sequence[Mapping[str, Any]]) -> list[RowSummary]:
    """One summary per row, in the order of the results."""
    by_row: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        by_row[result["policy"]].append(result)
    ours = {result["seed"]: average(result["accuracy"]) for result in by_row.get(OURS, [])}
    return [_row(runs, ours) for runs in by_row.values()]


def average(accuracy: Mapping[str, float]) -> float:
    """Mean over the families."""
    return float(np.mean([accuracy[family] for family in FAMILIES]))


def right_share(pairs: Sequence[Sequence[Any]]) -> float:
    """Share of right verdicts among the pairs where that can be said; NaN without any."""
    known = [pair[3] for pair in pairs if pair[3] is not None]
    return float(np.mean(known)) if known else float("nan")


def _row(runs: Sequence[Mapping[str, Any]], ours: Mapping[int, float]) -> RowSummary:
    policy = runs[0]["policy"]
    differences = [average(run["accuracy"]) - ours[run["seed"]] for run in runs if run["seed"] in ours]
    judged = [run for run in runs if run["pairs"]]
    return RowSummary(
        title=runs[0]["row"],
        policy=policy,
        benchmarks={family: estimate([run["accuracy"][family] for run in runs]) for family in FAMILIES},
        average=estimate([average(run["accuracy"]) for run in runs]),
        greedy=estimate([average(run["greedy"]) for run in runs]),
        difference=estimate(differences) if differences and policy != OURS else None,
        verdicts=estimate([right_share(run["pairs"]) for run in judged]) if judged else None,
        verdicts_by_family={
            family: right_share([pair for run in judged for pair in run["pairs"] if pair[1] == family])
            for family in FAMILIES
        }
        if judged
        else {},
        calls=float(np.mean([run["calls"] for run in runs])),
        calls_per_pair=float(np.mean([run["calls"] / max(len(run["pairs"]), 1) for run in runs])),
        seconds=float(np.mean([run["seconds"] for run in runs])),
        service_seconds=float(np.mean([run["service_seconds"] for run in runs])),
        audits=float(np.mean([run["audits"] for run in runs])),
    )
