"""What `reward-router replay` prints and writes. Called by `service.cli.replay`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from router_core.records import Signal
from router_core.replay import Curve, Scenario
from service.cli.evaluate_output import ANSWERS, covers_all, without_full_coverage
from service.cli.fitting import fitting_table
from service.cli.prices import cost_of
from service.lab.replaying.parts import Options

_WIDTH = 120
"""Columns of a table that is written to a file or a pipe."""


def describe(options: Options, scenario: Scenario, signal: Signal) -> dict[str, Any]:
    """The scenario as JSON: enough to run it again."""
    shift = options.shift
    loss = scenario.loss
    return {
        "folds": options.folds,
        "shift": None
        if shift is None
        else {"domain": shift.word, "stream_share": shift.stream_share, "offline_share": shift.offline_share},
        "offline_domains": list(options.offline_domains),
        "stream_domains": list(options.stream_domains),
        "drift": scenario.drift,
        "repeat": scenario.repeat,
        "delay": str(scenario.delay),
        "missing": scenario.missing,
        "batch": scenario.batch,
        "audits": None if scenario.audits is None else asdict(scenario.audits),
        "simulated_loss": None
        if signal is not Signal.LOSS
        else {
            "separation": loss.separation,
            "beta": loss.beta,
            "spread": loss.spread,
            "growth": loss.growth,
        },
    }


def gaps_sentence(total: int, complete: int, gaps: Mapping[str, int]) -> str:
    """What is said about pairs that cannot be streamed."""
    listed = ", ".join(f"{name} ({count})" for name, count in gaps.items())
    return f"{total - complete} of {total} pairs are not streamed: an RM of the pool was not asked about them: {listed}"


def curves_json(curves: Mapping[str, Curve]) -> dict[str, Any]:
    """Every policy's points, and the window that an accuracy is the mean of."""
    return {
        "window": next(iter(curves.values())).window,
        "policies": {name: curve.as_dict() for name, curve in curves.items()},
    }


def headline(figures: Mapping[str, Any]) -> str:
    """One line about the replay: the title of table and picture."""
    scenario = figures["scenario"]
    words = [f"{figures['n']} pairs", f"{len(figures['seeds'])} seeds", f"signal {figures['signal']}"]
    shift = scenario["shift"]
    if shift is not None:
        words.append(f"shift to {shift['domain']} ({shift['offline_share']:g} → {shift['stream_share']:g})")
    if scenario["offline_domains"] or scenario["stream_domains"]:
        sides = [" ".join(scenario[side]) or "all" for side in ("offline_domains", "stream_domains")]
        words.append(f"{sides[0]} → {sides[1]}")
    words += [f"{scenario['folds']} folds"] if scenario["folds"] else []
    words += ["drift"] if scenario["drift"] else []
    words += [f"{scenario['repeat']} times"] if scenario["repeat"] > 1 else []
    words += [f"delay {scenario['delay']}"] if scenario["delay"] != "0" else []
    words += [f"{scenario['missing']:.0%} without feedback"] if scenario["missing"] else []
    return ", ".join(words)


def print_report(figures: Mapping[str, Any], console: Console | None = None) -> None:
    """The table that people read."""
    console = console or Console(width=None if sys.stdout.isatty() else _WIDTH)
    rows: list[Sequence[str] | None] = []
    for name, row in sorted(figures["policies"].items(), key=lambda item: -item[1]["accuracy"]):
        low, high = row["ci95"]
        over = figures["paired"][name]["best_single"]
        rows.append(
            (
                name,
                f"{row['accuracy']:.3f}",
                f"{low:.3f} – {high:.3f}",
                f"{figures['last_third'][name]:.3f}",
                "{:+.3f} ({:+.3f} … {:+.3f})".format(over["difference"], *over["ci95"]),
                cost_of(row),
                f"{row['regret']:.3f}",
                f"{row['coverage']:.0%}",
            )
        )
    best, oracle = figures["best_single"], figures["oracle"]
    rows.append(None)
    for name, accuracy in (
        (f"best single: {best['model']}", best["accuracy"]),
        ("best RM per subset, in hindsight", figures["best_per_subset"]),
        ("oracle", oracle),
    ):
        rows.append((name, f"{accuracy:.3f}", "", "", "", "1", f"{oracle - accuracy:.3f}", ""))
    columns: Sequence[str] = (
        "policy",
        "accuracy",
        "95% interval",
        "last third",
        "over best single",
        "calls",
        "regret",
        ANSWERS,
    )
    rows = without_full_coverage(columns, rows, figures["policies"])
    columns = columns[: -1 if covers_all(figures["policies"]) else None]
    drop = ("last third", "over best single", "regret", "95% interval")
    console.print(fitting_table(console, columns, rows, drop=drop, title=headline(figures)))
