"""A plan: whom to ask about an instance, given what came back so far, and what the answers make together.

A policy is a plan that also says what it believes of each arm (`base.Policy`). Falling back, asking several, asking
everybody and asking the rest after the reply differ only in `next_arms`. Called by `service.usecases.ask`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from router_core.attempts import ASKED, Attempt, Outcome, answers, reads_all
from router_core.policies.scale import ScoreScale
from router_core.records import verdict_of

Array = NDArray[np.float64]

ScaleOf = Callable[[Sequence[int], Array], ScoreScale | None]
"""Scale of the scorers that answered, from their arms (K',) and their raw rewards (K', n); None while it is unknown."""


@dataclass(frozen=True, slots=True)
class Given:
    """What the caller gets for one instance.

    Attributes:
        arm: whose answer it is; None where a plan combined several.
        rewards: one number per response (n,).
        verdict: the preferred response, or TIE.
        p_right: probability that the verdict is right; None where nothing says.
    """

    arm: int | None
    rewards: list[float]
    verdict: int
    p_right: float | None = None


@dataclass(frozen=True, slots=True)
class View:
    """What a policy knows of one instance when it makes its plan.

    Attributes:
        n: number of responses.
        means: of the draws (K,), o_k(x) with the posterior's residual.
        multiplier: price of a call in units of P(right); None where price does not matter.
        max_calls: scorers that may be asked, at most.
        rng: for the draws after the first.
        parallel: scorers that may be asked at once in the first round, 1 or 2.
        max_rounds: rounds of asking, at most, once somebody has answered.
    """

    n: int
    means: Sequence[float]
    multiplier: float | None
    max_calls: int
    rng: np.random.Generator
    parallel: int = 1
    max_rounds: int = sys.maxsize


class Plan(Protocol):
    """Whom to ask, and what becomes of the answers. Stateless."""

    @property
    def needs_scale(self) -> bool:
        """True if `conclude` asks for the scale of the scorers that answered."""

    def next_arms(self, order: Sequence[int], attempts: Sequence[Attempt]) -> Sequence[int]:
        """Return the arms to ask now, all at once; none when the answers are enough, or nobody is left.

        Arms that cannot be asked come back as attempts that were `AWAY`, and the plan is asked again, before any other
        arm that it named is asked.

        Args:
            order: arms by decreasing draw, without those that the policy never asks.
            attempts: what happened so far.
        """

    def chance(self, arm: int, attempts: Sequence[Attempt]) -> float:
        """Return the probability with which the plan named an arm when it did, given what came before; 1 for the first
        choice, whose propensity is the draw's.

        Args:
            arm: that is being asked.
            attempts: what happened so far, with the arms that could not have been asked now.
        """

    def conclude(self, attempts: Sequence[Attempt], scale_of: ScaleOf) -> Given:
        """Make the reward of the answers.

        Args:
            attempts: at least one of them answered.
            scale_of: scale of the scorers that answered; asked only by plans with `needs_scale`.
        """


class Certain:
    """The part of a plan that names arms without drawing, and combines nothing."""

    __slots__ = ()

    @property
    def needs_scale(self) -> bool:
        """False: one scorer's answer is handed on as it is."""
        return False

    def chance(self, arm: int, attempts: Sequence[Attempt]) -> float:
        """Return 1."""
        return 1.0


class AskBest(Certain):
    """Ask the best draw; after a failure, the next best. Its answer is the reward. One call unless somebody fails.

    A scorer that cannot read all responses whole is followed by the next best, too. Where none can, the reward is the
    answer about most of them.
    """

    __slots__ = ()

    def next_arms(self, order: Sequence[int], attempts: Sequence[Attempt]) -> Sequence[int]:
        """Return the best draw that was not tried yet, until one has answered."""
        if not attempts:
            return order[:1]
        if attempts[-1].outcome is Outcome.ANSWERED and reads_all(attempts[-1]):
            return ()
        tried = {attempt.arm for attempt in attempts if attempt.outcome is not Outcome.ABSENT}
        return next(((arm,) for arm in order if arm not in tried), ())

    def conclude(self, attempts: Sequence[Attempt], scale_of: ScaleOf) -> Given:
        """Hand on the answer, the first of those about most responses."""
        answer = attempts[-1]
        if answer.outcome is not Outcome.ANSWERED or not reads_all(answer):
            answer = max(answers(attempts), key=lambda told: sum([reward == reward for reward in told.rewards]))
        return Given(answer.arm, answer.rewards, answer.verdict)


class AskAll(Certain):
    """Ask every arm at once; `combine` and `preference` make one reward and one verdict of those that answer."""

    __slots__ = ()

    def next_arms(self, order: Sequence[int], attempts: Sequence[Attempt]) -> Sequence[int]:
        """Return every arm that is not known to be away, by index, until they have been asked."""
        return () if any(one.outcome in ASKED for one in attempts) else _untried(order, attempts)

    def conclude(self, attempts: Sequence[Attempt], scale_of: ScaleOf) -> Given:
        """Combine the rewards of those that answered, on their scale."""
        told = answers(attempts)
        rewards = np.array([answer.rewards for answer in told])
        scale = scale_of([answer.arm for answer in told], rewards) if self.needs_scale else None
        return Given(None, self.combine(rewards, scale).tolist(), verdict_of(self.preference(rewards, scale).tolist()))

    def combine(self, rewards: Array, scale: ScoreScale | None) -> Array:
        """Return the reward per response that the caller gets.

        Args:
            rewards: (K', n) float64, raw rewards of the arms that answered; at least one row.
            scale: of those arms, in the same order; None: normalise inside this group.

        Returns:
            (n,) float64.
        """
        raise NotImplementedError

    def preference(self, rewards: Array, scale: ScoreScale | None) -> Array:
        """Return (n,) numbers whose largest marks the preferred response; those of `combine` by default."""
        return self.combine(rewards, scale)


@dataclass(frozen=True, slots=True)
class AskRest(Certain):
    """Ask every arm that was not asked before, at once: the shadow of a decision, after its reply.

    Attributes:
        before: what happened before the reply.
    """

    before: Sequence[Attempt]

    def next_arms(self, order: Sequence[int], attempts: Sequence[Attempt]) -> Sequence[int]:
        """Return the arms that were neither asked before nor known to be away, by index, until they have been asked."""
        return () if any(one.outcome in ASKED for one in attempts) else _untried(order, [*self.before, *attempts])

    def conclude(self, attempts: Sequence[Attempt], scale_of: ScaleOf) -> Given:
        """Raise TypeError: a shadow gives no reward."""
        raise TypeError("a shadow gives no reward: its answers go into the log")


def _untried(order: Sequence[int], attempts: Sequence[Attempt]) -> list[int]:
    tried = {attempt.arm for attempt in attempts}
    return sorted(arm for arm in order if arm not in tried)
