"""The store in one process's memory, for unit tests only: the contract of `service.stores.protocol.Store` in few lines.

Knows no server and forgets everything with the process. The contract suite holds it to the same words as `RedisStore`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from service.errors import ConflictError
from service.stores.ids import check_run
from service.stores.protocol import (
    Activity,
    AuditedDecision,
    AuditProgress,
    AuditQueue,
    AuditTask,
    AuditVerdict,
    DecisionRecord,
    FeedbackRecord,
    FeedbackResult,
    FeedbackStatus,
    LogEntry,
    LogStatus,
    RunCheck,
    RunIdentity,
    ScoreEntry,
    ScoreLogPart,
    lost_run,
)
from service.stores.records import check_reference, is_expired, response_count, system_ms
from service.stores.requirements import ServerFacts


def _parse_id(event_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = event_id.partition("-")
    return int(milliseconds), int(sequence or 0)


@dataclass(slots=True)
class _Decision:
    n: int
    payload: bytes
    dies_ms: int


@dataclass(slots=True)
class _Task:
    task: bytes
    dies_ms: float
    leased_ms: float = 0.0


@dataclass(slots=True)
class _Run:
    """What the server's keys of one run hold."""

    identity: RunIdentity | None = None
    decisions: dict[str, _Decision] = field(default_factory=dict)
    aliases: dict[str, tuple[str, int]] = field(default_factory=dict)
    markers: dict[str, tuple[str, bytes, int]] = field(default_factory=dict)
    log: list[LogEntry] = field(default_factory=list)
    appended: int = 0
    last: tuple[int, int] = (0, 0)
    snapshot: tuple[int, bytes] | None = None
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    sticky: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    scores: list[ScoreEntry] = field(default_factory=list)
    scores_appended: int = 0
    scale: tuple[int, bytes] | None = None
    progress: AuditProgress = field(default_factory=lambda: AuditProgress(0))
    waiting: dict[str, _Task] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)
    spent: tuple[float, int] = (0.0, 0)
    audited: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    judged: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    acts: list[LogEntry] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)
    newest: dict[bytes, int] = field(default_factory=dict)
    newest_dies_ms: float = 0.0
    points: dict[int, tuple[bytes, float]] = field(default_factory=dict)


def _feedback_before(state: _Run, decision_id: str, now: int) -> bytes:
    """Return a newline and the feedback that the decision has got; nothing where there is none."""
    _, value, dies_ms = state.markers.get(decision_id, ("", b"", now))
    return b"\n" + value if dies_ms > now else b""


