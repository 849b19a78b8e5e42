"""Audit: let a referee look at the decisions that were chosen, after their replies, behind everything else.

What was chosen and not yet refereed stands in the store. Gateways take a few decisions at a time, each for the length
of a lease, ask the referees in order until one does not abstain, and every other RM (`ask: all`), and finish each
decision with one event in the run's log. A gateway that dies leaves its decisions to the next when the lease ends; one
that comes too late changes nothing. Started by `service.gateway`; knows no policy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np

from router_core.attempts import TOO_LONG, Attempt, Outcome, reads_all
from router_core.audits.schedule import Schedule
from router_core.audits.signs import SIGNS, signs_of, words_of
from router_core.policies import AskRest, answers_of
from router_core.records import Instance, verdict_of
from service.errors import ServiceError
from service.scorers.admission import Ticket
from service.scorers.protocol import AbstainedError, Scored, Scorer, WorkerRejectedError
from service.stores.protocol import AuditTask, AuditVerdict, FeedbackStatus, Store
from service.telemetry import Telemetry
from service.usecases.ask import Asker, Inquiry, Tickets
from service.usecases.audit_choice import decode_task
from service.usecases.audit_groups import Part, grouped
from service.usecases.decisions import AUDITED, StoredAudit, StoredDecision, encode_decision
from service.usecases.runs import Run, RunTemplate

logger = logging.getLogger(__name__)

AT_ONCE = 8
"""Decisions that one gateway audits at a time: few, so that requests that come meanwhile find the scorers free."""

MAX_WAITING = 10_000
"""Decisions of a run that may wait for a referee; the oldest ones beyond are dropped and counted."""

POLL_SECONDS = 1.0
"""Pause between two looks at the store, for what other gateways have chosen or left behind."""

YIELD_SECONDS = 0.1
"""How long audits wait for requests that are being answered here; then a few are made all the same, so that a gateway
that is never idle makes up to `AT_ONCE` of them in this time."""

RETRY_SECONDS = 30.0
"""Added to the time that the scorers may take: how long a decision is left alone after a referee was away."""


@dataclass(frozen=True, slots=True)
class Referee:
    """One who is asked about audits.

    Attributes:
        name: in the pool file.
        scorer: who is asked; None for the learned vote of all RMs.
        arm: its index in the pool; None for one that is no arm.
        price: of one asking, in units of the cheapest RM.
    """

    name: str
    scorer: Scorer | None
    arm: int | None
    price: float


@dataclass(frozen=True, slots=True)
class AuditPlan:
    """How decisions are audited.

    Attributes:
        referees: in the order in which they are asked.
        ask_all: every RM that was not asked before the reply is asked too.
        budget: price that the audits of an hour may have; None for no limit.
        trust: how often the referees are expected to be right.
        keep: how many of the newest audits are kept with their texts.
    """

    referees: tuple[Referee, ...]
    ask_all: bool
    budget: float | None
    trust: float
    keep: int


@dataclass(frozen=True, slots=True)
class Audits:
    """The audits of a run's pool.

    Attributes:
        plan: how decisions are audited.
        schedule: with which probability.
        apart: scorers that are asked about audits only.
    """

    plan: AuditPlan
    schedule: Schedule
    apart: tuple[Scorer, ...] = ()


class Case(NamedTuple):
    """One claimed decision: its id, what was stored, its texts."""

    decision_id: str
    decision: StoredDecision
    instance: Instance


class Opinion(NamedTuple):
    """What a referee made of a case: its name, its rewards (n,), and what asking cost."""

    referee: str
    rewards: list[float]
    price: float


class _Rest:
    """The other RMs' answers to some cases, each asked for once.

    Args:
        cases: all of them.
        ask: asks about some.
    """

    def __init__(
        self, cases: Sequence[Case], ask: Callable[[Sequence[Case]], Awaitable[list[Sequence[Attempt]]]]
    ) -> None:
        self.told: list[Sequence[Attempt]] = [()] * len(cases)
        self._cases = cases
        self._ask = ask
        self._asked: set[int] = set()

    async def ask(self, indices: Sequence[int]) -> None:
        """Ask about those cases that were not asked about before."""
        fresh = [i for i in indices if i not in self._asked]
        if not fresh:
            return
        self._asked.update(fresh)
        for i, attempts in zip(fresh, await self._ask([self._cases[i] for i in fresh]), strict=True):
            self.told[i] = attempts


class Auditor:
    """Works off what was chosen; one per process.

    Args:
        store: where it waits.
        runs: the open runs by name; read at each turn. The template of each says how it is audited.
        telemetry: counters.
        timeout_seconds: how long a scorer without a time of its own may take.
        idle: set while no request is being answered here.
    """

    def __init__(
        self,
        store: Store,
        runs: Callable[[], Mapping[str, Run]],
        telemetry: Telemetry,
        *,
        timeout_seconds: float,
        idle: asyncio.Event,
    ) -> None:
        self._store = store
        self._runs = runs
        self._telemetry = telemetry
        self._timeout_seconds = timeout_seconds
        self._idle = idle
        self._asker = Asker(telemetry.audit_calls.labels, timeout_seconds=timeout_seconds)
        self._chosen = asyncio.Event()

    def _patience_seconds(self, template: RunTemplate, plan: AuditPlan) -> float:
        """Time that everybody may take who is asked about an audit, one after the other."""
        referees = [referee.scorer for referee in plan.referees if referee.scorer is not None]
        asked = [*(template.arms[k] for k in template.asked), *referees]
        return sum(scorer.timeout_seconds or self._timeout_seconds for scorer in asked)

    def notify(self) -> None:
        """Say that a decision was chosen, so that nobody waits for the next look."""
        self._chosen.set()

    async def run_forever(self) -> None:
        """Audit until cancelled. What goes wrong is counted and logged; the decisions wait."""
        while True:
            try:
                worked = await self.work_off()
            except ServiceError as error:
                self._telemetry.store_errors.labels("audits").inc()
                logger.warning("audits wait", extra={"fields": {"error": str(error)}})
                worked = False
            except Exception:  # the one place that may: it counts and logs, and the decisions wait
                self._telemetry.audit_errors.inc()
                logger.exception("audit failed")
                worked = False
            if not worked:
                await self._rest()

    async def _rest(self) -> None:
        self._chosen.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_SECONDS):
                await self._chosen.wait()

    async def work_off(self) -> bool:
        """Audit a few decisions of every open run; return True if there were any.

        Only runs that learn are audited: an event is no use to the others now.

        Raises:
            ServiceError: the store does not answer, or has lost a run.
        """
        worked = False
        for run in list(self._runs().values()):
            template = run.template
            if template.audits is None or run.failure is not None or not run.ready.is_set():
                continue
            plan = template.audits.plan
            await self._wait_for_requests()
            queue = await self._store.claim_audits(
                run.name,
                count=AT_ONCE,
                lease_seconds=self._patience_seconds(template, plan) + RETRY_SECONDS,
                keep=MAX_WAITING,
                budget=plan.budget,
            )
            self._telemetry.audits_waiting.labels(run.name).set(queue.waiting)
            if queue.dropped:
                self._count(run, "dropped", queue.dropped)
            if queue.tasks:
                worked = True
                await self._audit_apart(run, template, plan, queue.tasks)
        return worked

    async def _audit_apart(self, run: Run, template: RunTemplate, plan: AuditPlan, tasks: Sequence[AuditTask]) -> None:
        """Audit; where that fails unexpectedly, one by one, so that only a decision that fails alone is given up.

        Raises:
            ServiceError: the store does not answer, or has lost the run.
        """
        try:
            await self._audit(run, template, plan, tasks)
        except ServiceError:
            raise
        except Exception:
            self._telemetry.audit_errors.inc()
            logger.exception("audit failed")
            if len(tasks) > 1:
                for task in tasks:
                    await self._audit_apart(run, template, plan, [task])
                return
            given_up = [AuditVerdict(task.decision_id, 0.0) for task in tasks]
            await self._store.finish_audits(run.name, given_up, identity=run.identity, keep=plan.keep)
            self._count(run, "failed", len(tasks))

    async def _wait_for_requests(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(YIELD_SECONDS):
                await self._idle.wait()

    async def _audit(self, run: Run, template: RunTemplate, plan: AuditPlan, tasks: Sequence[AuditTask]) -> None:
        """Ask about some decisions of one run, and finish those that somebody, or nobody for good, has judged."""
        cases: list[Case] = []
        verdicts: list[AuditVerdict] = []
        unreadable = alone = 0
        for task in tasks:
            try:
                case = _case(task.decision_id, decode_task(task.task))
            except msgspec.ValidationError:
                unreadable += 1
                verdicts.append(AuditVerdict(task.decision_id, 0.0))
                continue
            if case is None:
                alone += 1
                verdicts.append(AuditVerdict(task.decision_id, 0.0))
            else:
                cases.append(case)
        deadline = asyncio.get_running_loop().time() + self._patience_seconds(template, plan)
        rest = _Rest(cases, partial(self._ask_rest, template, deadline)) if plan.ask_all else None
        opinions = await self._refer(template, plan, cases, rest)
        if rest is not None:
            await rest.ask([i for i, opinion in enumerate(opinions) if isinstance(opinion, Opinion)])
        told = [()] * len(cases) if rest is None else rest.told
        away = 0
        for case, attempts, opinion in zip(cases, told, opinions, strict=True):
            if isinstance(opinion, Opinion):
                verdicts.append(_verdict(plan, case, attempts, opinion))
            elif opinion:
                away += 1
            else:
                verdicts.append(AuditVerdict(case.decision_id, _price(attempts)))
        self._count(run, "away", away)
        self._count(run, "unreadable", unreadable)
        self._count(run, "alone", alone)
        results = await self._store.finish_audits(run.name, verdicts, identity=run.identity, keep=plan.keep)
        for verdict, result in zip(verdicts, results, strict=True):
            if result.status is not FeedbackStatus.APPLIED:
                self._count(run, "late")
            elif verdict.value:
                self._count(run, "recorded")
            elif any(case.decision_id == verdict.decision_id for case in cases):
                self._count(run, "abstained")
        self._telemetry.audit_price.labels(run.name).inc(sum(verdict.price for verdict in verdicts))

    async def _ask_rest(self, template: RunTemplate, deadline: float, cases: Sequence[Case]) -> list[Sequence[Attempt]]:
        """Ask every RM that was not asked before the reply; what it said, or why it said nothing."""
        inquiries = [
            Inquiry(AskRest(case.decision.attempts), case.instance, case.decision.known_of(template.asked))
            for case in cases
        ]
        await self._asker.ask(inquiries, Tickets(template.arms, template.prices), deadline)
        return [inquiry.attempts for inquiry in inquiries]

    async def _refer(
        self, template: RunTemplate, plan: AuditPlan, cases: Sequence[Case], rest: _Rest | None
    ) -> list[Opinion | bool]:
        """Return each case's opinion; True where a referee that might have one is away, False where all abstain.

        The other RMs are asked before a referee that is one of them, or their vote; otherwise nobody is asked in vain.
        """
        opinions: list[Opinion | bool] = [False] * len(cases)
        pending = list(range(len(cases)))
        for referee in plan.referees:
            if not pending:
                break
            if rest is not None and (referee.scorer is None or referee.arm is not None):
                await rest.ask(pending)
            attempts = [[*cases[i].decision.attempts, *(rest.told[i] if rest is not None else ())] for i in pending]
            found = await self._ask(referee, template, [cases[i] for i in pending], attempts)
            for i, opinion in zip(pending, found, strict=True):
                opinions[i] = opinion
            pending = [i for i in pending if opinions[i] is False]
        return opinions

    async def _ask(
        self, referee: Referee, template: RunTemplate, cases: Sequence[Case], attempts: Sequence[Sequence[Attempt]]
    ) -> list[Opinion | bool]:
        if referee.scorer is None:
            return [_vote(referee, template, case, made) for case, made in zip(cases, attempts, strict=True)]
        opinions: list[Opinion | bool] = [False] * len(cases)
        asked: list[int] = []
        for i, (case, made) in enumerate(zip(cases, attempts, strict=True)):
            before = next((it for it in made if it.arm == referee.arm), None) if referee.arm is not None else None
            if before is not None and before.outcome is Outcome.ANSWERED and reads_all(before):
                opinions[i] = Opinion(referee.name, before.rewards, 0.0)
            elif (
                before is None or before.outcome not in (Outcome.ANSWERED, Outcome.ABSTAINED)
            ) and referee.scorer.applies(case.instance):
                asked.append(i)
        if not asked:
            return opinions
        outcomes = await self._score(referee.scorer, [cases[i].instance for i in asked])
        for i, outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, Scored):
                # Who has not read all responses cannot say which is the best.
                if TOO_LONG in outcome.failures:
                    continue
                opinions[i] = Opinion(referee.name, outcome.rewards, referee.price)
            else:
                opinions[i] = not isinstance(outcome, AbstainedError | WorkerRejectedError)
        return opinions

    async def _score(self, scorer: Scorer, instances: Sequence[Instance]) -> Sequence[Scored | Exception]:
        """Ask a referee about instances; all are errors where it cannot be asked now."""
        ticket = Ticket(scorer)
        if not ticket.open:
            self._telemetry.audit_calls.labels(scorer.name, "worker_unavailable").inc(len(instances))
            return [ServiceError("away")] * len(instances)
        deadline = asyncio.get_running_loop().time() + (scorer.timeout_seconds or self._timeout_seconds)
        await ticket.bring(len(instances))
        try:
            outcomes = await scorer.score(instances, deadline=deadline, ticket=ticket)
        finally:
            ticket.take_back(len(instances), lost=False)
        for outcome in outcomes:
            code = "ok" if isinstance(outcome, Scored) else outcome.code
            self._telemetry.audit_calls.labels(scorer.name, code).inc()
        return outcomes

    def _count(self, run: Run, outcome: str, count: int = 1) -> None:
        if count:
            self._telemetry.audits.labels(run.name, outcome).inc(count)


def _case(name: str, parts: Sequence[Part]) -> Case | None:
    """Return what is audited; None for a group of singles of which no two can be compared."""
    if not parts[0][0].group:
        return Case(name, *parts[0])
    group = grouped(parts)
    return None if group is None else Case(name, *group)


def _verdict(plan: AuditPlan, case: Case, attempts: Sequence[Attempt], opinion: Opinion) -> AuditVerdict:
    price = _price(attempts) + opinion.price
    signs = zip(*map(signs_of, case.instance.responses), strict=True)
    decision = msgspec.structs.replace(
        case.decision,
        shadows=[*attempts] if plan.ask_all else case.decision.shadows,
        audit=StoredAudit(
            opinion.referee,
            verdict_of(opinion.rewards),
            plan.trust,
            opinion.rewards,
            price,
            signs={name: [*counts] for name, counts in zip(SIGNS, signs, strict=True)},
            words=words_of(case.instance.prompt),
        ),
    )
    shown = msgspec.msgpack.encode(case.instance) if plan.keep else b""
    return AuditVerdict(case.decision_id, price, encode_decision(decision), AUDITED, shown)


def _price(attempts: Sequence[Attempt]) -> float:
    return sum([attempt.price for attempt in attempts])


def _vote(referee: Referee, template: RunTemplate, case: Case, attempts: Sequence[Attempt]) -> Opinion | bool:
    """Return the learned vote of all who answered; False where the checkpoint has learned none, or nobody did.

    True, to be tried again, where the decision's pool is not known here yet.
    """
    combination, n, K = template.combination, case.decision.n, len(template.arms)
    if len(case.decision.offsets) > K:
        # Another gateway has met a change of the pool first.
        return True
    if combination is None or not any(attempt.outcome is Outcome.ANSWERED for attempt in attempts):
        return False
    # The decision may be older than the last arms.
    offsets = np.full((1, K), 0.5)
    offsets[0, : len(case.decision.offsets)] = case.decision.offsets
    rewards = combination.votes.probabilities(offsets, answers_of(attempts, K, n))[0]
    return Opinion(referee.name, rewards.tolist(), 0.0)
