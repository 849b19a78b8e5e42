"""`stacked` and `cascade:B`: learned votes make one verdict of every answer, and say whether another call is worth it.

docs/math/combination.md has the mathematics. The first arm is the Thompson draw of `bayesian`; each further arm is
drawn among those left, in proportion to what its answer is worth beyond its price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from router_core.attempts import ASKED, Attempt, Outcome, answers
from router_core.combine import Answers, Combination, Pacer, Votes, call_values, margins_of, next_call, verdicts_of
from router_core.policies.base import Array, Beliefs
from router_core.policies.bayesian import posterior_beliefs
from router_core.policies.plan import AskBest, Given, Plan, ScaleOf, View
from router_core.posterior import Posterior
from router_core.prior import PriorForm


@dataclass(frozen=True, slots=True)
class CombinedPolicy:
    """A policy of learned votes.

    Attributes:
        name: `stacked` or `cascade:B`.
        combination: the checkpoint's votes and multipliers.
        prior: the calibrated one: votes were learned with its offsets.
    """

    name: str
    combination: Combination
    prior: PriorForm | None = PriorForm.CALIBRATED
    one_arm_per_batch: bool = False

    def beliefs(self, x: NDArray[np.float32], offsets: Array, posterior: Posterior) -> Beliefs:
        """Return those of `bayesian`: the first arm is its draw."""
        return posterior_beliefs(x, offsets, posterior)

    def pacer(self) -> Pacer | None:
        """Return the pacer of a new run; None for `stacked`."""
        return self.combination.pacer(self.name)

    def plan_for(self, view: View) -> Plan:
        """Return the plan for one instance: a single response is asked about once, there is nothing to vote on."""
        return AskBest() if view.n == 1 else VotePlan(self.combination.votes, view)


@dataclass(slots=True)
class VotePlan:
    """Ask the draw; then others, one at a time, while an answer is worth its price. Without a price, ask all at once.

    Attributes:
        votes: learned.
        view: what was believed of the instance, and the price in units of P(right).
        chances: probability with which each further arm was drawn, by arm.
    """

    votes: Votes
    view: View
    chances: dict[int, float] = field(default_factory=dict)

    def next_arms(self, order: Sequence[int], attempts: Sequence[Attempt]) -> Sequence[int]:
        """Return the draw first, the next best while nobody has answered, then the arm that is worth asking."""
        if self.view.multiplier is None:
            return () if attempts else sorted(order)
        if not attempts:
            return order[:1]
        tried = {attempt.arm for attempt in attempts if attempt.outcome is not Outcome.ABSENT}
        left = [arm for arm in order if arm not in tried]
        if not answers(attempts):
            return left[:1]
        asked = sum([attempt.outcome in ASKED for attempt in attempts])
        if not left or asked >= self.view.max_calls:
            return ()
        return self._draw(left, attempts)

    def chance(self, arm: int) -> float:
        """Return the probability with which a further arm was drawn; 1 for others."""
        return self.chances.get(arm, 1.0)

    def conclude(self, attempts: Sequence[Attempt], scale_of: ScaleOf) -> Given:
        """Make the probability that each response is best the reward. One answer alone keeps its scorer's name."""
        told = answers(attempts)
        probabilities = self.votes.probabilities(self._offsets(), answers_of(attempts, self.votes.n_arms, self.view.n))
        verdicts = verdicts_of(probabilities)
        arm = told[0].arm if len(told) == 1 else None
        return Given(arm, probabilities[0].tolist(), int(verdicts.preferred[0]), float(verdicts.right[0]))

    def _draw(self, left: Sequence[int], attempts: Sequence[Attempt]) -> Sequence[int]:
        values = call_values(self.votes, self._offsets(), answers_of(attempts, self.votes.n_arms, self.view.n))
        available = np.zeros((1, self.votes.n_arms), dtype=np.bool_)
        available[0, list(left)] = True
        assert self.view.multiplier is not None
        going, shares = next_call(values, np.ones(self.votes.n_arms), self.view.multiplier, available)
        if not going[0]:
            return ()
        arm = int(self.view.rng.choice(self.votes.n_arms, p=shares[0]))
        self.chances[arm] = float(shares[0, arm])
        return (arm,)

    def _offsets(self) -> Array:
        return np.array([self.view.means])


def answers_of(attempts: Sequence[Attempt], n_arms: int, n: int) -> Answers:
    """Return what the attempts at one instance brought, as arrays of one row: K arms, n responses."""
    verdicts, answered = np.zeros((1, n_arms), np.int64), np.zeros((1, n_arms), np.bool_)
    scores = np.full((1, n_arms, n), np.nan)
    for attempt in answers(attempts):
        verdicts[0, attempt.arm], answered[0, attempt.arm] = attempt.verdict, True
        scores[0, attempt.arm] = attempt.rewards
    return Answers(verdicts, answered, margins_of(scores), np.array([n]))
