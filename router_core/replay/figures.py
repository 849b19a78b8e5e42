"""The figures of a replay: accuracy, regret, calls, paired differences, subsets; the JSON of `reward-router replay`.

Knows traces and tables. Called by `service.cli.replay` and `loadtests`; in process and over HTTP alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_core.intervals import accuracy_interval, paired_difference
from router_core.replay.table import Table
from router_core.replay.trace import Trace

Array = NDArray[np.float64]

REFERENCES = ("random", "majority")
"""Policies that the others are compared with, pair by pair, where they were replayed; the best single RM always is."""


@dataclass(frozen=True, slots=True)
class PolicySummary:
    """One row of the table.

    Attributes:
        accuracy: mean over seeds and instances.
        ci95: over groups of pairs and over seeds (`intervals.accuracy_interval`).
        calls_per_instance: RM calls.
        price_per_instance: what they cost, in units of the cheapest RM.
        regret: mean per instance of (best arm's correctness − the policy's).
    """

    accuracy: float
    ci95: tuple[float, float]
    calls_per_instance: float
    price_per_instance: float
    regret: float


def summarise(trace: Trace, table: Table) -> PolicySummary:
    """Accuracy with its interval, calls and regret of one policy."""
    correct = trace.correct
    accuracy = float(correct.mean())
    return PolicySummary(
        accuracy,
        accuracy_interval(correct, table.groups),
        trace.calls_per_instance,
        trace.price,
        float(table.oracle.mean()) - accuracy,
    )


def report(traces: Mapping[str, Trace], table: Table) -> dict[str, Any]:
    """The JSON of `reward-router replay`: docs/replay.md has its fields."""
    correct = {name: trace.correct for name, trace in traces.items()}
    return {
        "n": len(table),
        "policies": {name: _row(summarise(trace, table)) for name, trace in traces.items()},
        "oracle": float(table.oracle.mean()),
        "best_single": _best_single(table),
        "best_per_subset": best_per_subset(table),
        "subsets": {subset: _subset(correct, table, rows) for subset, rows in subset_rows(table).items()},
        "paired": paired(correct, table),
        "per_seed": {name: np.nanmean(values, axis=1).tolist() for name, values in correct.items()},
        "last_third": {name: last_third(trace) for name, trace in traces.items()},
        "asked": {name: _shares(trace, table) for name, trace in traces.items() if (trace.asked >= 0).all()},
        "pool": list(table.pool),
        "seeds": list(next(iter(traces.values())).seeds) if traces else [],
    }


def paired(correct: Mapping[str, Array], table: Table) -> dict[str, dict[str, dict[str, Any]]]:
    """Each policy minus each reference, pair by pair, with its interval over groups and seeds.

    The best single RM is chosen on these very pairs, in hindsight; that favours it.

    Args:
        correct: per policy (S, N).

    Returns:
        {policy: {"best_single" | reference: {"difference", "ci95"}}}; a policy is not compared with itself.
    """
    best = int(table.correctness.mean(axis=0).argmax())
    references: dict[str, Array] = {"best_single": np.broadcast_to(table.correctness[:, best], (1, len(table)))}
    references |= {name: correct[name] for name in REFERENCES if name in correct}
    return {
        name: {
            against: _difference(values - reference, table)
            for against, reference in references.items()
            if against != name
        }
        for name, values in correct.items()
    }


def _difference(values: Array, table: Table) -> dict[str, Any]:
    found = paired_difference(values, table.groups)
    return {"difference": found.value, "ci95": list(found.ci95)}


def best_per_subset(table: Table) -> float:
    """Accuracy of the best RM of every subset, chosen in hindsight: what a router of subsets could reach at most."""
    total = sum(float(table.correctness[rows].sum(axis=0).max()) for rows in subset_rows(table).values())
    return total / len(table)


def subset_rows(table: Table) -> dict[str, NDArray[np.int64]]:
    """Indices of the pairs of each subset, in order of first appearance."""
    names = np.array(table.subsets)
    return {name: np.flatnonzero(names == name) for name in dict.fromkeys(table.subsets)}


def last_third(trace: Trace) -> float:
    """Mean accuracy over the last third of each pass: what was reached, rather than what it cost to get there."""
    return float(np.mean([part.correct[-max(len(part.correct) // 3, 1) :].mean() for part in trace.passes]))


def _row(summary: PolicySummary) -> dict[str, Any]:
    return {
        "accuracy": summary.accuracy,
        "ci95": list(summary.ci95),
        "calls_per_instance": summary.calls_per_instance,
        "price_per_instance": summary.price_per_instance,
        "regret": summary.regret,
    }


def _best_single(table: Table) -> dict[str, Any]:
    singles = table.correctness.mean(axis=0)
    best = int(singles.argmax())
    return {"model": table.pool[best], "accuracy": float(singles[best])}


def _subset(correct: Mapping[str, Array], table: Table, rows: NDArray[np.int64]) -> dict[str, Any]:
    part = table.rows(rows)
    return {
        "n": len(part),
        "policies": {
            name: {
                "accuracy": float(values[:, rows].mean()),
                "ci95": list(accuracy_interval(values[:, rows], part.groups)),
            }
            for name, values in correct.items()
        },
        "oracle": float(part.oracle.mean()),
        "best_single": _best_single(part),
    }


def _shares(trace: Trace, table: Table) -> dict[str, float]:
    """Share of the steps at which each RM was asked."""
    asked = np.concatenate([part.asked for part in trace.passes])
    counts = np.bincount(asked, minlength=len(table.pool))
    return {name: float(count / len(asked)) for name, count in zip(table.pool, counts, strict=True)}
