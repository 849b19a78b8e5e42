"""Reply: what a finished instance becomes, as the decision that is stored and as the reply.

Pure functions of a `Job`. Called by `score`; asks nobody and saves nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from router_core.attempts import (
    TOO_LONG,
    Attempt,
    Outcome,
    answers,
    excluded,
    first_choice,
    reads_all,
    waited_seconds,
)
from router_core.errors import UnknownScaleError
from router_core.moments import ScoreScales
from router_core.policies import AllCalls, Given, Policy, ScoreScale, answers_of, propensity_without
from router_core.policies.bayesian import posterior_moments
from router_core.prior import PriorForm
from router_core.records import TIE
from service.errors import NoRewardError
from service.schemas import AttemptReply, Belief, Fallback, RewardReply, Timings, Truncated
from service.usecases.ask import Inquiry
from service.usecases.choose import Chosen
from service.usecases.decisions import StoredDecision
from service.usecases.runs import Run
from service.usecases.sticky import StickyChoice

FAILED = "failed"
"""Code of a response without a reward whose scorer gave no code."""


@dataclass(slots=True, kw_only=True)
class Job(Inquiry):
    """One instance of a request, from its draw to its reply.

    Attributes:
        run: its run.
        policy: who drew, and made the plan.
        multiplier: price of a call in units of P(right) when the plan was made; 0 where price did not matter.
        chosen: the draws of its pass.
        row: its place there.
        sticky: key of the draw that singles of this prompt share; see `StoredDecision.sticky`.
        explain: True if the reply tells what was believed and drawn.
        followed: the draw of an earlier one of them, which stands in the place of this one's own.
        group: id of the audit that compares singles of this prompt; "" for none.
        inclusion: probability of that audit; None where there is none.
        given: what the plan made of the answers; None until it has, and where there is an error.
        normalised: the rewards on the scale of their scorer; `scale_version` is that scale's.
        decision_id: its name, once it is decided.
        decision: what is stored, once it is decided.
    """

    run: Run
    policy: Policy
    chosen: Chosen
    row: int
    multiplier: float = 0.0
    sticky: str = ""
    explain: bool = False
    followed: StickyChoice | None = None
    group: str = ""
    inclusion: float | None = None
    given: Given | None = None
    normalised: list[float | None] | None = None
    scale_version: int = 0
    decision_id: str = ""
    decision: StoredDecision | None = None

    def conclude(self, scales: ScoreScales | None = None) -> None:
        """Make the reward of the answers, unless there is an error; the run's budget is told what it cost.

        Args:
            scales: what the run's score log tells of its RMs; needed only by plans with `needs_scale`.
        """
        known = self.chosen.template.score_scale

        def scale_of(arms: Sequence[int], rewards: NDArray[np.float64]) -> ScoreScale | None:
            if known is not None:
                return known.rows(arms)
            return None if scales is None else ScoreScale.of_moments([scales.arms[arm] for arm in arms], rewards)

        if self.error is None:
            try:
                given = self.plan.conclude(self.attempts, scale_of)
            except UnknownScaleError as error:
                self.error = NoRewardError(f"run {self.run.name!r}: {error}", retry_after_seconds=1)
                return
            self.given = given if given.p_right is not None else replace(given, p_right=self._right(given))
        self.run.spent(self.policy, sum([attempt.price for attempt in self.attempts]))

    def _right(self, given: Given) -> float | None:
        """Return the probability that a verdict is right which no learned votes have made; None where nothing says."""
        combination, n = self.chosen.template.combination, len(self.instance.responses)
        if combination is None or n == 1 or self.run.prior.form is not PriorForm.CALIBRATED:
            return None
        if given.verdict == TIE:
            return 1.0 / n
        offsets = self.chosen.offsets[self.row]
        if given.arm is not None:
            best, second = sorted([reward for reward in given.rewards if reward == reward])[:-3:-1]
            return combination.votes.alone(given.arm, offsets, best - second, n)
        told = answers_of(self.attempts, combination.votes.n_arms, n)
        return float(combination.votes.probabilities(offsets[None], told)[0, given.verdict])


def own_draw(job: Job) -> StickyChoice:
    """Return the job's own draw, as it may stick."""
    choices, row = job.chosen.choices, job.row
    floors = choices.floors[row]
    return StickyChoice(
        order=[*job.order],
        means=choices.means[row].tolist(),
        sds=choices.sds[row].tolist(),
        propensities=choices.propensities[row].tolist(),
        version=job.chosen.posterior.count,
        floors=floors.tolist() if floors.any() else [],
        group=job.group,
        inclusion=job.inclusion,
    )


