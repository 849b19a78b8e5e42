"""`stacked` and `cascade:B`: learned votes make one verdict of every answer, and say whether another call is worth it.

docs/math/combination.md has the mathematics. The first arm is the Thompson draw of `bayesian`; each further arm is
drawn among those left, in proportion to what its answer is worth beyond its price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from router_core.attempts import ASKED, Attempt, Outcome, answers
from router_core.combine import (
    Answers,
    Combination,
    Pacer,
    Votes,
    call_values,
    margins_of,
    next_call,
    surcharges,
    verdicts_of,
)
from router_core.policies.base import Array, Beliefs
from router_core.policies.bayesian import on_probation, posterior_beliefs
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
        multiplier: price of a call in units of P(right) at which the first arm is drawn.
    """

    name: str
    combination: Combination
    prior: PriorForm | None = PriorForm.CALIBRATED
    one_arm_per_batch: bool = False
    multiplier: float = 0.0

    def beliefs(self, x: NDArray[np.float32], offsets: Array, posterior: Posterior) -> Beliefs:
        """Return those of `bayesian`, less what each arm costs beyond the cheapest."""
        beliefs = on_probation(posterior_beliefs(x, offsets, posterior), posterior)
        if self.combination.prices is None:
            return beliefs
        return Beliefs(
            beliefs.means - surcharges(self.combination.prices, self.multiplier), beliefs.sds, beliefs.floors
        )

    def at(self, multiplier: float | None) -> CombinedPolicy:
        """Return the same policy, drawing first arms at this multiplier; itself where prices are equal."""
        if self.combination.prices is None or multiplier is None:
            return self
        return replace(self, multiplier=multiplier)

    def pacer(self) -> Pacer | None:
        """Return the pacer of a new run; None for `stacked`."""
        return self.combination.pacer(self.name)

    def plan_for(self, view: View) -> Plan:
        """Return the plan for one instance: a single response is asked about once, there is nothing to vote on."""
        return AskBest() if view.n == 1 else VotePlan(self.combination, view)


