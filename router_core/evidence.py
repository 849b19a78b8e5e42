"""How strong should the prior be? The precision λ₀ under which what was observed is most probable (empirical Bayes).

Knows Gram matrices and information vectors; nothing of events or logs. Called by `posterior.fold` at the end of blocks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LAMBDA_GRID: Array = 10.0 ** np.arange(0.5, 4.01, 0.25)
"""Precisions to choose from: residual weights of sd 0.56 (little of what was learned offline is trusted) to 0.01."""


def log_evidence(gram: Array, information: Array, grid: Array = LAMBDA_GRID) -> Array:
    """log p(rewards | λ) of Bayesian linear regression for each λ, up to a constant in λ.

    With Gram matrix G = XᵀX/σ² = Σᵢ gᵢ qᵢqᵢᵀ and b = Xᵀt/σ², weights N(0, I/λ):
    log p = ½ Σᵢ [log λ/(λ + gᵢ) + (qᵢᵀb)²/(λ + gᵢ)] (Bishop 2006, eq. 3.86, in the eigenbasis of G).

    Args:
        gram: (..., d, d), symmetric positive semi-definite.
        information: (..., d).
        grid: (L,) positive.

    Returns:
        (..., L). Cost O(d³) per matrix.

    >>> log_evidence(np.array([[8.0]]), np.array([0.0]), np.array([1.0, 8.0])).round(3)  # trust the prior
    array([-1.099, -0.347])
    """
    values, vectors = np.linalg.eigh(gram)
    values = np.maximum(values, 0.0)[..., None, :]
    along = np.square(np.einsum("...di,...d->...i", vectors, information))[..., None, :]
    total = grid[:, None] + values
    evidence: Array = 0.5 * (np.log(grid[:, None] / total) + along / total).sum(axis=-1)
    return evidence


def most_probable_precision(grams: Array, informations: Array) -> float:
    """The λ of `LAMBDA_GRID` with the largest evidence over all arms together; the smallest of equals.

    One λ for all arms: if the offline stage misjudges a new kind of text, it misjudges it for every RM. (One each was
    measured, and is worse: docs/experiments.md.)

    Args:
        grams: (K, d, d).
        informations: (K, d).
    """
    return float(LAMBDA_GRID[log_evidence(grams, informations).sum(axis=0).argmax()])
