"""How much of an offline figure is the luck of one fit? The folds dealt and fitted again, beside what pairs alone say.

Intervals of docs/results.md count groups of pairs, and fits only as far as they were repeated. Here the five folds are
dealt many times, each with fits of another seed, so that every pair is judged by another fit of other pairs. `Pairs` is
the standard deviation that one dealing's interval rests on, `refits` that of a single dealing around the mean of all.
Other labelled pairs altogether would differ by more than dealings of the same ones: read `refits` as a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.soundness.recorded import ENCODER, fitted, recorded
from loadtests.soundness.report import Options, Report
from loadtests.tables.experiments import K4, Fit, Plan, Size
from loadtests.tables.work import Material
from router_core.checkpoint import Checkpoint
from router_core.dataset import pool_matrix, pool_names
from router_core.intervals import clustered_variance

DEALINGS = 8


def refitting(options: Options) -> Report:
    """Per pool: accuracy of `offline`, and its lead over the best single RM in hindsight."""
    material, dealings = recorded(options), options.seeds or DEALINGS
    plan = Plan(material.pairs, ENCODER, Size(dealings=dealings))
    groups = [pair.group for pair in material.pairs]
    figures: dict[str, Any] = {}
    for name, pool in (("K4", K4), ("K9", pool_names(material.pairs))):
        checkpoints = fitted((stream.fit for stream in plan.in_distribution(pool)), material, options)
        correctness = pool_matrix(material.pairs, pool)
        right = np.stack([_routed(plan, pool, dealing, checkpoints, material) for dealing in range(dealings)])
        best = correctness[:, int(correctness.mean(axis=0).argmax())]
        for figure, values in (("offline", right), ("offline − best single RM", right - best)):
            pairs = float(np.mean([clustered_variance(row, groups) for row in values])) ** 0.5
            refits = float(values.mean(axis=1).std(ddof=1))
            figures[f"{name}: {figure}"] = {
                "mean": float(values.mean()),
                "pairs": pairs,
                "refits": refits,
                "wider": (pairs**2 + refits**2) ** 0.5 / pairs,
            }
    rows = [
        (name, f"{found['mean']:+.3f}", f"{found['pairs']:.4f}", f"{found['refits']:.4f}", f"{found['wider']:.2f}")
        for name, found in figures.items()
    ]
    return Report(
        title=f"what refitting adds to an interval, {dealings} dealings of five folds",
        columns=("figure", "mean", "sd, pairs", "sd, refits", "times wider"),
        rows=tuple(rows),
        notes=("Times wider: an interval of one dealing, if it counted refitting as well.",),
        figures=figures,
    )


def _routed(
    plan: Plan, pool: tuple[str, ...], dealing: int, checkpoints: Mapping[Fit, Checkpoint], material: Material
) -> NDArray[np.float64]:
    """(N,): was the asked RM right, each pair by the fit that has not seen its group."""
    right = np.empty(len(material.pairs))
    for stream in plan.folds(pool, plan.size.folds, dealing):
        rows = np.array(stream.rows)
        checkpoint = checkpoints[stream.fit]
        x = checkpoint.fuse.apply(material.encoded[ENCODER].features[rows])
        correctness = pool_matrix([material.pairs[i] for i in rows.tolist()], pool)
        right[rows] = correctness[np.arange(len(rows)), checkpoint.class_probabilities(x).argmax(axis=1)]
    return right
