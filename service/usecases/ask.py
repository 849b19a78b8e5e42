"""Ask: carry out plans for many instances at once.

In turns: every plan says whom it wants to ask next, instances are grouped by arm, and each arm is asked once for its
group. Falling back, asking all and shadowing are what plans say, not code here. What every scorer refused is an error
of its own instance, never an invented reward. Called by `score` and `shadow`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client import Counter

from router_core.attempts import Attempt, Outcome, answers, passed_over
from router_core.policies import Plan
from router_core.records import TIE, Instance, verdict_of
from service.errors import DeadlineExceededError, NoWorkerError, ServiceError
from service.scorers.admission import Ticket
from service.scorers.protocol import (
    AbstainedError,
    Scored,
    Scorer,
    UnreadableVerdictError,
    WorkerError,
    WorkerRejectedError,
    WorkerTimeoutError,
    WorkerTooLongError,
    WorkerUnavailableError,
)

PATIENT_INSTANCES = 64
"""An RM may take `worker_timeout_seconds` for every so many instances that it is asked about at once."""

UNAVAILABLE = WorkerUnavailableError.code
"""Reason of an attempt at a scorer that could not be asked."""


@dataclass(slots=True)
class Inquiry:
    """One instance on its way through a plan.

    Attributes:
        plan: says whom to ask.
        instance: what is scored.
        order: arms by decreasing draw, without those that are never asked.
        attempts: what happened so far.
        error: why there is no reward.
        refusal: what the last scorer said that refused the instance.
    """

    plan: Plan
    instance: Instance
    order: Sequence[int]
    attempts: Sequence[Attempt] = ()
    error: ServiceError | None = None
    refusal: WorkerError | None = None


class Told(NamedTuple):
    """What one scorer made of one instance."""

    attempt: Attempt
    error: WorkerError | None


class Tickets:
    """The tickets of one call, by arm.

    Args:
        arms: the pool's scorers.
        prices: of one asking, by arm, in units of the cheapest scorer.
        shared: see `Ticket`.
    """

    __slots__ = ("_by_arm", "arms", "prices", "shared")

    def __init__(self, arms: Sequence[Scorer], prices: Sequence[float], *, shared: bool = False) -> None:
        self.arms = arms
        self.prices = prices
        self.shared = shared
        self._by_arm: dict[int, Ticket] = {}

    def closed(self) -> frozenset[int]:
        """Return the arms that this call cannot ask now."""
        taken = self._by_arm
        return frozenset(
            [
                index
                for index, arm in enumerate(self.arms)
                if not (arm.available if index not in taken else taken[index].open)
            ]
        )

    def __getitem__(self, arm: int) -> Ticket:
        """Return the call's ticket for an arm."""
        if arm not in self._by_arm:
            self._by_arm[arm] = Ticket(self.arms[arm], shared=self.shared)
        return self._by_arm[arm]


