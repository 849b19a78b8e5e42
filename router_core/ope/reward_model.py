"""A model q(x, k) of the reward of asking k first, for the doubly robust estimator: ridge per arm, on the past only.

The prediction for a row uses no reward of that row or of a later one. So the doubly robust score's error, given the
past, has mean zero even when the log was collected by a policy that learned from it, and q may be as wrong as it likes
(docs/off-policy.md). Knows `LoggedData` only. Called by whoever estimates.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from router_core.ope.data import Array, LoggedData

FIRST_BLOCK = 32
"""Rows before the first fit; they are predicted by a constant."""

BLOCK_GROWTH = 1.4
"""Each fit serves until the log has grown by this factor."""

PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)
"""Ridge penalties λ that compete; contexts have unit norm."""

MEAN_SHRINKAGE = 4.0
"""An arm's mean is shrunk to the mean of all arms as if it had so many rows of that."""

MAX_FEATURES = 64
"""Longer contexts are projected on so many principal directions: the fit is for variance reduction only."""


def sequential_ridge(data: LoggedData) -> Array:
    """q(x_t, k) for every row t and arm k, from rows before t's block: (N, K) float64.

    Per arm, q = m_k + xᵀβ_k with β_k = argmin Σ_s (r_sk − m_k − x_sᵀβ)² + λ‖β‖² over the earlier rows that know r_sk.
    Blocks grow by `BLOCK_GROWTH`; before each, λ is the one of `PENALTIES` that has predicted best so far. The first
    block gets 1/2 for rewards in [0, 1], else 0; predictions of rewards in [0, 1] stay there. Cost O(K d³ log N).

    Args:
        data: the log, in its order.
    """
    n, n_arms = data.propensities.shape
    z = _features(data.x)
    low, high = (0.0, 1.0) if data.unit_rewards else (-np.inf, np.inf)
    out = np.full((n, n_arms), 0.5 if data.unit_rewards else 0.0)
    errors = np.zeros(len(PENALTIES))
    for start, stop in _blocks(n):
        if not start:
            continue
        block = slice(start, stop)
        predicted = np.stack([_fit(z, data, k, start)(z[block]) for k in range(n_arms)], axis=-1)
        np.clip(predicted, low, high, out=predicted)
        out[block] = predicted[int(errors.argmin())]
        errors += np.nansum(np.square(predicted - data.rewards[block]), axis=(1, 2))
    return out


class _Ridge:
    """One arm's fits for all penalties: z (B, d) -> (penalties, B)."""

    def __init__(self, mean: float, coefficients: Array) -> None:
        self._mean, self._coefficients = mean, coefficients

    def __call__(self, z: Array) -> Array:
        predicted: Array = self._mean + self._coefficients @ z.T
        return predicted


def _fit(z: Array, data: LoggedData, k: int, stop: int) -> _Ridge:
    """Arm k's ridge on the rows before `stop`."""
    overall = float(np.nanmean(data.rewards[:stop]))
    mine = np.flatnonzero(~np.isnan(data.rewards[:stop, k]))
    rewards, features = data.rewards[mine, k], z[mine]
    mean = (float(rewards.sum()) + MEAN_SHRINKAGE * overall) / (len(mine) + MEAN_SHRINKAGE)
    values, vectors = np.linalg.eigh(features.T @ features)
    along = vectors.T @ (features.T @ (rewards - mean))
    penalties = np.array(PENALTIES)[:, None]
    return _Ridge(mean, (along / (np.maximum(values, 0.0) + penalties)) @ vectors.T)


def _features(x: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Array:
    """Contexts in float64, projected where they are long. Rewards have no part in it."""
    z = x.astype(np.float64)
    if z.shape[1] <= MAX_FEATURES:
        return z
    _, vectors = np.linalg.eigh(z.T @ z)
    projected: Array = z @ vectors[:, -MAX_FEATURES:]
    return projected


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    """Consecutive (start, stop) that cover 0 … n."""
    start, stop = 0, FIRST_BLOCK
    while start < n:
        yield start, min(stop, n)
        start, stop = stop, int(stop * BLOCK_GROWTH) + 1
