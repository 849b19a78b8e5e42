"""What a policy is, and the draw that all one-call policies share.

A policy turns contexts into an independent Gaussian belief per arm; the arm with the largest draw is asked.
Deterministic policies believe with sd 0, `random` believes the same of every arm, `single:<model>` believes −inf of the
others. So drawing, ranking for fallbacks, and propensities are written once, here. Whom a policy asks, and what it
makes of the answers, is its plan (`plan`). Called by `service.usecases` and by replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from router_core.combine import Pacer
from router_core.policies.plan import AskAll, AskBest, Plan, View
from router_core.policies.scale import ScoreScale
from router_core.posterior import Posterior
from router_core.prior import PriorForm
from router_core.propensity import choice_propensities
from router_core.records import verdict_of

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Beliefs:
    """Independent Gaussians over what each arm is worth.

    Attributes:
        means: (B, K) float64; −inf: never ask this arm.
        sds: (B, K) float64.
        floors: (B, K) or None: with probability f_k an instance is given to arm k whatever is drawn; Σ f_k < 1.
    """

    means: Array
    sds: Array
    floors: Array | None = None

    def without(self, barred: NDArray[np.bool_] | None) -> Beliefs:
        """Return the beliefs with −inf as the mean, and no floor, of what is never asked.

        Args:
            barred: (B, K); None: nothing.
        """
        if barred is None or not barred.any():
            return self
        floors = None if self.floors is None else np.where(barred, 0.0, self.floors)
        return Beliefs(np.where(barred, -np.inf, self.means), self.sds, floors)

    def reading_most(self, readable: NDArray[np.int64] | None) -> Beliefs:
        """Return the beliefs without the arms that can read fewer of an instance's responses than another one.

        Args:
            readable: (B, K), responses that each arm can read whole; None where nothing is known.

        >>> both = Beliefs(np.array([[0.9, 0.5]]), np.zeros((1, 2)))
        >>> both.reading_most(np.array([[1, 2]])).means.tolist()
        [[-inf, 0.5]]
        """
        if readable is None:
            return self
        asked = np.where(np.isneginf(self.means), -1, readable)
        return self.without(asked < asked.max(axis=1, keepdims=True))


@dataclass(frozen=True, slots=True)
class Choices:
    """What was drawn for B instances.

    Attributes:
        ranking: (B, K) int64, arms by decreasing draw, or for the share of the floors in a random order: [:, 0] is the
            drawn arm, the rest the order of fallback.
        draws: (B, K) float64; −inf for arms that the policy never asks.
        means: (B, K) float64, the beliefs' means.
        sds: (B, K) float64, the beliefs' standard deviations.
        propensities: (B, K) float64, P(arm is drawn) given the beliefs.
        floors: (B, K) as the beliefs', zeros where they have none.
    """

    ranking: NDArray[np.int64]
    draws: Array
    means: Array
    sds: Array
    propensities: Array
    floors: Array


class Policy(Protocol):
    """One system of the paper's tables: beliefs and plans. Stateless: what was learned is in the posterior."""

    @property
    def name(self) -> str:
        """The name it is selected by, for example `bayesian:none`."""

    @property
    def prior(self) -> PriorForm | None:
        """The prior form that this policy insists on; None: it takes its run's."""

    @property
    def one_arm_per_batch(self) -> bool:
        """True if all instances that are drawn together in one request share one arm; see `draw_batch`."""

    def beliefs(self, x: NDArray[np.float32], offsets: Array, posterior: Posterior) -> Beliefs:
        """What each arm is believed to be worth on each instance.

        Args:
            x: (B, d) float32 unit-norm contexts.
            offsets: (B, K) float64, o_k(x) of the run's prior.
            posterior: what the run has learned.
        """

    def pacer(self) -> Pacer | None:
        """Return what keeps a new run to its budget; None where the number of calls is fixed."""

    def at(self, multiplier: float | None) -> Policy:
        """Return the policy whose draws are made at this price of a call; itself where price does not matter."""

    def plan_for(self, view: View) -> Plan:
        """Return whom to ask about one instance."""


class FixedCalls:
    """The half of `Policy` that policies share whose number of calls is fixed: the policy is its own plan."""

    __slots__ = ()

    prior: PriorForm | None = None
    one_arm_per_batch: bool = False

    def pacer(self) -> Pacer | None:
        """Return None, since the number of calls is fixed and needs no pacing."""
        return None

    def at(self, multiplier: float | None) -> Self:
        """Return itself: price does not matter."""
        return self

    def plan_for(self, view: View) -> Self:
        """Return itself: the plan is the same for every instance."""
        return self


class OneCall(FixedCalls, AskBest):
    """What policies share that ask the best draw."""

    __slots__ = ()


