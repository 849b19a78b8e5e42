"""The table that `reward-router evaluate` prints, from its JSON document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from service.cli.fitting import fits, fitting_table
from service.cli.prices import cost_of

ANSWERS: Final = "answers"
"""Column with the share of the pairs on which a policy gives a verdict; its accuracy is over these."""


def print_table(document: Mapping[str, Any], console: Console) -> None:
    """The table that people read: subsets as columns where the console is wide enough, else below as rows."""
    subsets = document["subsets"] if len(document["subsets"]) > 1 else {}
    wide = _policy_table(document, subsets, console, drop=())
    if fits(wide, console):
        console.print(wide)
    else:
        console.print(_policy_table(document, {}, console, drop=("over best single", "95% interval")))
        if subsets:
            console.print(_subset_table(document, console))
    if document["calibration"]:
        console.print(_calibration_table(document["calibration"], console))


def _policy_table(
    document: Mapping[str, Any], subsets: Mapping[str, Any], console: Console, *, drop: Sequence[str]
) -> Table:
    """One policy a row; its accuracy in all and in each of the subsets."""
    rows: list[Sequence[str] | None] = []
    for name, row in document["policies"].items():
        if name in ("random", "offline"):
            rows.append(None)
        cells = _cells(name, row, document["paired"][name]["best_single"])
        rows.append((*cells, f"{row['coverage']:.0%}", *_subset_cells(subsets, name)))
    best = [f"{part['best_single']['accuracy']:.3f}" for part in subsets.values()]
    oracles = [f"{part['oracle']:.3f}" for part in subsets.values()]
    rows += [
        None,
        ("best RM per subset, in hindsight", "1", f"{document['best_per_subset']:.3f}", "", "", "", *best),
        ("oracle", "", f"{document['oracle']:.3f}", "", "", "", *oracles),
    ]
    columns = ("policy", "calls", "accuracy", "95% interval", "over best single", ANSWERS, *subsets)
    rows = without_full_coverage(columns, rows, document["policies"])
    columns = tuple(column for column in columns if column != ANSWERS or not covers_all(document["policies"]))
    return fitting_table(console, columns, rows, drop=drop, title=_title(document))


def covers_all(policies: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return True if no policy abstains anywhere."""
    return all(row["coverage"] == 1.0 for row in policies.values())


def without_full_coverage(
    columns: Sequence[str], rows: Sequence[Sequence[str] | None], policies: Mapping[str, Mapping[str, Any]]
) -> list[Sequence[str] | None]:
    """Return the rows, without the column of coverages where no policy abstains."""
    if not covers_all(policies):
        return list(rows)
    at = columns.index(ANSWERS)
    return [row if row is None else [*row[:at], *row[at + 1 :]] for row in rows]


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


def _subset_table(document: Mapping[str, Any], console: Console) -> Table:
    """Narrow consoles: one subset a row, the rows that matter most as columns."""
    shown = [name for name in ("majority", "uwo", "offline") if name in document["policies"]]
    rows = []
    for name, part in document["subsets"].items():
        accuracies = [f"{part['policies'][policy]['accuracy']:.3f}" for policy in shown]
        best = f"{part['best_single']['accuracy']:.3f}"
        rows.append((name, str(part["n"]), best, *accuracies, f"{part['oracle']:.3f}"))
    columns = ("subset", "n", "best RM", *shown, "oracle")
    return fitting_table(console, columns, rows, drop=("oracle", "uwo", "n"), title="per subset")


def _calibration_table(calibration: Mapping[str, Any], console: Console) -> Table:
    """One domain a row: what `offline` promised for the RM that it asked, what that RM earned, and the fit of all."""
    rows = []
    for name, part in calibration.items():
        figures = (part["said"], part["right"], part["bias"], -part["negative_log_likelihood"])
        shown = [f"{value:.3f}" for value in (*figures, part["expected_calibration_error"])]
        rows.append((name or "all", str(part["n"]), *shown))
    return fitting_table(
        console,
        ("domain", "n", "said", "right", "bias per RM", "log-likelihood", "ECE"),
        rows,
        drop=("log-likelihood", "ECE", "bias per RM"),
        title="calibration of `offline`, on pairs that it has not seen",
    )
