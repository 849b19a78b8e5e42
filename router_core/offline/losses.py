"""The two losses of the offline stage, on scores and correctness.

Knows tensors of one batch; nothing of encoders, files or optimisers. Called by `offline.train`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus


def bradley_terry(scores: Tensor, correctness: Tensor) -> Tensor:
    """An RM that is right should outscore one that is wrong on the same pair (arXiv 2510.02850, offline stage).

    L = mean over pairs of Σ_{j,l} w_jl · (−log σ(s_j − s_l)) / Σ w_jl, with w_jl = y_j (1 − y_l): 1 for a right j and a
    wrong l, 1/2 or 1/4 where ties take part. Each pair weighs the same however many couples it has; a pair on which all
    agree says nothing and is left out.

    Args:
        scores: (B, K), s_k = scale · xᵀe_k.
        correctness: (B, K) in {0, 0.5, 1}, NaN where the RM was not asked.

    Returns:
        Scalar; 0 (with zero gradient) if no pair has a couple.
    """
    asked = ~torch.isnan(correctness)
    y = torch.nan_to_num(correctness)
    both = asked[:, :, None] & asked[:, None, :] & ~torch.eye(y.shape[1], dtype=torch.bool, device=y.device)
    weight = y[:, :, None] * (1 - y[:, None, :]) * both
    loss = softplus(scores[:, None, :] - scores[:, :, None])
    total = weight.sum((1, 2))
    informative = total > 0
    per_pair = (weight * loss).sum((1, 2)) / total.clamp_min(1e-6)
    return per_pair.sum() / informative.sum().clamp_min(1)


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
