"""Score: choose an RM for each instance, ask it, save the decision, answer (design: the way of `POST /reward`).

One path for one instance and for many, which go piece by piece: while the RMs are asked about some, the next are
encoded. An RM that fails hands its instances to their next-best draws; what every RM
refused is an error of its own instance, never an invented reward.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass

import msgspec
import numpy as np

from router_core.policies import Policy, combined_verdict, propensity_without
from router_core.records import TIE, Instance, verdict_of
from service.errors import DeadlineExceededError, NoWorkerError, ServiceError, StoreUnavailableError, ValidationError
from service.schemas import Fallback, RewardReply, RewardRequest, Timings, Truncated
from service.settings import OnStoreUnavailable
from service.stores.ids import RANDOM_BYTES, new_decision_id
from service.stores.protocol import DecisionRecord, Store
from service.telemetry import Telemetry
from service.usecases.choose import Chooser, Chosen
from service.usecases.decisions import StoredDecision, content_key, encode_decision
from service.usecases.normalise import Normalised, Normaliser
from service.usecases.pieces import PIECES_ASKED, PIECES_CHOSEN, Piece, cut
from service.usecases.runs import Run, RunRegistry
from service.usecases.shadow import Shadowable, Shadower
from service.usecases.sticky import StickyChoice, StickyChoices, sticky_key
from service.workers.protocol import Arm, Rewards, WorkerError, WorkerRejectedError, WorkerTooLongError

ALL_ARMS = -1
"""`StoredDecision.arm` where every RM was asked."""

PATIENT_INSTANCES = 64
"""An RM may take `worker_timeout_seconds` for every so many instances that it is asked about at once."""


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
    """Of a batch that is encoded and asked about in pieces; see `service.usecases.pieces`."""


@dataclass(slots=True)
class _Job:
    """One instance on its way: which arms are still to be asked, and what came back.

    Made for every instance of every request: what is seldom filled is an empty tuple, and replaced, not appended to.
    """

    run: Run
    policy: Policy
    instance: Instance
    chosen: Chosen
    row: int
    order: list[int]
    gone: Sequence[int] = ()
    """Arms that were drawn before the last one, and were unavailable or failed."""
    away: Sequence[int] = ()
    """Arms that would have come after the last one, and were unavailable when it was asked."""
    failed: Sequence[int] = ()
    """Arms of `gone` that were asked and gave no reward, in that order."""
    away_first: Sequence[int] = ()
    """Arms that were unavailable when the first one was asked, whichever that was."""
    fallbacks: Sequence[Fallback] = ()
    arm: int = ALL_ARMS
    rewards: list[float] | None = None
    verdict: int | None = None
    """The preferred response where several RMs were asked; else that of `rewards`."""
    error: ServiceError | None = None
    worker_seconds: float = 0.0
    prompt_tokens_cut: int = 0
    """The most that an RM that was asked did not read of the prompt."""
    refusals: Sequence[WorkerError] = ()
    normalised: list[float | None] | None = None
    scale_version: int = 0
    sticky: str = ""
    """Key of the draw that singles of this prompt share; see `StoredDecision.sticky`."""
    followed: StickyChoice | None = None
    """The draw of an earlier one of them, which stands in the place of this one's own."""


class _Room:
    """For how many pieces of one run and policy there is room at once, in each stage.

    Attributes:
        choosing: of those that are encoded and drawn.
        asking: of those that RMs are asked about.
    """

    __slots__ = ("asking", "choosing")

    def __init__(self) -> None:
        self.choosing = asyncio.Semaphore(PIECES_CHOSEN)
        self.asking = asyncio.Semaphore(PIECES_ASKED)


