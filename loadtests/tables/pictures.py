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
