"""The model card beside a checkpoint: what it was made of, how well it did on pairs it had not seen, how to use it.

Knows checkpoints, pairs and held-out predictions; fits nothing. Called by the `train` command after the checkpoint is
saved. The card says nothing of when or where, so equal training gives equal cards.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from router_core.checkpoint import Checkpoint
from router_core.errors import ShapeMismatchError
from router_core.offline.calibrate import (
    calibration_by_domain,
    expected_calibration_error,
    negative_log_likelihood,
)
from router_core.offline.evaluate import majority_correctness, wilson
from router_core.records import LabelledPair

CARD_FILE = "README.md"
FIGURE_FILE = "calibration.png"
BINS = 10
"""Points of a reliability diagram; each holds as many pairs as the others."""

Array = NDArray[np.float64]


_ESTIMATED = (
    "**Answers of pairs without a label were estimated from the agreement of the RMs, and every figure below takes "
    "them as true.** Where RMs err together the figures are too good.\n"
)


@dataclass(frozen=True, slots=True)
class Compared:
    """What a checkpoint's held-out accuracy is to be compared with, on the same pairs.

    Attributes:
        n: pairs.
        best_single: name of the RM that is right most often.
        best_single_accuracy: share of the pairs on which that one is right; one on which it says nothing counts ½.
        majority: share of the pairs on which majority vote is right.
    """

    n: int
    best_single: str
    best_single_accuracy: float
    majority: float


def write_card(
    directory: Path,
    checkpoint: Checkpoint,
    pairs: Sequence[LabelledPair],
    probabilities: Array,
    correctness: Array,
    config: Any,
    rows: Sequence[int] | NDArray[np.int64] | None = None,
    scores: Array | None = None,
) -> Compared:
    """Write `README.md` and `calibration.png` into the checkpoint's directory.

    Args:
        directory: of the saved checkpoint.
        checkpoint: what was saved there.
        pairs: all pairs that the training was given.
        probabilities: (N, K), calibrated, predicted for pairs that the predicting model had not seen.
        correctness: (N, K), NaN where an RM was not asked.
        config: the settings, a dataclass.
        rows: which of `pairs` the N rows are; None for all of them, in order.
        scores: (N, K) by which the checkpoint routes, if not by the probabilities.

    Returns:
        What the best single RM and majority vote have on the N pairs.

    Raises:
        ShapeMismatchError: rows, probabilities and correctness do not belong together.
    """
    judged = list(pairs) if rows is None else [pairs[int(i)] for i in rows]
    shape = (len(judged), len(checkpoint.pool))
    scores = probabilities if scores is None else scores
    if not probabilities.shape == correctness.shape == scores.shape == shape:
        raise ShapeMismatchError(
            f"probabilities {probabilities.shape}, correctness {correctness.shape}, scores {scores.shape}: "
            f"expected {shape}, a row per pair"
        )
    (directory / CARD_FILE).write_text(
        card(checkpoint, pairs, judged, probabilities, correctness, scores, config), "utf-8"
    )
    reliability_figure(checkpoint.pool, probabilities, correctness).savefig(
        directory / FIGURE_FILE, dpi=110, metadata={"Software": None}
    )
    best, right = best_single(correctness)
    majority = float(majority_correctness(judged, checkpoint.pool).mean())
    return Compared(len(judged), checkpoint.pool[best], right, majority)


def best_single(correctness: Array) -> tuple[int, float]:
    """Index and accuracy of the RM that is right most often; where it says nothing it counts as a guess, ½.

    Args:
        correctness: (N, K), NaN where an RM says nothing.

    >>> best_single(np.array([[1.0, 1.0], [np.nan, 1.0], [np.nan, 0.0]]))
    (0, 0.6666666666666666)
    """
    means = np.nan_to_num(correctness, nan=0.5).mean(axis=0)
    best = int(means.argmax())
    return best, float(means[best])


def card(
    checkpoint: Checkpoint,
    pairs: Sequence[LabelledPair],
    judged: Sequence[LabelledPair],
    probabilities: Array,
    correctness: Array,
    scores: Array,
    config: Any,
) -> str:
    """The card's text; arguments as in `write_card`, `judged` being the pairs of the rows."""
    name = " + ".join(checkpoint.pool)
    whole = (
        "each by a model that had not seen its group" if len(judged) == len(pairs) else "none of which was trained on"
    )
    parts = [
        f"# Reward-model router for {name}\n",
        "Chooses, for a prompt and its candidate responses, which one of these reward models (RMs) to ask. It holds "
        "the encoder's last layers, an embedding and a calibrated probability of being right per RM, and the prior "
        "from which the online stage starts to learn.\n",
        "    reward-router serve --checkpoint THIS_DIRECTORY ...\n",
        "## Origin\n",
        _table(("", ""), _origin(checkpoint, pairs)),
        "## Labelled pairs\n",
        _table(("subset", "pairs"), _counts(pairs)),
        "## Held-out figures\n",
        *([_ESTIMATED] if checkpoint.metrics.get("consensus_pairs") else []),
        f"{len(judged)} pairs, {whole}; the calibration of a pair's probabilities has not seen its group either. "
        "These pairs also chose when to stop, so expect a little less on others. A router is right if the RM that it "
        "asks is right; a tie counts one half. Intervals are 95 % (Wilson).\n",
        _table(("subset", "pairs", "router", "95 %", "best RM here", "its accuracy", "majority"),
               _accuracies(checkpoint.pool, judged, scores, correctness)),
        "## Calibration\n",
        "How often each RM was right, how often it was expected to be, and the expected calibration error (ECE) of "
        f"these probabilities; the picture shows them in {BINS} groups of equal size.\n",
        f"![calibration of each RM]({FIGURE_FILE})\n",
        _table(("RM", "asked", "right", "expected", "ECE", "log-likelihood"),
               _calibration(checkpoint.pool, probabilities, correctness)),
        "Per domain: what was promised of the RM that is routed to (said) and how often it was right; the gap between "
        "promise and outcome per RM, without its sign, as a mean over the RMs (bias).\n",
        _table(("domain", "pairs", "said", "right", "bias", "ECE", "log-likelihood"),
               _by_domain(judged, scores, probabilities, correctness)),
        "## Prior of the online stage\n",
        _table(("", ""), [("form", checkpoint.prior_form.value), *_items(checkpoint.hyperparameters)]),
        "## Settings of the training\n",
        _table(("", ""), _items(config)),
        "## Limits\n",
        "It knows texts like those above. On a domain that it never saw, its probabilities are over-confident until "
        "feedback corrects them. Retrain when an RM of the pool is replaced.\n",
    ]  # fmt: skip
    return "\n".join(parts)


