"""The table that `reward-router evaluate` prints, from its JSON document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from service.cli.prices import cost_of

UNBOUNDED = 10_000
"""Columns of a console on which everything fits."""


def print_table(document: Mapping[str, Any], console: Console) -> None:
    """The table that people read: subsets as columns where the console is wide enough, else below as rows."""
    subsets = document["subsets"] if len(document["subsets"]) > 1 else {}
    wide = _policy_table(document, subsets)
    unbounded = console.options.update(width=UNBOUNDED, max_width=UNBOUNDED)
    if console.measure(wide, options=unbounded).maximum <= console.width:
        console.print(wide)
    else:
        console.print(_policy_table(document, {}))
        if subsets:
            console.print(_subset_table(document))
    if document["calibration"]:
        console.print(_calibration_table(document["calibration"]))


def _policy_table(document: Mapping[str, Any], subsets: Mapping[str, Any]) -> Table:
    """One policy a row; its accuracy in all and in each of the subsets."""
    table = Table(title=_title(document))
    table.add_column("policy", overflow="fold", min_width=14)
    for column in ("calls", "accuracy", "95% interval", "over best single", *subsets):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in document["policies"].items():
        if name in ("random", "offline"):
            table.add_section()
        table.add_row(*_cells(name, row, document["paired"][name]["best_single"]), *_subset_cells(subsets, name))
    table.add_section()
    best = [f"{part['best_single']['accuracy']:.3f}" for part in subsets.values()]
    oracles = [f"{part['oracle']:.3f}" for part in subsets.values()]
    table.add_row("best RM per subset, in hindsight", "1", f"{document['best_per_subset']:.3f}", "", "", *best)
    table.add_row("oracle", "", f"{document['oracle']:.3f}", "", "", *oracles)
    return table


def _title(document: Mapping[str, Any]) -> str:
    learned = {
        "held-out": "judged on other pairs than learned from",
        "cross-validation": f"{document.get('folds')} grouped folds",
        "checkpoint": "a checkpoint judged",
    }[document["scenario"]]
    return f"{document['n']} pairs, {len(document['pool'])} RMs, {learned}"


def _cells(name: str, row: Mapping[str, Any], over_best: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = row["ci95"]
    below, above = over_best["ci95"]
    over = "" if below == above == 0 else f"{over_best['difference']:+.3f} ({below:+.3f} … {above:+.3f})"
    shown = f"[bold]{name}[/]" if name == "offline" else name
    return shown, cost_of(row), f"{row['accuracy']:.3f}", f"{low:.3f} – {high:.3f}", over


def _subset_cells(subsets: Mapping[str, Any], name: str) -> list[str]:
    return [f"{part['policies'][name]['accuracy']:.3f}" for part in subsets.values()]


def _subset_table(document: Mapping[str, Any]) -> Table:
    """Narrow consoles: one subset a row, the rows that matter most as columns."""
    shown = [name for name in ("majority", "uwo", "offline") if name in document["policies"]]
    table = Table(title="per subset")
    table.add_column("subset")
    for column in ("n", "best RM", *shown, "oracle"):
        table.add_column(column, justify="right")
    for name, part in document["subsets"].items():
        accuracies = [f"{part['policies'][policy]['accuracy']:.3f}" for policy in shown]
        best = f"{part['best_single']['accuracy']:.3f}"
        table.add_row(name, str(part["n"]), best, *accuracies, f"{part['oracle']:.3f}")
    return table


def _calibration_table(calibration: Mapping[str, Any]) -> Table:
    """One domain a row: what `offline` promised for the RM that it asked, what that RM earned, and the fit of all."""
    table = Table(title="calibration of `offline`, on pairs that it has not seen")
    table.add_column("domain")
    for column in ("n", "said", "right", "bias per RM", "log-likelihood", "ECE"):
        table.add_column(column, justify="right")
    for name, part in calibration.items():
        figures = (part["said"], part["right"], part["bias"], -part["negative_log_likelihood"])
        shown = [f"{value:.3f}" for value in (*figures, part["expected_calibration_error"])]
        table.add_row(name or "all", str(part["n"]), *shown)
    return table
