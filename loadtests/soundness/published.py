"""What do the published scalars cost the paper's prior form? Others, chosen as ours: by what they earn on these pairs.

The form `paper` (mean = unit-norm Bradley-Terry embeddings, no offset) is replayed on K4 in the folds, under shift and
on domains left out, with the published λ₀ = σ² = v = 1 and with others. Their σ² is .16, since only λ₀σ² and vσ matter.
The best of them by the mean of the three columns, and the best in the folds, are rows of docs/results.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from loadtests.soundness.recorded import ENCODER, fitted, recorded
from loadtests.soundness.report import Options, Report
from loadtests.tables.experiments import K4, PAPER, Plan, Size, Stream, Variant
from loadtests.tables.work import Material, priors_of, run_all
from router_core.checkpoint import Checkpoint
from router_core.records import Signal
from router_core.replay import replay, tabulate
from router_core.torch_threads import torch_threads

SEEDS = 2
PUBLISHED = (1.0, 1.0, 1.0)
OURS = ()
"""Stands for the default policy, beside the others."""
GRID = tuple((lambda0, 0.16, v) for lambda0 in (10.0, 30.0, 100.0, 300.0, 1000.0) for v in (0.0, 0.1, 0.3, 1.0))
"""λ₀, σ², v."""


def published(options: Options) -> Report:
    """Accuracy of the paper's form per scalars and kind of stream."""
    material = recorded(options)
    plan = Plan(material.pairs, ENCODER, Size(shifts=2))
    kinds = {"folds": plan.folds(K4, 5, 0), "shift": plan.shifted(K4), "unseen": plan.without_a_domain(K4)}
    checkpoints = fitted((stream.fit for streams in kinds.values() for stream in streams), material, options)
    tasks: dict[tuple[tuple[float, ...], str, int], Callable[[], float]] = {
        (scalars, kind, number): partial(
            _earned, stream, checkpoints[stream.fit], material, scalars, options.seeds or SEEDS
        )
        for scalars in (OURS, PUBLISHED, *GRID)
        for kind, streams in kinds.items()
        for number, stream in enumerate(streams)
    }
    earned = run_all(tasks, options.workers)
    figures = {}
    for scalars in (OURS, PUBLISHED, *GRID):
        named = [f"{name} = {value:g}" for name, value in zip(("λ₀", "σ²", "v"), scalars, strict=False)]
        title = ", ".join(named) or "bayesian, the default"
        figures[title] = {
            kind: float(
                np.average(
                    [earned[scalars, kind, number] for number in range(len(streams))],
                    weights=[len(stream.rows) for stream in streams],
                )
            )
            for kind, streams in kinds.items()
        }
    rows = [
        (title, *(f"{by[kind]:.3f}" for kind in kinds), f"{np.mean(list(by.values())):.3f}")
        for title, by in figures.items()
    ]
    return Report(
        title=f"the paper's prior form by its scalars, K4, {options.seeds or SEEDS} passes",
        columns=("scalars", *kinds, "mean"),
        rows=tuple(rows),
        notes=("The second row is as published. The others are chosen and judged on the same pairs, as ours were.",),
        figures=figures,
    )


def _earned(
    stream: Stream, checkpoint: Checkpoint, material: Material, scalars: tuple[float, ...], seeds: int
) -> float:
    rows = list(stream.rows)
    table = tabulate([material.pairs[i] for i in rows], stream.fit.pool)
    x = checkpoint.fuse.apply(material.encoded[ENCODER].features[rows])
    changes = tuple(zip(("lambda0", "sigma2", "v"), scalars, strict=False))
    policy = PAPER if scalars else "bayesian"
    priors = priors_of(checkpoint, Variant(), Signal.PREFERENCE, changes)
    with torch_threads(1):
        traces = replay(table, x, (policy,), priors=priors, signal=Signal.PREFERENCE, seeds=range(seeds))
    return float(traces[policy].correct.mean())
