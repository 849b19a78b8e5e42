"""Make "probability that RM k is right" mean it: temperature and bias from held-out logits, and how well they fit.

Knows logits and outcomes; nothing of how they came about. Called by `offline.train` with held-out predictions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from router_core.errors import ShapeMismatchError
from router_core.offline.losses import correctness_bce


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Calibrated logit of arm k = scale_k · logit + shift_k; scale (K,), shift (K,), float64, scale > 0."""

    scale: NDArray[np.float64]
    shift: NDArray[np.float64]

    def probabilities(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """(N, K) logits to calibrated probabilities."""
        z = np.clip(self.scale * logits + self.shift, -30.0, 30.0)
        probabilities: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-z))
        return probabilities


def fit_calibration(logits: NDArray[np.floating], correctness: NDArray[np.float64], ridge: float = 1e-3) -> Calibration:
    """Minimise held-out negative log-likelihood over one temperature for all arms and one bias per arm, by L-BFGS.

    min_{t, c} BCE(exp(t) · logit_k + c_k, y_k) + ridge · (t² + mean c²). One temperature, because the arms share one
    network and so its over-confidence; the ridge keeps an arm that was always right from an infinite bias.

    Args:
        logits: (N, K) held-out logits.
        correctness: (N, K) in {0, 0.5, 1}, NaN where the RM was not asked.

    Raises:
        ShapeMismatchError: the shapes differ or there is no row.
    """
    if logits.shape != correctness.shape or not len(logits):
        raise ShapeMismatchError(
            f"logits {logits.shape} and correctness {correctness.shape} must be equal, with a row at least"
        )
    z = torch.as_tensor(logits, dtype=torch.float64)
    y = torch.as_tensor(correctness, dtype=torch.float64)
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(z.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_scale, shift], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad()
        loss = correctness_bce(log_scale.exp() * z + shift, y) + ridge * (log_scale**2 + (shift**2).mean())
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return Calibration(
        scale=np.full(z.shape[1], float(log_scale.detach().exp())),
        shift=shift.detach().numpy().copy(),
    )


def negative_log_likelihood(probabilities: NDArray[np.float64], correctness: NDArray[np.float64]) -> float:
    """Mean over the asked (pair, RM) of −y log p − (1−y) log(1−p), in nats; NaN correctness is left out."""
    asked = ~np.isnan(correctness)
    p, y = np.clip(probabilities[asked], 1e-12, 1 - 1e-12), correctness[asked]
    return float(-(y * np.log(p) + (1 - y) * np.log1p(-p)).mean())


def expected_calibration_error(
    probabilities: NDArray[np.float64], correctness: NDArray[np.float64], bins: int = 10
) -> float:
    """ECE = Σ_b (n_b / n) |mean outcome in b − mean probability in b|, over bins of equal count.

    Equal counts, because nearly all probabilities here lie between 0.6 and 1. NaN correctness is left out; 0 with no
    outcome at all.
    """
    asked = ~np.isnan(correctness)
    p, y = probabilities[asked], correctness[asked]
    order = np.argsort(p, kind="stable")
    error = 0.0
    for chunk in np.array_split(order, min(bins, max(len(order), 1))):
        if len(chunk):
            error += len(chunk) / len(order) * abs(float(y[chunk].mean() - p[chunk].mean()))
    return error