class Asker:
    """Carries out plans.

    Args:
        called: counter of calls by scorer and outcome (`ok`, or a failure's code).
        timeout_seconds: a scorer that says no time of its own may take so long for every `PATIENT_INSTANCES` instances.
    """

    def __init__(self, called: Callable[[str, str], Counter], *, timeout_seconds: float) -> None:
        self._called = called
        self._timeout_seconds = timeout_seconds

    async def ask(self, inquiries: Sequence[Inquiry], tickets: Tickets, deadline: float) -> None:
        """Carry out all plans: attempts are complete afterwards, and `error` says where nobody could be asked.

        Args:
            inquiries: of one pool.
            tickets: of the call.
            deadline: absolute, by the event loop's clock.
        """
        clock, pool, turn = asyncio.get_running_loop().time, tickets.arms, 0
        going_on = [(one, wanted) for one in inquiries if (wanted := _wanted(one, pool))]
        while going_on:
            if clock() >= deadline:
                # An instance that only wants another opinion keeps the answer that it has.
                for inquiry, _ in going_on:
                    if not answers(inquiry.attempts):
                        inquiry.error = too_late(inquiry.attempts, pool)
                return
            closed = tickets.closed()
            if closed:
                going_on = [(one, able) for one, wanted in going_on if (able := _able(one, wanted, closed, turn, pool))]
            by_arm: dict[int, list[Inquiry]] = {}
            for inquiry, chosen in going_on:
                for arm in chosen:
                    by_arm.setdefault(arm, []).append(inquiry)
            if len(by_arm) == 1:
                [(arm, group)] = by_arm.items()
                for inquiry, told in zip(group, await self._ask_arm(arm, group, tickets, deadline, turn), strict=True):
                    _take(inquiry, [told])
            else:
                asked = await asyncio.gather(
                    *(self._ask_arm(arm, group, tickets, deadline, turn) for arm, group in by_arm.items())
                )
                answered = {arm: iter(outcomes) for arm, outcomes in zip(by_arm, asked, strict=True)}
                for inquiry, chosen in going_on:
                    _take(inquiry, [next(answered[arm]) for arm in chosen])
            going_on = [(one, wanted) for one, _ in going_on if (wanted := _wanted(one, pool))]
            turn += 1

    async def _ask_arm(
        self, arm: int, group: Sequence[Inquiry], tickets: Tickets, deadline: float, turn: int
    ) -> list[Told]:
        """Ask one scorer about all of them. What is wrong with one instance does not fail the others."""
        scorer, ticket = tickets.arms[arm], tickets[arm]
        instances = [inquiry.instance for inquiry in group]
        started = time.perf_counter()
        in_hand = await ticket.bring(len(group))
        patience = (scorer.timeout_seconds or self._timeout_seconds) * -(-in_hand // PATIENT_INSTANCES)
        limit = min(deadline, asyncio.get_running_loop().time() + patience)
        outcomes: Sequence[Scored | WorkerError] = []
        try:
            outcomes = await scorer.score(instances, deadline=limit, ticket=ticket)
        finally:
            lost = any(isinstance(outcome, WorkerTimeoutError | WorkerUnavailableError) for outcome in outcomes)
            ticket.take_back(len(group), lost=lost)
        seconds = time.perf_counter() - started
        told = [
            _told(arm, turn, outcome, seconds, tickets.prices[arm], inquiry.plan.chance(arm, inquiry.attempts))
            for inquiry, outcome in zip(group, outcomes, strict=True)
        ]
        answered = sum([error is None for _, error in told])
        if answered:
            self._called(scorer.name, "ok").inc(answered)
        for _, error in told:
            if error is not None:
                self._called(scorer.name, error.code).inc()
        return told


def _wanted(inquiry: Inquiry, arms: Sequence[Scorer]) -> Sequence[int]:
    """Return whom the plan wants to ask next; without an answer and with nobody left, the error is noted."""
    if inquiry.error is not None:
        return ()
    wanted = inquiry.plan.next_arms(inquiry.order, inquiry.attempts)
    if not wanted and not answers(inquiry.attempts):
        inquiry.error = _nothing_left(inquiry, arms)
    return wanted


def _able(
    inquiry: Inquiry, wanted: Sequence[int], closed: frozenset[int], turn: int, arms: Sequence[Scorer]
) -> Sequence[int]:
    """Return the arms that can be asked in this turn; who is wanted and cannot be is noted as an attempt."""
    while wanted:
        away = [Attempt(arm, turn, Outcome.AWAY, UNAVAILABLE) for arm in wanted if arm in closed]
        inquiry.attempts = (*inquiry.attempts, *away)
        if not away:
            tried = {attempt.arm for attempt in inquiry.attempts if attempt.outcome is not Outcome.ABSENT}
            absent = [
                Attempt(arm, turn, Outcome.ABSENT, UNAVAILABLE)
                for arm in inquiry.order
                if arm in closed and arm not in tried
            ]
            inquiry.attempts = (*inquiry.attempts, *absent)
            return wanted
        wanted = _wanted(inquiry, arms)
    return ()


def _told(arm: int, turn: int, outcome: Scored | WorkerError, seconds: float, price: float, chance: float) -> Told:
    if isinstance(outcome, WorkerError):
        silent = isinstance(outcome, AbstainedError | WorkerTooLongError)
        how = Outcome.ABSTAINED if silent else Outcome.FAILED
        return Told(Attempt(arm, turn, how, outcome.code, [], TIE, seconds, price, 0, chance), outcome)
    rewards, cut = outcome.rewards, outcome.prompt_tokens_cut
    answer = Attempt(arm, turn, Outcome.ANSWERED, "", rewards, verdict_of(rewards), seconds, price, cut, chance)
    if outcome.components or outcome.failures:
        answer = answer._replace(components=dict(outcome.components), failures=[*outcome.failures])
    return Told(answer, None)


def _take(inquiry: Inquiry, told: Sequence[Told]) -> None:
    """Note what came back."""
    inquiry.attempts = (*inquiry.attempts, *[attempt for attempt, _ in told])
    for _, error in told:
        if isinstance(error, WorkerRejectedError):
            inquiry.refusal = error
            if isinstance(error, WorkerTooLongError) and error.final:
                inquiry.error = error


def tried(attempts: Sequence[Attempt], arms: Sequence[Scorer]) -> list[dict[str, str]]:
    """Return model and reason of every attempt that brought nothing, for an error's details."""
    return [{"model": arms[attempt.arm].name, "reason": attempt.reason} for attempt in passed_over(attempts)]


def too_late(attempts: Sequence[Attempt] = (), arms: Sequence[Scorer] = ()) -> DeadlineExceededError:
    """Return the error of an instance whose time was over before a scorer had answered."""
    return DeadlineExceededError(
        "no reward within the request's deadline (request_timeout_seconds): try again, or send smaller batches",
        details={"tried": tried(attempts, arms)},
        retry_after_seconds=1,
    )


def _nothing_left(inquiry: Inquiry, arms: Sequence[Scorer]) -> ServiceError:
    """Return the error of an instance without a reward: the scorer's own words if all refused it, else 503."""
    if not inquiry.order and not inquiry.attempts:
        return _nobody_applies({"tried": []})
    failed = passed_over(inquiry.attempts)
    details: dict[str, object] = {"tried": tried(inquiry.attempts, arms)}
    reasons = {attempt.reason for attempt in failed}
    if reasons == {AbstainedError.code}:
        return _nobody_applies(details)
    if inquiry.refusal is not None:
        reasons.discard(AbstainedError.code)
        if reasons == {WorkerTooLongError.code}:
            return WorkerTooLongError(
                f"too long for every scorer that applies: {inquiry.refusal.message}", details=details, final=True
            )
        if reasons <= {WorkerTooLongError.code, WorkerRejectedError.code, UnreadableVerdictError.code}:
            return WorkerRejectedError(
                f"every reward model refused this input: {inquiry.refusal.message}", details=details
            )
    named = ", ".join(f"{one['model']} ({one['reason']})" for one in tried(inquiry.attempts, arms))
    return NoWorkerError(
        f"no reward model could be asked; tried {named or 'none'}. Check `GET /models` and the workers",
        details=details,
        retry_after_seconds=1,
    )


def _nobody_applies(details: dict[str, object]) -> AbstainedError:
    return AbstainedError(
        "no scorer of the pool applies to this instance: see `applies` in the pool file, and send what they need "
        "(`reference`, `metadata`)",
        details=details,
    )
