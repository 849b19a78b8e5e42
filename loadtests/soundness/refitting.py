"""How much of an offline figure is the luck of one fit? The folds dealt and fitted again, beside what pairs alone say.

Intervals of docs/results.md count groups of pairs, and fits only as far as they were repeated. Here the five folds are
dealt several times, each with fits of another seed. Standard deviations of a figure of one dealing:

* `pairs`: what its interval rests on;
* `refits`: around the mean of all dealings, whose fits share most of their pairs: too small;
* `other pairs`: from fits on two halves of the groups outside a fold, which share none: the root mean square of the
  two halves' difference, over √2. Of fits on half as many pairs: too large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.soundness.recorded import ENCODER, fitted, recorded
from loadtests.soundness.report import Options, Report
from loadtests.tables.experiments import K4, Fit, Plan, Size, Stream
from loadtests.tables.work import Material
from router_core.checkpoint import Checkpoint
from router_core.dataset import grouped_split, pool_matrix, pool_names
from router_core.intervals import clustered_variance

DEALINGS = 6


def refitting(options: Options) -> Report:
    """Per pool: accuracy of `offline`, and its lead over the best single RM in hindsight."""
    material, dealings = recorded(options), options.seeds or DEALINGS
    plan = Plan(material.pairs, ENCODER, Size(dealings=dealings))
    groups = [pair.group for pair in material.pairs]
    figures: dict[str, Any] = {}
    for name, pool in (("K4", K4), ("K9", pool_names(material.pairs))):
        dealt = [plan.folds(pool, plan.size.folds, dealing) for dealing in range(dealings)]
        halves = [[tuple(_half(stream, side, material) for stream in streams) for streams in dealt] for side in (0, 1)]
        everything = [stream.fit for part in (dealt, *halves) for streams in part for stream in streams]
        checkpoints = fitted(everything, material, options)
        correctness = pool_matrix(material.pairs, pool)
        right, one, other = (
            np.stack([_routed(streams, checkpoints, material) for streams in part]) for part in (dealt, *halves)
        )
        apart = float(np.sqrt(np.square((one - other).mean(axis=1)).mean() / 2))
        best = correctness[:, int(correctness.mean(axis=0).argmax())]
        for figure, values in (("offline", right), ("offline − best single RM", right - best)):
            pairs = float(np.mean([clustered_variance(row, groups) for row in values])) ** 0.5
            refits = float(values.mean(axis=1).std(ddof=1))
            figures[f"{name}: {figure}"] = {
                "mean": float(values.mean()),
                "pairs": pairs,
                "refits": refits,
                "other pairs": apart,
                "wider": (pairs**2 + apart**2) ** 0.5 / pairs,
            }
    rows = [
        (
            name,
            f"{found['mean']:+.3f}",
            *(f"{found[key]:.4f}" for key in ("pairs", "refits", "other pairs")),
            f"{found['wider']:.2f}",
        )
        for name, found in figures.items()
    ]
    return Report(
        title=f"what refitting adds to an interval, {dealings} dealings of five folds",
        columns=("figure", "mean", "sd, pairs", "sd, refits", "sd, other pairs", "times wider"),
        rows=tuple(rows),
        notes=("Times wider, at most: an interval of one dealing, if it counted other labelled pairs as well.",),
        figures=figures,
    )


def _half(stream: Stream, side: int, material: Material) -> Stream:
    """The same pairs, judged by a fit on one half of the groups that the stream's fit learns from."""
    rows = np.array(stream.fit.rows)
    pairs = [material.pairs[i] for i in stream.fit.rows]
    parts = grouped_split(pairs, 0.5, np.random.default_rng(stream.fit.config.seed))
    return replace(stream, fit=replace(stream.fit, rows=tuple(rows[parts[side]].tolist())))


def _routed(
    streams: Sequence[Stream], checkpoints: Mapping[Fit, Checkpoint], material: Material
) -> NDArray[np.float64]:
    """(N,): was the asked RM right, each pair by a fit that has not seen its group."""
    right = np.empty(len(material.pairs))
    for stream in streams:
        rows, checkpoint = np.array(stream.rows), checkpoints[stream.fit]
        x = checkpoint.fuse.apply(material.encoded[ENCODER].features[rows])
        correctness = pool_matrix([material.pairs[i] for i in rows.tolist()], stream.fit.pool)
        right[rows] = correctness[np.arange(len(rows)), checkpoint.class_probabilities(x).argmax(axis=1)]
    return right