def reliability_figure(pool: Sequence[str], probabilities: Array, correctness: Array) -> Figure:
    """One panel per RM: observed against predicted probability of being right, with 95 % intervals."""
    columns = 2 if len(pool) in (2, 4) else min(len(pool), 3)
    lines = -(-len(pool) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.4, 3.1 * lines + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axis, name, p, y in zip(axes, pool, probabilities.T, correctness.T, strict=False):
        axis.plot([0, 1], [0, 1], color="0.75", linewidth=1, zorder=0)
        points = reliability(p, y)
        if points:
            x, mean, low, high = (np.array(values) for values in zip(*points, strict=True))
            # Where all are right, Wilson's upper bound lies below 1 by rounding.
            axis.errorbar(x, mean, yerr=np.maximum([mean - low, high - mean], 0.0), fmt="o", markersize=4, capsize=2)
        axis.set_title(f"{_short(name)}\nECE {_ece(p, y):.3f}", fontsize=9)
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1.02)
    for axis in axes[len(pool) :]:
        axis.set_visible(False)
    figure.supxlabel("predicted probability that the RM is right", fontsize=9)
    figure.supylabel("share of pairs on which it was", fontsize=9)
    return figure


def reliability(probabilities: Array, outcomes: Array, bins: int = BINS) -> list[tuple[float, float, float, float]]:
    """Mean prediction, mean outcome and its 95 % interval of each of `bins` groups of equal count, ascending.

    Args:
        probabilities: (N,).
        outcomes: (N,) in {0, 0.5, 1}; NaN is left out.
    """
    asked = ~np.isnan(outcomes)
    p, y = probabilities[asked], outcomes[asked]
    points = []
    for chunk in np.array_split(np.argsort(p, kind="stable"), min(bins, max(len(p), 1))):
        if len(chunk):
            accuracy = wilson(float(y[chunk].sum()), len(chunk))
            points.append((float(p[chunk].mean()), accuracy.value, accuracy.low, accuracy.high))
    return points