class _Call:
    """What the pieces of one call share.

    Attributes:
        deadline: of choosing and asking, by the event loop's clock.
        pieces: how many there are.
        asked: instances that an RM is being asked about, by arm.
    """

    __slots__ = ("_returned", "_rooms", "_slots", "asked", "deadline", "pieces")

    def __init__(self, deadline: float, pieces: int) -> None:
        self.deadline = deadline
        self.pieces = pieces
        self.asked: Counter[int] = Counter()
        self._returned = asyncio.Event()
        self._slots: dict[int, asyncio.Semaphore] = {}
        self._rooms: dict[tuple[str, str], _Room] = {}

    def room(self, piece: Piece) -> _Room:
        """That of the piece's run and policy: those of another one do not wait for these."""
        return self._rooms.setdefault((piece.run.name, piece.policy.name), _Room())

    def slots(self, arm: int, worker: Arm) -> asyncio.Semaphore:
        """Of the requests to the RM: pieces have no more of them in flight together than a whole batch has."""
        if arm not in self._slots:
            self._slots[arm] = worker.slots()
        return self._slots[arm]

    def can_ask(self, arm: int, worker: Arm) -> bool:
        """Whether the RM is there. One that may be at its limit only with what this call asks of it is."""
        return worker.available or self.asked[arm] > 0

    async def enter(self, arm: int, worker: Arm, instances: int) -> None:
        """Count instances that the RM is to be asked about, as soon as it has room beside those of other pieces.

        Without the wait a long batch would find an RM full of its own pieces, and take it for away.
        """
        while self.asked[arm] > 0 and not worker.available:
            await self._returned.wait()
        self.asked[arm] += instances

    def leave(self, arm: int, instances: int) -> None:
        """The RM has answered about these."""
        self.asked[arm] -= instances
        # An event of its own for each return: whoever waits looks again, and waits for the next one if need be.
        self._returned.set()
        self._returned = asyncio.Event()


