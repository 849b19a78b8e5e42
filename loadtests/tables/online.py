"""Figures of streams: each policy's accuracy, regret, calls and distance to ours; per domain; per ablation.

Knows replayed jobs and arithmetic; replays nothing. Called by the command.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from loadtests.tables.experiments import OURS
from loadtests.tables.offline import minus
from loadtests.tables.work import BEST_HINDSIGHT, DOMAINS_HINDSIGHT, Replayed
from router_core.intervals import accuracy_interval
from router_core.replay import Table, curve
from router_core.replay.curves import Curve
from router_core.replay.figures import last_third

Figures = dict[str, Any]


def stream_figures(replayed: Replayed) -> Figures:
    """One job: `policies` (accuracy, ci95, calls, regret, last_third), `minus` (ours minus it), oracle, sizes."""
    table, traces = replayed.table, replayed.traces
    correct = {name: trace.correct for name, trace in traces.items()}
    calls = {name: trace.calls_per_instance for name, trace in traces.items()}
    found = row_figures(correct, calls, table)
    for name, trace in traces.items():
        found["policies"][name]["last_third"] = last_third(trace)
    lengths = {len(part.order) for part in traces[OURS].passes}
    return found | {"streams": len(traces[OURS].passes) // len(traces[OURS].seeds), "length": sorted(lengths)}


def domain_figures(replayed: Replayed) -> dict[str, Figures]:
    """The same per domain, whose best single RM in hindsight is its own; and under "" for all together.

    The row `DOMAINS_HINDSIGHT` asks each domain's best RM; the best single RM of "" is one for all domains.
    """
    table = replayed.table
    best = np.empty(len(table))
    for rows in (np.array(table.domains) == name for name in set(table.domains)):
        best[rows] = table.correctness[rows, int(table.correctness[rows].mean(axis=0).argmax())]
    correct = {name: trace.correct for name, trace in replayed.traces.items()} | {DOMAINS_HINDSIGHT: best[None]}
    calls = {name: trace.calls_per_instance for name, trace in replayed.traces.items()} | {DOMAINS_HINDSIGHT: 1.0}
    names = np.array(table.domains)
    found = {}
    for domain in dict.fromkeys(table.domains):
        rows = np.flatnonzero(names == domain)
        kept = {name: values[:, rows] for name, values in correct.items()}
        found[domain] = _with_lead(kept, calls, table.rows(rows))
    return {**found, "": _with_lead(correct, calls, table)}


def _with_lead(correct: Mapping[str, Any], calls: Mapping[str, float], table: Table) -> Figures:
    """And `offline_lead`: the offline router minus the best single RM of these very pairs."""
    best = table.correctness[None, :, int(table.correctness.mean(axis=0).argmax())]
    lead = minus({"offline": correct["offline"], "best": best}, table.groups, "offline")["best"]
    return row_figures({**correct, BEST_HINDSIGHT: best}, calls, table) | {"offline_lead": lead}


def row_figures(correct: Mapping[str, Any], calls: Mapping[str, float], table: Table) -> Figures:
    """Figures of rows (S, N) over the table's pairs."""
    oracle = float(table.oracle.mean())
    return {
        "n": len(table),
        "oracle": oracle,
        "policies": {
            name: {
                "accuracy": float(values.mean()),
                "ci95": list(accuracy_interval(values, table.groups)),
                "calls_per_instance": calls[name],
                "regret": oracle - float(values.mean()),
            }
            for name, values in correct.items()
        },
        "minus": minus(correct, table.groups, OURS),
    }


def ablation_figures(replayed: Replayed, default: Replayed) -> Figures:
    """One variant's accuracies and, per policy, the default's minus its own with the interval."""
    found: Figures = {}
    for name in ("offline", OURS):
        values = replayed.traces[name].correct
        rows = {"default": default.traces[name].correct, "variant": values}
        found[name] = {"accuracy": float(values.mean())}
        if replayed is not default:
            found[name] |= {"lost": minus(rows, replayed.table.groups, "default")["variant"]}
    return found


def curves(replayed: Replayed) -> dict[str, Curve]:
    """Every policy's learning curve; the references' are left out but for the best single RM."""
    return {name: curve(trace, replayed.table) for name, trace in replayed.traces.items()}
