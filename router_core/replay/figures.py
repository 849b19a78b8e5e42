"""The figures of a replay: accuracy, regret, calls, paired differences, subsets; the JSON of `reward-router replay`.

Knows traces and tables. Called by `service.cli.replay` and `loadtests`; in process and over HTTP alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        regret: mean per instance of (best arm's correctness − the policy's); where it abstains, of an even guess.
        coverage: share of the instances at which it gives a verdict; the accuracy is over these.
    """

    accuracy: float
    ci95: tuple[float, float]
    calls_per_instance: float
    price_per_instance: float
    regret: float
    coverage: float = 1.0


def summarise(trace: Trace, table: Table) -> PolicySummary:
    """Accuracy with its interval, calls and regret of one policy."""
    accuracy = accuracy_of(trace.correct, table.groups)
    return PolicySummary(
        accuracy["accuracy"],
        tuple(accuracy["ci95"]),
        trace.calls_per_instance,
        trace.price,
        regret_of(trace.correct, table),
        accuracy["coverage"],
    )


def accuracy_of(values: Array, groups: Sequence[str]) -> dict[str, Any]:
    """`accuracy` and `ci95` over the pairs with a verdict, and `coverage`, the share of these; NaN where there is none.

    Args:
        values: (S, N) in [0, 1], NaN where there is no verdict.
        groups: N names.
    """
    known = np.flatnonzero(~np.isnan(values).any(axis=0))
    coverage = len(known) / values.shape[1]
    if not len(known):
        return {"accuracy": float("nan"), "ci95": [0.0, 1.0], "coverage": coverage}
    told = values[:, known]
    ci95 = accuracy_interval(told, [groups[i] for i in known.tolist()])
    return {"accuracy": float(told.mean()), "ci95": list(ci95), "coverage": coverage}


def regret_of(values: Array, table: Table) -> float:
    """Mean of what the best arm of each pair earns less the policy's (S, N), which guesses where it abstains."""
    return float(table.oracle.mean() - np.where(np.isnan(values), 0.5, values).mean())


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

    The best single RM is chosen on these very pairs, in hindsight; that favours it. Pairs on which one of the two
    abstains are left out.

    Args:
        correct: per policy (S, N).

    Returns:
        {policy: {"best_single" | reference: {"difference", "ci95"}}}; a policy is not compared with itself.
    """
    best = int(table.singles.argmax())
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
    known = np.flatnonzero(~np.isnan(values).any(axis=0))
    if not len(known):
        return {"difference": 0.0, "ci95": [-1.0, 1.0]}
    found = paired_difference(values[:, known], [table.groups[i] for i in known.tolist()])
    return {"difference": found.value, "ci95": list(found.ci95)}


def best_per_subset(table: Table) -> float:
    """Accuracy of the best RM of every subset, chosen in hindsight: what a router of subsets could reach at most."""
    total = sum(len(rows) * float(table.rows(rows).singles.max()) for rows in subset_rows(table).values())
    return total / len(table)


def subset_rows(table: Table) -> dict[str, NDArray[np.int64]]:
    """Indices of the pairs of each subset, in order of first appearance."""
    names = np.array(table.subsets)
    return {name: np.flatnonzero(names == name) for name in dict.fromkeys(table.subsets)}


def last_third(trace: Trace) -> float:
    """Mean accuracy over the last third of each pass: what was reached, rather than what it cost to get there."""
    tails = [part.correct[-max(len(part.correct) // 3, 1) :] for part in trace.passes]
    known = [tail[~np.isnan(tail)] for tail in tails]
    return float(np.mean([tail.mean() for tail in known if len(tail)])) if any(map(len, known)) else float("nan")


def _row(summary: PolicySummary) -> dict[str, Any]:
    return {
        "accuracy": summary.accuracy,
        "ci95": list(summary.ci95),
        "calls_per_instance": summary.calls_per_instance,
        "price_per_instance": summary.price_per_instance,
        "regret": summary.regret,
        "coverage": summary.coverage,
    }


def _best_single(table: Table) -> dict[str, Any]:
    best = int(table.singles.argmax())
    return {"model": table.pool[best], "accuracy": float(table.singles[best])}


def _subset(correct: Mapping[str, Array], table: Table, rows: NDArray[np.int64]) -> dict[str, Any]:
    part = table.rows(rows)
    return {
        "n": len(part),
        "policies": {name: accuracy_of(values[:, rows], part.groups) for name, values in correct.items()},
        "oracle": float(part.oracle.mean()),
        "best_single": _best_single(part),
    }


def _shares(trace: Trace, table: Table) -> dict[str, float]:
    """Share of the steps at which each RM was asked."""
    asked = np.concatenate([part.asked for part in trace.passes])
    counts = np.bincount(asked, minlength=len(table.pool))
    return {name: float(count / len(asked)) for name, count in zip(table.pool, counts, strict=True)}