class _Entropy:
    """The operating system's random bytes, fetched many at a time: a call for ten costs as much as one for more."""

    _FETCHED = 4096

    def __init__(self) -> None:
        self._bytes = b""
        self._position = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes; none is given twice."""
        if self._position + count > len(self._bytes):
            self._bytes, self._position = os.urandom(max(count, self._FETCHED)), 0
        taken = self._bytes[self._position : self._position + count]
        self._position += count
        return taken


class Scorer:
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
    ) -> None:
        self._runs = runs
        self._chooser = chooser
        self._store = store
        self._telemetry = telemetry
        self._limits = limits
        self._shadower = shadower
        self._sticky = sticky
        self._normaliser = normaliser
        self._entropy = _Entropy()

    async def score(self, request: RewardRequest) -> RewardReply:
        """One instance.

        Raises:
            ServiceError: whatever kept the reward away; see `docs/api.md` for the codes.
        """
        result = (await self.score_many([request]))[0]
        if isinstance(result, ServiceError):
            raise result
        return result

    async def score_many(
        self,
        requests: Sequence[RewardRequest],
        *,
        run: str | None = None,
        policy: str | None = None,
        normalize: bool | None = None,
    ) -> list[RewardReply | ServiceError]:
        """Many instances, in pieces: per piece one encode batch, one GEMM per arm and one worker call per arm and
        chunk; then one store pipeline for all.

        What goes wrong with one piece (its time is over, the encoder is away) is the error of its instances, where
        another piece has come through.

        Args:
            requests: the instances.
            run: run of those that name none.
            policy: policy of those that name none.
            normalize: whether rewards are normalised, of those that do not say; None: the setting.

        Returns:
            A reply or the error per instance, in order.

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
        try:
            async with asyncio.timeout_at(deadline):
                pieces = await self._pieces(requests, run, policy, refused)
        except TimeoutError as error:
            raise _too_late() from error
        jobs = await self._route(pieces, _Call(deadline, len(pieces)), refused)
        normalize = self._limits.normalize if normalize is None else normalize
        wanted = [
            job
            for index, job in jobs.items()
            if (normalize if requests[index].normalize is None else requests[index].normalize)
        ]
        if wanted:
            await self._normalise(wanted)
        replies = dict(zip(jobs, await self._record_and_reply(list(jobs.values()), started), strict=True))
        return [refused[index] if index in refused else replies[index] for index in range(len(requests))]

    async def _pieces(
        self, requests: Sequence[RewardRequest], run: str | None, policy: str | None, refused: dict[int, ServiceError]
    ) -> list[Piece]:
        """All instances but those that are put into `refused`, by run and policy, and each of them in pieces."""
        groups: dict[tuple[str | None, str | None], list[int]] = {}
        for index, request in enumerate(requests):
            try:
                self._check(request, index if len(requests) > 1 else None)
            except ValidationError as error:
                refused[index] = error
            else:
                groups.setdefault((request.run or run, request.policy or policy), []).append(index)
        pieces: list[Piece] = []
        for (run_name, policy_name), indices in groups.items():
            try:
                template = self._runs.template
                chosen_policy = template.policy(policy_name) if policy_name else template.default_policy
                found = await self._runs.get(run_name, chosen_policy.prior)
            except StoreUnavailableError:
                raise
            except ServiceError as error:
                if len(indices) == len(requests):
                    raise
                refused.update(dict.fromkeys(indices, error))
                continue
            instances = [Instance(requests[i].prompt, tuple(requests[i].responses)) for i in indices]
            whole = Piece(found, chosen_policy, indices, instances)
            pieces.extend(cut(whole, self._limits.piece_responses))
        return pieces

    async def _route(self, pieces: Sequence[Piece], call: _Call, refused: dict[int, ServiceError]) -> dict[int, _Job]:
        """Choose and ask, every piece on its own way; the jobs by place, but for pieces that are put into `refused`.

        Raises:
            ServiceError: what went wrong with the first piece, where it went wrong with all of them.
        """
        if len(pieces) == 1:
            return await self._route_piece(pieces[0], call)
        outcomes = await asyncio.gather(*(self._route_piece(piece, call) for piece in pieces), return_exceptions=True)
        jobs: dict[int, _Job] = {}
        failed: list[BaseException] = []
        for piece, outcome in zip(pieces, outcomes, strict=True):
            if isinstance(outcome, dict):
                jobs.update(outcome)
                continue
            failed.append(outcome)
            if isinstance(outcome, ServiceError):
                refused.update(dict.fromkeys(piece.indices, outcome))
        for error in failed:
            if not isinstance(error, ServiceError) or len(failed) == len(pieces):
                raise error
        return jobs

    async def _route_piece(self, piece: Piece, call: _Call) -> dict[int, _Job]:
        room = call.room(piece)
        try:
            async with asyncio.timeout_at(call.deadline), room.choosing:
                jobs = await self._choose(piece, room if call.pieces > 1 else None)
        except TimeoutError as error:
            raise _too_late() from error
        async with room.asking:
            await self._ask(jobs, call)
        return dict(zip(piece.indices, jobs, strict=True))

    async def _choose(self, piece: Piece, apart: object | None) -> list[_Job]:
        """The jobs of a piece, in order: drawn, and nobody asked yet."""
        run, policy = piece.run, piece.policy
        chosen = await self._chooser.choose(run, policy, piece.instances, apart=apart)
        # Copies: a row of a batch would keep the whole batch.
        run.recent.append((chosen.x[0].copy(), chosen.offsets[0].copy()))
        rankings, draws = chosen.choices.ranking.tolist(), chosen.choices.draws.tolist()
        if not np.isfinite(chosen.choices.draws).all():
            rankings = [
                [arm for arm in ranking if drawn[arm] != -float("inf")]
                for ranking, drawn in zip(rankings, draws, strict=True)
            ]
        jobs = [_Job(run, policy, instance, chosen, row, rankings[row]) for row, instance in enumerate(piece.instances)]
        if not policy.asks_all:
            if self._sticky.seconds:
                await self._stick(jobs)
            for arm, count in Counter(job.order[0] for job in jobs).items():
                self._telemetry.drawn(run.name, run.template.pool[arm]).inc(count)
        return jobs

    async def _stick(self, jobs: Sequence[_Job]) -> None:
        """Singles whose prompt was asked about before take that draw; all of one run and policy."""
        singles = [
            job for job in jobs if len(job.instance.responses) == 1 and job.instance.prompt and len(job.order) > 1
        ]
        if not singles:
            return
        for job in singles:
            job.sticky = sticky_key(job.policy.name, job.instance.prompt)
        standing = await self._sticky.settle(singles[0].run.name, [(job.sticky, _as_sticky(job)) for job in singles])
        for job, followed in zip(singles, standing, strict=True):
            if followed is not None:
                job.followed, job.order = followed, list(followed.order)

    async def _normalise(self, jobs: Sequence[_Job]) -> None:
        """Put the rewards of those that one RM answered on its scale; one exchange with the store per run."""
        by_run: dict[str, list[_Job]] = {}
        for job in jobs:
            if job.rewards is not None and job.arm != ALL_ARMS:
                by_run.setdefault(job.run.name, []).append(job)

        async def of_run(answered: list[_Job]) -> Normalised:
            return await self._normaliser.normalise(
                answered[0].run, [(job.arm, job.rewards) for job in answered if job.rewards is not None]
            )

        for answered, found in zip(by_run.values(), await asyncio.gather(*map(of_run, by_run.values())), strict=True):
            for job, rewards in zip(answered, found.rewards, strict=True):
                job.normalised, job.scale_version = rewards, found.version

    def _check(self, request: RewardRequest, index: int | None) -> None:
        where = "" if index is None else f"items[{index}]."
        limits = self._limits
        if len(request.responses) > limits.max_responses:
            raise ValidationError(
                f"{where}responses holds {len(request.responses)} texts: send at most {limits.max_responses}",
                details={"field": f"{where}responses", "limit": limits.max_responses},
            )
        longest = limits.max_text_chars
        if max(map(len, (request.prompt, *request.responses))) <= longest:
            return
        for name, text in (
            ("prompt", request.prompt),
            *((f"responses[{i}]", r) for i, r in enumerate(request.responses)),
        ):
            if len(text) > longest:
                raise ValidationError(
                    f"{where}{name} is {len(text)} characters long: send at most {longest}",
                    details={"field": f"{where}{name}", "limit": longest},
                )

    async def _ask(self, jobs: Sequence[_Job], call: _Call) -> None:
        """Rounds of asking (jobs of one run): each asks every open job's best arm that is left, one call per arm."""
        everyone = [job for job in jobs if job.policy.asks_all]
        single = [job for job in jobs if not job.policy.asks_all]
        if everyone:
            await self._ask_all(everyone, call)
        while single:
            by_arm: dict[int, list[_Job]] = {}
            late = asyncio.get_running_loop().time() >= call.deadline
            arms = single[0].run.template.arms
            out = {arm for arm, worker in enumerate(arms) if not call.can_ask(arm, worker)}
            for job in single:
                arm = None if late else self._next_arm(job, out)
                if late:
                    job.error = _too_late(job)
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

    def _next_arm(self, job: _Job, out: Set[int]) -> int | None:
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

    def _give_up(self, job: _Job, arm: int, reason: str) -> None:
        name = job.run.template.pool[arm]
        job.gone = [*job.gone, arm]
        job.fallbacks = [*job.fallbacks, Fallback(name, reason)]
        self._telemetry.fallbacks.labels(name, reason).inc()

    async def _ask_arm(self, arm: int, jobs: list[_Job], call: _Call) -> None:
        """Ask one RM about all of them; what is wrong with one of them spoils no other."""
        worker = jobs[0].run.template.arms[arm]
        groups = [[(job.instance.prompt, response) for response in job.instance.responses] for job in jobs]
        started = time.perf_counter()
        await call.enter(arm, worker, len(jobs))
        patience = self._limits.worker_timeout_seconds * -(-call.asked[arm] // PATIENT_INSTANCES)
        limit = min(call.deadline, asyncio.get_running_loop().time() + patience)
        outcomes: list[list[float] | WorkerError]
        try:
            if len(groups) == 1 and call.pieces == 1:
                outcomes = [await worker.score(groups[0], deadline=limit)]
            else:
                outcomes = await worker.score_groups(groups, deadline=limit, slots=call.slots(arm, worker))
        except WorkerError as error:
            outcomes = [error] * len(groups)
        finally:
            call.leave(arm, len(jobs))
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

    async def _ask_all(self, jobs: Sequence[_Job], call: _Call) -> None:
        """Ask every RM, one call per RM; the policy makes one reward of those that answered."""
        started = time.perf_counter()
        by_arm: list[list[_Job]] = []
        calls = []
        for arm, worker in enumerate(jobs[0].run.template.arms):
            votes = [_Job(job.run, job.policy, job.instance, job.chosen, job.row, []) for job in jobs]
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

    async def _record_and_reply(self, jobs: Sequence[_Job], started: float) -> list[RewardReply | ServiceError]:
        now_ms = int(time.time() * 1000)
        entropy = self._entropy.take(RANDOM_BYTES * len(jobs))
        by_run: dict[str, list[DecisionRecord]] = {}
        decisions: list[tuple[str, StoredDecision] | None] = []
        for index, job in enumerate(jobs):
            if job.rewards is None:
                decisions.append(None)
                continue
            decision_id = new_decision_id(now_ms, entropy[index * RANDOM_BYTES : (index + 1) * RANDOM_BYTES])
            stored = _decision(job, now_ms)
            key = (
                content_key(job.run.name, job.instance.prompt, job.instance.responses)
                if self._limits.content_keys
                else None
            )
            by_run.setdefault(job.run.name, []).append(DecisionRecord(decision_id, encode_decision(stored), key))
            decisions.append((decision_id, stored))
        store_started = time.perf_counter()
        unsaved = await self._save(by_run)
        store_seconds = time.perf_counter() - store_started
        if by_run:
            self._telemetry.stage["store"].observe(store_seconds)
        if self._shadower.rate:
            self._shadower.offer(
                Shadowable(job.run, *made, job.instance, job.chosen.offsets[job.row])
                for job, made in zip(jobs, decisions, strict=True)
                if made is not None and job.arm != ALL_ARMS and job.run.name not in unsaved
            )
        replies: list[RewardReply | ServiceError] = []
        for job, made in zip(jobs, decisions, strict=True):
            if made is None:
                replies.append(job.error or NoWorkerError("no reward model answered"))
                continue
            self._telemetry.stage["worker"].observe(job.worker_seconds)
            recorded = job.run.name not in unsaved
            replies.append(_reply(job, *made, recorded=recorded, store_seconds=store_seconds, started=started))
        given = Counter((job.run.name, job.policy.name) for job, made in zip(jobs, decisions, strict=True) if made)
        for (run, policy), count in given.items():
            self._telemetry.decided(run, policy).inc(count)
        self._telemetry.stage["total"].observe(time.perf_counter() - started)
        return replies

    async def _save(self, by_run: dict[str, list[DecisionRecord]]) -> frozenset[str]:
        """Save the decisions; the runs whose decisions could not be saved, where rewards are answered all the same.

        Raises:
            StoreUnavailableError: the store is away, and rewards are refused then.
        """
        if len(by_run) == 1:
            [(run, records)] = by_run.items()
            failed = [run] if await self._save_run(run, records) is not None else []
        else:
            errors = await asyncio.gather(*(self._save_run(run, records) for run, records in by_run.items()))
            failed = [run for run, error in zip(by_run, errors, strict=True) if error is not None]
        return frozenset(failed)

    async def _save_run(self, run: str, records: list[DecisionRecord]) -> StoreUnavailableError | None:
        try:
            await self._store.save_decisions(run, records)
        except StoreUnavailableError as error:
            self._telemetry.store_errors.labels("save_decisions").inc()
            if self._limits.on_store_unavailable is OnStoreUnavailable.REFUSE:
                raise
            self._telemetry.unrecorded.inc(len(records))
            return error
        return None


def _too_late(job: _Job | None = None) -> DeadlineExceededError:
    """The error of an instance whose time was over before an RM had answered."""
    tried = [{"model": f.model, "reason": f.reason} for f in job.fallbacks] if job is not None else []
    return DeadlineExceededError(
        "no reward within the request's deadline (request_timeout_seconds): try again, or send smaller batches",
        details={"tried": tried},
        retry_after_seconds=1,
    )


def _nothing_left(job: _Job) -> ServiceError:
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


def _combine(job: _Job, answers: dict[int, list[float]]) -> None:
    """Make one reward and one verdict of the rewards by arm, on the checkpoint's scale or on what the run has seen."""
    arms, rewards = list(answers), np.array(list(answers.values()))
    known = job.run.template.score_scale
    scale = job.run.scores.rows(arms, rewards) if known is None else known.rows(arms)
    job.run.scores.observe(arms, rewards)
    job.rewards = job.policy.combine(rewards, scale).tolist()
    job.verdict = combined_verdict(job.policy, rewards, scale)


def _as_sticky(job: _Job) -> StickyChoice:
    """The job's own draw."""
    choices, row = job.chosen.choices, job.row
    return StickyChoice(
        order=job.order,
        means=choices.means[row].tolist(),
        sds=choices.sds[row].tolist(),
        propensities=choices.propensities[row].tolist(),
        version=job.chosen.posterior.count,
    )


def _decision(job: _Job, now_ms: int) -> StoredDecision:
    row = job.row
    # A single that follows another's draw was decided by that one: its beliefs and its propensity are the honest ones.
    draw = job.followed or _as_sticky(job)
    assert job.rewards is not None
    if job.arm == ALL_ARMS:
        propensity, offset = 1.0, 0.0
    else:
        offset = float(job.chosen.offsets[row, job.arm])
        propensity = draw.propensities[job.arm]
        if job.gone or job.away:
            gone = [*job.gone, *job.away]
            propensity = propensity_without(np.array(draw.means), np.array(draw.sds), gone, job.arm)
    return StoredDecision(
        n=len(job.instance.responses),
        arm=job.arm,
        x=job.chosen.x[row].tobytes(),
        offset=offset,
        verdict=verdict_of(job.rewards) if job.verdict is None else job.verdict,
        propensity=propensity,
        propensities=draw.propensities,
        means=draw.means,
        sds=draw.sds,
        rewards=job.rewards,
        policy=job.policy.name,
        version=draw.version,
        time_ms=now_ms,
        fallback=bool(job.fallbacks),
        gone=[*job.gone, *job.away],
        failed=[*job.failed],
        away=[*job.away_first],
        prompt_tokens_cut=job.prompt_tokens_cut,
        sticky=job.sticky,
    )


def _reply(
    job: _Job, decision_id: str, stored: StoredDecision, *, recorded: bool, store_seconds: float, started: float
) -> RewardReply:
    raw, normalised = stored.rewards, job.normalised
    rewards: list[float | None] = [*raw] if normalised is None else normalised
    ordered = sorted((reward for reward in rewards if reward is not None), reverse=True)
    return RewardReply(
        decision_id=decision_id,
        run=job.run.name,
        model=job.policy.name if job.arm == ALL_ARMS else job.run.template.pool[job.arm],
        rewards=rewards,
        preferred=None if stored.verdict == TIE else stored.verdict,
        margin=ordered[0] - ordered[1] if len(ordered) > 1 else None,
        propensity=stored.propensity,
        policy=stored.policy,
        posterior_version=stored.version,
        fallback=stored.fallback,
        recorded=recorded,
        timings=Timings(
            encode_ms=round(job.chosen.encode_seconds * 1e3, 4),
            draw_ms=round(job.chosen.draw_seconds * 1e3, 4),
            worker_ms=round(job.worker_seconds * 1e3, 4),
            store_ms=round(store_seconds * 1e3, 4),
            total_ms=round((time.perf_counter() - started) * 1e3, 4),
        ),
        fallbacks=[*job.fallbacks],
        truncated=Truncated(job.prompt_tokens_cut) if job.prompt_tokens_cut else msgspec.UNSET,
        sticky=msgspec.UNSET if job.followed is None else True,
        raw_rewards=msgspec.UNSET if normalised is None else raw,
        scale_version=msgspec.UNSET if normalised is None else job.scale_version,
    )
