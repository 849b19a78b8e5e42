"""Learn: accept feedback exactly once, and fold the run's log into its posterior (design: the way of `POST /feedback`).

`FeedbackService` only appends to the log. `Learner`, one per run and gateway, tails the log and replaces the run's
posterior; so every replica learns from every replica's feedback, in the same order, to the same bits.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor

from router_core.errors import FeedbackError, RouterCoreError
from router_core.feedback import validate
from router_core.posterior import Posterior, events_to_refresh, fold, start
from router_core.records import Event, Feedback, Signal
from router_core.snapshot import Snapshot, dump, parse
from service.errors import ConflictError, GoneError, NotFoundError, ServiceError, StoreUnavailableError, ValidationError
from service.schemas import FeedbackReply, FeedbackRequest
from service.stores.protocol import FeedbackRecord, FeedbackResult, FeedbackStatus, LogEntry, Store
from service.telemetry import Telemetry
from service.usecases.decisions import content_key, decode_feedback, encode_feedback, event_of
from service.usecases.runs import Run, RunRegistry

logger = logging.getLogger(__name__)

READ_COUNT = 1024
"""Events per read of the log: large enough that replaying is bound by folding, small enough to stay responsive."""

BLOCK_MS = 1000
"""How long a read waits for the next event; bounds how late a stop is noticed."""

RETRY_SECONDS = 0.5
"""Pause after the store did not answer."""

RETRY_AFTER_SECONDS = 1
"""Hint for feedback by content that comes before its decision."""

MAX_RELOADS = 3
"""How often in a row a learner starts again from the snapshot before it calls the log damaged."""


class LogGapError(RouterCoreError):
    """The posterior holds other events than the log: some were trimmed before they were read, or lost by the store."""


class FeedbackService:
    """The use case behind `/feedback` and `/feedback/batch`.

    Args:
        runs: where runs are opened.
        store: marks decisions and appends events, atomically.
        telemetry: counters.
        max_batch: items per call at most.
    """

    def __init__(self, runs: RunRegistry, store: Store, telemetry: Telemetry, *, max_batch: int) -> None:
        self._runs = runs
        self._store = store
        self._telemetry = telemetry
        self._max_batch = max_batch

    async def accept(self, request: FeedbackRequest) -> FeedbackReply:
        """One feedback. When this returns, the event is in the log, once.

        Raises:
            ServiceError: see `docs/api.md` for the codes; nothing was changed.
        """
        result = (await self.accept_many([request]))[0]
        if isinstance(result, ServiceError):
            raise result
        return result

    async def accept_many(
        self, requests: Sequence[FeedbackRequest], *, run: str | None = None
    ) -> list[FeedbackReply | ServiceError]:
        """Many feedbacks, each applied or refused on its own, in one pipeline per run.

        Raises:
            ServiceError: what concerns the whole call: the batch's size, the run, the store away (resend: what had been
                applied answers `duplicate`).
        """
        if len(requests) > self._max_batch:
            raise ValidationError(
                f"items holds {len(requests)} feedbacks: send at most {self._max_batch} at once",
                details={"field": "items", "limit": self._max_batch},
            )
        results: list[FeedbackReply | ServiceError | None] = [None] * len(requests)
        by_run: dict[str, list[tuple[int, FeedbackRecord]]] = {}
        runs: dict[str | None, Run | ServiceError] = {}
        for index, request in enumerate(requests):
            name = request.run or run
            if name not in runs:
                runs[name] = await self._find(name)
            found = runs[name]
            if isinstance(found, ServiceError):
                if request.run is None:
                    raise found
                results[index] = found
                continue
            try:
                record = _record(request, found)
            except ServiceError as error:
                self._telemetry.feedback.labels(found.name, "invalid").inc()
                results[index] = error
            else:
                by_run.setdefault(found.name, []).append((index, record))
        for run_name, records in by_run.items():
            try:
                outcomes = await self._store.apply_feedback(run_name, [record for _, record in records])
            except StoreUnavailableError:
                self._telemetry.store_errors.labels("apply_feedback").inc()
                raise
            for (index, record), outcome in zip(records, outcomes, strict=True):
                self._telemetry.feedback.labels(run_name, outcome.status).inc()
                results[index] = _answer(requests[index], record, outcome)
        return [result for result in results if result is not None]

    async def _find(self, name: str | None) -> Run | ServiceError:
        """The run, or why there is none. Appending to a log does not wait for the posterior."""
        try:
            return await self._runs.find(name)
        except StoreUnavailableError:
            raise
        except ServiceError as error:
            return error


def _record(request: FeedbackRequest, run: Run) -> FeedbackRecord:
    given = {
        signal: value
        for signal, value in (
            (Signal.PREFERENCE, request.preferred),
            (Signal.LOSS, request.loss),
            (Signal.REWARD, request.reward),
        )
        if value is not None
    }
    wanted = run.template.signal
    field = "preferred" if wanted is Signal.PREFERENCE else wanted.value
    if set(given) != {wanted}:
        sent = ", ".join("preferred" if s is Signal.PREFERENCE else s.value for s in given) or "none of them"
        raise ValidationError(
            f"run {run.name!r} learns from the signal {wanted.value!r}: send exactly the field {field!r}, not {sent}",
            details={"field": field, "signal": wanted.value},
        )
    try:
        feedback = validate(Feedback(wanted, float(given[wanted])))
    except FeedbackError as error:
        raise ValidationError(str(error), details={"field": field}) from error
    preferred = int(feedback.value) if wanted is Signal.PREFERENCE else None
    parts_of_content = (request.prompt is not None) + (request.responses is not None)
    if parts_of_content != (2 if request.decision_id is None else 0):
        raise ValidationError(
            "name the decision by decision_id, or by prompt and responses; send one of the two",
            details={"field": "decision_id"},
        )
    value = encode_feedback(feedback)
    if request.decision_id is not None:
        return FeedbackRecord(value, decision_id=request.decision_id, preferred=preferred)
    assert request.prompt is not None
    assert request.responses is not None
    key = content_key(run.name, request.prompt, request.responses)
    return FeedbackRecord(value, content_key=key, preferred=preferred)


def _answer(request: FeedbackRequest, record: FeedbackRecord, outcome: FeedbackResult) -> FeedbackReply | ServiceError:
    name = outcome.decision_id or record.decision_id or "named by its content"
    details: dict[str, object] = {"decision_id": outcome.decision_id or record.decision_id}
    match outcome.status:
        case FeedbackStatus.APPLIED | FeedbackStatus.DUPLICATE:
            return FeedbackReply(
                decision_id=outcome.decision_id or record.decision_id or "",
                event_id=outcome.event_id or "",
                duplicate=outcome.status is FeedbackStatus.DUPLICATE,
            )
        case FeedbackStatus.CONFLICT:
            standing = decode_feedback(outcome.standing_value or b"").value
            return ConflictError(
                f"decision {name} already has the feedback {standing:g}, and got another value: the first one stands",
                details={**details, "standing": standing},
            )
        case FeedbackStatus.EXPIRED:
            return GoneError(
                f"decision {name} is older than the feedback window: send feedback sooner, or raise "
                "decision_ttl_seconds",
                details=details,
            )
        case FeedbackStatus.OUT_OF_RANGE:
            return ValidationError(
                f"preferred is {request.preferred}: decision {name} has fewer responses; send an index, 0 for the "
                "first",
                details={**details, "field": "preferred"},
            )
        case FeedbackStatus.UNKNOWN:
            if record.content_key is not None:
                # Its reward may be on the way still: a trainer that cannot carry ids may have two things going at once.
                return NotFoundError(
                    "no decision of this run has that prompt and these responses: send them exactly as they were "
                    "scored, with the run; if the reward is still being computed, send the feedback again in a moment",
                    details=details,
                    retry_after_seconds=RETRY_AFTER_SECONDS,
                )
            return NotFoundError(
                f"decision {name} is unknown in this run: send the decision_id of a reply with `recorded: true`, and "
                "its run",
                details=details,
            )


class Learner:
    """Keeps one run's posterior current, for as long as the gateway lives.

    Args:
        run: whose posterior it replaces.
        store: its log and snapshot.
        executor: where folding happens; one thread.
        telemetry: gauges.
        keep_events: events left in the log behind the newest snapshot.
    """

    def __init__(self, run: Run, store: Store, executor: Executor, telemetry: Telemetry, *, keep_events: int) -> None:
        self._run = run
        self._store = store
        self._executor = executor
        self._telemetry = telemetry
        self._keep_events = keep_events
        self._marks: deque[tuple[int, str]] = deque()
        self._checked = 0
        """Events that are known to be folded without a gap."""
        self._reloads = 0

    async def run_forever(self) -> None:
        """Load the snapshot, replay the log, mark the run ready, then follow the log until cancelled.

        The store may come and go. A posterior that has missed events (this replica was behind when another one trimmed
        the log) is made again from the newest snapshot. A log that cannot be folded stops the learner and makes the
        gateway not ready.
        """
        loaded = False
        while True:
            try:
                if not loaded:
                    await self._load()
                    loaded = True
                await self._follow()
            except StoreUnavailableError as error:
                self._telemetry.store_errors.labels("read_log").inc()
                fields = {"run": self._run.name, "error": str(error)}
                logger.warning("store away, learner waits", extra={"fields": fields})
                await asyncio.sleep(RETRY_SECONDS)
            except LogGapError as error:
                self._reloads += 1
                if self._reloads > MAX_RELOADS:
                    self._stop(error)
                    return
                logger.warning("learner starts again", extra={"fields": {"run": self._run.name, "error": str(error)}})
                loaded = False
            except Exception as error:  # noqa: BLE001 - the one place that may: it counts, logs and fails readiness
                self._stop(error)
                return

    def _stop(self, error: Exception) -> None:
        self._telemetry.learner_errors.labels(self._run.name).inc()
        self._run.failure = f"{type(error).__name__}: {error}"
        logger.error("learner stopped", exc_info=error, extra={"fields": {"run": self._run.name}})

    async def _load(self) -> None:
        run = self._run
        snapshot = await self._load_snapshot()
        status = await self._store.log_status(run.name)
        while status.trimmed > snapshot.posterior.count:
            # Another replica may have saved a newer one and trimmed behind it, between our two calls.
            newer = await self._load_snapshot()
            if newer.posterior.count == snapshot.posterior.count:
                raise RouterCoreError(
                    f"the log of run {run.name!r} has lost its first {status.trimmed} of {status.appended} events and "
                    f"the newest snapshot holds {snapshot.posterior.count}: a snapshot is missing; restore the store "
                    "from a backup, or use a new run name"
                )
            snapshot = newer
        if status.appended < snapshot.posterior.count:
            raise RouterCoreError(
                f"the snapshot of run {run.name!r} holds {snapshot.posterior.count} events and its log has seen "
                f"{status.appended}: the store has lost events; restore it from a backup, or use a new run name"
            )
        run.posterior, run.last_event_id = snapshot.posterior, snapshot.last_event_id
        self._checked = snapshot.posterior.count
        self._marks.clear()
        if snapshot.posterior.count:
            self._marks.append((snapshot.posterior.count, snapshot.last_event_id))

    async def _load_snapshot(self) -> Snapshot:
        """The newest snapshot, or the prior where there is none."""
        run, settings = self._run, self._run.template.fold_settings
        data = await self._store.load_snapshot(run.name)
        if data is None:
            return Snapshot(start(run.prior, settings), "0-0")
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, parse, data, run.fingerprint, run.prior, settings
        )

    async def _follow(self) -> None:
        run = self._run
        while True:
            caught_up = run.ready.is_set()
            entries = await self._store.read_log(
                run.name, run.last_event_id, count=READ_COUNT, block_ms=BLOCK_MS if caught_up else 1
            )
            for piece in self._cut_at_refresh(entries):
                await self._fold(piece)
            if not entries or (not caught_up and len(entries) < READ_COUNT):
                await self._check_tail()
                if not caught_up:
                    run.ready.set()
                    logger.info("run ready", extra={"fields": {"run": run.name, "events": run.posterior.count}})
            self._publish()

    async def _check_tail(self) -> None:
        """Compare the posterior with the end of the log.

        Raises:
            LogGapError: at the log's last event the counts differ, or the log ends before the posterior does.
        """
        run = self._run
        status = await self._store.log_status(run.name)
        if _order(status.last_id) < _order(run.last_event_id):
            raise LogGapError(
                f"the log of run {run.name!r} ends at event {status.last_id} and {run.last_event_id} was folded: the "
                "store has lost events"
            )
        if status.last_id != run.last_event_id:
            return
        if status.appended != run.posterior.count:
            raise LogGapError(
                f"the log of run {run.name!r} has seen {status.appended} events and {run.posterior.count} of them were "
                "folded"
            )
        self._reloads = 0

    async def _check_gap(self) -> None:
        """Make sure that nothing was trimmed before it was read, since the last time this was called.

        Exact in one direction: it may raise without a gap, when what was trimmed had been read just before.

        Raises:
            LogGapError: the log was trimmed beyond what was folded at the last check.
        """
        status = await self._store.log_status(self._run.name)
        if status.trimmed > self._checked or status.appended < self._run.posterior.count:
            raise LogGapError(
                f"the log of run {self._run.name!r} has dropped {status.trimmed} of {status.appended} events, of which "
                f"{self._checked} are known to be folded"
            )
        self._checked = self._run.posterior.count
        self._reloads = 0

    def _cut_at_refresh(self, entries: list[LogEntry]) -> list[list[LogEntry]]:
        """Pieces that end at refresh positions, so that a snapshot can be taken there."""
        pieces = []
        room = events_to_refresh(self._run.posterior)
        while entries:
            pieces.append(entries[:room])
            entries = entries[room:]
            room = self._run.template.fold_settings.refresh_events
        return pieces

    async def _fold(self, entries: list[LogEntry]) -> None:
        run = self._run
        loop = asyncio.get_running_loop()
        run.posterior = await loop.run_in_executor(self._executor, _fold_entries, run.posterior, entries)
        run.last_event_id = entries[-1].event_id
        if run.posterior.at_refresh:
            await self._check_gap()
            await self._snapshot()

    async def _snapshot(self) -> None:
        run = self._run
        snapshot = Snapshot(run.posterior, run.last_event_id)
        loop = asyncio.get_running_loop()
        data = await loop.run_in_executor(self._executor, dump, snapshot, run.fingerprint)
        if await self._store.save_snapshot(run.name, run.posterior.count, data):
            self._telemetry.snapshots.labels(run.name).inc()
        self._marks.append((run.posterior.count, run.last_event_id))
        trim_before = None
        while self._marks and self._marks[0][0] <= run.posterior.count - self._keep_events:
            trim_before = self._marks.popleft()[1]
        if trim_before is not None:
            await self._store.trim_log(run.name, trim_before)

    def _publish(self) -> None:
        run = self._run
        statistics = run.posterior.statistics
        self._telemetry.version.labels(run.name).set(run.posterior.count)
        self._telemetry.drift.labels(run.name).set(run.posterior.drift)
        for name, mean in zip(run.template.pool, statistics.mean_reward().tolist(), strict=True):
            if mean == mean:
                self._telemetry.mean_reward.labels(run.name, name).set(mean)


def _order(event_id: str) -> tuple[int, int]:
    """Ids of the log as numbers, in the order of the log."""
    milliseconds, _, sequence = event_id.partition("-")
    return int(milliseconds), int(sequence or 0)


def _fold_entries(posterior: Posterior, entries: Sequence[LogEntry]) -> Posterior:
    events: list[Event] = []
    for entry in entries:
        try:
            events.append(event_of(entry.decision_id, entry.payload, entry.value))
        except ValueError as error:
            raise RouterCoreError(f"log entry {entry.event_id} cannot be read: {error}") from error
    return fold(posterior, events)
