"""Draws the learning curves as a picture. The one module here that needs matplotlib (reward-router[train]).

Lines differ by dashes and markers as well as by colour, so that the picture reads in black and white too. Called by
`service.cli.replay`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_core.errors import RouterCoreError
from router_core.replay.curves import Band, Curve

_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "x", "P", "*", "<", ">", "h")
_COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#777777")
"""Okabe and Ito's palette: told apart by people who are blind to some colours."""


def plot_curves(curves: Mapping[str, Curve], path: Path, title: str) -> None:
    """Accuracy (left) and cumulative regret (right) of every policy with 95 % bands, as PNG, PDF or SVG by the suffix.

    Raises:
        RouterCoreError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RouterCoreError(f"--curve needs matplotlib ({error}): pip install 'reward-router[train]'") from error
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    # The legend lists them as they lie at the right-hand end, from above.
    worst_first = sorted(curves.items(), key=lambda item: -item[1].regret.mean[-1])
    for number, (name, curve) in enumerate(worst_first):
        _draw(left, number, name, curve, curve.accuracy, curve.steps >= curve.window)
        _draw(right, number, name, curve, curve.regret, curve.steps > 0)
    window = next(iter(curves.values())).window
    left.set(xlabel="instances", ylabel=f"verdict is right, mean of the last {window}")
    right.set(xlabel="instances", ylabel="cumulative regret, instances")
    left.grid(alpha=0.3)
    right.grid(alpha=0.3)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(curves), 4), fontsize=8, handlelength=5)
    figure.suptitle(f"{title}; bands: 95 % over passes", fontsize=10)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise RouterCoreError(f"--curve {path}: cannot be written ({error}); give a path that ends in .png") from error


def _draw(axes: Any, number: int, name: str, curve: Curve, band: Band, shown: NDArray[np.bool_]) -> None:
    """One line with its band; a marker at every tenth of it, shifted so that equal lines show each other."""
    steps, mean = curve.steps[shown], band.mean[shown]
    colour = _COLOURS[number % len(_COLOURS)]
    every = max(len(steps) // 10, 1)
    axes.plot(
        steps,
        mean,
        label=name,
        color=colour,
        linestyle=_DASHES[number % len(_DASHES)],
        marker=_MARKERS[number % len(_MARKERS)],
        markevery=(number % every, every),
        markersize=5,
        linewidth=1.3,
    )
    axes.fill_between(steps, band.low[shown], band.high[shown], color=colour, alpha=0.1, linewidth=0)
