"""Score: choose an RM for each instance, ask it, save the decision, answer (design: the way of `POST /reward`).

One path for one instance and for many. A request goes forward through `choose` (contexts and draws), `ask` (plans and
attempts) and `reply` (decision and reply); what was decided is saved before it is answered.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from router_core.attempts import answers, passed_over, waited_seconds
from router_core.moments import ScoreScales
from router_core.policies import AllCalls, OneCall, Policy
from router_core.records import Instance, Signal
from service.encoders.protocol import EncoderInputError
from service.errors import NoWorkerError, ServiceError, StoreUnavailableError, ValidationError
from service.keys.access import EVERYTHING, Access
from service.schemas import BeliefsReply, RewardReply, RewardRequest
from service.settings import OnStoreUnavailable, Settings
from service.stores.ids import RANDOM_BYTES, new_decision_id
from service.stores.protocol import DecisionRecord, Store
from service.telemetry import Telemetry
from service.usecases.ask import Asker, Tickets, too_late
from service.usecases.audit_choice import AuditChooser, ChosenAudits, is_audited_run
from service.usecases.choose import Chooser
from service.usecases.converse import instance_of
from service.usecases.decisions import StoredDecision, content_key, encode_decision
from service.usecases.history import Decided, beginnings
from service.usecases.normalise import Normaliser
from service.usecases.pieces import PIECES_ASKED, Piece, cut, divide
from service.usecases.reply import Job, beliefs_of, decision_of, own_draw, reply_of
from service.usecases.runs import Run, RunRegistry, RunTemplate, Wish
from service.usecases.shadow import Shadowable, Shadower
from service.usecases.sticky import StickyChoices, sticky_key

_Key = TypeVar("_Key", bound=Hashable)

_NEVER = -math.inf
"""Draw of an arm that is never asked."""


@dataclass(frozen=True, slots=True)
class ScoreLimits:
    """Bounds of one request; see `Settings`."""

    max_responses: int
    max_text_chars: int
    max_batch: int
    request_timeout_seconds: float
    worker_timeout_seconds: float
    on_store_unavailable: OnStoreUnavailable
    content_keys: bool
    normalize: bool = False
    piece_responses: int = 0
    """Responses per piece of a batch, 0 for one piece; see `service.usecases.pieces`."""
    keep_texts: bool = False
    """Keep the beginnings of the newest texts for the console."""


def limits_of(settings: Settings) -> ScoreLimits:
    """Return the bounds that settings name."""
    return ScoreLimits(
        max_responses=settings.max_responses,
        max_text_chars=settings.max_text_chars,
        max_batch=settings.max_batch,
        request_timeout_seconds=settings.request_timeout_seconds,
        worker_timeout_seconds=settings.worker_timeout_seconds,
        on_store_unavailable=settings.on_store_unavailable,
        content_keys=settings.content_keys,
        normalize=settings.normalize,
        piece_responses=settings.batch_piece_responses,
        keep_texts=settings.console_texts,
    )


class _Entropy:
    """The operating system's random bytes, fetched many at a time: a call for ten costs as much as one for more."""

    _FETCHED = 4096

    def __init__(self) -> None:
        self._bytes = b""
        self._position = 0

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes; none is given twice."""
        if self._position + count > len(self._bytes):
            self._bytes, self._position = os.urandom(max(count, self._FETCHED)), 0
        taken = self._bytes[self._position : self._position + count]
        self._position += count
        return taken


class RewardService:
    """The use case behind `/reward` and `/reward/batch`.

    Args:
        runs: where runs are opened.
        chooser: encodes and draws.
        store: where decisions are saved.
        telemetry: counters and stage times.
        limits: bounds.
        shadower: asks the other RMs about some instances, after the reply.
        sticky: keeps singles of one prompt with one RM.
        normaliser: gives rewards on the scale of their RM.
        audits: chooses decisions for audits; None where there are none.
        on_chosen: called when a decision was chosen.
        idle: set while no call is being answered.
    """

    def __init__(
        self,
        runs: RunRegistry,
        chooser: Chooser,
        store: Store,
        telemetry: Telemetry,
        limits: ScoreLimits,
        shadower: Shadower,
        sticky: StickyChoices,
        normaliser: Normaliser,
        audits: AuditChooser | None = None,
        on_chosen: Callable[[], None] = lambda: None,
        idle: asyncio.Event | None = None,
    ) -> None:
        self._runs = runs
        self._chooser = chooser
        self._store = store
        self._telemetry = telemetry
        self._limits = limits
        self._shadower = shadower
        self._sticky = sticky
        self._normaliser = normaliser
        self._audits = audits
        self._on_chosen = on_chosen
        self._under_way = 0
        self._idle = idle or asyncio.Event()
        self._idle.set()
        self._asker = Asker(telemetry.called, timeout_seconds=limits.worker_timeout_seconds)
        self._entropy = _Entropy()

    async def score(self, request: RewardRequest, access: Access = EVERYTHING) -> RewardReply:
        """Return the reply to one instance.

        Raises:
            ServiceError: whatever kept the reward away; see `docs/api.md` for the codes.
        """
        result = (await self.score_many([request], access=access))[0]
        if isinstance(result, ServiceError):
            raise result
        return result

    async def score_many(
        self,
        requests: Sequence[RewardRequest | ValidationError],
        *,
        run: str | None = None,
        policy: str | None = None,
        signal: str | None = None,
        normalize: bool | None = None,
        access: Access = EVERYTHING,
    ) -> list[RewardReply | ServiceError]:
        """Return a reply or the error per instance, in order.

        Instances go in pieces: per piece one encode batch, one GEMM per arm and one worker call per arm and chunk; then
        one store pipeline for all. What goes wrong with one piece (its time is over, the encoder is away) is the error
        of its instances, where another piece has come through.

        Args:
            requests: the instances; an error in the place of one that could not be read stays there.
            run: run of those that name none.
            policy: policy of those that name none.
            signal: kind of feedback that runs must have, of those that name none.
            normalize: whether rewards are normalised, of those that do not say; None: the setting.
            access: what the caller may do: instances of other runs are refused.

        Raises:
            ServiceError: what concerns the whole call: too many instances, a run or policy that is wrong for all of
                them, the store away.
        """
        started = time.perf_counter()
        if len(requests) > self._limits.max_batch:
            raise ValidationError(
                f"items holds {len(requests)} instances: send at most {self._limits.max_batch} at once",
                details={"field": "items", "limit": self._limits.max_batch},
            )
        deadline = asyncio.get_running_loop().time() + self._limits.request_timeout_seconds
        refused: dict[int, ServiceError] = {}
        wholes = await self._wholes(requests, run, policy, signal, access, deadline, refused)
        self._under_way += 1
        self._idle.clear()
        try:
            return await self._answer(requests, wholes, deadline, refused, normalize, started)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def believe(self, request: RewardRequest, access: Access = EVERYTHING) -> BeliefsReply:
        """Return what is believed of every scorer on an instance now. Asks nobody and saves nothing.

        Raises:
            ServiceError: the instance cannot be read, or its run or policy is wrong.
        """
        instance = self._read(request, None)
        known = await self._runs.find(request.run, access)
        try:
            async with asyncio.timeout(self._limits.request_timeout_seconds):
                run, policy = await self._open(known.name, request.policy, None)
                chosen = await self._chooser.choose(run, policy, [instance])
        except TimeoutError as error:
            raise too_late() from error
        return BeliefsReply(run.name, policy.name, chosen.posterior.count, beliefs_of(chosen, 0))

    async def _answer(
        self,
        requests: Sequence[RewardRequest | ValidationError],
        wholes: Sequence[Sequence[Piece]],
        deadline: float,
        refused: dict[int, ServiceError],
        normalize: bool | None,
        started: float,
    ) -> list[RewardReply | ServiceError]:
        """Route, normalise, save and reply."""
        jobs = await self._route(wholes, deadline, refused)
        for index, job in jobs.items():
            request = requests[index]
            job.explain = isinstance(request, RewardRequest) and request.explain
        normalize = self._limits.normalize if normalize is None else normalize
        wanted = [job for index, job in jobs.items() if _normalizes(requests[index], normalize)]
        if wanted:
            await self._normalise(wanted)
        replies = dict(zip(jobs, await self._record_and_reply(list(jobs.values()), started), strict=True))
        return [refused[index] if index in refused else replies[index] for index in range(len(requests))]

    async def _wholes(
        self,
        requests: Sequence[RewardRequest | ValidationError],
        run: str | None,
        policy: str | None,
        signal: str | None,
        access: Access,
        deadline: float,
        refused: dict[int, ServiceError],
    ) -> list[list[Piece]]:
        """Return the instances by run, policy and signal, in pieces; those that cannot be scored go into `refused`.

        Raises:
            DeadlineExceededError: a run was not open in time.
        """
        groups: dict[tuple[str | None, str | None, str | None], list[int]] = {}
        read: dict[int, Instance] = {}
        for index, request in enumerate(requests):
            if isinstance(request, ValidationError):
                refused[index] = request
                continue
            try:
                read[index] = self._read(request, index if len(requests) > 1 else None)
            except ValidationError as error:
                refused[index] = error
            else:
                wanted = (request.run or run, request.policy or policy, request.signal or signal)
                groups.setdefault(wanted, []).append(index)
        wholes: list[list[Piece]] = []
        for (run_name, policy_name, signal_name), indices in groups.items():
            try:
                access.check_run(run_name or self._runs.default)
                signal_wished = None if signal_name is None else Signal(signal_name)
                found, chosen_policy = self._opened(run_name, policy_name, signal_wished) or (None, None)
                if found is None or chosen_policy is None:
                    async with asyncio.timeout_at(deadline):
                        found, chosen_policy = await self._open(run_name, policy_name, signal_wished)
            except TimeoutError as error:
                raise too_late() from error
            except StoreUnavailableError:
                raise
            except ServiceError as error:
                if len(indices) == len(requests):
                    raise
                refused.update(dict.fromkeys(indices, error))
                continue
            instances = [read[i] for i in indices]
            whole = Piece(found, chosen_policy, indices, instances, named=bool(policy_name))
            wholes.append(cut(whole, self._limits.piece_responses))
        return wholes

    def _opened(self, name: str | None, policy: str | None, signal: Signal | None) -> tuple[Run, Policy] | None:
        """Return the run and the policy of its pool; None where the run must be waited for.

        Raises:
            ServiceError: there is no such policy, or the run is not what is wished for.
        """
        run = self._runs.opened(name, Wish(None, signal))
        if run is None:
            return None
        chosen = run.template.policy(policy) if policy else run.template.default_policy
        self._runs.opened(name, Wish(chosen.prior, signal))
        return run, chosen

    async def _open(self, name: str | None, policy: str | None, signal: Signal | None) -> tuple[Run, Policy]:
        """As `_opened`, waiting for the run. A new one is opened as the policy of the gateway's own pool wishes.

        Raises:
            ServiceError: there is no such policy, or the run is not what is wished for, or cannot be opened.
        """
        form = None
        if not await self._runs.known(name):
            template = self._runs.template
            form = (template.policy(policy) if policy else template.default_policy).prior
        run = await self._runs.get(name, Wish(form, signal))
        # Of the run's own pool, which is known now.
        chosen = run.template.policy(policy) if policy else run.template.default_policy
        self._runs.opened(name, Wish(chosen.prior, signal))
        return run, chosen

    async def _route(
        self, wholes: Sequence[Sequence[Piece]], deadline: float, refused: dict[int, ServiceError]
    ) -> dict[int, Job]:
        """Choose and ask; the jobs by place, without those of pieces that failed, which go into `refused`.

        Raises:
            ServiceError: what went wrong with the first piece, where it went wrong with all of them.
        """
        if not wholes:
            return {}
        if len(wholes) == 1 and len(wholes[0]) == 1:
            piece = wholes[0][0]
            try:
                jobs = await self._choose(piece, deadline)
            except EncoderInputError as error:
                bad, rest = divide(piece, error.places)
                if not rest.instances:
                    raise
                refused.update(dict.fromkeys(bad.indices, error))
                return await self._route([[rest]], deadline, refused)
            template = jobs[0].chosen.template
            await self._ask(jobs, Tickets(template.arms, template.prices), deadline)
            return dict(zip(piece.indices, jobs, strict=True))
        shared: dict[RunTemplate, Tickets] = {}
        routed = await asyncio.gather(*(self._route_whole(pieces, shared, deadline) for pieces in wholes))
        outcomes = [outcome for part in routed for outcome in part]
        failed = [outcome for _, outcome in outcomes if isinstance(outcome, ServiceError)]
        if len(failed) == len(outcomes):
            raise failed[0]
        found: dict[int, Job] = {}
        for piece, outcome in outcomes:
            if isinstance(outcome, ServiceError):
                refused.update(dict.fromkeys(piece.indices, outcome))
            else:
                found.update(zip(piece.indices, outcome, strict=True))
        return found

    async def _route_whole(
        self, pieces: Sequence[Piece], shared: dict[RunTemplate, Tickets], deadline: float
    ) -> list[tuple[Piece, list[Job] | ServiceError]]:
        """Choose piece after piece; each is asked about while the next ones are chosen."""
        room = asyncio.Semaphore(PIECES_ASKED)

        async def ask(jobs: list[Job]) -> list[Job]:
            template = jobs[0].chosen.template
            if template not in shared:
                shared[template] = Tickets(template.arms, template.prices, shared=True)
            try:
                await self._ask(jobs, shared[template], deadline)
            finally:
                room.release()
            return jobs

        under_way: list[tuple[Piece, asyncio.Task[list[Job]] | ServiceError]] = []
        async with asyncio.TaskGroup() as tasks:
            waiting = deque(pieces)
            while waiting:
                piece = waiting.popleft()
                try:
                    jobs = await self._choose(piece, deadline)
                except EncoderInputError as error:
                    bad, rest = divide(piece, error.places)
                    under_way.append((bad, error))
                    if rest.instances:
                        waiting.appendleft(rest)
                    continue
                except ServiceError as error:
                    under_way.append((piece, error))
                    continue
                await room.acquire()
                under_way.append((piece, tasks.create_task(ask(jobs))))
        return [
            (piece, outcome if isinstance(outcome, ServiceError) else outcome.result()) for piece, outcome in under_way
        ]

    async def _choose(self, piece: Piece, deadline: float) -> list[Job]:
        """Return the jobs of a piece, in order: drawn, and nobody asked yet.

        Raises:
            ServiceError: the encoder is away, or the time is over.
        """
        run = piece.run
        # Of the pool as it is now; the piece may have waited.
        policy = run.template.policy(piece.policy.name) if piece.named else run.template.default_policy
        try:
            async with asyncio.timeout_at(deadline):
                chosen = await self._chooser.choose(run, policy, piece.instances)
                # A copy: a row of a batch would keep the whole batch.
                run.recent.append(chosen.x[0].copy())
                rankings, draws = chosen.choices.ranking.tolist(), chosen.choices.draws.tolist()
                for row, drawn in enumerate(draws):
                    if _NEVER in drawn:
                        rankings[row] = [arm for arm in rankings[row] if drawn[arm] != _NEVER]
                means = chosen.choices.means.tolist()
                jobs = []
                for row, instance in enumerate(piece.instances):
                    view = run.view(len(instance.responses), means[row], chosen.multiplier, chosen.template)
                    jobs.append(
                        Job(
                            policy.plan_for(view),
                            instance,
                            rankings[row],
                            run=run,
                            policy=policy,
                            chosen=chosen,
                            row=row,
                            multiplier=view.multiplier or 0.0,
                        )
                    )
                if not isinstance(policy, AllCalls):
                    if self._sticky.seconds:
                        await self._stick(jobs)
                    for arm, count in _counted([job.order[0] for job in jobs if job.order]).items():
                        self._telemetry.drawn(run.name, chosen.template.pool[arm]).inc(count)
        except TimeoutError as error:
            raise too_late() from error
        return jobs

    async def _ask(self, jobs: Sequence[Job], tickets: Tickets, deadline: float) -> None:
        """Carry out the plans: every job has its reward or its error afterwards."""
        await self._asker.ask(jobs, tickets, deadline)
        scaled = [job for job in jobs if job.plan.needs_scale]
        unknown = [job for job in scaled if job.chosen.template.score_scale is None]
        scales = await self._observed(unknown) if unknown else {}
        for job in jobs:
            job.conclude(scales.get(job.run.name))

    async def _observed(self, jobs: Sequence[Job]) -> dict[str, ScoreScales]:
        """Return what the score logs of the jobs' runs tell, by run, once these answers are in them."""
        scored: dict[str, list[tuple[int, Sequence[float]]]] = {}
        for job in jobs:
            scored.setdefault(job.run.name, []).extend([(it.arm, it.rewards) for it in answers(job.attempts)])
        runs = {job.run.name: job.run for job in jobs}
        return {name: await self._normaliser.observe(runs[name], told) for name, told in scored.items() if told}

    async def _stick(self, jobs: Sequence[Job]) -> None:
        """Singles whose prompt was asked about before take that draw; all of one run and policy."""
        singles = [
            job for job in jobs if len(job.instance.responses) == 1 and job.instance.prompt and len(job.order) > 1
        ]
        if not singles:
            return
        for job in singles:
            job.sticky = sticky_key(job.policy.name, job.instance.prompt)
        audits = self._audits if is_audited_run(singles[0].run) else None
        if audits is not None:
            await self._offer_groups(audits, singles)
        standing = await self._sticky.settle(singles[0].run.name, [(job.sticky, own_draw(job)) for job in singles])
        for job, followed in zip(singles, standing, strict=True):
            if followed is None:
                continue
            # A draw that is older than a change of the pool, and would ask a retired scorer, is followed no more; nor
            # is one of another gateway that has met a change before this one.
            retired = job.chosen.template.retired
            if len(followed.means) > len(retired) or any(retired[arm] for arm in followed.order):
                job.sticky = ""
            else:
                if audits is None:
                    # The draw may be older than the end of the run's audits.
                    followed = msgspec.structs.replace(followed, group="", inclusion=None)
                job.followed, job.order = followed, followed.order
        if audits is not None:
            begun = [job for job in singles if job.followed is None and job.sticky]
            audits.met(singles[0].run, [job.chosen.x[job.row] for job in begun])

    async def _offer_groups(self, audits: AuditChooser, singles: Sequence[Job]) -> None:
        """Give each single the audit that it would begin; all of one run."""
        offered = await audits.offer(singles[0].run, [job.chosen.x[job.row] for job in singles])
        if offered is None:
            return
        now_ms, entropy = int(time.time() * 1000), self._entropy.take(RANDOM_BYTES * len(singles))
        for index, (job, inclusion) in enumerate(zip(singles, offered, strict=True)):
            job.group = new_decision_id(now_ms, entropy[index * RANDOM_BYTES : (index + 1) * RANDOM_BYTES])
            job.inclusion = inclusion

    async def _normalise(self, jobs: Sequence[Job]) -> None:
        """Put the rewards of those that one RM answered on its scale; one exchange with the store per run."""
        by_run: dict[str, list[Job]] = {}
        for job in jobs:
            if job.given is not None and job.given.arm is not None and isinstance(job.policy, OneCall):
                by_run.setdefault(job.run.name, []).append(job)

        async def of_run(answered: list[Job]) -> None:
            scored = [
                (job.given.arm, job.given.rewards)
                for job in answered
                if job.given is not None and job.given.arm is not None
            ]
            found = await self._normaliser.normalise(answered[0].run, scored)
            for job, rewards in zip(answered, found.rewards, strict=True):
                job.normalised, job.scale_version = rewards, found.version

        await asyncio.gather(*map(of_run, by_run.values()))

    def _read(self, request: RewardRequest, index: int | None) -> Instance:
        """Return the instance of a request.

        Raises:
            ValidationError: it is beyond a bound, or its messages cannot be read.
        """
        where = "" if index is None else f"items[{index}]."
        limits = self._limits
        if len(request.responses) > limits.max_responses:
            raise ValidationError(
                f"{where}responses holds {len(request.responses)} texts: send at most {limits.max_responses}",
                details={"field": f"{where}responses", "limit": limits.max_responses},
            )
        longest = limits.max_text_chars
        instance = instance_of(request.prompt, request.responses, request.reference, request.metadata, where=where)
        texts = [instance.prompt, *instance.responses]
        names = ["prompt", *[f"responses[{i}]" for i in range(len(request.responses))]]
        if request.reference is not None:
            texts.append(request.reference)
            names.append("reference")
        for name, fact in (request.metadata or {}).items():
            if isinstance(fact, str):
                texts.append(fact)
                names.append(f"metadata.{name}")
        if max(map(len, texts)) <= longest:
            return instance
        for name, text in zip(names, texts, strict=True):
            if len(text) > longest:
                raise ValidationError(
                    f"{where}{name} is {len(text)} characters long: send at most {longest}",
                    details={"field": f"{where}{name}", "limit": longest},
                )
        return instance

    async def _record_and_reply(self, jobs: Sequence[Job], started: float) -> list[RewardReply | ServiceError]:
        now_ms = int(time.time() * 1000)
        answered = [(job, job.given) for job in jobs if job.given is not None]
        entropy = self._entropy.take(RANDOM_BYTES * len(answered))
        by_run: dict[str, list[DecisionRecord]] = {}
        decided: list[Shadowable] = []
        for index, (job, given) in enumerate(answered):
            job.decision_id = new_decision_id(now_ms, entropy[index * RANDOM_BYTES : (index + 1) * RANDOM_BYTES])
            job.decision = decision_of(job, given, now_ms)
            decided.append(Shadowable(job.run, job.decision_id, job.decision, job.instance))
        tasks = {} if self._audits is None else await self._audits.choose(decided)
        for one in decided:
            key = content_key(one.run.name, one.instance) if self._limits.content_keys else None
            record = DecisionRecord(one.decision_id, encode_decision(one.stored), key)
            by_run.setdefault(one.run.name, []).append(record)
        store_started = time.perf_counter()
        unsaved = await self._save(by_run, tasks)
        store_seconds = time.perf_counter() - store_started
        if by_run:
            self._telemetry.stage["store"].observe(store_seconds)
        if any(chosen.tasks for chosen in tasks.values()):
            self._on_chosen()
        if self._shadower.rate:
            # A loss or a reward says nothing of scorers that were not asked.
            compared = [one for one in decided if one.run.signal is Signal.PREFERENCE]
            self._shadower.offer([one for one in compared if one.run.name not in unsaved])
        for job in jobs:
            if job.decision is not None:
                job.run.history.add(self._decided(job, job.decision, job.run.name not in unsaved))
        self._count(jobs)
        replies: list[RewardReply | ServiceError] = [
            job.error or NoWorkerError("no reward model answered")
            if job.decision is None
            else reply_of(
                job,
                job.decision,
                recorded=job.run.name not in unsaved,
                store_seconds=store_seconds,
                started=started,
            )
            for job in jobs
        ]
        self._telemetry.stage["total"].observe(time.perf_counter() - started)
        return replies

    def _decided(self, job: Job, decision: StoredDecision, recorded: bool) -> Decided:
        draws = None if job.followed is not None else job.chosen.choices.draws[job.row].tolist()
        texts = beginnings(job.instance) if self._limits.keep_texts else None
        return Decided(job.decision_id, decision, draws, recorded, texts)

    def _count(self, jobs: Sequence[Job]) -> None:
        telemetry = self._telemetry
        for job in jobs:
            if len(job.attempts) > 1 or job.given is None:
                for attempt in passed_over(job.attempts):
                    telemetry.fallbacks.labels(job.chosen.template.pool[attempt.arm], attempt.reason).inc()
            if job.given is not None:
                telemetry.stage["worker"].observe(waited_seconds(job.attempts))
            telemetry.paid(job.run.name, job.policy.name).inc(sum([attempt.price for attempt in job.attempts]))
        given = _counted([(job.run.name, job.policy.name) for job in jobs if job.given is not None])
        for (run, policy), count in given.items():
            telemetry.decided(run, policy).inc(count)

    async def _save(self, by_run: dict[str, list[DecisionRecord]], tasks: Mapping[str, ChosenAudits]) -> frozenset[str]:
        """Save the decisions; the runs whose decisions could not be saved, where rewards are answered all the same.

        Raises:
            StoreUnavailableError: the store is away, and rewards are refused then.
        """
        if len(by_run) == 1:
            [(run, records)] = by_run.items()
            failed = [run] if await self._save_run(run, records, tasks.get(run)) is not None else []
        else:
            errors = await asyncio.gather(
                *(self._save_run(run, records, tasks.get(run)) for run, records in by_run.items())
            )
            failed = [run for run, error in zip(by_run, errors, strict=True) if error is not None]
        return frozenset(failed)

    async def _save_run(
        self, run: str, records: list[DecisionRecord], chosen: ChosenAudits | None
    ) -> StoreUnavailableError | None:
        try:
            if self._audits is None or chosen is None:
                await self._store.save_decisions(run, records)
            else:
                await self._audits.save(run, records, chosen)
        except StoreUnavailableError as error:
            self._telemetry.store_errors.labels("save_decisions").inc()
            if self._limits.on_store_unavailable is OnStoreUnavailable.REFUSE:
                raise
            self._telemetry.unrecorded.inc(len(records))
            return error
        return None


def _normalizes(request: RewardRequest | ValidationError, otherwise: bool) -> bool:
    said = None if isinstance(request, ValidationError) else request.normalize
    return otherwise if said is None else said


def _counted(keys: Iterable[_Key]) -> dict[_Key, int]:
    """How often each is there. A `Counter` takes longer to make than the one key of most requests to count."""
    counts: dict[_Key, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return counts
