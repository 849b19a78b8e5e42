"""`reward-router ope`: what would other policies have earned on an exported log?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from router_core.combine import CASCADE, STACKED, budget_of
from router_core.policies import make_policy
from service.cli.data import parse_pool
from service.cli.fitting import fitting_table
from service.cli.json_option import JsonOut, publish
from service.lab.estimates import ESTIMATORS, evaluate_log
from service.lab.eventlog.load import load_log
from service.lab.eventlog.targets import SOFTMAX, load_checkpoint, temperature_of


def ope(
    log: Annotated[Path, typer.Argument(help="File that `reward-router export` has written.")],
    policies: Annotated[
        str,
        typer.Option(
            help="Comma-separated: `singles`, single:MODEL, random, offline, softmax:TEMPERATURE, bayesian (what was "
            "learned from the beginning of the log, evaluated on the rest), stacked, cascade:B."
        ),
    ] = "singles,random",
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="The checkpoint that the run was served with; offline, softmax, stacked and cascades need it."
        ),
    ] = None,
    clip: Annotated[
        float | None, typer.Option(min=0, help="Largest importance weight; less variance, some bias.")
    ] = None,
    learn_share: Annotated[
        float, typer.Option(min=0.05, max=0.95, help="For `bayesian`: share of the log that it learns from.")
    ] = 0.5,
    json_out: JsonOut = None,
) -> None:
    """Off-policy evaluation: mean reward that each policy would have had on the logged instances.

    IPS, SNIPS and doubly robust with 95% intervals, which of them to use, and a safe interval. A policy that
    the log says too little about gets a reason, never a number. docs/off-policy.md explains all of it.
    """
    events = load_log(log)
    names = _names(policies, events.header.pool)
    figures = evaluate_log(
        events, names, load_checkpoint(checkpoint, events.header), clip=clip, learn_share=learn_share
    )
    publish(figures, json_out, lambda: print_figures(figures))


def print_figures(figures: dict[str, Any], console: Console | None = None) -> None:
    """The table that people read."""
    console = console or Console()
    logged = figures["logged"]
    rows: list[Sequence[str] | None] = [
        ("as logged", "", _cell(logged), "", "", "", "", "", "", str(figures["n"])),
        None,
    ]
    for name, row in figures["policies"].items():
        safe = "–" if row["safe95"] is None else _interval(row["safe95"])
        weights = ("–", "–") if row["snips"] is None else _weights(row["snips"])
        calls = "–" if row["calls"] is None else f"{row['calls']:.2f}"
        cells = [_cell(row[how]) for how in ESTIMATORS]
        use = row["recommended"]
        value = "–" if use is None else _cell(row[use])
        rows.append((name, use or "none", value, calls, *cells, safe, *weights))
    columns = ("policy", "use", "value", "calls", *ESTIMATORS, "safe interval", "mean weight", "eff. rows")
    title = f"{figures['n']} logged decisions of run {figures['run']}: mean reward by `use`, 95% interval"
    drop = ("calls", *ESTIMATORS, "safe interval", "eff. rows", "mean weight")
    console.print(fitting_table(console, columns, rows, drop=drop, title=title))
    for note in _notes(figures):
        console.print(note, highlight=False, soft_wrap=True)
    for line in _remarks(figures["policies"]):
        console.print(line, highlight=False, soft_wrap=True)


def _remarks(policies: Mapping[str, Any]) -> list[str]:
    """What to know about each policy; a remark that holds for several is made once and names them."""
    about: dict[str, list[str]] = {}
    for name, row in policies.items():
        told = [f"use {row['recommended']}: {row['why']}"] if row["recommended"] else []
        for remark in [*told, *([row["problem"]] if row["problem"] else []), *row["warnings"]]:
            about.setdefault(remark, []).append(name)
    whole = len(policies)
    return [
        f"{'every policy' if len(names) == whole > 1 else ', '.join(names)}: {remark}"
        for remark, names in about.items()
    ]


def _notes(figures: dict[str, Any]) -> list[str]:
    """What to know about the log, whatever the policy."""
    notes = {
        "sharing_a_draw": "share the draw of an earlier one (sticky): the intervals count the rows of one draw as one",
        "after_a_failure": "asked an RM first that gave no reward: the values are of asking an RM first and, where it "
        "fails, the next-best draws of the logged policy",
    }
    return [f"{figures[key]} rows {note}" for key, note in notes.items() if figures[key]]


def _names(text: str, pool: Sequence[str]) -> list[str]:
    names: list[str] = []
    for name in parse_pool(text):
        names.extend([f"single:{model}" for model in pool] if name == "singles" else [name])
    for name in names:
        if name.startswith(SOFTMAX):
            temperature_of(name)
        elif name.startswith(CASCADE):
            budget_of(name)
        elif name == STACKED:
            continue
        else:
            make_policy(name, pool)
    return names


def _weights(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['mean_weight']:.2f}", f"{row['ess']:.0f}"


def _cell(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['value']:.3f} ({_interval(row['ci95'])})"


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.3f} – {bounds[1]:.3f}"