class AllCalls(FixedCalls, AskAll):
    """What policies share that ask every RM: what is asked depends on nothing learned."""

    __slots__ = ()

    name: str

    def beliefs(self, x: NDArray[np.float32], offsets: Array, posterior: Posterior) -> Beliefs:
        """The same of every arm: the order of asking does not matter."""
        return Beliefs(np.zeros_like(offsets), np.zeros_like(offsets))


def combined_verdict(policy: AllCalls, rewards: Array, scale: ScoreScale | None) -> int:
    """The response that the policy prefers, or TIE; arguments as `AskAll.combine`."""
    return verdict_of(policy.preference(rewards, scale).tolist())


def draw(beliefs: Beliefs, rng: np.random.Generator) -> Choices:
    """One independent draw per arm and instance; ties (equal point masses) are broken evenly.

    With floors f, an instance is given to arm k with probability f_k, and its ranking goes on like that among the rest.

    Args:
        beliefs: (B, K) Gaussians.
        rng: the run's generator.
    """
    noise = rng.standard_normal(beliefs.means.shape)
    draws = beliefs.means + beliefs.sds * noise
    ranking = np.lexsort((-noise, -draws), axis=-1)
    floors = np.zeros_like(draws) if beliefs.floors is None else beliefs.floors
    if beliefs.floors is not None:
        rows, keys = floor_draws(floors, rng.random((len(draws), 1 + draws.shape[1])))
        ranking[rows] = np.argsort(-keys, axis=1, kind="stable")
    propensities = choice_propensities(beliefs.means, beliefs.sds, floors)
    return Choices(ranking, draws, beliefs.means, beliefs.sds, propensities, floors)


def floor_draws(floors: Array, uniforms: Array) -> tuple[NDArray[np.int64], Array]:
    """Which instances fall to the floors, and what takes the place of the draws there.

    The arms follow each other in proportion to their floors: they are ranked by waiting times −ln(1 − u_k)/f_k, so that
    the first among any arms that are left is k with probability f_k/Σ f.

    Args:
        floors: (B, K); an arm with none comes last.
        uniforms: (B, 1 + K) in [0, 1): the first column decides which, the others give the waiting times.

    Returns:
        Rows (R,), and (R, K) waiting times less than 0: the largest comes first.
    """
    rows = np.flatnonzero(uniforms[:, 0] < floors.sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        keys: Array = np.nan_to_num(np.log1p(-uniforms[rows, 1:]) / floors[rows], nan=-np.inf, neginf=-np.inf)
    return rows, keys


def draw_batch(
    policy: Policy,
    x: NDArray[np.float32],
    offsets: Array,
    posterior: Posterior,
    rng: np.random.Generator,
    barred: NDArray[np.bool_] | None = None,
    readable: NDArray[np.int64] | None = None,
) -> Choices:
    """The draws of B instances that came together: one per instance, or one for all where the policy says so.

    A policy with `one_arm_per_batch` sees the mean of the contexts (LASER, arXiv 2410.01735) and draws once; all
    instances get that draw.

    Args:
        policy: whose beliefs are drawn from.
        x: (B, d) float32 contexts, B >= 1.
        offsets: (B, K) float64.
        posterior: what the run has learned.
        rng: the run's generator.
        barred: (B, K), arms that do not apply to an instance and are never asked; None where all apply. One draw for
            all instances bars what does not apply to one of them.
        readable: (B, K), see `Beliefs.reading_most`; one draw for all instances counts the responses of all.
    """
    if not policy.one_arm_per_batch:
        return draw(policy.beliefs(x, offsets, posterior).without(barred).reading_most(readable), rng)
    mean = x.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)
    any_barred = None if barred is None else np.atleast_2d(barred.any(axis=0))
    of_all = None if readable is None else readable.sum(axis=0, keepdims=True)
    beliefs = policy.beliefs(mean, offsets.mean(axis=0, keepdims=True), posterior).without(any_barred)
    one = draw(beliefs.reading_most(of_all), rng)
    size = len(x)
    return Choices(
        one.ranking.repeat(size, axis=0),
        one.draws.repeat(size, axis=0),
        one.means.repeat(size, axis=0),
        one.sds.repeat(size, axis=0),
        one.propensities.repeat(size, axis=0),
        one.floors.repeat(size, axis=0),
    )


def propensity_without(means: Array, sds: Array, floors: Array, gone: Sequence[int], asked: int) -> float:
    """P(`asked` is drawn among the arms that are not gone): the propensity of a fallback.

    Args:
        means: (K,) of the beliefs.
        sds: (K,) of the beliefs.
        floors: (K,) of the beliefs; zeros where there are none.
        gone: arms that were unavailable or failed before `asked` was asked.
        asked: the arm that answered.
    """
    left = means.copy()
    left[list(gone)] = -np.inf
    return float(choice_propensities(left[None], sds[None], floors[None])[0, asked])
