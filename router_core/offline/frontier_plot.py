"""Draws the frontier as a picture. Needs matplotlib (reward-router[train]). Called by the `frontier` command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from router_core.errors import RouterCoreError
from router_core.offline.frontier import Point

_STYLES: Mapping[str, tuple[str, str, str]] = {
    "cascade": ("#0072b2", "o", "-"),
    "random-cascade": ("#777777", "x", ":"),
    "judge-when-unsure": ("#d55e00", "s", "--"),
}
"""Colour, marker and line of the rows that have a budget; the colours are Okabe and Ito's."""
_OTHERS = ("#000000", "D", "")


def plot_frontier(points: Sequence[Point], path: Path, title: str) -> None:
    """Accuracy against mean price with 95 % intervals, as PNG, PDF or SVG by the suffix; one line per kind of policy.

    Raises:
        RouterCoreError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RouterCoreError(f"--plot needs matplotlib ({error}): pip install 'reward-router[train]'") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind, (colour, marker, line) in {**_STYLES, "": _OTHERS}.items():
        chosen = [point for point in points if _kind(point.policy) == kind]
        if kind:
            chosen = [point for point in points if point.policy == "offline"] + chosen
        xs, ys = [point.price for point in chosen], [point.accuracy for point in chosen]
        errors = [
            [max(point.accuracy - point.ci95[0], 0.0) for point in chosen],
            [max(point.ci95[1] - point.accuracy, 0.0) for point in chosen],
        ]
        axes.errorbar(
            xs, ys, yerr=errors, color=colour, marker=marker, linestyle=line, label=kind or None, capsize=2, alpha=0.85
        )
        if not kind:
            for point in chosen:
                axes.annotate(
                    point.policy, (point.price, point.accuracy), textcoords="offset points", xytext=(6, -10), fontsize=8
                )
    axes.set(xlabel="price per instance (cheapest RM = 1)", ylabel="verdict is right")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise RouterCoreError(f"--plot {path}: cannot be written ({error}); give a path that ends in .png") from error


def _kind(policy: str) -> str:
    kind = policy.partition(":")[0]
    return kind if kind in _STYLES else ""
