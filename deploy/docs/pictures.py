"""Draw the pictures of docs/concepts.md: `python -m deploy.docs.pictures`. Needs the extra `train` (matplotlib).

The bells are those of a real posterior: it learns from a few feedbacks, and what it believes is drawn.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np

from router_core.policies.bayesian import posterior_beliefs
from router_core.posterior import fold, start
from router_core.prior import no_prior
from router_core.records import Event, Feedback, Signal

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "reward-router"

from matplotlib import pyplot as plt  # noqa: E402 - the backend must be chosen first

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
INK, COLOURS = "#37474f", ("#1565c0", "#ef6c00", "#2e7d32")
BOX = {"boxstyle": "round,pad=0.5", "facecolor": "#eceff1", "edgecolor": INK}

Place = tuple[float, float]
Arrow = tuple[str, str, str, float]
"""From, to, label, and how far the label is above the arrow."""

REQUEST = (
    {"trainer": (6, 50), "encode,\ndraw": (34, 50), "RM A": (63, 90), "RM B": (63, 50), "judge": (63, 10),
     "decision\nsaved": (90, 50)},
    [("trainer", "encode,\ndraw", "pair", 8), ("encode,\ndraw", "RM B", "one is asked", 8),
     ("RM B", "decision\nsaved", "rewards", 8)],
)  # fmt: skip
LEARNING = (
    {"trainer or person": (12, 85), "referee": (12, 15), "log of the run": (50, 50), "posterior,\ngateway 1": (88, 85),
     "posterior,\ngateway 2": (88, 15)},
    [("trainer or person", "log of the run", "feedback", 5), ("referee", "log of the run", "audit", -14),
     ("log of the run", "posterior,\ngateway 1", "fold", 5), ("log of the run", "posterior,\ngateway 2", "fold", -14)],
)  # fmt: skip


def boxes(name: str, places: dict[str, Place], arrows: list[Arrow]) -> None:
    """Draw boxes and arrows between them."""
    figure, axes = plt.subplots(figsize=(8, 2.8))
    axes.set(xlim=(0, 100), ylim=(0, 100))
    axes.axis("off")
    patches = {}
    for text, (x, y) in places.items():
        shown = axes.text(x, y, text, ha="center", va="center", bbox=BOX, fontsize=10, color=INK)
        patches[text] = shown.get_bbox_patch()
    figure.canvas.draw()
    for start_at, end_at, label, above in arrows:
        joined = {"arrowstyle": "-|>", "color": INK, "patchA": patches[start_at], "patchB": patches[end_at]}
        axes.annotate("", places[end_at], places[start_at], arrowprops=joined)
        (x0, y0), (x1, y1) = places[start_at], places[end_at]
        axes.text((x0 + x1) / 2, (y0 + y1) / 2 + above, label, ha="center", va="bottom", fontsize=9, color=INK)
    save(figure, name)


def bells(name: str) -> None:
    """Draw what a posterior believes of three RMs at one context, and one draw from each."""
    rng = np.random.default_rng(5)
    x = np.array([[0.8, 0.6, 0.0, 0.0]], dtype=np.float32)
    events = [
        Event(arm, x[0].tobytes(), 0.5, float(i < right), Feedback(Signal.PREFERENCE, 0.0), f"{arm}-{i}")
        for arm, right, count in ((0, 16, 30), (1, 24, 30), (2, 2, 3))
        for i in range(count)
    ]
    posterior = fold(start(no_prior(3, 4)), events)
    beliefs = posterior_beliefs(x, np.full((1, 3), 0.5), posterior)
    means, sds = beliefs.means[0], beliefs.sds[0]
    drawn = rng.normal(means, sds)
    figure, axes = plt.subplots(figsize=(8, 2.8))
    at = np.linspace((means - 3 * sds).min(), (means + 3 * sds).max(), 300)
    for k, colour in enumerate(COLOURS):
        density = np.exp(-0.5 * ((at - means[k]) / sds[k]) ** 2) / sds[k]
        axes.plot(at, density, color=colour, label=f"RM {'ABC'[k]}, {posterior.events[k]:.0f} feedbacks")
        axes.axvline(drawn[k], 0, 0.9, color=colour, linestyle="-" if k == drawn.argmax() else ":")
    axes.set(yticks=[], xlabel="probability that the RM ranks this pair rightly")
    axes.legend(loc="upper center", framealpha=1, edgecolor="none")
    axes.spines[["left", "right", "top"]].set_visible(False)
    save(figure, name)


def save(figure: plt.Figure, name: str) -> None:
    """Write a picture, on white so that it can be read on a dark page too."""
    figure.savefig(FIGURES / name, bbox_inches="tight", facecolor="white", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    boxes("concepts-request.svg", *REQUEST)
    bells("concepts-draws.svg")
    boxes("concepts-learning.svg", *LEARNING)