def beliefs_of(chosen: Chosen, row: int, followed: StickyChoice | None = None) -> list[Belief]:
    """Return what was believed and drawn, by arm.

    Args:
        chosen: the draws of a pass.
        row: the instance's place there.
        followed: an earlier draw that stands in the place of this one's own.
    """
    choices, rows = chosen.choices, slice(row, row + 1)
    doubts = posterior_moments(chosen.x[rows], chosen.offsets[rows], chosen.posterior)[1][0].tolist()
    offsets, draws = chosen.offsets[row].tolist(), choices.draws[row].tolist()
    means, sds, propensities = (values[row].tolist() for values in (choices.means, choices.sds, choices.propensities))
    if followed is not None:
        means, sds, propensities = followed.means, followed.sds, followed.propensities
        draws = [-math.inf] * len(draws)
    return [
        Belief(
            model=model,
            offset=offsets[arm],
            mean=_finite(means[arm]),
            sd=sds[arm],
            doubt=doubts[arm],
            draw=_finite(draws[arm]),
            propensity=propensities[arm],
        )
        # An earlier draw may be of a smaller pool.
        for arm, model in enumerate(chosen.template.pool[: len(means)])
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def decision_of(job: Job, given: Given, now_ms: int) -> StoredDecision:
    """Return what is stored about an instance that has a reward.

    Args:
        job: the instance.
        given: its reward.
        now_ms: Unix time in milliseconds.
    """
    # A single that follows another's draw was decided by that one: its beliefs and its propensity are the honest ones.
    draw = job.followed or own_draw(job)
    return StoredDecision(
        n=len(job.instance.responses),
        x=job.chosen.x[job.row].tobytes(),
        offsets=job.chosen.offsets[job.row].tolist(),
        means=draw.means,
        sds=draw.sds,
        propensities=draw.propensities,
        policy=job.policy.name,
        version=draw.version,
        time_ms=now_ms,
        attempts=[*job.attempts],
        arm=given.arm,
        rewards=given.rewards,
        verdict=given.verdict,
        propensity=_propensity(job, given, draw),
        sticky=job.sticky,
        multiplier=job.multiplier,
        p_right=given.p_right,
        floors=draw.floors,
        reference=job.instance.reference,
        metadata=dict(job.instance.metadata),
        inclusion=draw.inclusion if job.sticky else None,
        group=draw.group if job.sticky else "",
    )


def _propensity(job: Job, given: Given, draw: StickyChoice) -> float:
    """Return the probability that the arm would give the reward, among those that could."""
    if isinstance(job.policy, AllCalls) or (job.multiplier == 0.0 and given.arm is None):
        return 1.0
    if len(job.attempts) == 1:
        return draw.propensities[job.attempts[0].arm]
    if job.multiplier:
        return _of_sequence(job, draw)
    assert given.arm is not None
    gone = excluded(job.attempts, next(it.turn for it in reversed(job.attempts) if it.arm == given.arm))
    return _propensity_without(draw, gone, given.arm)


def _of_sequence(job: Job, draw: StickyChoice) -> float:
    """Return the probability of the whole sequence of arms: the first draw's, times the chance of each further one."""
    first = first_choice(job.attempts)
    assert first is not None
    propensity = _propensity_without(draw, excluded(job.attempts, 0), first.arm)
    return propensity * math.prod([attempt.chance for attempt in job.attempts])


def _propensity_without(draw: StickyChoice, gone: Sequence[int], asked: int) -> float:
    floors = draw.floors or [0.0] * len(draw.means)
    return propensity_without(np.array(draw.means), np.array(draw.sds), np.array(floors), gone, asked)


def reply_of(
    job: Job, decision: StoredDecision, *, recorded: bool, store_seconds: float, started: float
) -> RewardReply:
    """Return the reply to an instance that has a reward.

    Args:
        job: the instance.
        decision: what was stored about it.
        recorded: False if it could not be saved.
        store_seconds: time of saving.
        started: `time.perf_counter()` at the beginning of the request.
    """
    pool, raw, normalised, attempts = job.chosen.template.pool, decision.rewards, job.normalised, job.attempts
    rewards = _told_rewards(raw if normalised is None else normalised)
    valid = [reward is not None for reward in rewards]
    ordered = sorted([reward for reward in rewards if reward is not None], reverse=True)
    fallbacks = [] if len(attempts) == 1 else _fallbacks(attempts, decision.arm, pool)
    cut = max([attempt.prompt_tokens_cut for attempt in attempts])
    return RewardReply(
        decision_id=job.decision_id,
        run=job.run.name,
        model=job.policy.name if decision.arm is None else pool[decision.arm],
        rewards=rewards,
        preferred=None if decision.verdict == TIE else decision.verdict,
        margin=ordered[0] - ordered[1] if len(ordered) > 1 else None,
        propensity=decision.propensity,
        p_right=decision.p_right,
        price=sum([attempt.price for attempt in attempts]),
        policy=decision.policy,
        posterior_version=decision.version,
        fallback=bool(fallbacks),
        recorded=recorded,
        timings=Timings(
            encode_ms=round(job.chosen.encode_seconds * 1e3, 4),
            draw_ms=round(job.chosen.draw_seconds * 1e3, 4),
            worker_ms=round(waited_seconds(attempts) * 1e3, 4),
            store_ms=round(store_seconds * 1e3, 4),
            total_ms=round((time.perf_counter() - started) * 1e3, 4),
        ),
        components=components_of(attempts, pool),
        valid=valid,
        failure=msgspec.UNSET if all(valid) else _failures(rewards, raw, attempts),
        attempts=told_attempts(attempts, pool),
        fallbacks=fallbacks,
        truncated=Truncated(cut) if cut else msgspec.UNSET,
        sticky=msgspec.UNSET if job.followed is None else True,
        raw_rewards=msgspec.UNSET if normalised is None else _told_rewards(raw),
        scale_version=msgspec.UNSET if normalised is None else job.scale_version,
        arm=decision.arm,
        beliefs=beliefs_of(job.chosen, job.row, job.followed) if job.explain else msgspec.UNSET,
    )


def _fallbacks(attempts: Sequence[Attempt], arm: int | None, pool: tuple[str, ...]) -> list[Fallback]:
    """Return who was wanted and gave no reward, or not to all responses where another one's reward was taken."""
    told = [
        it._replace(reason=TOO_LONG)
        if it.outcome is Outcome.ANSWERED and not reads_all(it) and arm is not None and it.arm != arm
        else it
        for it in attempts
    ]
    return [Fallback(pool[it.arm], it.reason) for it in told if it.reason and it.outcome is not Outcome.ABSENT]


def components_of(attempts: Sequence[Attempt], pool: tuple[str, ...]) -> dict[str, list[float | None]]:
    """Return what everyone said who answered, raw, by name; the heads of a scorer as `NAME.HEAD`."""
    out: dict[str, list[float | None]] = {}
    for answer in answers(attempts):
        name = pool[answer.arm]
        out[name] = _told_rewards(answer.rewards)
        for part, values in answer.components.items():
            out[f"{name}.{part}"] = _told_rewards(values)
    return out


def _told_rewards(rewards: Sequence[float | None]) -> list[float | None]:
    """Return null in the place of NaN."""
    return [reward if reward == reward else None for reward in rewards]


def _failures(rewards: Sequence[float | None], raw: Sequence[float], attempts: Sequence[Attempt]) -> list[str | None]:
    """Return per response why it has no reward; None where it has one. With a raw one, its scale is not known yet."""
    told = [answer.failures for answer in answers(attempts) if answer.failures]
    lost = [
        attempt.reason
        for attempt in attempts
        if attempt.outcome in (Outcome.FAILED, Outcome.AWAY) or attempt.reason == TOO_LONG
    ]

    def why(index: int) -> str:
        codes = [failures[index] for failures in told if failures[index]]
        return NoRewardError.code if raw[index] == raw[index] else next(iter([*codes, *lost]), FAILED)

    return [None if reward is not None else why(index) for index, reward in enumerate(rewards)]


def told_attempts(attempts: Sequence[Attempt], pool: tuple[str, ...]) -> list[AttemptReply]:
    """Return what callers are told of each asking."""
    return [
        AttemptReply(
            model=pool[attempt.arm],
            outcome=attempt.outcome.value,
            reason=attempt.reason or None,
            rewards=_told_rewards(attempt.rewards) or None,
            ms=round(attempt.seconds * 1e3, 4),
            price=attempt.price,
        )
        for attempt in attempts
        if attempt.outcome is not Outcome.ABSENT
    ]
