"""What the use cases know of a store: save decisions, apply feedback exactly once, read the log, keep a snapshot.

Bytes in, bytes out: a store never looks inside a snapshot, and inside a decision only for `n`, the number of responses.
Every method raises `StoreUnavailableError` when the server does not answer in time, or with an error; then nothing was
acknowledged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from service.errors import NotReadyError, ServiceError
from service.stores.requirements import ServerFacts

WATCH_SECONDS = 5.0
"""How long a store counts as watched after a gateway's last `open_run`: a few times the period of those calls."""


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """One decision to be saved before the reply.

    `payload` is a msgpack map with at least `n`, the number of responses. `content_key` (hash of run, prompt and
    responses) lets feedback find the latest decision of that content without its id.
    """

    decision_id: str
    payload: bytes
    content_key: str | None = None


@dataclass(frozen=True, slots=True)
class FeedbackRecord:
    """One feedback to be applied: exactly one of the two references, and the canonical bytes of its value.

    `preferred` is the response index of a preference, checked against the decision's `n`; None for other signals.
    """

    value: bytes
    decision_id: str | None = None
    content_key: str | None = None
    preferred: int | None = None


class ForeignEntryError(ServiceError):
    """A run's log holds an entry that no gateway wrote: it fits no run, and no repetition heals it."""


class NameNotFreeError(NotReadyError):
    """A run's name looks unused, in a store that may have lost it a moment ago.

    Attributes:
        seconds: until the name may be taken, if nobody claims it meanwhile.
    """

    seconds: float = 0.0


class FeedbackStatus(StrEnum):
    """What became of a feedback. Only `APPLIED` appended an event."""

    APPLIED = "applied"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    UNKNOWN = "unknown"
    EXPIRED = "expired"
    OUT_OF_RANGE = "out_of_range"


@dataclass(frozen=True, slots=True)
class FeedbackResult:
    """The outcome, with the event's id in the log when there is one and the value that stands when it differs."""

    status: FeedbackStatus
    decision_id: str | None = None
    event_id: str | None = None
    standing_value: bytes | None = None


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One event of a run's log: the decision's payload and the feedback's value, verbatim."""

    event_id: str
    decision_id: str
    payload: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class LogStatus:
    """`appended` counts every event ever appended, `trimmed` those of them that were dropped; `last_id` is "0-0" for an
    empty log."""

    appended: int
    last_id: str
    trimmed: int = 0


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What a run's name stands for in the store.

    `fingerprint` names all that the run's posterior depends on besides its log. `born` is drawn when the name is taken:
    a store that lost the run and in which the name was taken again has another one.
    """

    born: str
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class RunCheck:
    """What the store holds of a run: its identity, None if it has none; its log's status and the id of the log's first
    event, "0-0" where there is none; and those of the ids asked for that the log does not hold."""

    identity: RunIdentity | None
    status: LogStatus
    first_id: str
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AuditTask:
    """A decision that was chosen for an audit, and what its referee must know: any bytes.

    Attributes:
        decision_id: of the decision, or of the audit where it is made of several decisions.
        task: any bytes; those of the parts come one after the other.
        collect_seconds: None for a whole task. Else this is one part of it: the first part begins it, and it may be
            claimed so many seconds later.
        parts: how many parts there may be; later ones are left out.
    """

    decision_id: str
    task: bytes
    collect_seconds: float | None = None
    parts: int = 1


@dataclass(frozen=True, slots=True)
class AuditQueue:
    """Tasks that were claimed, and what was found in the queue.

    Attributes:
        tasks: claimed; nobody else gets them while the lease lasts.
        waiting: decisions that are chosen and not refereed, the claimed ones included.
        dropped: decisions that this claim dropped: too many waited, or their texts have expired.
    """

    tasks: list[AuditTask]
    waiting: int
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class AuditVerdict:
    """What a referee made of one claimed decision.

    Attributes:
        decision_id: of the decision.
        price: what it cost, in units of the cheapest scorer.
        payload: of the decision, with every answer that the audit has added; it also replaces that of a decision that
            still waits for feedback.
        value: of the event; b"" for none: no referee has said anything. Where feedback came first, a newline and its
            value are added.
        shown: what people need to judge it too, kept with the newest audits; b"" for nothing.
    """

    decision_id: str
    price: float
    payload: bytes = b""
    value: bytes = b""
    shown: bytes = b""


@dataclass(frozen=True, slots=True)
class AuditProgress:
    """How far a run has come on its schedule of audits.

    Attributes:
        count: decisions saved while audits were on.
        start: of them, those before the schedule last began anew.
    """

    count: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class AuditedDecision:
    """One of the newest audits: `AuditVerdict.payload` and `AuditVerdict.shown`, and the value that people have given
    it, None for none."""

    decision_id: str
    payload: bytes
    shown: bytes
    judged: bytes | None = None


@dataclass(frozen=True, slots=True)
class ScoreEntry:
    """One entry of a run's score log, verbatim."""

    entry_id: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class ScoreLogPart:
    """Some entries of a run's score log, oldest first, and the log's status after they were read."""

    entries: list[ScoreEntry]
    status: LogStatus


