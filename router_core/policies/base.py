"""What a policy is, and the draw that all one-call policies share.

A policy turns contexts into an independent Gaussian belief per arm; the arm with the largest draw is asked.
Deterministic policies believe with sd 0, `random` believes the same of every arm, `single:<model>` believes −inf of the
others. So drawing, ranking for fallbacks, and propensities are written once, here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from router_core.posterior import Posterior
from router_core.propensity import argmax_propensities

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Beliefs:
    """Independent Gaussians over what each arm is worth: means and sds (B, K) float64; mean −inf: never ask this
    arm.
    """

    means: Array
    sds: Array


@dataclass(frozen=True, slots=True)
class Choices:
    """What was drawn for B instances.

    Attributes:
        ranking: (B, K) int64, arms by decreasing draw: [:, 0] is the drawn arm, the rest the order of fallback.
        draws: (B, K) float64; −inf for arms that the policy never asks.
        means: (B, K) float64, the beliefs' means.
        sds: (B, K) float64, the beliefs' standard deviations.
        propensities: (B, K) float64, P(arm is drawn) given the beliefs.
    """

    ranking: NDArray[np.int64]
    draws: Array
    means: Array
    sds: Array
    propensities: Array


class Policy(Protocol):
    """One system of the paper's tables. Stateless: what was learned is in the posterior."""

    @property
    def name(self) -> str:
        """The name it is selected by."""

    @property
    def asks_all(self) -> bool:
        """True if every RM is asked for each instance and their verdicts are combined (K calls)."""

    def beliefs(self, x: NDArray[np.float32], offsets: Array, posterior: Posterior) -> Beliefs:
        """What each arm is believed to be worth on each instance.

        Args:
            x: (B, d) float32 unit-norm contexts.
            offsets: (B, K) float64, o_k(x) of the run's prior.
            posterior: what the run has learned.
        """


def draw(beliefs: Beliefs, rng: np.random.Generator) -> Choices:
    """One independent draw per arm and instance; ties (equal point masses) are broken evenly.

    Args:
        beliefs: (B, K) Gaussians.
        rng: the run's generator.
    """
    noise = rng.standard_normal(beliefs.means.shape)
    draws = beliefs.means + beliefs.sds * noise
    ranking = np.lexsort((-noise, -draws), axis=-1)
    return Choices(ranking, draws, beliefs.means, beliefs.sds, argmax_propensities(beliefs.means, beliefs.sds))


def propensity_without(means: Array, sds: Array, gone: Sequence[int], asked: int) -> float:
    """P(`asked` has the largest draw among the arms that are not gone): the propensity of a fallback.

    Args:
        means: (K,) of the beliefs.
        sds: (K,) of the beliefs.
        gone: arms that were unavailable or failed before `asked` was asked.
        asked: the arm that answered.
    """
    left = means.copy()
    left[list(gone)] = -np.inf
    return float(argmax_propensities(left[None], sds[None])[0, asked])
