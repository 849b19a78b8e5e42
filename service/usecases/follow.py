"""Follow: fold a run's log into its posterior, for as long as the gateway lives.

`Learner`, one per run and gateway, tails the log and replaces the run's posterior; so every replica learns from every
replica's feedback, in the same order, to the same bits. Before anything is folded it makes sure that the log is still
the one that it has followed and that callers' feedback went to (`check_held`). Started by `service.gateway`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from router_core.errors import RouterCoreError
from router_core.pools import Mark, PoolChange
from router_core.posterior import Posterior, events_to_refresh, fold, start
from router_core.prior import Prior
from router_core.records import Event
from router_core.snapshot import Snapshot, dump, parse
from service.errors import ConfigurationError, ServiceError, ValidationError
from service.specification import decode
from service.stores.acts import ARCHIVE, POOL, is_act, is_archived
from service.stores.ids import event_order
from service.stores.protocol import ForeignEntryError, LogEntry, LogStatus, RunCheck, Store
from service.telemetry import Telemetry
from service.usecases.decisions import event_of
from service.usecases.runs import Run, Templates, differences

logger = logging.getLogger(__name__)

READ_COUNT = 1024
"""Events per read of the log: large enough that replaying is bound by folding, small enough to stay responsive."""

BLOCK_MS = 1000
"""How long a read waits for the next event; bounds how late a stop or a loss is noticed."""

RETRY_FIRST_SECONDS = 0.25
"""Pause after the store did not answer, or answered with an error; doubles with each further one."""

RETRY_LAST_SECONDS = 4.0
"""Longest such pause: how late a store that came back may be noticed."""

STALLED_AFTER = 4
"""Failures in a row, about 2 s with their pauses, after which readiness tells of them."""

MAX_RELOADS = 3
"""How often in a row a learner starts again from the snapshot before it calls the log damaged."""

RESTORE = (
    "restore the store from a backup that holds the run, or give the run a new name "
    "(docs/runbooks/RewardRouterLearnerStopped.md)"
)
"""What helps after a loss in the store; the runbook's sentence."""


class LogGapError(RouterCoreError):
    """The posterior holds other events than the log, and none that is known to have been acknowledged was lost.

    Some were trimmed before they were read here, or written by a primary that died before its replicas had them.
    """


class LostRunError(RouterCoreError):
    """The store no longer holds what it acknowledged: it came back empty or older, or the name was taken again."""


def check_identity(run: Run, check: RunCheck) -> None:
    """Make sure that the run's name stands for what it stood for when this gateway opened it.

    Raises:
        LostRunError: the store has no such run, or another one under its name.
    """
    standing = check.identity
    if standing == run.identity:
        return
    if standing is None:
        raise LostRunError(f"the store has lost run {run.name!r}: {RESTORE}")
    if standing.fingerprint != run.identity.fingerprint:
        changed = differences(standing.fingerprint.decode(), run.identity.fingerprint.decode())
        raise LostRunError(
            f"the store has lost run {run.name!r}, and its name was taken by a gateway that differs in "
            f"{', '.join(sorted(changed)) or 'its fingerprint'}: stop that gateway, then {RESTORE}"
        )
    raise LostRunError(f"the store has lost run {run.name!r}, and it was opened again since: {RESTORE}")


def check_held(run: Run, check: RunCheck, *, replicated: bool) -> None:
    """Make sure that the log holds every event that was folded here or acknowledged by this gateway.

    Args:
        run: what was folded and acknowledged.
        check: of the store, asked for `held_events`.
        replicated: whether feedback is acknowledged only when replicas hold it: then a failover may take events that
            were read here and that no caller was told of.

    Raises:
        LostRunError: an acknowledged event is gone.
        LogGapError: the log was trimmed beyond what was folded here, or has lost events that nobody was told of.
    """
    status = check.status
    gone = {event_id for event_id in check.missing if _is_lost(event_id, check)}
    count = run.posterior.count
    if not gone and status.appended >= count:
        if status.trimmed and status.trimmed >= count:
            raise LogGapError(
                f"the log of run {run.name!r} has dropped {status.trimmed} of {status.appended} events, and {count} "
                "were folded here"
            )
        return
    sentence = (
        f"the log of run {run.name!r} has lost events: it has seen {status.appended} up to {status.last_id}, and "
        f"{count} up to {run.last_event_id} were folded here"
    )
    if replicated and status.appended and run.acknowledged not in gone:
        raise LogGapError(sentence)
    raise LostRunError(f"{sentence}: {RESTORE}")


def held_events(run: Run) -> list[str]:
    """Ids of the events that tell whether the log still holds what it must."""
    return [event_id for event_id in dict.fromkeys((run.last_event_id, run.acknowledged)) if event_id != "0-0"]