@dataclass(frozen=True, slots=True)
class Activity:
    """What all gateways have told of a run's decisions: sums by name, and the newest ones, oldest first, verbatim."""

    counts: Mapping[str, float]
    newest: list[bytes]


def lost_run(run: str) -> NotReadyError:
    """The refusal of feedback on a run that the store has lost, or that was opened again since."""
    return NotReadyError(
        f"the store has lost run {run!r}: this feedback is not acknowledged; restore the store from a backup, or give "
        "the run a new name",
        details={"run": run},
        retry_after_seconds=1,
    )


def name_not_free(run: str, seconds: float) -> NameNotFreeError:
    """Return the refusal of a new run's name that a gateway may hold still."""
    error = NameNotFreeError(
        f"run {run!r} is not in the store, which may have lost it a moment ago: other gateways have "
        f"{seconds:.1f} s to claim the name; then it is taken as a new run's",
        details={"run": run},
        retry_after_seconds=math.ceil(seconds),
    )
    error.seconds = seconds
    return error


class Store(Protocol):
    """One store for all runs; a run's keys share one hash tag and never meet another run's."""

    async def ping(self) -> None:
        """Return when the server answers."""

    async def probe(self, run: str) -> None:
        """Return when something of the run could be saved: a server that is full or read-only answers a ping too."""

    async def survey(self) -> Sequence[ServerFacts]:
        """Ask every server of the store that takes writes what it is; none for a store without servers."""

    def refuse(self, reason: str | None) -> None:
        """Save no decision and take no feedback from now on, for this reason; None: as usual again.

        Meanwhile `probe`, `save_decisions` and `apply_feedback` raise `UnsafeStoreError`.
        """

    async def open_run(self, run: str, fingerprint: bytes, *, free_seconds: float = 0.0) -> RunIdentity:
        """Give the run an identity with this fingerprint if it has none; return the one that stands.

        A store that has lost a run looks as if the run had never been. So a newcomer waits: gateways that hold runs
        call this again and again without `free_seconds`, which takes a lost name back and marks the store as watched.

        Args:
            run: the name.
            fingerprint: see `RunIdentity`.
            free_seconds: how long the store must have been watched, without losing anything, before an unused name is
                taken.

        Raises:
            NameNotFreeError: the name is unused, and the store has not been watched for so long.
        """

    async def check_run(self, run: str, event_ids: Sequence[str]) -> RunCheck:
        """Say what the store holds of a run, and which of these events its log does not hold. Changes nothing."""

    async def has_run(self, run: str) -> bool:
        """Return True if `open_run` was ever called for the run, by any gateway."""

    async def list_runs(self) -> list[str]:
        """Names of all runs that `open_run` was ever called for, sorted."""

    async def save_decisions(self, run: str, decisions: Sequence[DecisionRecord]) -> None:
        """Save all of them, each for the feedback window; returns when the server has acknowledged them."""

    async def save_audited(
        self, run: str, decisions: Sequence[DecisionRecord], tasks: Sequence[AuditTask], *, counted: int, seconds: float
    ) -> AuditProgress:
        """Save decisions as `save_decisions` does, and queue those of them that were chosen for an audit.

        A part of a task that is finished, or complete, changes nothing.

        Args:
            run: whose.
            decisions: to be saved.
            tasks: of those of them that were chosen.
            counted: how many of the decisions the schedule counts.
            seconds: how long a task is kept; then its decision is dropped.

        Returns:
            The progress, these decisions included.
        """

    async def audit_progress(self, run: str) -> AuditProgress:
        """Return how far the run has come on its schedule."""

    async def restart_audits(self, run: str, start: int) -> None:
        """Let the schedule begin anew after so many decisions, unless it began later."""

    async def claim_audits(
        self, run: str, *, count: int, lease_seconds: float, keep: int, budget: float | None = None
    ) -> AuditQueue:
        """Take up to `count` of the queued decisions, oldest first; nobody else gets them for `lease_seconds`.

        Args:
            run: whose.
            count: decisions at most.
            lease_seconds: after which a decision that is not finished may be claimed again.
            keep: decisions that may wait; the oldest ones beyond are dropped.
            budget: price that the audits of an hour may have; none is claimed once it is spent. None: no limit.
        """

    async def finish_audits(
        self, run: str, verdicts: Sequence[AuditVerdict], *, identity: RunIdentity, keep: int
    ) -> list[FeedbackResult]:
        """Take decisions out of the queue, each with its event, atomically: `APPLIED`, with the event's id where there
        is one, or `DUPLICATE` for a decision that is not in the queue any more.

        Args:
            run: whose.
            verdicts: of decisions that were claimed.
            identity: of the run.
            keep: how many of the newest audits are kept for people.

        Raises:
            NotReadyError: the store has lost the run.
        """

    async def audits_waiting(self, run: str) -> int:
        """Return how many decisions are chosen and not refereed."""

    async def newest_audits(self, run: str, count: int) -> list[AuditedDecision]:
        """Return up to `count` of the audits that are kept for people, newest first."""

    async def audited(self, run: str, decision_id: str) -> AuditedDecision | None:
        """Return one of the audits that are kept for people; None if it is not kept."""

    async def judge_audit(
        self, run: str, record: DecisionRecord, value: bytes, *, identity: RunIdentity
    ) -> FeedbackResult:
        """Append what a person says of an audited decision, once: `APPLIED`, `DUPLICATE` or `CONFLICT`.

        The record's payload is the event's, and that of a decision that still waits for feedback. Where feedback came
        first, a newline and its value are added to the value.

        Raises:
            NotReadyError: the store has lost the run.
        """

    async def update_decisions(self, run: str, decisions: Sequence[DecisionRecord]) -> list[bool]:
        """Replace the payloads of those that still wait for feedback, each for the rest of its window; which they were.

        A decision whose feedback came first, or that has expired, is left alone. Content keys stay as they are.
        """

    async def apply_feedback(
        self, run: str, feedback: Sequence[FeedbackRecord], *, identity: RunIdentity | None = None
    ) -> list[FeedbackResult]:
        """Apply each atomically and exactly once: mark the decision and append the event, or say why not.

        Raises:
            NotReadyError: the run has another identity than `identity`, or none: the store has lost the run. None:
                whatever it has.
        """

    async def read_log(self, run: str, after: str, *, count: int, block_ms: int) -> list[LogEntry]:
        """Events after id `after` ("0-0": from the first), oldest first; waits up to `block_ms` when there are none.

        Blocking reads never delay the other methods.
        """

    async def log_status(self, run: str) -> LogStatus:
        """How many events were ever appended, the id of the last, and how many were dropped."""

    async def load_snapshot(self, run: str) -> bytes | None:
        """The newest snapshot, or None."""

    async def save_snapshot(self, run: str, position: int, snapshot: bytes) -> bool:
        """Keep the snapshot of the first `position` events unless a newer one is kept; True if it was kept."""

    async def trim_log(self, run: str, before: str) -> int:
        """Drop the events with ids lower than `before`; returns how many."""

    async def stick(self, run: str, choices: Sequence[tuple[str, bytes]], *, seconds: float) -> list[bytes | None]:
        """Set each (key, value) for so long, unless one stands: None where it was set, else the value that stands.

        In order, each atomically: of equal keys in one call, and of callers at once, the first wins.
        """

    async def exchange_scores(self, run: str, entries: Sequence[bytes], *, after: str, count: int) -> ScoreLogPart:
        """Append to the score log, then read up to `count` entries after id `after` ("0-0": from the first)."""

    async def load_scale(self, run: str) -> bytes | None:
        """The newest snapshot of the score log, or None."""

    async def save_scale(self, run: str, position: int, data: bytes, *, trim_before: str) -> None:
        """Keep the snapshot of the first `position` entries unless a newer one is kept; drop those before that id."""

    async def tell_activity(
        self,
        run: str,
        counts: Mapping[str, float],
        newest: Sequence[tuple[int, bytes]],
        *,
        keep: int,
        seconds: float,
    ) -> None:
        """Add to a run's totals and newest decisions, for people who watch it; nothing depends on them.

        Args:
            run: whose.
            counts: by name, added to what stands.
            newest: decisions, with the time in milliseconds by which they are ordered.
            keep: how many of the newest are kept.
            seconds: how long these are kept after the last one.
        """

    async def activity(self, run: str, *, newest: int) -> Activity:
        """Return the totals of a run and up to `newest` of its newest decisions."""

    async def keep_point(self, run: str, slot: int, point: bytes, *, seconds: float) -> bytes:
        """Keep a point of the run's charts for so long unless the slot has one; return the one that stands."""

    async def points(self, run: str, slots: Sequence[int]) -> list[bytes]:
        """Return the points of these slots, in their order, without those that have none."""

    async def append_act(
        self, run: str, name: str, payload: bytes, value: bytes, *, identity: RunIdentity, expected: int | None = None
    ) -> str | None:
        """Append an operator's act to the run's log, and to the list of its acts, which is never trimmed.

        Args:
            run: whose.
            name: of the act, in the place of a decision's id.
            payload: of the event.
            value: of the event.
            identity: of the run.
            expected: how many acts the caller has seen; None: it does not matter.

        Returns:
            The event's id; None where there are other acts than the caller has seen.

        Raises:
            NotReadyError: the store has lost the run.
        """

    async def acts(self, run: str) -> list[LogEntry]:
        """Return every act of the run as it stands in the log, oldest first."""

    async def drop_run(self, run: str) -> None:
        """Delete everything of a run. Gateways that hold it would take it for lost: archive it first."""

    async def write_entries(self, run: str, entries: Sequence[LogEntry], *, acts: bool = False) -> None:
        """Append entries with their ids to the log of a run that has no identity yet, or to its acts."""

    async def finish_run(
        self, run: str, fingerprint: bytes, status: LogStatus, snapshot: tuple[int, bytes] | None
    ) -> RunIdentity:
        """Give a run whose entries were written its counts, snapshot and identity: it can be opened then.

        Raises:
            ConflictError: the name was taken meanwhile.
        """

    async def note(self, run: str, payload: bytes, value: bytes) -> None:
        """Keep an act on a run that is gone."""

    async def notes(self) -> list[LogEntry]:
        """Return the acts on runs that are gone, oldest first; `decision_id` is the run's name."""

    async def close(self) -> None:
        """Close connections."""
