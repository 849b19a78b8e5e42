"""One policy once through one stream: the vectorised way of policies that do not learn, and the loop of those that do.

Knows policies, the posterior's `fold` and a `Plan`; no files, no summaries. Called by `run`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from router_core.audits.schedule import Progress
from router_core.errors import DatasetError
from router_core.policies import (
    AllCalls,
    Beliefs,
    MajorityPolicy,
    OfflinePolicy,
    Policy,
    RandomPolicy,
    ScoreScale,
    SinglePolicy,
    floor_draws,
    vote_shares,
)
from router_core.posterior import FoldSettings, Posterior, fold, start
from router_core.prior import Prior
from router_core.records import Event, Feedback, Shadow, Signal, Source, chance_of, leaders_of
from router_core.replay.audits import Audits, credits_against
from router_core.replay.stream import Plan, Scenario
from router_core.replay.table import Table
from router_core.replay.trace import ALL_ARMS, Pass

Array = NDArray[np.float64]
Steps = Callable[[int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """Everything that the passes of one policy share.

    Attributes:
        table: the pairs.
        x: (N, d) float32 contexts.
        offsets: (N, K) o_k(x) of the prior.
        policy: which.
        prior: where its posterior starts.
        signal: kind of feedback.
        scenario: what happens to the stream.
        shadow: share of the steps at which every RM is asked, and all verdicts are learned from.
        settings: where the log is cut.
    """

    table: Table
    x: NDArray[np.float32]
    offsets: Array
    policy: Policy
    prior: Prior
    signal: Signal
    scenario: Scenario
    shadow: float = 0.0
    settings: FoldSettings | None = None


def learns(policy: Policy) -> bool:
    """False for policies known to give the same beliefs whatever the posterior."""
    return not isinstance(policy, AllCalls | SinglePolicy | RandomPolicy | OfflinePolicy)


def eligible(beliefs: Beliefs, answered: NDArray[np.bool_], policy: Policy) -> Beliefs:
    """The beliefs (B, K) without arms that abstain there, which nobody asks but a policy of one RM alone."""
    return beliefs if isinstance(policy, SinglePolicy) else beliefs.without(~answered)


def first_choice(beliefs: Beliefs, noise: Array, uniforms: Array) -> NDArray[np.int64]:
    """The drawn arms (B,): `policies.draw` with this noise (B, K) and these uniforms (B, 1 + K) for the floors, without
    the ranking and the propensities.
    """
    draws = beliefs.means + beliefs.sds * noise
    best = draws == draws.max(axis=1, keepdims=True)
    chosen: NDArray[np.int64] = np.where(best, noise, -np.inf).argmax(axis=1)
    if beliefs.floors is not None:
        rows, keys = floor_draws(beliefs.floors, uniforms)
        chosen[rows] = keys.argmax(axis=1)
    return chosen


def fixed_pass(stage: Stage, plan: Plan, on_step: Steps) -> Pass:
    """A one-call policy that does not learn: all draws at once."""
    beliefs = stage.policy.beliefs(stage.x, stage.offsets, start(stage.prior, stage.settings))
    beliefs = eligible(beliefs, stage.table.answered, stage.policy)
    met = Beliefs(beliefs.means[plan.order], beliefs.sds[plan.order])
    asked = first_choice(met, plan.noise, plan.uniforms)
    on_step(len(plan))
    return Pass(plan.seed, plan.order, stage.table.correctness[plan.order, asked], asked)


def combined_correctness(table: Table, policy: AllCalls, scale: ScoreScale) -> Array:
    """(N,) in [0, 1]: is the verdict right of a policy that asks all RMs, of which those that do not abstain are heard;
    1/w where w responses tie for it.

    Majority counts the recorded verdicts; other policies combine the recorded scores.

    Raises:
        DatasetError: the policy combines scores, and some are not recorded.
    """
    right, answered = np.empty(len(table)), table.answered
    for i, (n, label) in enumerate(zip(table.responses.tolist(), table.labels.tolist(), strict=True)):
        arms = np.flatnonzero(answered[i])
        if isinstance(policy, MajorityPolicy):
            right[i] = chance_of(leaders_of(vote_shares(table.verdicts[i, arms].tolist(), n)), label)
            continue
        rewards = table.scores[i, arms, :n]
        if not np.isfinite(rewards).all():
            raise DatasetError(
                f"policy {policy.name!r} combines scores, and the data hold verdicts only: record scores"
            )
        right[i] = chance_of(leaders_of(policy.preference(rewards, scale.rows(arms.tolist())).tolist()), label)
    return right


def all_arms_pass(correct: Array, plan: Plan, on_step: Steps) -> Pass:
    """A policy that asks all RMs, from its (N,) correctness: nothing is drawn."""
    on_step(len(plan))
    return Pass(plan.seed, plan.order, correct[plan.order], np.full(len(plan), ALL_ARMS))


def online_pass(stage: Stage, plan: Plan, on_step: Steps) -> Pass:
    """A policy that learns: draw, wait for the feedback that is due, fold it, draw on.

    Between two arrivals the posterior stands still, so the steps there are drawn at once. A policy with one RM per
    batch draws at a batch's first step, from the mean context.
    """
    loop = Loop(stage, plan)
    while loop.step < len(plan):
        on_step(loop.advance())
    return Pass(plan.seed, plan.order, loop.correct, loop.asked, int(loop.audited.sum()))


class Loop:
    """The mutable half of one online pass: where it is, what is known, what has been asked.

    Attributes:
        step: how many steps are drawn.
        asked: (T,) the drawn arms.
        correct: (T,) how right they were.
        chances: (T,) inclusion probability of each step that was drawn; 0 without audits.
        audited: (T,) which steps are audited.
    """

    def __init__(self, stage: Stage, plan: Plan) -> None:
        self._stage, self._plan = stage, plan
        self._state = start(stage.prior, stage.settings)
        audits, landmarks = stage.scenario.audits, stage.prior.landmarks
        self._schedule = None if audits is None else audits.over(len(plan))
        self._road = Progress()
        self.chances = np.zeros(len(plan))
        self._novel: Sequence[bool | None] = [None] * len(stage.x)
        if audits is not None and landmarks is not None:
            self._novel = [landmarks.is_novel(row) for row in stage.x]
        self._due = plan.due.tolist()
        self._waiting: list[tuple[int, int]] = []
        self.audited = np.zeros(len(plan), bool)
        self._shadowed = plan.shadowed(stage.shadow)
        self._contexts = [row.tobytes() for row in stage.x]
        self._answered = stage.table.answered
        self._progress = np.arange(len(plan)) / len(plan)
        self.step = 0
        self.asked = np.empty(len(plan), np.int64)
        self.correct = np.empty(len(plan))

    def advance(self) -> int:
        """Draw all steps up to the next change of the posterior, then fold what is due; returns how many were drawn."""
        begin, end = self.step, self._meet()
        self.asked[begin:end] = self._draw(begin, end, self._state)
        self.correct[begin:end] = self._earned(begin, end)
        self.step = end
        events = []
        while self._waiting and self._waiting[0][0] < end:
            step = heapq.heappop(self._waiting)[1]
            # Nothing is heard of an RM that abstained: `laser` may have asked one.
            if not np.isnan(self.correct[step]):
                events.append(self._event(step))
        self._state = fold(self._state, events)
        return end - begin

    def _earned(self, begin: int, end: int) -> Array:
        """Correctness of what the drawn arms say."""
        earned: Array = self._stage.table.correctness[self._plan.order[begin:end], self.asked[begin:end]]
        return earned

    def _heard(self, step: int) -> Sequence[int]:
        """The arms besides the drawn one whose verdicts are learned from."""
        return range(len(self._stage.table.pool)) if self._shadowed[step] else ()

    def _meet(self) -> int:
        """Note when each step's feedback is due; return the first step not to be drawn with the present posterior."""
        length, end, whole_batch = len(self._plan), self.step, self._stage.policy.one_arm_per_batch
        limit = min(end + self._stage.scenario.batch, length) if whole_batch else length
        while end < limit and (whole_batch or not self._waiting or self._waiting[0][0] >= end):
            if self._speaks(end) and self._due[end] < length:
                heapq.heappush(self._waiting, (self._due[end], end))
            end += 1
        return end

    def _speaks(self, step: int) -> bool:
        """Return True if something is said of a step: feedback; where there are audits, only if it is chosen."""
        if self._schedule is None:
            return True
        alarms = float(sum([watch.alarms for watch in self._state.watches]))
        novel = self._novel[int(self._plan.order[step])]
        self._road, (self.chances[step],) = self._schedule.advance(self._road, [novel], alarms)
        chosen = bool(self._plan.audit_uniforms[step, 0] < self.chances[step])
        self.audited[step] = chosen
        return chosen

    def _draw(self, begin: int, end: int, state: Posterior) -> NDArray[np.int64]:
        stage, pairs = self._stage, self._plan.order[begin:end]
        noise, uniforms = self._plan.noise[begin:end], self._plan.uniforms[begin:end]
        x, offsets, answered = stage.x[pairs], stage.offsets[pairs], self._answered[pairs]
        if stage.policy.one_arm_per_batch:
            # One draw for all is made among the RMs that answer most of them.
            share = answered.mean(axis=0, keepdims=True)
            answered = np.asarray(share == share.max(), dtype=np.bool_)
            x = x.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)
            offsets, noise, uniforms = offsets.mean(axis=0, keepdims=True), noise[:1], uniforms[:1]
        return first_choice(eligible(self._beliefs(x, offsets, state), answered, stage.policy), noise, uniforms)

    def _beliefs(self, x: NDArray[np.float32], offsets: Array, state: Posterior) -> Beliefs:
        """Return what the draws are made from."""
        return self._stage.policy.beliefs(x, offsets, state)

    def _event(self, step: int) -> Event:
        """The feedback of a step, or the audit, as the run's log would hold it."""
        audits = self._stage.scenario.audits
        if audits is not None:
            return self._audit(step, audits, float(self.chances[step]))
        pair = int(self._plan.order[step])
        feedback = Feedback(self._stage.signal, self._value(step, pair))
        return self._told(step, feedback, self._stage.table.credit[pair], self._heard(step))

    def _audit(self, step: int, audits: Audits, chance: float) -> Event:
        table, pair = self._stage.table, int(self._plan.order[step])
        uniform = float(self._plan.audit_uniforms[step, 1])
        verdict = audits.verdict(int(table.labels[pair]), int(table.responses[pair]), uniform)
        heard = range(len(table.pool)) if audits.ask_all else self._heard(step)
        event = self._told(
            step, Feedback(Signal.PREFERENCE, float(verdict)), credits_against(table, pair, verdict), heard
        )
        return replace(event, source=Source.AUDIT, audit=audits.record(verdict, chance))

    def _told(self, step: int, feedback: Feedback, earned: Array, heard: Sequence[int]) -> Event:
        pair, arm = int(self._plan.order[step]), int(self.asked[step])
        offsets = self._stage.offsets[pair]
        answered = self._answered[pair]
        shadows = tuple(Shadow(k, float(offsets[k]), float(earned[k])) for k in heard if k != arm and answered[k])
        own = float(earned[arm])
        return Event(arm, self._contexts[pair], float(offsets[arm]), own, feedback, str(step), shadows=shadows)

    def _value(self, step: int, pair: int) -> float:
        stage = self._stage
        if stage.signal is Signal.PREFERENCE:
            return float(stage.table.labels[pair])
        if stage.signal is Signal.REWARD:
            return float(self.correct[step])
        at = slice(step, step + 1)
        return float(stage.scenario.loss.losses(self.correct[at], self._progress[at], self._plan.loss_noise[at])[0])
