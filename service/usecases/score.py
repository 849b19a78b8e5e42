"""Score: choose an RM for each instance, ask it, save the decision, answer (design: the way of `POST /reward`).

One path for one instance and for many, which go piece by piece (`service.usecases.pieces`). Choosing is
`service.usecases.choose`, asking `.ask`; what was decided is saved before it is answered.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np

from router_core.policies import propensity_without
from router_core.records import TIE, Instance, verdict_of
from service.errors import NoWorkerError, ServiceError, StoreUnavailableError, ValidationError
from service.schemas import RewardReply, RewardRequest, Timings, Truncated
from service.settings import OnStoreUnavailable
from service.stores.ids import RANDOM_BYTES, new_decision_id
from service.stores.protocol import DecisionRecord, Store
from service.telemetry import Telemetry
from service.usecases.ask import ALL_ARMS, Asker, Job, too_late
from service.usecases.choose import Chooser
from service.usecases.decisions import StoredDecision, content_key, encode_decision
from service.usecases.normalise import Normalised, Normaliser
from service.usecases.pieces import Call, Piece, Room, cut
from service.usecases.runs import RunRegistry
from service.usecases.shadow import Shadowable, Shadower
from service.usecases.sticky import StickyChoice, StickyChoices, sticky_key

_Key = TypeVar("_Key", bound=Hashable)


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
        self._asker = Asker(telemetry, timeout_seconds=limits.worker_timeout_seconds)
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
            raise too_late() from error
        jobs = await self._route(pieces, Call(deadline, len(pieces)), refused)
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

    async def _route(self, pieces: Sequence[Piece], call: Call, refused: dict[int, ServiceError]) -> dict[int, Job]:
        """Choose and ask, every piece on its own way; the jobs by place, but for pieces that are put into `refused`.

        Raises:
            ServiceError: what went wrong with the first piece, where it went wrong with all of them.
        """
        if len(pieces) == 1:
            return await self._route_piece(pieces[0], call)
        outcomes = await asyncio.gather(*(self._route_piece(piece, call) for piece in pieces), return_exceptions=True)
        jobs: dict[int, Job] = {}
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

    async def _route_piece(self, piece: Piece, call: Call) -> dict[int, Job]:
        room = call.room(piece)
        try:
            async with asyncio.timeout_at(call.deadline):
                jobs = await self._choose(piece, room)
        except TimeoutError as error:
            raise too_late() from error
        if room is None:
            await self._asker.ask(jobs, call)
        else:
            async with room.asking:
                await self._asker.ask(jobs, call)
        return dict(zip(piece.indices, jobs, strict=True))

    async def _choose(self, piece: Piece, room: Room | None) -> list[Job]:
        """The jobs of a piece, in order: drawn, and nobody asked yet."""
        run, policy = piece.run, piece.policy
        if room is None:
            chosen = await self._chooser.choose(run, policy, piece.instances)
        else:
            async with room.choosing:
                chosen = await self._chooser.choose(run, policy, piece.instances, apart=room)
        # Copies: a row of a batch would keep the whole batch.
        run.recent.append((chosen.x[0].copy(), chosen.offsets[0].copy()))
        rankings, draws = chosen.choices.ranking.tolist(), chosen.choices.draws.tolist()
        if not np.isfinite(chosen.choices.draws).all():
            rankings = [
                [arm for arm in ranking if drawn[arm] != -float("inf")]
                for ranking, drawn in zip(rankings, draws, strict=True)
            ]
        jobs = [Job(run, policy, instance, chosen, row, rankings[row]) for row, instance in enumerate(piece.instances)]
        if not policy.asks_all:
            if self._sticky.seconds:
                await self._stick(jobs)
            for arm, count in _counted([job.order[0] for job in jobs]).items():
                self._telemetry.drawn(run.name, run.template.pool[arm]).inc(count)
        return jobs

    async def _stick(self, jobs: Sequence[Job]) -> None:
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

    async def _normalise(self, jobs: Sequence[Job]) -> None:
        """Put the rewards of those that one RM answered on its scale; one exchange with the store per run."""
        by_run: dict[str, list[Job]] = {}
        for job in jobs:
            if job.rewards is not None and job.arm != ALL_ARMS:
                by_run.setdefault(job.run.name, []).append(job)

        async def of_run(answered: list[Job]) -> Normalised:
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

    async def _record_and_reply(self, jobs: Sequence[Job], started: float) -> list[RewardReply | ServiceError]:
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
        given = _counted([(job.run.name, job.policy.name) for job, made in zip(jobs, decisions, strict=True) if made])
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


def _counted(keys: Iterable[_Key]) -> dict[_Key, int]:
    """How often each is there. A `Counter` takes longer to make than the one key of most requests to count."""
    counts: dict[_Key, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return counts


def _as_sticky(job: Job) -> StickyChoice:
    """The job's own draw."""
    choices, row = job.chosen.choices, job.row
    return StickyChoice(
        order=job.order,
        means=choices.means[row].tolist(),
        sds=choices.sds[row].tolist(),
        propensities=choices.propensities[row].tolist(),
        version=job.chosen.posterior.count,
    )


def _decision(job: Job, now_ms: int) -> StoredDecision:
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
    job: Job, decision_id: str, stored: StoredDecision, *, recorded: bool, store_seconds: float, started: float
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