def _origin(checkpoint: Checkpoint, pairs: Sequence[LabelledPair]) -> list[tuple[str, str]]:
    groups = len({pair.group for pair in pairs})
    rows = [
        ("checkpoint digest", f"`{checkpoint.digest}`"),
        ("data digest", f"`{checkpoint.data_digest}`"),
        ("labelled pairs", f"{len(pairs)} in {groups} groups"),
        ("pool, in arm order", ", ".join(checkpoint.pool)),
        ("encoder", f"`{checkpoint.encoder_spec}`" + (" (fine-tuned)" if checkpoint.encoder_files else "")),
        ("context", f"{checkpoint.d} columns, of which the heads read {checkpoint.fuse.features}"),
        ("made by", checkpoint.created_by),
    ]  # fmt: skip
    return rows + [(name.replace("_", " "), f"{value:.4g}") for name, value in sorted(checkpoint.metrics.items())]


def _counts(pairs: Sequence[LabelledPair]) -> list[tuple[str, str]]:
    counts: dict[str, int] = {}
    for pair in pairs:
        counts[pair.part] = counts.get(pair.part, 0) + 1
    return [(name, str(count)) for name, count in sorted(counts.items())]


def _accuracies(
    pool: Sequence[str], pairs: Sequence[LabelledPair], scores: Array, correctness: Array
) -> list[tuple[str, ...]]:
    """A row per subset and one for all; the router asks the RM with the highest score among those judged."""
    asked = ~np.isnan(correctness)
    some = asked.any(axis=1)
    chosen = np.where(asked, scores, -np.inf).argmax(axis=1)
    right = correctness[np.arange(len(pairs)), chosen]
    majority = majority_correctness(pairs, pool)
    subsets = np.array([pair.part for pair in pairs])
    rows: list[tuple[str, ...]] = []
    names = sorted(set(subsets.tolist()))
    parts = [("**all**", some)] + ([(name, some & (subsets == name)) for name in names] if len(names) > 1 else [])
    for name, part in parts:
        if part.any():
            router = wilson(float(right[part].sum()), int(part.sum()))
            best, single = best_single(correctness[part])
            interval = f"{router.low:.3f} – {router.high:.3f}"
            rows.append(
                (name, str(router.n), f"**{router.value:.3f}**", interval, pool[best],
                 f"{single:.3f}", f"{majority[part].mean():.3f}")
            )  # fmt: skip
    return rows


def _calibration(pool: Sequence[str], probabilities: Array, correctness: Array) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, p, y in zip(pool, probabilities.T, correctness.T, strict=True):
        asked = ~np.isnan(y)
        if not asked.any():
            rows.append((name, "0", "–", "–", "–", "–"))
            continue
        likelihood = -negative_log_likelihood(p, y)
        rows.append(
            (name, str(int(asked.sum())), f"{y[asked].mean():.3f}", f"{p[asked].mean():.3f}", f"{_ece(p, y):.3f}",
             f"{likelihood:.3f}")
        )  # fmt: skip
    return rows


def _by_domain(
    pairs: Sequence[LabelledPair], scores: Array, probabilities: Array, correctness: Array
) -> list[tuple[str, ...]]:
    """A row for all pairs and, where there are several, one per domain."""
    chosen = np.where(np.isnan(correctness), -np.inf, scores).argmax(axis=1)
    found = calibration_by_domain(probabilities, correctness, chosen, [pair.domain for pair in pairs])
    everything = found.pop("")
    parts = {"**all**": everything, **(found if len(found) > 1 else {})}
    return [
        (name, str(part["n"]), f"{part['said']:.3f}", f"{part['right']:.3f}", f"{part['bias']:.3f}",
         f"{part['expected_calibration_error']:.3f}", f"{-part['negative_log_likelihood']:.3f}")
        for name, part in parts.items()
    ]  # fmt: skip


def _ece(p: Array, y: Array) -> float:
    return expected_calibration_error(p, y, BINS)


def _items(settings: Any) -> list[tuple[str, str]]:
    """Fields of a dataclass, nested ones left out: they have a section of their own."""
    values: Iterable[tuple[str, Any]]
    if is_dataclass(settings):
        values = [(field.name, getattr(settings, field.name)) for field in fields(settings)]
    else:
        values = dict(settings).items()
    return [(name, _shown(value)) for name, value in values if not is_dataclass(value) and name != "hyperparameters"]


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, str) else json.dumps(value, default=str)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(map(_escaped, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _short(name: str) -> str:
    return name if len(name) <= 30 else name[:29] + "…"
