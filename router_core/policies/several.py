"""Policies that ask named scorers and make one reward of several: `sum`, `min`, `gate`, `within`.

Unlike `majority` and `uwo` they say which scorer means what. A scorer that does not apply has no part in the reward;
one that failed, or for which a response is too long, leaves no reward (NaN), since a part that is missing would be
taken for another reward. Made by name in `router_core.policies`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.attempts import TOO_LONG, Attempt, Outcome, answers
from router_core.policies.base import AllCalls, Array, Beliefs
from router_core.policies.plan import Given, ScaleOf
from router_core.policies.scale import ScoreScale
from router_core.posterior import Posterior
from router_core.records import verdict_of

WITHIN_BOUND = 0.05
"""Half the width of the range that the rewards of one group of a rule keep to: α and β of HERO's equation."""

NEUTRAL = 0.5
"""Group of a rule that abstains: between wrong and right."""


class SeveralCalls(AllCalls):
    """The half of `Policy` that these policies share: which arms are asked, and what becomes of those that fail."""

    __slots__ = ()

    arms: tuple[int, ...]

    def beliefs(self, x: NDArray[np.float32], offsets: Array, posterior: Posterior) -> Beliefs:
        """Return −inf for arms that are not named."""
        means = np.full_like(offsets, -np.inf)
        means[:, list(self.arms)] = 0.0
        return Beliefs(means, np.zeros_like(offsets))

    def conclude(self, attempts: Sequence[Attempt], scale_of: ScaleOf) -> Given:
        """Make the reward of those that answered; NaN everywhere where one that had to be heard failed.

        One for which all responses are too long counts with NaN for each.
        """
        told = {answer.arm: np.array(answer.rewards) for answer in answers(attempts)}
        n = len(next(iter(told.values())))
        told |= {it.arm: np.full(n, np.nan) for it in attempts if it.reason == TOO_LONG and it.arm in self.arms}
        failed = {it.arm for it in attempts if it.outcome in (Outcome.FAILED, Outcome.AWAY)} - set(told)
        rewards = np.full(n, np.nan) if failed & set(self.arms) else self.made_of(told, n)
        return Given(None, rewards.tolist(), verdict_of(rewards.tolist()))

    def combine(self, rewards: Array, scale: ScoreScale | None) -> Array:
        """Return the reward where every arm of the pool answered: (K, n), in arm order."""
        return self.made_of({arm: rewards[arm] for arm in self.arms}, rewards.shape[1])

    def made_of(self, told: Mapping[int, Array], n: int) -> Array:
        """Return (n,) rewards.

        Args:
            told: arm to its raw rewards (n,), of the arms that did not abstain.
            n: number of responses.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class SumPolicy(SeveralCalls):
    """Weighted sum of raw rewards, as TRL's several reward functions.

    >>> SumPolicy("sum:a=2,b=1", (0, 1), (2.0, 1.0)).combine(np.array([[1.0, 0.0], [0.5, 3.0]]), None).tolist()
    [2.5, 3.0]
    """

    name: str
    arms: tuple[int, ...]
    weights: tuple[float, ...]

    def made_of(self, told: Mapping[int, Array], n: int) -> Array:
        """Return Σ weight·reward over those that did not abstain."""
        out = np.zeros(n)
        for arm, weight in zip(self.arms, self.weights, strict=True):
            if arm in told:
                out += weight * told[arm]
        return out


@dataclass(frozen=True, slots=True)
class MinPolicy(SeveralCalls):
    """The least raw reward: for scorers on one scale, such as rules and judges in [0, 1].

    >>> MinPolicy("min:a,b", (0, 1)).combine(np.array([[1.0, 0.2], [0.5, 0.9]]), None).tolist()
    [0.5, 0.2]
    """

    name: str
    arms: tuple[int, ...]

    def made_of(self, told: Mapping[int, Array], n: int) -> Array:
        """Return the minimum over those that did not abstain."""
        out: Array = np.min([told[arm] for arm in self.arms if arm in told], axis=0)
        return out


@dataclass(frozen=True, slots=True)
class GatePolicy(SeveralCalls):
    """A rule's 0 (or less) is final; what passes has the other's reward, by a sigmoid in (0, 1), so that 0 stays least.

    The rule is asked first, and the other only if a response passes: `python -m loadtests.gate` has what that saves.

    >>> GatePolicy("gate:a,b", (0, 1)).combine(np.array([[0.0, 1.0], [9.0, 0.0]]), None).tolist()
    [0.0, 0.5]
    """

    name: str
    arms: tuple[int, ...]

    def next_arms(self, order: Sequence[int], attempts: Sequence[Attempt]) -> Sequence[int]:
        """Return the rule, then the other, unless the rule lets no response pass, or can read none."""
        rule, model = self.arms
        done = {attempt.arm: attempt for attempt in attempts if attempt.outcome is not Outcome.ABSENT}
        if rule in order and rule not in done:
            return (rule,)
        if model in done or model not in order:
            return ()
        said = done.get(rule)
        if said is not None and said.outcome is Outcome.ANSWERED:
            final = not any(reward > 0 for reward in said.rewards)
        else:
            final = said is not None and said.reason == TOO_LONG
        return () if final else (model,)

    def made_of(self, told: Mapping[int, Array], n: int) -> Array:
        """Return 0 where the rule says so; a rule that abstains lets everything pass."""
        rule, model = (told.get(arm) for arm in self.arms)
        passing = np.full(n, np.nan) if model is None else 0.5 * (1.0 + np.tanh(0.5 * model))
        if rule is None:
            return passing
        if model is None:
            # Only the rule applies, or nothing passes: it alone is the reward.
            return np.where(rule > 0, 1.0, np.where(np.isnan(rule), np.nan, 0.0))
        return np.where(rule > 0, passing, np.where(np.isnan(rule), np.nan, 0.0))


@dataclass(frozen=True, slots=True)
class WithinPolicy(SeveralCalls):
    """The other's rewards, bounded inside the rule's groups: they rank right answers and wrong ones, never across.

    r̂ = v − δ + 2δ·(r − min r)/(max r − min r) over the responses to which the rule gives v (HERO, arXiv 2510.07242,
    stratified normalisation, with v = 0 and 1); v alone where all r of a group are equal.

    >>> WithinPolicy("within:a,b", (0, 1)).combine(np.array([[1.0, 0.0, 1.0], [2.0, 9.0, 5.0]]), None).tolist()
    [0.95, 0.0, 1.05]
    """

    name: str
    arms: tuple[int, ...]

    def made_of(self, told: Mapping[int, Array], n: int) -> Array:
        """Return the bounded rewards; NaN for a response that one of them failed on."""
        rule, model = (told.get(arm) for arm in self.arms)
        groups = np.full(n, NEUTRAL) if rule is None else rule
        if model is None:
            return groups
        out = np.where(np.isnan(model), np.nan, groups)
        for value in np.unique(out[~np.isnan(out)]):
            members = out == value
            spread = np.ptp(model[members])
            if spread > 0:
                place = (model[members] - model[members].min()) / spread
                out[members] = value - WITHIN_BOUND + 2 * WITHIN_BOUND * place
        return out
