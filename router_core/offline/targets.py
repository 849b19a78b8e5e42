"""What the fit aims at: correctness, softened by how sure each RM was.

Knows labelled pairs and their recorded scores; nothing of encoders or networks. Called by `offline.train`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from router_core.records import LabelledPair

Array = NDArray[np.float64]


def score_margins(pairs: Sequence[LabelledPair], pool: Sequence[str]) -> Array:
    """How far each RM puts the better response above the best other one, in its own scores: (N, K).

    Positive where the RM is right; NaN where it was not asked, or gave a verdict without scores.
    """
    return np.array([[_margin(pair, name) for name in pool] for pair in pairs]).reshape(len(pairs), len(pool))


def soft_targets(correctness: Array, margins: Array, share: float, width: float) -> Array:
    """(1 − a) y + a σ(m_k / (w s_k)), with s_k the root mean square deviation of RM k's margins.

    Being right by a hair is nearly chance, and says less about where an RM is strong than being right by far; a verdict
    alone throws that away. Held-out routing gains by it (docs/experiments.md); the calibration afterwards is fitted to
    hard correctness, so that o_k stays a probability of being right.

    Args:
        correctness: (N, K) in {0, 0.5, 1}, NaN where the RM was not asked.
        margins: (N, K) from `score_margins`. Where one is NaN the target is the correctness, not softened.
        share: a in [0, 1]; 0 gives `correctness` back.
        width: w > 0, in deviations.
    """
    if share == 0.0 or not len(margins):
        return correctness
    deviation = np.array(
        [column[np.isfinite(column)].std() if np.isfinite(column).any() else 0.0 for column in margins.T]
    )
    z = np.clip(margins / np.where(deviation > 0, deviation, 1.0), -2.0, 2.0) / width
    softened = (1 - share) * correctness + share / (1 + np.exp(-z))
    return np.where(np.isnan(margins), correctness, softened)


def _margin(pair: LabelledPair, name: str) -> float:
    scores = pair.scores.get(name)
    if scores is None:
        return math.nan
    return scores[pair.label] - max(score for i, score in enumerate(scores) if i != pair.label)