def _is_lost(event_id: str, check: RunCheck) -> bool:
    """Return True if an event that the log lacks can be missing for another reason than that it was trimmed."""
    at = event_order(event_id)
    return not check.status.trimmed or at >= event_order(check.first_id) or at > event_order(check.status.last_id)


class Learner:
    """Keeps one run's posterior current, for as long as the gateway lives.

    Args:
        run: whose posterior it replaces.
        store: its log and snapshot.
        executor: where folding happens; one thread.
        telemetry: gauges.
        keep_events: events left in the log behind the newest snapshot.
        replicated: see `check_held`.
        templates: of changed pools; None where no pool changes.
        on_pool: called when the run's pool is another one than before.
        on_archived: called when the run was archived; the learner ends.
    """

    def __init__(
        self,
        run: Run,
        store: Store,
        executor: Executor,
        telemetry: Telemetry,
        *,
        keep_events: int,
        replicated: bool = False,
        templates: Templates | None = None,
        on_pool: Callable[[Run], None] = lambda _: None,
        on_archived: Callable[[Run], None] = lambda _: None,
    ) -> None:
        self._templates = templates
        self._on_pool = on_pool
        self._on_archived = on_archived
        self._run = run
        self._store = store
        self._executor = executor
        self._telemetry = telemetry
        self._keep_events = keep_events
        self._replicated = replicated
        self._marks: deque[tuple[int, str]] = deque()
        self._loaded = False
        self._reloads = 0
        self._failures = 0
        """Failures in a row, by which the next pause grows."""

    async def run_forever(self) -> None:
        """Load the snapshot, replay the log, mark the run ready, then follow the log until cancelled.

        The store may come and go, and say what it likes: the learner waits and tries again. A posterior that has missed
        events (this replica was behind when another one trimmed the log) is made again from the newest snapshot. Where
        the store has lost what it acknowledged, the run does not learn, takes no feedback and is not ready, until the
        store holds it again. Only a log that fits no run ends the learner.
        """
        while True:
            try:
                if not self._loaded:
                    await self._load()
                    self._loaded = True
                await self._follow()
                return
            except LogGapError as error:
                self._loaded = False
                self._reloads += 1
                if self._reloads <= MAX_RELOADS:
                    fields = {"run": self._run.name, "error": str(error)}
                    logger.warning("learner starts again", extra={"fields": fields})
                else:
                    await self._lost(LostRunError(f"{error}, again and again: {RESTORE}"))
            except LostRunError as error:
                await self._lost(error)
            except ForeignEntryError as error:
                self._stop(error)
                return
            except ServiceError as error:
                await self._wait(error)
            except Exception as error:  # noqa: BLE001 - the one place that may: it counts, logs and fails readiness
                self._stop(error)
                return

    def _stop(self, error: Exception) -> None:
        self._telemetry.learner_errors.labels(self._run.name).inc()
        self._run.failure = f"{type(error).__name__}: {error}"
        logger.error("learner stopped", exc_info=error, extra={"fields": {"run": self._run.name}})

    async def _wait(self, error: ServiceError) -> None:
        """Count and log what the store said, then pause; the pauses grow."""
        self._telemetry.store_errors.labels("read_log").inc()
        if self._failures + 1 >= STALLED_AFTER:
            self._run.stalled = error.message
        fields = {"run": self._run.name, "error": str(error), "seconds": self._pause_seconds}
        logger.warning("store away, learner waits", extra={"fields": fields})
        await self._pause()

    async def _lost(self, error: LostRunError) -> None:
        """Fail the run and pause: the store may be restored. `service.usecases.hold` keeps the run's name."""
        run = self._run
        if run.failure != str(error):
            run.failure = str(error)
            self._telemetry.learner_errors.labels(run.name).inc()
            logger.error("learner stopped", extra={"fields": {"run": run.name, "error": str(error)}})
        await self._pause()

    @property
    def _pause_seconds(self) -> float:
        return min(RETRY_FIRST_SECONDS * float(2**self._failures), RETRY_LAST_SECONDS)

    async def _pause(self) -> None:
        pause = self._pause_seconds
        self._failures = min(self._failures + 1, 30)
        await asyncio.sleep(pause)

    async def _load(self) -> None:
        run = self._run
        snapshot = await self._load_snapshot()
        check = await self._store.check_run(run.name, ())
        check_identity(run, check)
        status = check.status
        while status.trimmed > snapshot.posterior.count:
            # Another replica may have saved a newer one and trimmed behind it, between our two calls.
            newer = await self._load_snapshot()
            if newer.posterior.count == snapshot.posterior.count:
                raise LostRunError(
                    f"the log of run {run.name!r} has lost its first {status.trimmed} of {status.appended} events and "
                    f"the newest snapshot holds {snapshot.posterior.count}: a snapshot is missing; {RESTORE}"
                )
            snapshot = newer
        if status.appended < snapshot.posterior.count:
            raise LostRunError(
                f"the snapshot of run {run.name!r} holds {snapshot.posterior.count} events and its log has seen "
                f"{status.appended}: the store has lost events; {RESTORE}"
            )
        await self._advance(snapshot.posterior)
        run.last_event_id = snapshot.last_event_id
        self._marks.clear()
        if snapshot.posterior.count:
            self._marks.append((snapshot.posterior.count, snapshot.last_event_id))

    async def _load_snapshot(self) -> Snapshot:
        """The newest snapshot, or the prior where there is none."""
        run, settings = self._run, self._run.template.fold_settings
        data = await self._store.load_snapshot(run.name)
        if data is None:
            return Snapshot(start(run.founding.prior(run.terms), settings), "0-0")
        prior = run.founding.prior(run.terms)
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, parse, data, run.fingerprint, prior, settings, self._prior_of
        )

    def _prior_of(self, specification: bytes) -> Prior:
        """The prior of a changed pool."""
        if self._templates is None:
            raise RouterCoreError(f"the pool of run {self._run.name!r} was changed, which this process cannot follow")
        try:
            return self._templates.prior(decode(specification), self._run.terms)
        except ConfigurationError as error:
            raise RouterCoreError(f"the pool of run {self._run.name!r} was changed: {error.message}") from error

    async def _advance(self, posterior: Posterior) -> None:
        """Take a posterior; where the pool is another one, with the scorers and plans of that, in one step."""
        run, specification = self._run, posterior.pool.specification
        if specification == run.posterior.pool.specification:
            run.advance(posterior)
            return
        template = run.founding
        if specification and self._templates is not None:
            try:
                template = self._templates.template(decode(specification))
            except ConfigurationError as error:
                raise RouterCoreError(f"the pool of run {run.name!r} was changed: {error.message}") from error
            await self._templates.begin(template)
        run.advance(posterior, template)
        self._on_pool(run)

    async def _follow(self) -> None:
        run = self._run
        while True:
            caught_up = run.ready.is_set() and run.failure is None
            entries = await self._store.read_log(
                run.name, run.last_event_id, count=READ_COUNT, block_ms=BLOCK_MS if caught_up else 1
            )
            # After the read and before the fold: what was read may come from a log that is not the run's any more.
            status = await self._check()
            for piece in self._cut_at_refresh(entries):
                await self._fold(piece)
            if any(entry.value == ARCHIVE for entry in entries) and is_archived(await self._store.acts(run.name)):
                run.archived = True
                self._on_archived(run)
                return
            self._check_tail(status)
            if not caught_up and len(entries) < READ_COUNT:
                self._set_ready()
            self._publish()

    def _set_ready(self) -> None:
        run = self._run
        run.failure = None
        run.ready.set()
        logger.info("run ready", extra={"fields": {"run": run.name, "events": run.posterior.count}})

    async def _check(self) -> LogStatus:
        """Make sure that the store holds the run as it was followed; returns the status of its log.

        Raises:
            LostRunError, LogGapError: see `check_identity` and `check_held`.
        """
        check = await self._store.check_run(self._run.name, held_events(self._run))
        check_identity(self._run, check)
        check_held(self._run, check, replicated=self._replicated)
        self._run.stalled = None
        self._failures = 0
        return check.status

    def _check_tail(self, status: LogStatus) -> None:
        """Compare the posterior with the end of the log, where it has come to it.

        Raises:
            LogGapError: at the log's last event the counts differ.
        """
        run = self._run
        if status.last_id != run.last_event_id:
            return
        if status.appended != run.posterior.count:
            raise LogGapError(
                f"the log of run {run.name!r} has seen {status.appended} events and {run.posterior.count} of them were "
                "folded"
            )
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
        posterior = await loop.run_in_executor(self._executor, _fold_entries, run.posterior, entries, self._prior_of)
        await self._advance(posterior)
        run.last_event_id = entries[-1].event_id
        if run.posterior.at_refresh:
            # Never a snapshot into a store that has lost the run.
            await self._check()
            self._reloads = 0
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
        template, means = run.template, statistics.mean_reward().tolist()
        for k in template.asked:
            name, mean = template.pool[k], means[k]
            if mean == mean:
                self._telemetry.mean_reward.labels(run.name, name).set(mean)


def _fold_entries(posterior: Posterior, entries: Sequence[LogEntry], prior_of: Callable[[bytes], Prior]) -> Posterior:
    events: list[Event | PoolChange | Mark] = []
    for entry in entries:
        try:
            if entry.value == POOL:
                events.append(PoolChange(prior_of(entry.payload), decode(entry.payload).state))
            elif is_act(entry):
                events.append(Mark())
            else:
                events.append(event_of(entry.decision_id, entry.payload, entry.value))
        except (ValueError, ValidationError) as error:
            raise RouterCoreError(f"log entry {entry.event_id} cannot be read: {error}") from error
    return fold(posterior, events)