@dataclass(slots=True)
class VotePlan:
    """Ask the draw; then others while an answer is worth its price. Without a price, ask all at once.

    Attributes:
        combination: learned votes, and prices.
        view: what was believed of the instance, and the price in units of P(right).
        shares: (K,) probabilities that the latest further arm was drawn with.
    """

    combination: Combination
    view: View
    shares: Array | None = None

    @property
    def needs_scale(self) -> bool:
        """False: learned votes read scores by their own offsets."""
        return False

    def next_arms(self, order: Sequence[int], attempts: Sequence[Attempt]) -> Sequence[int]:
        """Return the draw first, the next best while nobody has answered, then the arm that is worth asking.

        With `View.parallel` = 2 the second arm is asked beside the draw, where it is worth its price whatever the draw
        will say.
        """
        tried = {attempt.arm for attempt in attempts if attempt.outcome is not Outcome.ABSENT}
        left = [arm for arm in order if arm not in tried]
        asked = sum([attempt.outcome in ASKED for attempt in attempts])
        if self.view.multiplier is None:
            return () if asked else sorted(left)
        if not answers(attempts):
            second = self._beside(left) if not asked and self._may_ask(2, 1) and self.view.parallel > 1 else ()
            return (*left[:1], *second)
        if not left or not self._may_ask(asked + 1, attempts[-1].turn + 2):
            return ()
        return self._draw(left, answers_of(attempts, self.combination.votes.n_arms, self.view.n))

    def chance(self, arm: int, attempts: Sequence[Attempt]) -> float:
        """Return the probability with which a further arm was drawn among those that could be asked; 1 for others."""
        if self.shares is None or self.shares[arm] == 0.0:
            return 1.0
        turn = attempts[-1].turn if attempts else 0
        closed = [one.arm for one in attempts if one.outcome is Outcome.ABSENT and one.turn == turn]
        return float(self.shares[arm] / np.delete(self.shares, closed).sum())

    def conclude(self, attempts: Sequence[Attempt], scale_of: ScaleOf) -> Given:
        """Make the probability that each response is best the reward. One answer alone keeps its scorer's name.

        A response to which nobody gave a reward has none (NaN).
        """
        told, votes = answers(attempts), self.combination.votes
        probabilities = votes.probabilities(self._offsets(), answers_of(attempts, votes.n_arms, self.view.n))
        verdicts = verdicts_of(probabilities)
        arm = told[0].arm if len(told) == 1 else None
        unread = np.isnan([answer.rewards for answer in told]).all(axis=0)
        rewards = np.where(unread, np.nan, probabilities[0]).tolist()
        return Given(arm, rewards, int(verdicts.preferred[0]), float(verdicts.right[0]))

    def _may_ask(self, calls: int, rounds: int) -> bool:
        return calls <= self.view.max_calls and rounds <= self.view.max_rounds

    def _beside(self, left: Sequence[int]) -> Sequence[int]:
        """Return the arm to ask together with the draw, none where its answer may yet be enough."""
        said = supposed_answers(self.combination.votes, left[0], self.view.n)
        return self._draw(left[1:], said) if len(left) > 1 else ()

    def _draw(self, left: Sequence[int], said: Answers) -> Sequence[int]:
        """Draw one of the arms left; none unless a call is worth its price whichever of the answers holds."""
        shares = further_shares(self.combination, self._offsets(), said, left, self.view.multiplier or 0.0)
        if shares is None:
            return ()
        self.shares = shares
        return (int(self.view.rng.choice(len(shares), p=shares)),)

    def _offsets(self) -> Array:
        """What the arms are believed to be worth, without what the draw held against their prices: (1, K)."""
        means = np.array([self.view.means])
        if self.combination.prices is None or self.view.multiplier is None:
            return means
        return means + surcharges(self.combination.prices, self.view.multiplier)


def further_shares(
    combination: Combination, offsets: Array, said: Answers, left: Sequence[int], multiplier: float
) -> Array | None:
    """Probabilities (K,) with which the next arm is drawn among those left; None where no call is worth its price.

    Args:
        combination: votes and prices.
        offsets: (1, K).
        said: equally likely answers so far, a row each: one after they came. Every row must be worth another call.
        left: arms that may be asked.
        multiplier: μ.
    """
    available = np.zeros(said.verdicts.shape, dtype=np.bool_)
    available[:, list(left)] = True
    values = call_values(combination.votes, offsets.repeat(len(said), axis=0), said)
    going, shares = next_call(values, combination.costs, multiplier, available)
    return np.asarray(shares.mean(axis=0)) if going.all() else None


def supposed_answers(votes: Votes, arm: int, n: int) -> Answers:
    """What an arm may say of n responses, a row for each of its typical margins; which response it prefers is alike."""
    margins = np.full((len(votes.margins), votes.n_arms), np.nan)
    margins[:, arm] = votes.deviations[arm] * np.expm1(votes.margins[:, arm]) / 2.0
    answered = np.zeros(margins.shape, np.bool_)
    answered[:, arm] = True
    return Answers(np.zeros(margins.shape, np.int64), answered, margins, np.full(len(margins), n))


def answers_of(attempts: Sequence[Attempt], n_arms: int, n: int) -> Answers:
    """Return what the attempts at one instance brought, as arrays of one row: K arms, n responses."""
    verdicts, answered = np.zeros((1, n_arms), np.int64), np.zeros((1, n_arms), np.bool_)
    scores = np.full((1, n_arms, n), np.nan)
    for attempt in answers(attempts):
        verdicts[0, attempt.arm], answered[0, attempt.arm] = attempt.verdict, True
        scores[0, attempt.arm] = attempt.rewards
    return Answers(verdicts, answered, margins_of(scores), np.array([n]))