class MemoryStore:
    """`Store` without durability.

    Args:
        window_seconds: feedback window.
        now_ms: clock, milliseconds since 1970.
    """

    def __init__(self, *, window_seconds: float, now_ms: Callable[[], int] = system_ms) -> None:
        self._window_ms = round(window_seconds * 1000)
        self._now_ms = now_ms
        self._runs: dict[str, _Run] = {}
        self._notes: list[LogEntry] = []

    def _run(self, run: str) -> _Run:
        return self._runs.setdefault(check_run(run), _Run())

    async def ping(self) -> None:
        """Memory always answers."""

    async def survey(self) -> Sequence[ServerFacts]:
        """Nothing: there is no server."""
        return ()

    def refuse(self, reason: str | None) -> None:
        """Nobody refuses memory: a survey finds nothing."""

    async def probe(self, run: str) -> None:
        """Memory can always save."""
        check_run(run)

    async def open_run(self, run: str, fingerprint: bytes, *, free_seconds: float = 0.0) -> RunIdentity:
        """Give the run an identity if it has none; return the one that stands. Memory loses no run."""
        state = self._run(run)
        if state.identity is None:
            state.identity = RunIdentity(secrets.token_hex(8), fingerprint)
        return state.identity

    async def check_run(self, run: str, event_ids: Sequence[str]) -> RunCheck:
        """Say what is held of a run, and which of these events its log does not hold."""
        state = self._run(run)
        held = {entry.event_id for entry in state.log}
        first = state.log[0].event_id if state.log else "0-0"
        missing = tuple(event_id for event_id in event_ids if event_id not in held)
        return RunCheck(state.identity, await self.log_status(run), first, missing)

    async def has_run(self, run: str) -> bool:
        """Return True if `open_run` was ever called for the run, by any gateway."""
        return self._run(run).identity is not None

    async def list_runs(self) -> list[str]:
        """Names of the runs that have an identity, sorted."""
        return sorted(name for name, state in self._runs.items() if state.identity is not None)

    async def save_decisions(self, run: str, decisions: Sequence[DecisionRecord]) -> None:
        """Save all of them, each for the feedback window."""
        state, now = self._run(run), self._now_ms()
        counts = [response_count(decision) for decision in decisions]
        for decision, n in zip(decisions, counts, strict=True):
            state.decisions[decision.decision_id] = _Decision(n, decision.payload, now + self._window_ms)
            if decision.content_key is not None:
                state.aliases[decision.content_key] = (decision.decision_id, now + 2 * self._window_ms)

    async def save_audited(
        self, run: str, decisions: Sequence[DecisionRecord], tasks: Sequence[AuditTask], *, counted: int, seconds: float
    ) -> AuditProgress:
        """Save decisions, count them, and queue those that were chosen."""
        await self.save_decisions(run, decisions)
        state = self._run(run)
        now = self._now_ms()
        for task in tasks:
            if task.collect_seconds is not None:
                count = state.parts[task.decision_id] = state.parts.get(task.decision_id, 0) + 1
                if count > 1:
                    before = state.waiting.get(task.decision_id)
                    if before is not None and count <= task.parts:
                        before.task += task.task
                    continue
            due = 0.0 if task.collect_seconds is None else now + task.collect_seconds * 1000
            state.waiting[task.decision_id] = _Task(task.task, now + seconds * 1000, due)
        state.progress = AuditProgress(state.progress.count + counted, state.progress.start)
        return state.progress

    async def audit_progress(self, run: str) -> AuditProgress:
        """Return how far the run has come on its schedule."""
        return self._run(run).progress

    async def restart_audits(self, run: str, start: int) -> None:
        """Let the schedule begin anew after so many decisions, unless it began later."""
        state = self._run(run)
        state.progress = AuditProgress(state.progress.count, max(start, state.progress.start))

    async def claim_audits(
        self, run: str, *, count: int, lease_seconds: float, keep: int, budget: float | None = None
    ) -> AuditQueue:
        """Take up to `count` of the queued decisions, oldest first; nobody else gets them for `lease_seconds`."""
        state, now = self._run(run), self._now_ms()
        order = sorted(state.waiting, key=lambda name: (state.waiting[name].leased_ms, name))
        dropped = order[: max(len(order) - keep, 0)]
        spent, dies_ms = state.spent
        claimed: list[str] = []
        if budget is None or (spent if dies_ms > now else 0.0) < budget:
            free = [name for name in order[len(dropped) :] if state.waiting[name].leased_ms <= now][:count]
            claimed = [name for name in free if state.waiting[name].dies_ms > now]
            dropped += [name for name in free if name not in claimed]
        for name in dropped:
            del state.waiting[name]
        for name in claimed:
            state.waiting[name].leased_ms = now + lease_seconds * 1000
        tasks = [AuditTask(name, state.waiting[name].task) for name in claimed]
        return AuditQueue(tasks, len(state.waiting), len(dropped))

    async def finish_audits(
        self, run: str, verdicts: Sequence[AuditVerdict], *, identity: RunIdentity, keep: int
    ) -> list[FeedbackResult]:
        """Take decisions out of the queue, each with its event."""
        state, now = self._run(run), self._now_ms()
        if state.identity != identity:
            raise lost_run(run)
        results = []
        for it in verdicts:
            if state.waiting.pop(it.decision_id, None) is None:
                results.append(FeedbackResult(FeedbackStatus.DUPLICATE, it.decision_id))
                continue
            spent, dies_ms = state.spent if state.spent[1] > now else (0.0, now + 3_600_000)
            state.spent = (spent + it.price, dies_ms)
            event_id = None
            if it.value:
                value = it.value + _feedback_before(state, it.decision_id, now)
                event_id = self._append(state, it.decision_id, it.payload, value, now)
                await self.update_decisions(run, [DecisionRecord(it.decision_id, it.payload)])
            if it.value and it.shown:
                state.audited[it.decision_id] = (it.payload, it.shown)
                for old in list(state.audited)[: max(len(state.audited) - keep, 0)]:
                    del state.audited[old]
            results.append(FeedbackResult(FeedbackStatus.APPLIED, it.decision_id, event_id))
        return results

    async def audits_waiting(self, run: str) -> int:
        """Return how many decisions are chosen and not refereed."""
        return len(self._run(run).waiting)

    async def newest_audits(self, run: str, count: int) -> list[AuditedDecision]:
        """Return up to `count` of the audits that are kept for people, newest first."""
        names = list(self._run(run).audited)[::-1][:count]
        return [audit for name in names if (audit := await self.audited(run, name)) is not None]

    async def audited(self, run: str, decision_id: str) -> AuditedDecision | None:
        """Return one of the audits that are kept for people; None if it is not kept."""
        state = self._run(run)
        if decision_id not in state.audited:
            return None
        judged = state.judged.get(decision_id)
        return AuditedDecision(decision_id, *state.audited[decision_id], None if judged is None else judged[1])

    async def judge_audit(
        self, run: str, record: DecisionRecord, value: bytes, *, identity: RunIdentity
    ) -> FeedbackResult:
        """Append what a person says of an audited decision, once."""
        state, name, now = self._run(run), record.decision_id, self._now_ms()
        if state.identity != identity:
            raise lost_run(run)
        if name in state.judged:
            event_id, standing = state.judged[name]
            if standing == value:
                return FeedbackResult(FeedbackStatus.DUPLICATE, name, event_id)
            return FeedbackResult(FeedbackStatus.CONFLICT, name, event_id, standing)
        event_id = self._append(state, name, record.payload, value + _feedback_before(state, name, now), now)
        state.judged[name] = (event_id, value)
        await self.update_decisions(run, [record])
        return FeedbackResult(FeedbackStatus.APPLIED, name, event_id)

    async def update_decisions(self, run: str, decisions: Sequence[DecisionRecord]) -> list[bool]:
        """Replace the payloads of those that still wait for feedback; which they were."""
        state, now = self._run(run), self._now_ms()
        counts = [response_count(decision) for decision in decisions]
        pending = []
        for decision, n in zip(decisions, counts, strict=True):
            standing = state.decisions.get(decision.decision_id)
            alive = standing is not None and standing.dies_ms > now
            if standing is not None and alive:
                state.decisions[decision.decision_id] = _Decision(n, decision.payload, standing.dies_ms)
            pending.append(alive)
        return pending

    async def apply_feedback(
        self, run: str, feedback: Sequence[FeedbackRecord], *, identity: RunIdentity | None = None
    ) -> list[FeedbackResult]:
        """Apply each exactly once: mark the decision and append the event, or say why not."""
        for item in feedback:
            check_reference(item)
        state = self._run(run)
        if identity is not None and state.identity != identity:
            raise lost_run(run)
        return [self._apply(state, item, self._now_ms()) for item in feedback]

    def _apply(self, state: _Run, item: FeedbackRecord, now: int) -> FeedbackResult:
        decision_id = item.decision_id
        if item.content_key is not None:
            aliased, alias_dies = state.aliases.get(item.content_key, ("", now))
            if alias_dies <= now:
                return FeedbackResult(FeedbackStatus.UNKNOWN)
            decision_id = aliased
        assert decision_id is not None  # check_reference has seen to it
        event_id, standing, marker_dies = state.markers.get(decision_id, ("", b"", now))
        if marker_dies > now:
            if standing == item.value:
                return FeedbackResult(FeedbackStatus.DUPLICATE, decision_id, event_id)
            return FeedbackResult(FeedbackStatus.CONFLICT, decision_id, event_id, standing)
        decision = state.decisions.get(decision_id)
        if decision is None or decision.dies_ms <= now:
            expired = item.decision_id is None or is_expired(decision_id, now, self._window_ms)
            return FeedbackResult(FeedbackStatus.EXPIRED if expired else FeedbackStatus.UNKNOWN, decision_id)
        if item.preferred is not None and not 0 <= item.preferred < decision.n:
            return FeedbackResult(FeedbackStatus.OUT_OF_RANGE, decision_id)
        event_id = self._append(state, decision_id, decision.payload, item.value, now)
        state.markers[decision_id] = (event_id, item.value, now + 2 * self._window_ms)
        del state.decisions[decision_id]
        return FeedbackResult(FeedbackStatus.APPLIED, decision_id, event_id)

    def _append(self, state: _Run, decision_id: str, payload: bytes, value: bytes, now: int) -> str:
        # As XADD does: ids grow even when the clock goes back.
        milliseconds, sequence = state.last
        state.last = (now, 0) if now > milliseconds else (milliseconds, sequence + 1)
        event_id = f"{state.last[0]}-{state.last[1]}"
        state.log.append(LogEntry(event_id, decision_id, payload, value))
        state.appended += 1
        state.grown.set()
        return event_id

    async def read_log(self, run: str, after: str, *, count: int, block_ms: int) -> list[LogEntry]:
        """Events after id `after`, oldest first; waits up to `block_ms` when there are none."""
        state, position = self._run(run), _parse_id(after)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + block_ms / 1000
        while True:
            state.grown.clear()
            entries = [entry for entry in state.log if _parse_id(entry.event_id) > position][:count]
            if entries or loop.time() >= deadline:
                return entries
            try:
                async with asyncio.timeout_at(deadline):
                    await state.grown.wait()
            except TimeoutError:
                return []

    async def log_status(self, run: str) -> LogStatus:
        """How many events were ever appended, and the id of the last."""
        state = self._run(run)
        return LogStatus(state.appended, f"{state.last[0]}-{state.last[1]}", state.appended - len(state.log))

    async def load_snapshot(self, run: str) -> bytes | None:
        """The newest snapshot, or None."""
        snapshot = self._run(run).snapshot
        return None if snapshot is None else snapshot[1]

    async def save_snapshot(self, run: str, position: int, snapshot: bytes) -> bool:
        """Keep the snapshot unless a newer one is kept; True if it was kept."""
        state = self._run(run)
        if state.snapshot is not None and state.snapshot[0] > position:
            return False
        state.snapshot = (position, snapshot)
        return True

    async def trim_log(self, run: str, before: str) -> int:
        """Drop the events with ids lower than `before`; returns how many."""
        state, position = self._run(run), _parse_id(before)
        kept = [entry for entry in state.log if _parse_id(entry.event_id) >= position]
        dropped = len(state.log) - len(kept)
        state.log = kept
        return dropped

    async def stick(self, run: str, choices: Sequence[tuple[str, bytes]], *, seconds: float) -> list[bytes | None]:
        """Set each choice unless one stands: None where it was set, else the one that stands."""
        state, now = self._run(run), self._now_ms()
        standing: list[bytes | None] = []
        for key, value in choices:
            found, dies_ms = state.sticky.get(key, (b"", now))
            if dies_ms > now:
                standing.append(found)
            else:
                state.sticky[key] = (value, now + max(round(seconds * 1000), 1))
                standing.append(None)
        return standing

    async def exchange_scores(self, run: str, entries: Sequence[bytes], *, after: str, count: int) -> ScoreLogPart:
        """Append to the score log, then read what comes after id `after`."""
        state = self._run(run)
        for payload in entries:
            state.scores_appended += 1
            state.scores.append(ScoreEntry(f"{state.scores_appended}-0", payload))
        position, appended = _parse_id(after), state.scores_appended
        found = [entry for entry in state.scores if _parse_id(entry.entry_id) > position][:count]
        return ScoreLogPart(found, LogStatus(appended, f"{appended}-0", appended - len(state.scores)))

    async def load_scale(self, run: str) -> bytes | None:
        """The newest snapshot of the score log, or None."""
        scale = self._run(run).scale
        return None if scale is None else scale[1]

    async def save_scale(self, run: str, position: int, data: bytes, *, trim_before: str) -> None:
        """Keep the snapshot unless a newer one is kept; drop the entries before that id."""
        state = self._run(run)
        if state.scale is None or state.scale[0] <= position:
            state.scale = (position, data)
        state.scores = [e for e in state.scores if _parse_id(e.entry_id) >= _parse_id(trim_before)]

    async def tell_activity(
        self,
        run: str,
        counts: Mapping[str, float],
        newest: Sequence[tuple[int, bytes]],
        *,
        keep: int,
        seconds: float,
    ) -> None:
        """Add to the run's totals and newest decisions."""
        state, now = self._run(run), self._now_ms()
        for name, count in counts.items():
            state.counts[name] = state.counts.get(name, 0.0) + count
        standing = {**state.newest} if state.newest_dies_ms > now else {}
        standing |= {decision: time_ms for time_ms, decision in newest}
        order = sorted(standing, key=lambda decision: (standing[decision], decision))
        state.newest = {decision: standing[decision] for decision in order[-keep:]}
        state.newest_dies_ms = now + seconds * 1000

    async def activity(self, run: str, *, newest: int) -> Activity:
        """Return the run's totals and up to so many of its newest decisions."""
        state = self._run(run)
        alive = [*state.newest] if state.newest_dies_ms > self._now_ms() else []
        return Activity({**state.counts}, alive[len(alive) - min(newest, len(alive)) :])

    async def keep_point(self, run: str, slot: int, point: bytes, *, seconds: float) -> bytes:
        """Keep a point unless the slot has one; return the one that stands."""
        state, now = self._run(run), self._now_ms()
        if slot not in state.points or state.points[slot][1] <= now:
            state.points[slot] = (point, now + seconds * 1000)
        return state.points[slot][0]

    async def points(self, run: str, slots: Sequence[int]) -> list[bytes]:
        """Return the points of these slots, without those that have none."""
        state, now = self._run(run), self._now_ms()
        return [state.points[slot][0] for slot in slots if slot in state.points and state.points[slot][1] > now]

    async def append_act(
        self, run: str, name: str, payload: bytes, value: bytes, *, identity: RunIdentity, expected: int | None = None
    ) -> str | None:
        """Append an act to the run's log and to its acts; its event's id, None where others were first."""
        state = self._run(run)
        if state.identity != identity:
            raise lost_run(run)
        if expected is not None and expected != len(state.acts):
            return None
        event_id = self._append(state, name, payload, value, self._now_ms())
        state.acts.append(state.log[-1])
        return event_id

    async def acts(self, run: str) -> list[LogEntry]:
        """Every act of the run, oldest first."""
        return [*self._run(run).acts]

    async def drop_run(self, run: str) -> None:
        """Delete everything of a run."""
        self._runs.pop(run, None)

    async def write_entries(self, run: str, entries: Sequence[LogEntry], *, acts: bool = False) -> None:
        """Append entries with their ids."""
        state = self._run(run)
        (state.acts if acts else state.log).extend(entries)

    async def finish_run(
        self, run: str, fingerprint: bytes, status: LogStatus, snapshot: tuple[int, bytes] | None
    ) -> RunIdentity:
        """Give a run whose entries were written its counts, snapshot and identity."""
        state = self._run(run)
        if state.identity is not None:
            raise ConflictError(f"run {run!r} was opened meanwhile: import it under another name")
        state.appended, state.last, state.snapshot = status.appended, _parse_id(status.last_id), snapshot
        state.identity = RunIdentity(secrets.token_hex(8), fingerprint)
        return state.identity

    async def note(self, run: str, payload: bytes, value: bytes) -> None:
        """Keep an act on a run that is gone."""
        self._notes.append(LogEntry(f"{self._now_ms()}-{len(self._notes)}", run, payload, value))

    async def notes(self) -> list[LogEntry]:
        """The acts on runs that are gone, oldest first."""
        return [*self._notes]

    async def close(self) -> None:
        """Nothing to close."""
