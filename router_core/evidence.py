"""How strong should the prior be? The precision λ₀ under which what was observed is most probable (empirical Bayes).

Knows Gram matrices and information vectors; nothing of events or logs. Called by `posterior.fold` at the end of blocks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LAMBDA_GRID: Array = 10.0 ** np.arange(0.5, 4.01, 0.25)
"""Precisions to choose from: residual weights of sd 0.56 (little of what was learned offline is trusted) to 0.01."""

LEVEL_GRID: Array = 10.0 ** np.arange(-0.5, 2.01, 0.25)
"""Precisions of an arm's level: sd 1.8 to 0.1 of a weight that the context multiplies by about a third."""

BETTER_GAIN, WORSE_GAIN = 1.0, 3.0
"""Nats by which an arm's data must favour a level of its own: few for an arm that is better than said, since only few
ask it; more for one that is worse, which is asked often (docs/experiments.md)."""


def log_evidence(gram: Array, information: Array, grid: Array = LAMBDA_GRID) -> Array:
    """log p(rewards | λ) of Bayesian linear regression for each λ, up to a constant in λ.

    With Gram matrix G = XᵀX/σ² = Σᵢ gᵢ qᵢqᵢᵀ and b = Xᵀt/σ², weights N(0, I/λ):
    log p = ½ Σᵢ [log λ/(λ + gᵢ) + (qᵢᵀb)²/(λ + gᵢ)] (Bishop 2006, eq. 3.86, in the eigenbasis of G).

    Args:
        gram: (..., W, W), symmetric positive semi-definite.
        information: (..., W).
        grid: (L,) positive.

    Returns:
        (..., L). Cost O(W³) per matrix.

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
        grams: (K, W, W).
        informations: (K, W).
    """
    return float(LAMBDA_GRID[log_evidence(grams, informations).sum(axis=0).argmax()])


def level_precisions(grams: Array, informations: Array, precision: float) -> Array:
    """κ_k of each arm's first weight: λ, or a smaller one that the arm's own data make clearly more probable.

    The first column of a context is its constant, so that its weight is an arm's level: by how much the arm is better
    or worse than said, on all texts. With the other weights integrated out under N(0, I/λ), the data say
    s = G₁₁ − G₁ᵣ(λI + Gᵣᵣ)⁻¹Gᵣ₁ and c = b₁ − G₁ᵣ(λI + Gᵣᵣ)⁻¹bᵣ of it, and
    log p(κ) = ½ [log κ/(κ + s) + c²/(κ + s)].

    No arm's level depends on what other arms did: one that keeps its promise makes no other certain.

    Args:
        grams: (K, W, W), of the data alone.
        informations: (K, W).
        precision: λ of the other weights.

    Returns:
        (K,) in (0, λ].

    >>> level_precisions(np.array([[[60.0]], [[60.0]]]), np.array([[1.0], [22.0]]), 1e4).round(2).tolist()
    [10000.0, 10.0]
    """
    rest = grams[:, 1:, 1:] + precision * np.eye(grams.shape[-1] - 1)
    solved = np.linalg.solve(rest, np.concatenate([grams[:, 1:, :1], informations[:, 1:, None]], axis=2))
    told = grams[:, 0, 0] - np.einsum("ki,ki->k", grams[:, 0, 1:], solved[:, :, 0])
    level = informations[:, 0] - np.einsum("ki,ki->k", grams[:, 0, 1:], solved[:, :, 1])
    grid = np.append(LEVEL_GRID[precision > LEVEL_GRID], precision)
    total = grid + np.maximum(told, 0.0)[:, None]
    evidence = 0.5 * (np.log(grid / total) + np.square(level)[:, None] / total)
    best = evidence.argmax(axis=1)
    gain = evidence[np.arange(len(grams)), best] - evidence[:, -1]
    needed = np.where(level > 0.0, BETTER_GAIN, WORSE_GAIN)
    chosen: Array = np.where(gain > needed, grid[best], precision)
    return chosen
