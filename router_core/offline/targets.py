"""What the fit aims at: correctness, softened by how sure each RM was.

Knows labelled pairs and their recorded scores; nothing of encoders or networks. Called by `offline.train`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from router_core.records import LabelledPair

Array = NDArray[np.float64]


def score_margins(pairs: Sequence[LabelledPair], pool: Sequence[str]) -> Array:
    """How far each RM puts the better response above each other one, in its own scores: (N, K, n − 1).

    n is the largest number of responses. Positive where the RM orders the two rightly; NaN where it was not asked, or
    gave a verdict without scores, and beyond a pair's own responses.
    """
    most = max((len(pair.instance.responses) for pair in pairs), default=2)
    margins = np.full((len(pairs), len(pool), most - 1), np.nan)
    for i, pair in enumerate(pairs):
        for k, name in enumerate(pool):
            if name in pair.scores:
                scores = pair.scores[name]
                others = [scores[pair.label] - score for j, score in enumerate(scores) if j != pair.label]
                margins[i, k, : len(others)] = others
    return margins


def soft_targets(correctness: Array, margins: Array, share: float, width: float) -> Array:
    """(1 − a) y + a σ(m_k / (w s_k)), with s_k the standard deviation of RM k's margins; of several, the mean σ.

    Being right by a hair is nearly chance, and says less about where an RM is strong than being right by far; a verdict
    alone throws that away. Held-out routing gains by it (docs/experiments.md); the calibration afterwards is fitted to
    hard correctness, so that o_k stays a probability of being right.

    Args:
        correctness: (N, K) in [0, 1], NaN where the RM was not asked.
        margins: (N, K, n − 1) from `score_margins`. Where all are NaN the target is the correctness, not softened.
        share: a in [0, 1]; 0 gives `correctness` back.
        width: w > 0, in deviations.
    """
    if share == 0.0 or not len(margins):
        return correctness
    known = np.isfinite(margins)
    arms = range(margins.shape[1])
    deviation = np.array([margins[:, k][known[:, k]].std() if known[:, k].any() else 0.0 for k in arms])
    z = np.clip(margins / np.where(deviation > 0, deviation, 1.0)[:, None], -2.0, 2.0) / width
    won = np.where(known, 1 / (1 + np.exp(-np.where(known, z, 0.0))), 0.0).sum(axis=2)
    count = known.sum(axis=2)
    softened: Array = (1 - share) * correctness + share * won / np.maximum(count, 1)
    return np.where(count > 0, softened, correctness)
