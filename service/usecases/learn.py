"""Learn: accept feedback exactly once, and fold the run's log into its posterior (design: the way of `POST /feedback`).

`FeedbackService` only appends to the log. `Learner`, one per run and gateway, tails the log and replaces the run's posterior;
so every replica learns from every replica's feedback, in the same order, to the same bits.
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
        for index, request in enumerate(requests):
            found = await self._runs.get(request.run or run)
            try:
                record = _record(request, found)
            except ServiceError as error:
                self._telemetry.feedback.labels(found.name, "invalid").inc()
                results[index] = error
            else:
                by_run.setdefault(found.name, []).append((index, record))
        for name, records in by_run.items():
            try:
                outcomes = await self._store.apply_feedback(name, [record for _, record in records])
            except StoreUnavailableError:
                self._telemetry.store_errors.labels("apply_feedback").inc()
                raise
            for (index, record), outcome in zip(records, outcomes, strict=True):
                self._telemetry.feedback.labels(name, outcome.status).inc()
                results[index] = _answer(requests[index], record, outcome)
        return [result for result in results if result is not None]


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
    by_content = request.prompt is not None and request.responses is not None
    if (request.decision_id is None) == (not by_content):
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
                f"decision {name} is older than the feedback window: send feedback sooner, or raise decision_ttl_seconds",
                details=details,
            )
        case FeedbackStatus.OUT_OF_RANGE:
            return ValidationError(
                f"preferred is {request.preferred}: decision {name} has fewer responses; send an index, 0 for the first",
                details={**details, "field": "preferred"},
            )
        case FeedbackStatus.UNKNOWN:
            return NotFoundError(
                f"decision {name} is unknown in this run: send the decision_id of a reply with `recorded: true`, and its run",
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

    def __init__(
        self, run: Run, store: Store, executor: Executor, telemetry: Telemetry, *, keep_events: int
    ) -> None:
        self._run = run
        self._store = store
        self._executor = executor
        self._telemetry = telemetry
        self._keep_events = keep_events
        self._marks: deque[tuple[int, str]] = deque()

    async def run_forever(self) -> None:
        """Load the snapshot, replay the log, mark the run ready, then follow the log until cancelled.

        The store may come and go. A log that cannot be folded stops the learner and makes the gateway not ready.
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
                logger.warning("store away, learner waits", extra={"fields": {"run": self._run.name, "error": str(error)}})
                await asyncio.sleep(RETRY_SECONDS)
            except Exception as error:  # noqa: BLE001 - the one place that may: it counts, logs and fails readiness
                self._telemetry.learner_errors.labels(self._run.name).inc()
                self._run.failure = f"{type(error).__name__}: {error}"
                logger.exception("learner stopped", extra={"fields": {"run": self._run.name}})
                return

    async def _load(self) -> None:
        run, template = self._run, self._run.template
        run.posterior = start(template.prior, template.fold_settings)
        run.last_event_id = "0-0"
        data = await self._store.load_snapshot(run.name)
        if data is not None:
            loop = asyncio.get_running_loop()
            snapshot = await loop.run_in_executor(
                self._executor, parse, data, template.fingerprint(), template.prior, template.fold_settings
            )
            run.posterior, run.last_event_id = snapshot.posterior, snapshot.last_event_id
            self._marks.append((snapshot.posterior.count, snapshot.last_event_id))

    async def _follow(self) -> None:
        run = self._run
        while True:
            caught_up = run.ready.is_set()
            entries = await self._store.read_log(
                run.name, run.last_event_id, count=READ_COUNT, block_ms=BLOCK_MS if caught_up else 1
            )
            for piece in self._cut_at_refresh(entries):
                await self._fold(piece)
            if not caught_up and not entries:
                await self._check_complete()
                run.ready.set()
                logger.info("run ready", extra={"fields": {"run": run.name, "events": run.posterior.count}})
            await self._publish(more=len(entries) == READ_COUNT)

    async def _check_complete(self) -> None:
        """Refuse to serve a posterior that misses events, as when a log was trimmed and its snapshot deleted."""
        status = await self._store.log_status(self._run.name)
        if status.last_id == self._run.last_event_id and status.appended != self._run.posterior.count:
            raise RouterCoreError(
                f"the log of run {self._run.name!r} has seen {status.appended} events and {self._run.posterior.count} can be "
                "replayed: its snapshot is missing; restore the store from a backup, or use a new run name"
            )

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
            await self._snapshot()

    async def _snapshot(self) -> None:
        run = self._run
        snapshot = Snapshot(run.posterior, run.last_event_id)
        loop = asyncio.get_running_loop()
        data = await loop.run_in_executor(self._executor, dump, snapshot, run.template.fingerprint())
        if await self._store.save_snapshot(run.name, run.posterior.count, data):
            self._telemetry.snapshots.labels(run.name).inc()
        self._marks.append((run.posterior.count, run.last_event_id))
        trim_before = None
        while self._marks and self._marks[0][0] <= run.posterior.count - self._keep_events:
            trim_before = self._marks.popleft()[1]
        if trim_before is not None:
            await self._store.trim_log(run.name, trim_before)

    async def _publish(self, *, more: bool) -> None:
        run = self._run
        statistics = run.posterior.statistics
        self._telemetry.version.labels(run.name).set(run.posterior.count)
        self._telemetry.drift.labels(run.name).set(run.posterior.drift)
        for name, mean in zip(run.template.pool, statistics.mean_reward().tolist(), strict=True):
            if mean == mean:
                self._telemetry.mean_reward.labels(run.name, name).set(mean)
        lag = 0
        if more:
            lag = max((await self._store.log_status(run.name)).appended - run.posterior.count, 0)
        self._telemetry.log_lag.labels(run.name).set(lag)


def _fold_entries(posterior: Posterior, entries: Sequence[LogEntry]) -> Posterior:
    events: list[Event] = []
    for entry in entries:
        try:
            events.append(event_of(entry.decision_id, entry.payload, entry.value))
        except ValueError as error:
            raise RouterCoreError(f"log entry {entry.event_id} cannot be read: {error}") from error
    return fold(posterior, events)
