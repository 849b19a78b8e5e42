"""Single responses: is the RM that one response of a pair draws as good as the one that the pair draws?

Grouped folds of the recorded pairs. Each held-out pair is routed by both of its responses, by the first alone and by
the second alone; what is earned is the pair's correctness of the RM that is asked. `deviation 0` is what a single
response was until now: as near to the others as no pair is.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loadtests.soundness.report import Options, Report
from loadtests.tables.experiments import K4, K6
from router_core.checkpoint import Checkpoint
from router_core.dataset import grouped_folds, load_pairs, pool_matrix, pool_names
from router_core.encoder.fuse import Fuse, two_branch
from router_core.encoder.registry import load_backbone
from router_core.offline.calibrate import expected_calibration_error, negative_log_likelihood
from router_core.offline.train import TrainConfig, pair_features, train
from router_core.torch_threads import torch_threads

Array = NDArray[np.float64]

FOLDS, DEALINGS = 5, 1
POOLS = {"K4": K4, "K6": K6, "K9": None}
CONTEXTS = ("both responses", "one, deviation 0", "one, as now")
FIGURES = ("routed", "alike", "novel", "NLL", "ECE")


def singles(options: Options) -> Report:
    """Figures of each kind of context, per pool."""
    dealings = options.seeds or DEALINGS
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as executor:
        found = dict(zip(POOLS, executor.map(partial(_figures, options.data, dealings), POOLS), strict=True))
    rows = [
        (f"{pool}, {context}", *("" if np.isnan(figure) else f"{figure:.3f}" for figure in figures))
        for pool, by_context in found.items()
        for context, figures in by_context.items()
    ]
    return Report(
        title=f"routing by one response, {FOLDS} grouped folds, {dealings} dealing(s)",
        columns=("pool, context", *FIGURES),
        rows=tuple(rows),
        notes=(
            "routed: correctness of the RM that is asked. alike: both responses of a pair, each alone, draw one RM.",
            "novel: share of contexts that count as unlike the training pairs (usual: .25). NLL, ECE: of the offsets.",
        ),
        figures={
            pool: {context: dict(zip(FIGURES, values, strict=True)) for context, values in by_context.items()}
            for pool, by_context in found.items()
        },
    )


def _figures(data: Path, dealings: int, pool_name: str) -> dict[str, tuple[float, ...]]:
    pairs, backbone = load_pairs(data), load_backbone("static")
    pool = POOLS[pool_name] or pool_names(pairs)
    both = pair_features(pairs, backbone)
    h = backbone.embed([(pair.instance.prompt, text) for pair in pairs for text in pair.instance.responses])
    alone, correctness = two_branch(h, [1] * len(h)), pool_matrix(pairs, pool)
    parts: dict[str, list[tuple[Array, ...]]] = {context: [] for context in CONTEXTS}
    for seed in range(dealings):
        for inside, outside in grouped_folds(pairs, FOLDS, np.random.default_rng(seed)):
            with torch_threads(1):
                config = TrainConfig(seed=seed)
                checkpoint = train([pairs[i] for i in inside], pool, backbone, config, both[inside])
            halves = np.stack([2 * outside, 2 * outside + 1], axis=1).ravel()
            y, twice = correctness[outside], correctness[outside].repeat(2, axis=0)
            parts[CONTEXTS[0]].append(_judged(checkpoint, both[outside], y))
            with _no_deviation():
                parts[CONTEXTS[1]].append(_judged(checkpoint, alone[halves], twice))
            parts[CONTEXTS[2]].append(_judged(checkpoint, alone[halves], twice))
    return {
        context: _summary(*map(np.concatenate, zip(*found, strict=True)), alone=context != CONTEXTS[0])
        for context, found in parts.items()
    }


def _judged(checkpoint: Checkpoint, z: NDArray[np.float32], y: Array) -> tuple[Array, ...]:
    """Offsets (n, K), correctness (n, K), and which contexts are novel (n,)."""
    x = checkpoint.fuse.apply(z)
    assert checkpoint.landmarks is not None
    return checkpoint.class_probabilities(x), y, np.array([checkpoint.landmarks.is_novel(row) for row in x])


def _summary(offsets: Array, y: Array, novel: Array, *, alone: bool) -> tuple[float, ...]:
    arms = offsets.argmax(axis=1)
    routed = float(y[np.arange(len(arms)), arms].mean())
    return (
        routed,
        float((arms[0::2] == arms[1::2]).mean()) if alone else float("nan"),
        float(novel.mean()),
        negative_log_likelihood(offsets, y),
        expected_calibration_error(offsets, y),
    )


@contextmanager
def _no_deviation() -> Iterator[None]:
    """Standardise single responses as if their deviation were a measured 0."""
    kept = Fuse.standardise

    def measured(self: Fuse, z: NDArray[np.float32]) -> NDArray[np.float32]:
        return kept(self, np.nan_to_num(z))

    try:
        Fuse.standardise = measured  # type: ignore[method-assign]
        yield
    finally:
        Fuse.standardise = kept  # type: ignore[method-assign]
