"""Linear algebra of symmetric positive definite matrices that says why it failed. Called by `posterior` only.

float64 throughout; no jitter is ever added: a matrix that is not positive definite is an error, not a nuisance.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router_core.errors import NotFiniteError, NotPositiveDefiniteError

Array = NDArray[np.float64]


def inverse_spd(matrix: Array) -> Array:
    """Invert a symmetric positive definite matrix.

    Args:
        matrix: (W, W) float64, symmetric.

    Returns:
        (W, W) float64, exactly symmetric.

    Raises:
        NotFiniteError: the matrix holds NaN or infinity.
        NotPositiveDefiniteError: it is finite but has no Cholesky factor.

    >>> inverse_spd(np.array([[2.0, 0.0], [0.0, 4.0]])).tolist()
    [[0.5, 0.0], [0.0, 0.25]]
    """
    if not np.isfinite(matrix).all():
        raise NotFiniteError(
            "precision matrix holds NaN or infinity: the log or the prior holds a value that is not finite"
        )
    try:
        factor = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError as error:
        smallest = float(np.linalg.eigvalsh(matrix)[0])
        raise NotPositiveDefiniteError(
            f"precision matrix is not positive definite (smallest eigenvalue {smallest:.3g}): raise lambda0"
        ) from error
    half = np.linalg.inv(factor)
    inverse: Array = half.T @ half
    return (inverse + inverse.T) / 2


def inverse_residual(precision: Array, covariance: Array) -> float:
    """Largest absolute entry of ΛΣ − I: how far Σ has drifted from Λ⁻¹. O(W³).

    Args:
        precision: (W, W) float64.
        covariance: (W, W) float64.
    """
    product = precision @ covariance
    product[np.diag_indices_from(product)] -= 1.0
    return float(np.abs(product).max())


def inverse_probe(precision: Array, covariance: Array) -> float:
    """Largest absolute entry of (ΛΣ − I)p for the fixed unit vector p = 1/√W: an O(W²) estimate of the drift.

    Deterministic, so that every replica takes the same decision from it.
    """
    W = precision.shape[0]
    probe = np.full(W, 1.0 / np.sqrt(W))
    return float(np.abs(precision @ (covariance @ probe) - probe).max())
