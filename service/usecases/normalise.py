"""Normalise: rewards on their RM's scale, the same on every gateway (docs/decisions/009-scores-have-their-own-log.md).

A request that asks for it, or that combines RMs whose scale no checkpoint tells, appends the moments of its raw scores
to the run's score log and folds what the log holds by then, its own entry included. So a reward is a function of (raw
score, RM, version of the scale), and a version means the same numbers everywhere. Requests that come together share one
exchange with the store. Called by `score`; the mathematics is `router_core.moments`. Absurd numbers heal: a score
beyond `MAX_ABS_SCORE` is not folded and answered null; an entry's moments that no other scores have are skipped; an RM
whose snapshot has such moments starts again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from router_core.errors import RouterCoreError
from router_core.moments import Moments, ScoreScales, is_usable
from router_core.policies import ScoreScale
from service.errors import StoreUnavailableError
from service.stores.protocol import ScoreEntry, Store
from service.telemetry import Telemetry
from service.usecases.runs import Run

FORMAT = "reward-router-scale/1"

READ_COUNT = 1024
"""Entries per read of the score log."""

PRIOR_SCORES = 32.0
"""Scores that a checkpoint's mean and sd of an RM count as."""

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[tuple[int, float, float, float]])

Scored = tuple[int, Sequence[float]]
"""(arm, raw scores of its responses)."""


class ScoreLogError(RouterCoreError):
    """The score log holds what this version cannot read."""


@dataclass(frozen=True, slots=True)
class Normalised:
    """Rewards per instance, None where the RM's scale is unknown yet, and the scale's version."""

    rewards: list[list[float | None]]
    version: int


