"""Table 2 per pool: offline routing in grouped cross-validation, beside single RMs, ensembles and knowing the subset.

Knows which fits the rows need and how the rows become figures; the arithmetic is `router_core.offline`'s. Called by the
command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from loadtests.tables.experiments import Fit, Size
from loadtests.tables.work import (
    BEST_HINDSIGHT,
    BEST_LEARNED,
    SUBSETS_HINDSIGHT,
    SUBSETS_LEARNED,
    Material,
    best_arm,
    best_arm_per_subset,
    hindsight_arms,
    looked_up,
)
from router_core.checkpoint import Checkpoint
from router_core.intervals import paired_difference
from router_core.offline.figures import figures
from router_core.offline.table import OFFLINE, Judged, Router, Split, fits, fold_splits, judge_fitted, routers
from router_core.offline.train import TrainConfig
from router_core.records import LabelledPair
from router_core.replay import complete_pairs

Array = NDArray[np.float64]
Splits = Mapping[int, Sequence[Split]]

PAPERS = "offline, the paper's"
"""The paper's offline stage on our frozen encoder: one network, hard verdicts, both losses, routed by the Bradley-Terry
head. Its own fine-tunes the encoder.
"""


def papers_config(config: TrainConfig) -> TrainConfig:
    """The settings of `PAPERS`."""
    return replace(config, members=1, kind_members=0, soft_share=0.0, kernel_from=0, blend=0.0, level=0.0)


class TableTwo:
    """The rows of one pool: our router on all dealings; other fits (no-CLS, other encoders) on the first dealing."""

    def __init__(
        self,
        pairs: Sequence[LabelledPair],
        pool: Sequence[str],
        encoders: Sequence[str],
        size: Size,
        *,
        ablations: bool = True,
    ) -> None:
        self._pairs, self._pool = pairs, tuple(pool)
        self._splits: Splits = {seed: fold_splits(pairs, size.folds, seed) for seed in range(size.dealings)}
        rows, main = routers(encoders, size.config, ablations=ablations), (encoders[0], size.config)
        rows.append(Router(PAPERS, encoders[0], papers_config(size.config), "bt"))
        once = {0: self._splits[0]}
        self._parts: list[tuple[list[Router], Splits]] = [
            ([row for row in rows if (row.encoder, row.config) == main], self._splits),
            ([row for row in rows if (row.encoder, row.config) != main], once),
        ]

    def needed(self) -> list[Fit]:
        """Every fit of these rows."""
        return [
            Fit(encoder, self._pool, tuple(part.inside.tolist()), replace(config, seed=seed))
            for rows, splits in self._parts
            for encoder, config in fits(rows)
            for seed, parts in splits.items()
            for part in parts
        ]

    def judged(self, fitted: Mapping[Fit, Checkpoint], material: Material) -> Judged:
        """All rows on the same pairs, those that know the subsets included."""
        backbones = {name: encoded.backbone for name, encoded in material.encoded.items()}
        features = {name: encoded.features for name, encoded in material.encoded.items()}
        fit = looked_up(fitted, material)
        parts = [
            judge_fitted(self._pairs, self._pool, splits, rows, backbones, features, fit=fit)
            for rows, splits in self._parts
        ]
        references = self._references(parts[0])
        rows, calls, price = dict(references), dict.fromkeys(references, 1.0), dict.fromkeys(references, 1.0)
        asked: dict[str, Array] = {}
        for part in parts:
            # What needs no fit is the same in all parts: the first one's stays.
            rows = {**part.rows, **rows}
            calls, price, asked = {**part.calls, **calls}, {**part.price, **price}, {**part.asked, **asked}
        return replace(parts[0], rows=rows, calls=calls, price=price, asked=asked)

    def _references(self, judged: Judged) -> dict[str, Array]:
        """Rows that are told the best RM, or every pair's subset: chosen on the other folds, or in hindsight."""
        kept, _ = complete_pairs(self._pairs, self._pool)
        position = np.full(len(self._pairs), -1)
        position[kept] = np.arange(len(kept))
        correctness = judged.table.correctness
        arms = {name: np.empty((len(self._splits), len(kept)), np.int64) for name in (BEST_LEARNED, SUBSETS_LEARNED)}
        for s, parts in enumerate(self._splits.values()):
            for part in parts:
                outside = part.outside[position[part.outside] >= 0]
                learned = [self._pairs[i] for i in part.inside]
                streamed = [self._pairs[i] for i in outside]
                arms[BEST_LEARNED][s, position[outside]] = best_arm(learned, self._pool)
                arms[SUBSETS_LEARNED][s, position[outside]] = best_arm_per_subset(learned, streamed, self._pool)
        arms[BEST_HINDSIGHT] = np.full((1, len(kept)), int(correctness.mean(axis=0).argmax()))
        arms[SUBSETS_HINDSIGHT] = hindsight_arms(judged.table)[None]
        return {name: correctness[np.arange(len(kept)), chosen] for name, chosen in arms.items()}


def offline_figures(judged: Judged) -> dict[str, Any]:
    """`evaluate`'s JSON, and `minus`: our router minus each row, pair by pair."""
    return figures(judged) | {"minus": minus(judged.rows, judged.table.groups, OFFLINE)}


def minus(rows: Mapping[str, Array], groups: Sequence[str], ours: str) -> dict[str, dict[str, Any]]:
    """One row minus every other, pair by pair, with its interval over groups and seeds, and its p-value.

    Args:
        rows: (S, N) each, or (1, N) where seeds change nothing. Of rows with different numbers of seeds, the one with
            fewer is averaged over its seeds.
        groups: N names.
        ours: the row that the others are taken from.
    """
    return {name: _difference(rows[ours], values, groups) for name, values in rows.items() if name != ours}


def _difference(ours: Array, other: Array, groups: Sequence[str]) -> dict[str, Any]:
    if len(ours) != len(other):
        fewer = min(ours, other, key=len).mean(axis=0, keepdims=True)
        values = ours - fewer if len(ours) > len(other) else fewer - other
    else:
        values = ours - other
    found = paired_difference(values, groups)
    p = 2.0 * float(stats.t.sf(abs(found.value) / found.deviation, found.degrees))
    return {"difference": found.value, "ci95": list(found.ci95), "p": p}
