"""`bayesian`: Thompson sampling from the posterior (arXiv 2510.02850, online stage), and `offline`: its prior alone.

Both may name the prior form that they insist on: `bayesian:none` is the paper's row "w/o offline".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.policies.base import Array, Beliefs, OneCall
from router_core.pools import PROBATION_SHARE
from router_core.posterior import ArmPosterior, Posterior
from router_core.prior import PriorForm

FLOOR_EVENTS = 16.0
"""Events of an arm after which its weight among the floors is halved."""

PROBATION_DROP = 10.0
"""Taken from the mean of an arm on probation: rewards lie in [0, 1], so that it is never the largest."""

FLOOR_GAP = 0.1
"""Difference of the means over which the weight falls by a factor of e."""


@dataclass(frozen=True, slots=True)
class BayesianPolicy(OneCall):
    """θ_k ~ N(o_k(x) + xᵀμ_k, v² xᵀΣ_k x), one draw per arm per instance.

    Drawing w ~ N(μ, Σ) and taking xᵀw is the same in distribution; the scalar needs no factorisation.
    """

    name: str = "bayesian"
    prior: PriorForm | None = None

    def beliefs(self, x: NDArray[np.float32], offsets: Array, posterior: Posterior) -> Beliefs:
        """The posterior's means, and v times its standard deviations; arms on probation have their share instead."""
        return on_probation(posterior_beliefs(x, offsets, posterior), posterior)


def posterior_beliefs(x: NDArray[np.float32], offsets: Array, posterior: Posterior) -> Beliefs:
    """Means o_k(x) + xᵀμ_k and standard deviations u·v·√(xᵀΣ_k x), (B, K).

    u is the share of the events that spoke of some arms only (`Posterior.partial`): where audits speak of all, nothing
    is learned by asking, and u v and the floors u ε fall to 0.

    One GEMM per arm for the batch, (B, W) by (W, W); one matrix-vector product per arm for one instance.
    """
    means, sds = posterior_moments(x, offsets, posterior)
    hyper = posterior.prior.hyper
    partial = posterior.partial
    floors = floors_of(means, _events_in_floor(posterior), partial * hyper.floor) if hyper.floor else None
    return Beliefs(means, partial * hyper.v * sds, floors)


def posterior_moments(x: NDArray[np.float32], offsets: Array, posterior: Posterior) -> tuple[Array, Array]:
    """Means o_k(x) + xᵀμ_k and standard deviations √(xᵀΣ_k x) of what each arm is worth, (B, K) each.

    The posterior's own, whatever policies make of them: v and u are not in them.
    """
    x = posterior.prior.learned(x)
    precise = x.astype(np.float64)
    variances = np.empty(offsets.shape)
    if len(x) == 1:
        variances[0] = [_variance(arm, x[0], precise[0]) for arm in posterior.arms]
        means = offsets + posterior.means @ precise[0]
    else:
        for k, arm in enumerate(posterior.arms):
            variances[:, k] = np.einsum("bd,bd->b", x @ arm.covariance32, x)
            if len(arm.corrections):
                variances[:, k] -= np.square(precise @ arm.corrections.T).sum(axis=1)
        means = offsets + precise @ posterior.means.T
    return means, np.sqrt(np.maximum(variances, 0.0))


def _events_in_floor(posterior: Posterior) -> Array:
    """n_k (K,); infinite for arms that are retired or on probation: they take no part of the floor."""
    if not posterior.pool.specification:
        return posterior.events
    out, waiting = ~posterior.active, posterior.on_probation
    return np.where(out if waiting is None else out | waiting, np.inf, posterior.events)


def on_probation(beliefs: Beliefs, posterior: Posterior) -> Beliefs:
    """Take new arms of which nothing is known out of the draw, and give them a share of the instances instead.

    The share is u·`PROBATION_SHARE` for all of them together. Their means are lowered rather than removed, so that they
    are still there to fall back on when everybody else is away.
    """
    waiting = posterior.on_probation
    if waiting is None or waiting.sum() == posterior.active.sum():
        return beliefs
    share = posterior.partial * PROBATION_SHARE / float(waiting.sum())
    floors = np.zeros_like(beliefs.means) if beliefs.floors is None else beliefs.floors
    return Beliefs(
        np.where(waiting, beliefs.means - PROBATION_DROP, beliefs.means),
        beliefs.sds,
        np.where(waiting, share, floors),
    )


def floors_of(means: Array, events: Array, floor: float) -> Array:
    """Probability with which each arm is asked whatever is drawn (docs/math/router.md, "The floor").

    f_k = ε w_k/Σ w, w_k = e^{(m_k − max m)/s}·N/(N + n_k): the share ε goes to arms of which little is known and much
    may be expected. s = `FLOOR_GAP`, N = `FLOOR_EVENTS`.

    Args:
        means: (B, K).
        events: (K,) or (B, K), n_k >= 0.
        floor: ε.

    >>> floors_of(np.array([[0.9, 0.8]]), np.array([304.0, 0.0]), 0.02).round(4).tolist()
    [[0.0024, 0.0176]]
    """
    weights = np.exp((means - means.max(axis=1, keepdims=True)) / FLOOR_GAP) * (FLOOR_EVENTS / (FLOOR_EVENTS + events))
    floors: Array = floor * weights / weights.sum(axis=1, keepdims=True)
    return floors


def _variance(arm: ArmPosterior, x: NDArray[np.float32], precise: Array) -> float:
    """xᵀΣ_now x of one context: x (W,) in float32, and the same in float64."""
    variance = float(arm.covariance32.dot(x).dot(x))
    if len(arm.corrections):
        along = arm.corrections.dot(precise)
        variance -= float(along.dot(along))
    return variance


@dataclass(frozen=True, slots=True)
class OfflinePolicy(OneCall):
    """argmax of the prior: o_k(x) + xᵀμ₀_k, without draw or update (the paper's row "w/o online")."""

    name: str = "offline"
    prior: PriorForm | None = None

    def beliefs(self, x: NDArray[np.float32], offsets: Array, posterior: Posterior) -> Beliefs:
        """Point masses at the prior's mean."""
        means = offsets + posterior.prior.learned(x).astype(np.float64) @ posterior.prior.means.T
        return Beliefs(means, np.zeros_like(means))
