"""The two losses of the offline stage, on scores and correctness.

Knows tensors of one batch; nothing of encoders, files or optimisers. Called by `offline.train`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

MAX_COUPLE_WEIGHT = 10.0
"""Bound on how much more than the average a couple may weigh: a couple that was seen once must not decide the fit."""


def bradley_terry(scores: Tensor, correctness: Tensor, couple_weights: Tensor | None = None) -> Tensor:
    """An RM that is right should outscore one that is wrong on the same pair (arXiv 2510.02850, offline stage).

    L = mean over pairs of Σ_{j,l} w_jl · (−log σ(s_j − s_l)) / Σ w_jl, with w_jl = y_j (1 − y_l): 1 for a right j and a
    wrong l, 1/2 or 1/4 where ties take part. Each pair weighs the same however many couples it has; a pair on which all
    agree says nothing and is left out.

    Args:
        scores: (B, K), s_k = scale · xᵀe_k.
        correctness: (B, K) in {0, 0.5, 1}, NaN where the RM was not asked.
        couple_weights: (K, K) from `balanced_couples`, by which each term is multiplied; None for 1.

    Returns:
        Scalar; 0 (with zero gradient) if no pair has a couple.
    """
    weight = _couples(correctness)
    loss = softplus(scores[:, None, :] - scores[:, :, None])
    total = weight.sum((1, 2))
    informative = total > 0
    if couple_weights is not None:
        loss = loss * couple_weights
    per_pair = (weight * loss).sum((1, 2)) / total.clamp_min(1e-6)
    return per_pair.sum() / informative.sum().clamp_min(1)


def informative_pairs(correctness: Tensor) -> Tensor:
    """Pairs on which `bradley_terry` averages, those with a couple, as a scalar count: (B, K) to ()."""
    return (_couples(correctness).sum((1, 2)) > 0).sum()


def balanced_couples(correctness: Tensor) -> Tensor:
    """Weights under which every couple (j right where l is wrong) counts alike, however many pairs show it.

    v_jl = n̄ / n_jl, with n_jl = Σ_pairs w_jl and n̄ its mean over the couples that occur, at most `MAX_COUPLE_WEIGHT`.
    Without it an RM that is right nearly everywhere wins most of the couples, and so most of the loss.

    Args:
        correctness: (N, K) of all training pairs.

    Returns:
        (K, K) float32; 0 for couples that never occur.

    >>> balanced_couples(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    tensor([[0.0000, 0.6667],
            [2.0000, 0.0000]])
    """
    counts = _couples(correctness).sum(0)
    seen = counts > 0
    mean = counts.sum() / seen.sum().clamp_min(1)
    return torch.where(seen, (mean / counts.clamp_min(1e-6)).clamp_max(MAX_COUPLE_WEIGHT), 0.0).float()


def _couples(correctness: Tensor) -> Tensor:
    """(B, K, K): w_jl = y_j (1 − y_l) where both were asked and j is not l."""
    asked = ~torch.isnan(correctness)
    y = torch.nan_to_num(correctness)
    both = asked[:, :, None] & asked[:, None, :] & ~torch.eye(y.shape[1], dtype=torch.bool, device=y.device)
    return y[:, :, None] * (1 - y[:, None, :]) * both


def correctness_bce(logits: Tensor, correctness: Tensor) -> Tensor:
    """Binary cross-entropy of "RM k is right on this pair", averaged over the asked (pair, RM).

    Args:
        logits: (B, K).
        correctness: (B, K) in {0, 0.5, 1}, NaN where the RM was not asked.

    Returns:
        Scalar; 0 (with zero gradient) if no RM was asked.
    """
    asked = ~torch.isnan(correctness)
    loss = binary_cross_entropy_with_logits(logits, torch.nan_to_num(correctness), reduction="none")
    return (loss * asked).sum() / asked.sum().clamp_min(1)
