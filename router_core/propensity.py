"""Probability that each of K independent Gaussian draws is the largest (docs/math/router.md, "Propensities").

Logged with every decision, so that off-policy evaluation can weigh it later. Called by `policies`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_UNIFORM_NODES = 24
"""Nodes of the uniform grid. Trapezoids converge exponentially there once the step is below the smallest sd."""

_UNIFORM_REACH = 4.2
"""The uniform grid spans all that lies within this many sds of a mean and above where some arm surely is."""

_UNIFORM_STEPS = np.arange(_UNIFORM_NODES, dtype=np.float64)

_QUANTILE_NODES = 48
"""Nodes per arm of the union grid, for arms of very different scales; largest error found 8.6e-4 at K <= 9."""

_REACH = 5.0
"""Quantile nodes lie within this many sds of each mean."""

_QUANTILES = np.linspace(-_REACH, _REACH, _QUANTILE_NODES)

_MANY = 12
"""Arms above which an instance of very different scales has a sparser grid of its own."""

_FEWEST_NODES = 9
"""Nodes per arm there at least; largest error found 6e-4 at K = 85."""

_SD_FLOOR = 1e-7
"""Standard deviations below this fraction of the spread are treated as this: a point mass becomes a steep step."""

_INVERSE_SQRT_TWO_PI = 0.3989422804014327


def normal_cdf(z: Array) -> Array:
    """Φ(z), absolute error below 7.5e-8.

    >>> normal_cdf(np.array([0.0])).round(6).tolist()
    [0.5]
    """
    return _cdf_and_density(z)[0]


def _cdf_and_density(z: Array) -> tuple[Array, Array]:
    """Φ(z) and φ(z) from one exponential (Abramowitz & Stegun 26.2.17)."""
    density = np.exp(-0.5 * z * z)
    density *= _INVERSE_SQRT_TWO_PI
    t = np.abs(z)
    t *= 0.2316419
    t += 1.0
    np.reciprocal(t, out=t)
    upper = t * 1.330274429
    for coefficient in (-1.821255978, 1.781477937, -0.356563782, 0.319381530):
        upper += coefficient
        upper *= t
    upper *= density
    return np.where(z >= 0, 1.0 - upper, upper), density


def argmax_propensities(means: Array, sds: Array) -> Array:
    """P(arm k's draw is the largest) for independent draws N(mean_k, sd_k²).

    P_k = ∫ Π_{j≠k} F_j(t) f_k(t) dt by trapezoids, then normalised to sum to one: on a uniform grid where its step
    resolves the smallest sd (arms of like scale, the usual case), else on the union of all arms' quantile nodes, which
    resolves every arm's scale however different they are.

    Args:
        means: (B, K) float64; −inf marks an arm that cannot be drawn.
        sds: (B, K) float64, not negative; zero is a point mass. Equal point masses share evenly.

    Returns:
        (B, K) float64, rows sum to 1, within 1e-3 of the exact value.

    >>> argmax_propensities(np.array([[0.0, 0.0]]), np.array([[1.0, 1.0]])).round(3).tolist()
    [[0.5, 0.5]]
    """
    n_arms = means.shape[1]
    if n_arms == 1:
        return np.ones_like(means)
    possible = np.isfinite(means)
    if not possible.all():
        return _masked(means, sds, possible)
    if len(means) == 1 and n_arms > 2:
        return _of_one(means[0].tolist(), sds[0].tolist())
    # Only differences matter. Around zero, equal point masses keep a step that floating point can tell from none.
    means = means - means.max(axis=1, keepdims=True)
    spread = np.ptp(means, axis=1) + sds.max(axis=1)
    sds = np.maximum(sds, np.maximum(_SD_FLOOR * spread, 1e-300)[:, None])
    if n_arms == 2:
        first = normal_cdf((means[:, 0] - means[:, 1]) / np.hypot(sds[:, 0], sds[:, 1]))
        return np.stack([first, 1.0 - first], axis=1)
    low = (means - _UNIFORM_REACH * sds).max(axis=1)
    step = ((means + _UNIFORM_REACH * sds).max(axis=1) - low) / (_UNIFORM_NODES - 1)
    resolved = step <= sds.min(axis=1)
    if resolved.all():
        return _on_uniform_grid(means, sds, low, step)
    out = np.empty_like(means)
    if resolved.any():
        out[resolved] = _on_uniform_grid(means[resolved], sds[resolved], low[resolved], step[resolved])
    rest = ~resolved
    out[rest] = _on_quantile_grid(means[rest], sds[rest])
    return out


def choice_propensities(means: Array, sds: Array, floors: Array) -> Array:
    """P(arm k is asked) where a share F = Σ f_j of the choices is made by floors and not by the draws:
    (1 − F)·P(largest draw) + F·f_k/Σ f_j, the last sum over the arms that are left.

    Args:
        means: (B, K) float64; −inf marks an arm that is gone, or that is never asked.
        sds: (B, K) float64.
        floors: (B, K), F < 1; zeros where the draws alone choose.

    Returns:
        (B, K) float64; rows sum to 1, or are 0 where no arm is left.

    >>> choice_propensities(np.array([[0.0, 9.0]]), np.array([[1.0, 1.0]]), np.array([[0.02, 0.01]])).round(3).tolist()
    [[0.02, 0.98]]
    """
    drawn = argmax_propensities(means, sds)
    if not floors.any():
        return drawn
    share = floors.sum(axis=1, keepdims=True)
    left = np.where(np.isfinite(means), floors, 0.0)
    total = left.sum(axis=1, keepdims=True)
    even = np.divide(left, total, out=drawn.copy(), where=total > 0)
    mixed: Array = (1.0 - share) * drawn + share * even
    return mixed


def _of_one(means: list[float], sds: list[float]) -> Array:
    """The same for one instance, (K,) -> (1, K): what precedes the grid costs less without arrays."""
    best = max(means)
    means = [mean - best for mean in means]
    floor = max(_SD_FLOOR * (max(sds) - min(means)), 1e-300)
    sds = [max(sd, floor) for sd in sds]
    low = max([mean - _UNIFORM_REACH * sd for mean, sd in zip(means, sds, strict=True)])
    high = max([mean + _UNIFORM_REACH * sd for mean, sd in zip(means, sds, strict=True)])
    step = (high - low) / (_UNIFORM_NODES - 1)
    if step > min(sds):
        return _on_quantile_grid(np.array([means]), np.array([sds]))
    start = [(low - mean) / sd for mean, sd in zip(means, sds, strict=True)]
    return _trapezoids(np.array([start]), np.array([[step / sd for sd in sds]]))


def _on_uniform_grid(means: Array, sds: Array, low: Array, step: Array) -> Array:
    """Trapezoids with constant step: low (B,), step (B,), means and sds (B, K) -> (B, K)."""
    return _trapezoids((low[:, None] - means) / sds, step[:, None] / sds)


def _trapezoids(start: Array, stride: Array) -> Array:
    """∫ Π_{j≠k} F_j f_k in units of each arm's sd: first node and step, both (B, K) -> (B, K).

    The first node is at least −`_UNIFORM_REACH`, so that no F_j is smaller than 1e-5 and division by it is safe.
    """
    cdf, density = _cdf_and_density(start[:, :, None] + stride[:, :, None] * _UNIFORM_STEPS)
    density /= cdf
    weight: Array = np.matmul(density, cdf.prod(axis=1)[:, :, None])[:, :, 0]
    weight *= stride
    weight /= weight.sum(axis=1, keepdims=True)
    return weight


def _on_quantile_grid(means: Array, sds: Array) -> Array:
    """Trapezoidal Stieltjes sums over the union of the arms' quantile nodes: means and sds (B, K) -> (B, K)."""
    if means.shape[1] > _MANY:
        return np.stack([_of_many(mean, sd) for mean, sd in zip(means, sds, strict=True)])
    grid = (means[:, :, None] + sds[:, :, None] * _QUANTILES).reshape(means.shape[0], -1)
    grid.sort(axis=1)
    cdf, _ = _cdf_and_density((grid[:, None, :] - means[:, :, None]) / sds[:, :, None])
    others = _product_of_others(cdf)
    weight: Array = np.einsum("bkn,bkn->bk", others[:, :, 1:] + others[:, :, :-1], np.diff(cdf, axis=2))
    np.maximum(weight, 0.0, out=weight)
    weight /= weight.sum(axis=1, keepdims=True)
    return weight


def _of_many(means: Array, sds: Array) -> Array:
    """The same for one instance with many arms: (K,) -> (K,).

    Arms and nodes that lie 5 sds below where some arm surely is are left out, and the others' nodes are the sparser the
    more arms there are: what is near an arm has nodes of its own.
    """
    low = float((means - _REACH * sds).max())
    out = np.zeros_like(means)
    kept = np.flatnonzero(means + _REACH * sds >= low)
    mean, sd = means[kept], sds[kept]
    nodes = np.linspace(-_REACH, _REACH, max(_QUANTILE_NODES * _MANY // len(kept), _FEWEST_NODES))
    grid = np.unique((mean[:, None] + sd[:, None] * nodes).ravel())
    grid = np.concatenate([[low], grid[grid > low]])
    cdf = _cdf_and_density((grid - mean[:, None]) / sd[:, None])[0]
    logs = np.log(np.maximum(cdf, 1e-300))
    others = np.exp(logs.sum(axis=0) - logs)
    weight = ((others[:, 1:] + others[:, :-1]) * np.diff(cdf, axis=1)).sum(axis=1)
    out[kept] = np.maximum(weight, 0.0)
    out /= out.sum()
    return out


def _product_of_others(cdf: Array) -> Array:
    """Π_{j≠k} of (B, K, N) along K, without division."""
    n_arms = cdf.shape[1]
    before = np.ones_like(cdf)
    after = np.ones_like(cdf)
    for k in range(1, n_arms):
        np.multiply(before[:, k - 1], cdf[:, k - 1], out=before[:, k])
        np.multiply(after[:, n_arms - k], cdf[:, n_arms - k], out=after[:, n_arms - k - 1])
    before *= after
    return before


def _masked(means: Array, sds: Array, possible: NDArray[np.bool_]) -> Array:
    """The same with some arms out of the race, row by row."""
    out = np.zeros_like(means)
    for row in range(means.shape[0]):
        arms = np.flatnonzero(possible[row])
        if arms.size:
            out[row, arms] = argmax_propensities(means[row : row + 1, arms], sds[row : row + 1, arms])[0]
    return out
