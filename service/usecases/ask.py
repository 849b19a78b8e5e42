"""Ask: the RMs that were drawn, and who comes next where one fails.

An RM that fails hands its instances to their next-best draws; what every RM refused is an error of its own instance,
never an invented reward. `service.usecases.score` calls it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np

from router_core.policies import Policy, combined_verdict
from router_core.records import Instance
from service.errors import DeadlineExceededError, NoWorkerError, ServiceError
from service.schemas import Fallback
from service.telemetry import Telemetry
from service.usecases.choose import Chosen
from service.usecases.pieces import Call
from service.usecases.runs import Run
from service.usecases.sticky import StickyChoice
from service.workers.protocol import (
    Rewards,
    WorkerError,
    WorkerRejectedError,
    WorkerTimeoutError,
    WorkerTooLongError,
    WorkerUnavailableError,
)

ALL_ARMS = -1
"""`StoredDecision.arm` where every RM was asked."""

PATIENT_INSTANCES = 64
"""An RM may take `worker_timeout_seconds` for every so many instances that it is asked about at once."""


@dataclass(slots=True)
class Job:
    """One instance on its way: which arms are still to be asked, and what came back.

    Made for every instance of every request: what is seldom filled is an empty tuple, and replaced, not appended to.

    Attributes:
        run: its run.
        policy: who drew.
        instance: what is scored.
        chosen: the draws of its pass.
        row: its place there.
        order: arms that are still to be asked, best draw first.
        gone: arms that were drawn before the last one, and were unavailable or failed.
        away: arms that would have come after the last one, and were unavailable when it was asked.
        failed: arms of `gone` that were asked and gave no reward, in that order.
        away_first: arms that were unavailable when the first one was asked, whichever that was.
        fallbacks: `gone`, with their reasons.
        arm: who answered.
        rewards: the answer, one per response.
        verdict: the preferred response where several RMs were asked; else that of `rewards`.
        error: why there is no answer.
        worker_seconds: spent on asking.
        prompt_tokens_cut: the most that an RM that was asked did not read of the prompt.
        refusals: what the RMs that failed said.
        normalised: `rewards` on the scale of their RM; `scale_version` is that scale's.
        sticky: key of the draw that singles of this prompt share; see `StoredDecision.sticky`.
        followed: the draw of an earlier one of them, which stands in the place of this one's own.
    """

    run: Run
    policy: Policy
    instance: Instance
    chosen: Chosen
    row: int
    order: list[int]
    gone: Sequence[int] = ()
    away: Sequence[int] = ()
    failed: Sequence[int] = ()
    away_first: Sequence[int] = ()
    fallbacks: Sequence[Fallback] = ()
    arm: int = ALL_ARMS
    rewards: list[float] | None = None
    verdict: int | None = None
    error: ServiceError | None = None
    worker_seconds: float = 0.0
    prompt_tokens_cut: int = 0
    refusals: Sequence[WorkerError] = ()
    normalised: list[float | None] | None = None
    scale_version: int = 0
    sticky: str = ""
    followed: StickyChoice | None = None


class Asker:
    """Asks the RMs of a run.

    Args:
        telemetry: counters.
        timeout_seconds: an RM may take so long for every `PATIENT_INSTANCES` instances.
    """

    def __init__(self, telemetry: Telemetry, *, timeout_seconds: float) -> None:
        self._telemetry = telemetry
        self._timeout_seconds = timeout_seconds

    async def ask(self, jobs: Sequence[Job], call: Call) -> None:
        """Ask for all of them: their `rewards` or their `error` are there afterwards.

        In rounds: each asks every open job's best arm that is left, one call per arm.

        Args:
            jobs: of one run.
            call: what they are part of.
        """
        everyone = [job for job in jobs if job.policy.asks_all]
        single = [job for job in jobs if not job.policy.asks_all]
        if everyone:
            await self._ask_all(everyone, call)
        while single:
            by_arm: dict[int, list[Job]] = {}
            late = asyncio.get_running_loop().time() >= call.deadline
            arms = single[0].run.template.arms
            out = {arm for arm, worker in enumerate(arms) if not call.can_ask(arm, worker)}
            for job in single:
                arm = None if late else self._next_arm(job, out)
                if late:
                    job.error = too_late(job)
                elif arm is None:
                    job.error = _nothing_left(job)
                else:
                    by_arm.setdefault(arm, []).append(job)
            if len(by_arm) == 1:
                [(arm, group)] = by_arm.items()
                await self._ask_arm(arm, group, call)
            else:
                await asyncio.gather(*(self._ask_arm(arm, group, call) for arm, group in by_arm.items()))
            single = [job for job in single if job.rewards is None and job.error is None]

    def _next_arm(self, job: Job, out: Set[int]) -> int | None:
        """The best draw whose arm is not `out`; arms that are passed over are noted as fallbacks."""
        while job.order:
            arm = job.order.pop(0)
            if arm not in out:
                if out or job.away:
                    job.away = [other for other in job.order if other in out]
                if not job.failed:
                    job.away_first = [*job.gone, *job.away]
                return arm
            self._give_up(job, arm, "worker_unavailable")
        return None

    def _give_up(self, job: Job, arm: int, reason: str) -> None:
        name = job.run.template.pool[arm]
        job.gone = [*job.gone, arm]
        job.fallbacks = [*job.fallbacks, Fallback(name, reason)]
        self._telemetry.fallbacks.labels(name, reason).inc()

    async def _ask_arm(self, arm: int, jobs: list[Job], call: Call) -> None:
        """Ask one RM about all of them; what is wrong with one of them spoils no other."""
        worker = jobs[0].run.template.arms[arm]
        groups = [[(job.instance.prompt, response) for response in job.instance.responses] for job in jobs]
        started = time.perf_counter()
        asked, slots = await call.enter(arm, worker, len(jobs))
        patience = self._timeout_seconds * -(-asked // PATIENT_INSTANCES)
        limit = min(call.deadline, asyncio.get_running_loop().time() + patience)
        outcomes: list[list[float] | WorkerError] = []
        try:
            if len(groups) == 1 and call.alone:
                outcomes = [await worker.score(groups[0], deadline=limit)]
            else:
                outcomes = await worker.score_groups(groups, deadline=limit, slots=slots)
        except WorkerError as error:
            outcomes = [error] * len(groups)
        finally:
            gone = any(isinstance(outcome, WorkerTimeoutError | WorkerUnavailableError) for outcome in outcomes)
            call.leave(arm, len(jobs), late=gone)
        seconds = time.perf_counter() - started
        answered = 0
        for job, outcome in zip(jobs, outcomes, strict=True):
            job.worker_seconds += seconds
            if isinstance(outcome, WorkerError):
                job.refusals = [*job.refusals, outcome]
                self._telemetry.called(worker.name, outcome.code).inc()
                job.failed = [*job.failed, arm]
                self._give_up(job, arm, outcome.code)
                if isinstance(outcome, WorkerTooLongError) and outcome.final:
                    job.error = outcome
            else:
                job.arm, job.rewards = arm, list(outcome)
                if isinstance(outcome, Rewards):
                    job.prompt_tokens_cut = outcome.prompt_tokens_cut
                answered += 1
        if answered:
            self._telemetry.called(worker.name, "ok").inc(answered)

    async def _ask_all(self, jobs: Sequence[Job], call: Call) -> None:
        """Ask every RM, one call per RM; the policy makes one reward of those that answered."""
        started = time.perf_counter()
        by_arm: list[list[Job]] = []
        calls = []
        for arm, worker in enumerate(jobs[0].run.template.arms):
            votes = [Job(job.run, job.policy, job.instance, job.chosen, job.row, []) for job in jobs]
            by_arm.append(votes)
            if call.can_ask(arm, worker):
                calls.append(self._ask_arm(arm, votes, call))
            else:
                for vote in votes:
                    self._give_up(vote, arm, "worker_unavailable")
        await asyncio.gather(*calls)
        seconds = time.perf_counter() - started
        for job, ballot in zip(jobs, zip(*by_arm, strict=True), strict=True):
            for vote in ballot:
                job.fallbacks = [*job.fallbacks, *vote.fallbacks]
                job.refusals = [*job.refusals, *vote.refusals]
                job.error = job.error or vote.error
                job.prompt_tokens_cut = max(job.prompt_tokens_cut, vote.prompt_tokens_cut)
            answers = {arm: vote.rewards for arm, vote in enumerate(ballot) if vote.rewards is not None}
            if answers and job.error is None:
                _combine(job, answers)
            else:
                job.error = job.error or _nothing_left(job)
            job.worker_seconds = seconds


def too_late(job: Job | None = None) -> DeadlineExceededError:
    """The error of an instance whose time was over before an RM had answered."""
    tried = [{"model": f.model, "reason": f.reason} for f in job.fallbacks] if job is not None else []
    return DeadlineExceededError(
        "no reward within the request's deadline (request_timeout_seconds): try again, or send smaller batches",
        details={"tried": tried},
        retry_after_seconds=1,
    )


def _nothing_left(job: Job) -> ServiceError:
    """The error of an instance that no RM gave a reward for: the worker's own words when all refused it, else 503."""
    details: dict[str, object] = {"tried": [{"model": f.model, "reason": f.reason} for f in job.fallbacks]}
    if job.refusals and len(job.refusals) == len(job.fallbacks):
        rejections = [error for error in job.refusals if isinstance(error, WorkerRejectedError)]
        if all(isinstance(error, WorkerTooLongError) for error in job.refusals):
            return WorkerTooLongError(
                f"too long for every reward model: {rejections[-1].message}", details=details, final=True
            )
        if len(rejections) == len(job.refusals):
            return WorkerRejectedError(
                f"every reward model refused this input: {rejections[-1].message}", details=details
            )
    tried = ", ".join(f"{f.model} ({f.reason})" for f in job.fallbacks)
    return NoWorkerError(
        f"no reward model could be asked; tried {tried or 'none'}. Check `GET /models` and the workers",
        details=details,
        retry_after_seconds=1,
    )


def _combine(job: Job, answers: dict[int, list[float]]) -> None:
    """Make one reward and one verdict of the rewards by arm, on the checkpoint's scale or on what the run has seen."""
    arms, rewards = list(answers), np.array(list(answers.values()))
    known = job.run.template.score_scale
    scale = job.run.scores.rows(arms, rewards) if known is None else known.rows(arms)
    job.run.scores.observe(arms, rewards)
    job.rewards = job.policy.combine(rewards, scale).tolist()
    job.verdict = combined_verdict(job.policy, rewards, scale)
