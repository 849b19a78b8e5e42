"""The figures as PNG: accuracies of offline routing with intervals, and learning curves. Needs matplotlib.

Called by the command.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from router_core.replay import Curve
from router_core.replay.plot import plot_curves

CURVES = {
    "in distribution": "online-in-distribution.png",
    "long": "online-long.png",
    "shift": "online-shift.png",
    "drift": "online-drift.png",
    "shift, loss": "online-shift-loss.png",
}
"""Which jobs' curves are drawn, and where."""

DRAWN = (
    "bayesian",
    "bayesian:paper",
    "bayesian:none",
    "offline",
    "laser",
    "majority",
    "uwo",
    "best single RM, in hindsight",
)
"""Lines of a picture; more cannot be told apart."""

OFFLINE = "offline.png"

COLOURS = 128
"""Size of a picture's palette."""


def draw_curves(curves: Mapping[str, Mapping[str, Curve]], titles: Mapping[str, str], folder: Path) -> None:
    """One picture per job of `CURVES` that was replayed."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, file in CURVES.items():
        if key in curves:
            lines = {name: curve for name, curve in curves[key].items() if name in DRAWN}
            plot_curves(lines, folder / file, titles[key])
            _shrink(folder / file)


CALLS = "calls.png"

_SHOWN = ("offline", "majority", "cascade:1.5", "cascade:2", "cascade:3", "stacked")
"""Rows of the picture of accuracy against calls, beside the best single RM."""


def draw_calls(document: Mapping[str, Any], folder: Path) -> None:
    """Accuracy against RM calls, one line per pool: routed, cascades, all by learned votes; the others as points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    tables = {**document["offline"], **document["field"]["offline"]}
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for number, (pool, table) in enumerate(tables.items()):
        colour = f"C{number}"
        rows = {name: table["policies"][name] for name in _SHOWN if name in table["policies"]}
        routed = [name for name in rows if name != "majority"]
        points = sorted((rows[name]["calls_per_instance"], rows[name]["accuracy"]) for name in routed)
        panel.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=pool)
        if "majority" in rows:
            panel.plot(
                rows["majority"]["calls_per_instance"], rows["majority"]["accuracy"], "s", color=colour, mfc="none"
            )
        best = max(row["accuracy"] for name, row in table["policies"].items() if name.startswith("single:"))
        panel.plot(1.0, best, "x", color=colour)
    panel.set_xscale("log", base=2)
    ticks = [1, 1.5, 2, 3, 6, 9, 20, 85]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set(
        xlabel="RM calls per pair (line: offline, cascades, stacked; x: best single RM in hindsight; square: majority)",
        ylabel="verdict is right",
    )
    panel.grid(alpha=0.3)
    panel.legend(ncols=2, fontsize=8, loc="lower right")
    figure.savefig(folder / CALLS, dpi=90)
    _shrink(folder / CALLS)


def draw_offline(tables: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """One panel per pool: every row's accuracy as a point with its 95 % interval, the best at the top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    tallest = max(len(document["policies"]) for document in tables.values())
    figure = Figure(figsize=(5.2 * len(tables), 0.28 * tallest + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for panel, (pool, document) in zip(panels, tables.items(), strict=True):
        ordered = sorted(document["policies"].items(), key=lambda item: item[1]["accuracy"])
        for place, (name, row) in enumerate(ordered):
            ours = name.startswith("offline")
            low, high = row["ci95"]
            colour = "#d55e00" if ours else "#000000"
            panel.plot([low, high], [place, place], color=colour, linewidth=1.2)
            panel.plot([row["accuracy"]], [place], marker="D" if ours else "o", color=colour, markersize=4)
        panel.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=7)
        panel.set(title=pool, xlabel="verdict is right, with 95 % interval")
        panel.grid(axis="x", alpha=0.3)
    figure.savefig(folder / OFFLINE, dpi=90)
    _shrink(folder / OFFLINE)


def _shrink(path: Path) -> None:
    """The same PNG with a palette: a third of the size, and no difference that the eye sees."""
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB").quantize(COLOURS)
    small.save(path, optimize=True)