@dataclass(slots=True)
class _Followed:
    """One run's scale on this gateway."""

    scales: ScoreScales
    waiting: list[tuple[bytes, asyncio.Future[ScoreScales]]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    loaded: bool = False
    mark: str | None = None
    """Id of the entry at the last snapshot position: what came before it may be dropped at the next one."""


class Normaliser:
    """Keeps the scales of the runs that ask for them; one per process.

    Args:
        store: the score logs.
        telemetry: counters.
        required: whether a store that is away is an error; else what was folded so far is used then.
    """

    def __init__(self, store: Store, telemetry: Telemetry, *, required: bool) -> None:
        self._store = store
        self._telemetry = telemetry
        self._required = required
        self._runs: dict[str, _Followed] = {}

    def scales(self, run: str) -> ScoreScales | None:
        """What this gateway has folded of the run's score log; None if no request of it was normalised here."""
        followed = self._runs.get(run)
        return None if followed is None or not followed.loaded else followed.scales

    def forget(self, run: str) -> None:
        """Drop a closed run; its scale is made again from the store."""
        self._runs.pop(run, None)

    async def normalise(self, run: Run, scored: Sequence[Scored]) -> Normalised:
        """The rewards of some instances, each asked of one RM.

        Raises:
            StoreUnavailableError: the store is away, and rewards are refused then.
        """
        scales = await self.observe(run, scored)
        return Normalised([scales.arms[arm].normalise(scores) for arm, scores in scored], scales.count)

    async def observe(self, run: Run, scored: Sequence[Scored]) -> ScoreScales:
        """Append these scores to the run's score log. Return what the log tells then, these included.

        Raises:
            StoreUnavailableError: the store is away, and rewards are refused then.
        """
        followed = self._runs.get(run.name)
        if followed is None:
            followed = self._runs[run.name] = _Followed(_first_scales_of(run))
        followed.scales = followed.scales.of_arms(len(run.template.arms))
        seen = moments_by_arm(scored)
        try:
            scales = await self._exchange(run, followed, encode_entry(seen))
        except StoreUnavailableError:
            self._telemetry.store_errors.labels("exchange_scores").inc()
            if self._required:
                raise
            scales = followed.scales.observe(followed.scales.last_id, seen)
        return scales

    async def _exchange(self, run: Run, followed: _Followed, entry: bytes) -> ScoreScales:
        """Append the entry and fold the log to its end, together with whoever else asks meanwhile."""
        future: asyncio.Future[ScoreScales] = asyncio.get_running_loop().create_future()
        followed.waiting.append((entry, future))
        if followed.task is None:
            followed.task = asyncio.create_task(self._serve(run, followed))
        return await future

    async def _serve(self, run: Run, followed: _Followed) -> None:
        """Rounds of exchange until nobody waits. One at a time per run, so that entries are folded once."""
        try:
            while followed.waiting:
                batch, followed.waiting = followed.waiting, []
                try:
                    await self._round(run, followed, [entry for entry, _ in batch])
                except Exception as error:  # noqa: BLE001 - every waiting request is told; nothing is swallowed
                    _settle(batch, error)
                else:
                    _settle(batch, followed.scales)
        finally:
            followed.task = None

    async def _round(self, run: Run, followed: _Followed, entries: Sequence[bytes]) -> None:
        if not followed.loaded:
            await self._load(run, followed)
        mine, reloaded = entries, False
        while True:
            known = followed.scales
            part = await self._store.exchange_scores(run.name, mine, after=known.last_id, count=READ_COUNT)
            mine = ()
            if part.status.trimmed <= known.count <= part.status.appended:
                await self._fold(run, followed, part.entries)
                if len(part.entries) < READ_COUNT:
                    return
            elif reloaded:
                raise ScoreLogError(
                    f"the score log of run {run.name!r} holds entries {part.status.trimmed} to {part.status.appended}, "
                    f"and its snapshot ends at {known.count}: the store has lost some; use a new run name"
                )
            else:
                # Dropped by another gateway before they were read here.
                await self._load(run, followed)
                reloaded = True

    async def _load(self, run: Run, followed: _Followed) -> None:
        data = await self._store.load_scale(run.name)
        first = _first_scales_of(run)
        if data is not None:
            stored = parse_scales(data)
            arms = max(len(stored.arms), len(first.arms))
            first = healed(stored.of_arms(arms), first.of_arms(arms))
        followed.scales = first
        followed.mark = None if data is None else followed.scales.last_id
        followed.loaded = True

    async def _fold(self, run: Run, followed: _Followed, entries: Sequence[ScoreEntry]) -> None:
        """Fold, and snapshot at the positions at which the event log has its snapshots, too."""
        every = run.template.fold_settings.refresh_events
        scales, snapshot, mark = followed.scales, None, followed.mark
        trim_before = mark
        for entry in entries:
            seen = decode_entry(entry)
            # Another gateway may have met an arm before this one.
            met = max([arm + 1 for arm, _ in seen if arm < MAX_ARMS], default=0)
            scales = scales.of_arms(met).observe(entry.entry_id, seen)
            if scales.count % every == 0:
                trim_before, mark, snapshot = mark, scales.last_id, scales
        followed.scales, followed.mark = scales, mark
        if snapshot is not None:
            await self._save(run.name, snapshot, trim_before or "0-0")

    async def _save(self, run: str, snapshot: ScoreScales, trim_before: str) -> None:
        """Keep a snapshot. One that cannot be kept costs nobody a reward: the log is whole, and a later one comes."""
        try:
            await self._store.save_scale(run, snapshot.count, dump_scales(snapshot), trim_before=trim_before)
        except StoreUnavailableError:
            self._telemetry.store_errors.labels("save_scale").inc()


MAX_ARMS = 1024
"""Arms beyond this are nobody's: an entry that names one is damaged."""


def _settle(batch: Sequence[tuple[bytes, asyncio.Future[ScoreScales]]], outcome: ScoreScales | Exception) -> None:
    for _, future in batch:
        if future.done():
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _first_scales_of(run: Run) -> ScoreScales:
    """Before any entry: what the checkpoint knew when the run began; of arms that were added, nothing."""
    founding = run.founding
    return first_scales(len(founding.arms), founding.first_scale).of_arms(len(run.template.arms))


def first_scales(n_arms: int, known: ScoreScale | None) -> ScoreScales:
    """Before any entry: nothing, or what a checkpoint knows, as `PRIOR_SCORES` scores per RM."""
    if known is None:
        return ScoreScales(0, "0-0", (Moments(),) * n_arms)
    pairs = zip(known.shift.tolist(), known.scale.tolist(), strict=True)
    return ScoreScales(0, "0-0", tuple(Moments(PRIOR_SCORES, mean, PRIOR_SCORES * sd * sd) for mean, sd in pairs))


def healed(scales: ScoreScales, first: ScoreScales) -> ScoreScales:
    """A snapshot's scales, where an RM with moments that no usable scores have begins as it first did."""
    pairs = zip(scales.arms, first.arms, strict=True)
    return ScoreScales(scales.count, scales.last_id, tuple(m if m.possible else start for m, start in pairs))


def moments_by_arm(scored: Sequence[Scored]) -> list[tuple[int, Moments]]:
    """One (arm, moments) per RM that gave a usable score, in arm order."""
    by_arm: dict[int, list[float]] = {}
    for arm, scores in scored:
        by_arm.setdefault(arm, []).extend(filter(is_usable, scores))
    return [(arm, Moments.of(by_arm[arm])) for arm in sorted(by_arm) if by_arm[arm]]


def encode_entry(seen: Sequence[tuple[int, Moments]]) -> bytes:
    """The payload of one entry: (arm, count, mean, squares) per RM; float64, exact."""
    return _ENCODER.encode([(arm, m.count, m.mean, m.squares) for arm, m in seen])


def decode_entry(entry: ScoreEntry) -> list[tuple[int, Moments]]:
    """Read `encode_entry`'s payload back.

    Raises:
        ScoreLogError: it is none.
    """
    try:
        return [(arm, Moments(*numbers)) for arm, *numbers in _DECODER.decode(entry.payload)]
    except msgspec.DecodeError as error:
        raise ScoreLogError(f"entry {entry.entry_id} of the score log cannot be read: {error}") from error


def dump_scales(scales: ScoreScales) -> bytes:
    """A snapshot; numbers as hexadecimal floats, so that they come back exactly."""
    arms = [[m.count.hex(), m.mean.hex(), m.squares.hex()] for m in scales.arms]
    return json.dumps({"format": FORMAT, "count": scales.count, "last_id": scales.last_id, "arms": arms}).encode()


def parse_scales(data: bytes) -> ScoreScales:
    """Read `dump_scales` back.

    Raises:
        ScoreLogError: another format.
    """
    try:
        document = json.loads(data)
        arms = tuple(Moments(*(float.fromhex(number) for number in numbers)) for numbers in document["arms"])
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r}")
        return ScoreScales(int(document["count"]), str(document["last_id"]), arms)
    except (ValueError, OverflowError, KeyError, TypeError) as error:
        raise ScoreLogError(f"the snapshot of the score log is no {FORMAT!r} ({error}): use a new run name") from error
