"""Target policies as probabilities: what a fixed policy would ask at every logged context.

A policy that learns has no fixed probabilities: what it asks depends on what it would have seen. Its posterior of one
moment has, and that is what `fixed_policy` takes. Knows policies and posteriors, no file. Called by
`service.lab.estimates`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router_core.errors import HyperparameterError, UnknownPolicyError
from router_core.ope.data import Array, Mask
from router_core.policies import AllCalls, Policy
from router_core.posterior import Posterior
from router_core.propensity import choice_propensities

CHUNK = 4096
"""Rows per pass; bounds memory, changes nothing."""


def fixed_policy(policy: Policy, x: NDArray[np.float32], available: Mask, posterior: Posterior) -> Array:
    """π(k|x) = P(arm k is drawn among those available), its floor included; the posterior is held fixed.

    Args:
        policy: asks one RM per instance.
        x: (N, d) float32.
        available: (N, K).
        posterior: what the policy knows; its prior gives the offsets.

    Returns:
        (N, K) float64; a row of zeros where the policy would ask none of the available arms.

    Raises:
        UnknownPolicyError: the policy asks all RMs, or one for a whole batch.
    """
    if isinstance(policy, AllCalls):
        raise UnknownPolicyError(
            f"policy {policy.name!r} asks every RM, and a log holds one RM's answer: use `reward-router replay`"
        )
    if policy.one_arm_per_batch:
        raise UnknownPolicyError(
            f"policy {policy.name!r} asks one RM per batch and learns: use `reward-router replay` on recorded pairs"
        )
    out = np.zeros(available.shape)
    for start in range(0, len(x), CHUNK):
        rows = slice(start, start + CHUNK)
        beliefs = policy.beliefs(x[rows], posterior.prior.offsets(x[rows]), posterior)
        means = np.where(available[rows], beliefs.means, -np.inf)
        floors = np.zeros_like(means) if beliefs.floors is None else beliefs.floors
        out[rows] = choice_propensities(means, beliefs.sds, floors)
    return out


def softmax_policy(means: Array, temperature: float, available: Mask) -> Array:
    """π(k|x) ∝ exp(mean_k(x)/T) over the available arms.

    Args:
        means: (N, K), what each arm is believed to be worth; −inf: never.
        temperature: T, positive.
        available: (N, K).

    Raises:
        HyperparameterError: T is not positive.

    >>> softmax_policy(np.array([[0.0, 0.0]]), 1.0, np.array([[True, True]])).tolist()
    [[0.5, 0.5]]
    """
    if not 0.0 < temperature < np.inf:
        raise HyperparameterError(f"temperature is {temperature}: give a positive number")
    left = np.where(available, means, -np.inf) / temperature
    best = left.max(axis=1, keepdims=True)
    weight = np.where(np.isfinite(left), np.exp(left - np.where(np.isfinite(best), best, 0.0)), 0.0)
    total = weight.sum(axis=1, keepdims=True)
    shares: Array = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    return shares
