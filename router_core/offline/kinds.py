"""Kinds of texts: the few directions in which what a pair looks like says which of many RMs are right about it.

Knows standardised features and correctness of any number of RMs; nothing of pools, networks or files. Called by
`offline.members`. An item-response model with few traits (collaborative filtering over RMs x texts): all RMs of the
data teach it, so a pool of six inherits what eighty-five say about the texts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RIDGE = 3.0
"""The regression's ridge penalty, in units of the features' mean variance per pair; 1 to 10 are alike
(docs/experiments.md)."""
_NO_VARIANCE = 1e-6


def fit_kinds(u: NDArray[np.floating], correctness: Array, count: int) -> Array:
    """Directions V (p, r) of u, r <= count, such that the kinds (u − ū)V have variance 1, by reduced-rank regression.

    W minimises ‖Y − UW‖² + ridge·‖W‖² over all RMs' centred correctness Y; V spans W's leading directions by how much
    they move the fitted values UW (Izenman 1975, reduced-rank regression).

    Args:
        u: (N, p), standardised features.
        correctness: (N, C) in [0, 1], NaN where an RM was not asked: it counts as that RM's mean.
        count: kinds at most.

    Returns:
        (p, r) float64; r = 0 where nothing in u tells RMs apart.
    """
    U = np.asarray(u, dtype=np.float64) - u.mean(axis=0)
    asked = np.isfinite(correctness)
    means = np.where(asked, correctness, 0.0).sum(axis=0) / np.maximum(asked.sum(axis=0), 1)
    Y = np.where(asked, correctness - means, 0.0)
    gram = U.T @ U
    ridge = RIDGE * max(np.trace(gram), _NO_VARIANCE) / len(U)
    weights = np.linalg.solve(gram + ridge * np.eye(U.shape[1]), U.T @ Y)
    _, _, axes = np.linalg.svd(U @ weights, full_matrices=False)
    directions = weights @ axes[:count].T
    deviations = (U @ directions).std(axis=0)
    kept = deviations > _NO_VARIANCE
    kinds: Array = directions[:, kept] / deviations[kept]
    return kinds
