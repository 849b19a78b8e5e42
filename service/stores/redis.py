"""The store on a Redis or Valkey server: decisions, exactly-once feedback, the log, snapshots.

Knows the keys and scripts of `service.stores.protocol.Store`; never looks inside a payload or snapshot, but for the
decision's `n`. Built by `service.gateway`, called by the use cases.

Keys of a run R. All share the hash tag {R}, so a run lives on one node of a cluster:

    rr:{R}:d:<id>     decision: "<n> <payload>"                           lives one feedback window
    rr:{R}:c:<hash>   id of the latest decision of this content           two windows: expired is not unknown
    rr:{R}:f:<id>     marker of an applied feedback: "<event id> <value>"  two windows: outlives its decision
    rr:{R}:log        stream of events: d decision id, p payload, s value until trimmed
    rr:{R}:snap       hash: position, data                                for ever
    rr:{R}:meta       identity of the run: "<born> <fingerprint>"          for ever
    rr:{R}:probe      written to see whether the server takes writes       a minute
    rr:watched        since when gateways have watched this server, ms      some seconds after the last look; in a
                      cluster rr:{R}:watched                                 cluster the run's own

and those of `service.stores.redis_scores`, `redis_audits`, `redis_acts` and `redis_activity`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from service.stores.cluster import Client
from service.stores.protocol import (
    WATCH_SECONDS,
    DecisionRecord,
    FeedbackRecord,
    FeedbackResult,
    FeedbackStatus,
    ForeignEntryError,
    LogEntry,
    LogStatus,
    RunCheck,
    RunIdentity,
    lost_run,
    name_not_free,
)
from service.stores.records import check_reference, is_expired
from service.stores.redis_activity import RedisActivity
from service.stores.redis_acts import RedisActs
from service.stores.redis_audits import RedisAudits
from service.stores.redis_base import decision_value, run_prefix
from service.stores.redis_scores import RedisScores
from service.stores.requirements import QUESTIONS, ServerFacts, read_facts
from service.stores.resp import Arg, Reply
from service.stores.scripts import Script, identity_value

PROBE_MILLISECONDS = 60_000
"""How long the key of `probe` lives: it is there to be written, not to be read."""

OPEN = Script.load("open_run.lua")
APPLY = Script.load("apply_feedback.lua")

RUNS_KEY = "rr:runs"
"""Set of the names of all runs; one that was refused or lost has a name here and nothing else."""


class RedisStore(RedisActivity, RedisActs, RedisAudits, RedisScores):
    """`Store` on one Redis >= 7.0 or Valkey server, or on a cluster of them; arguments as `RedisBase`."""

    async def ping(self) -> None:
        """Return when the server answers; of a cluster, when it serves all slots that it wants to."""
        await self._hot.execute("PING")

    async def probe(self, run: str) -> None:
        """Return when something of the run could be saved: a server that is full or read-only answers a ping too."""
        self._check_safe()
        await self._hot.execute("SET", run_prefix(run) + "probe", "", "PX", PROBE_MILLISECONDS)

    async def survey(self) -> Sequence[ServerFacts]:
        """Ask every server of the store that takes writes what it is.

        Raises:
            StoreUnavailableError: one does not answer.
        """
        found = [read_facts(replies) for replies in await self._hot.everywhere(QUESTIONS)]
        if self._cluster is not None:
            # A primary of our map that has been demoted since: the map is learned again by the calls that it refuses.
            return [facts for facts in found if not facts.replica]
        if any(facts.replica for facts in found):
            # The name may lead to another server by now, and nobody else finds out while nothing is saved.
            for client in {self._hot, self._feedback}:
                client.disconnect("is a replica")
        return found

    async def open_run(self, run: str, fingerprint: bytes, *, free_seconds: float = 0.0) -> RunIdentity:
        """Give the run an identity with this fingerprint if it has none; return the one that stands.

        Raises:
            NameNotFreeError: it has none, and the store has not been watched for `free_seconds`.
        """
        key, milliseconds = run_prefix(run) + "meta", round(WATCH_SECONDS * 1000)
        fresh = identity_value(RunIdentity(secrets.token_hex(8), fingerprint))
        # All keys of a script lie on one node, so each run of a cluster has a mark of its own, for newcomers only.
        shared = self._cluster is None
        mark = "rr:watched" if shared else run_prefix(run) + "watched"
        commands: list[tuple[Arg, ...]] = [("PEXPIRE", mark, milliseconds)] if shared else []
        commands += [] if free_seconds else [("SET", key, fresh, "NX")]
        *marked, standing = await self._hot.pipeline([*commands, ("GET", key)])
        standing = self._hot.checked(standing)
        await self._hot.execute("SADD", RUNS_KEY, run)
        if standing is not None and (not shared or marked[0] == 1):
            return _identity(bytes(standing))
        words = (2, key, mark, fresh, round(free_seconds * 1000), milliseconds)
        (reply,) = await self._run_script(self._hot, OPEN, [words], self._timeout)
        if reply[0] is None:
            raise name_not_free(run, reply[1] / 1000)
        return _identity(bytes(reply[0]))

    async def check_run(self, run: str, event_ids: Sequence[str]) -> RunCheck:
        """Say what the store holds of a run, and which of these events its log does not hold. Changes nothing."""
        prefix = run_prefix(run)
        key = prefix + "log"
        # The log's status comes last, so that what is trimmed meanwhile shows in it.
        commands: list[tuple[Arg, ...]] = [("GET", prefix + "meta")]
        commands += [("XRANGE", key, event_id, event_id) for event_id in event_ids]
        commands.append(("XINFO", "STREAM", key))
        meta, *found, info = await self._hot.pipeline(commands)
        meta = self._hot.checked(meta)
        missing = [event_id for event_id, reply in zip(event_ids, found, strict=True) if not self._hot.checked(reply)]
        status, first = self._log_status(info)
        return RunCheck(None if meta is None else _identity(meta), status, first, tuple(missing))

    async def has_run(self, run: str) -> bool:
        """Return True if `open_run` was ever called for the run, by any gateway."""
        return bool(await self._hot.execute("EXISTS", run_prefix(run) + "meta"))

    async def list_runs(self) -> list[str]:
        """Names of the runs that were opened and are still here, sorted."""
        names = [bytes(name).decode() for name in await self._hot.execute("SMEMBERS", RUNS_KEY)]
        return sorted([name for name in names if await self.has_run(name)])

    async def save_decisions(self, run: str, decisions: Sequence[DecisionRecord]) -> None:
        """Save all of them, each for the feedback window, in one write; returns when the server has acknowledged them.

        Raises:
            ValueError: a payload without `n`; nothing was sent.
        """
        self._check_safe()
        for reply in await self._hot.pipeline(self._save_commands(run, decisions)):
            self._hot.checked(reply)

    async def update_decisions(self, run: str, decisions: Sequence[DecisionRecord]) -> list[bool]:
        """Replace the payloads of those that still wait for feedback, each for the rest of its window; which they were.

        A decision is gone as soon as its feedback is applied, so that a late update never touches the log's event.

        Raises:
            ValueError: a payload without `n`; nothing was sent.
        """
        prefix = run_prefix(run)
        commands: list[tuple[Arg, ...]] = [
            ("SET", f"{prefix}d:{decision.decision_id}", decision_value(decision), "XX", "KEEPTTL")
            for decision in decisions
        ]
        return [self._hot.checked(reply) is not None for reply in await self._hot.pipeline(commands)]

    async def apply_feedback(
        self, run: str, feedback: Sequence[FeedbackRecord], *, identity: RunIdentity | None = None
    ) -> list[FeedbackResult]:
        """Apply each atomically and exactly once: mark the decision and append the event, or say why not.

        Raises:
            StoreUnavailableError: some may have been applied all the same; repeating is safe and says `DUPLICATE`.
            NotReadyError: the run has another identity than `identity`, or none: the store has lost the run.
            ValueError: not exactly one reference; nothing was sent.
        """
        self._check_safe()
        prefix = run_prefix(run)
        expected = b"" if identity is None else identity_value(identity)
        words = [self._feedback_words(prefix, item, expected) for item in feedback]
        replies = await self._run_script(self._feedback, APPLY, words, self._timeout, self._replicas)
        if any(reply[0] == b"lost" for reply in replies):
            raise lost_run(run)
        return [self._feedback_result(item, reply) for item, reply in zip(feedback, replies, strict=True)]

    def _feedback_words(self, prefix: str, item: FeedbackRecord, expected: bytes) -> tuple[Arg, ...]:
        check_reference(item)
        reference = f"d:{item.decision_id}" if item.content_key is None else f"c:{item.content_key}"
        return (
            *(3, prefix + "log", prefix + reference, prefix + "meta"),
            *(prefix, item.decision_id or "", item.value),
            *("" if item.preferred is None else item.preferred, 2 * self._window_ms, int(self._replicas > 0)),
            expected,
        )

    def _feedback_result(self, item: FeedbackRecord, reply: list[bytes]) -> FeedbackResult:
        status, decision_id, event_id, standing = [*reply, None, None, None][:4]
        found = item.decision_id if decision_id is None else decision_id.decode()
        if status == b"missing":
            # An alias outlives its decision, so a decision that is missing behind one has expired.
            by_alias = item.decision_id is None and decision_id is not None
            expired = by_alias or is_expired(item.decision_id, self._now_ms(), self._window_ms)
            return FeedbackResult(FeedbackStatus.EXPIRED if expired else FeedbackStatus.UNKNOWN, found)
        return FeedbackResult(
            FeedbackStatus((status or b"").decode()), found, None if event_id is None else event_id.decode(), standing
        )

    async def read_log(self, run: str, after: str, *, count: int, block_ms: int) -> list[LogEntry]:
        """Events after id `after` ("0-0": from the first), oldest first; waits up to `block_ms` when there are none.

        Cancelling it closes the connection that it blocked; the next call makes another.
        """
        key = run_prefix(run) + "log"
        # BLOCK 0 would wait for ever.
        block: tuple[Arg, ...] = ("BLOCK", block_ms) if block_ms > 0 else ()
        reader = self._idle_readers.pop() if self._idle_readers else self._new_reader()
        answered = False
        try:
            reply = await reader.execute(
                *("XREAD", "COUNT", count, *block, "STREAMS", key, after),
                timeout_seconds=self._bulk_timeout + block_ms / 1000,
            )
            answered = True
        finally:
            if not answered:
                reader.disconnect("was left while waiting for the log")
            self._idle_readers.append(reader)
        return [] if reply is None else [_log_entry(entry) for entry in reply[0][1]]

    def _new_reader(self) -> Client:
        reader = self._client()
        self._readers.append(reader)
        return reader

    async def log_status(self, run: str) -> LogStatus:
        """How many events were ever appended, and the id of the last.

        Raises:
            ConfigurationError: the server is older than Redis 7.0 and does not count.
        """
        (reply,) = await self._hot.pipeline([("XINFO", "STREAM", run_prefix(run) + "log")])
        return self._log_status(reply)[0]

    async def load_snapshot(self, run: str) -> bytes | None:
        """The newest snapshot, or None."""
        snapshot: bytes | None = await self._bulk.execute(
            "HGET", run_prefix(run) + "snap", "data", timeout_seconds=self._bulk_timeout
        )
        return snapshot

    async def save_snapshot(self, run: str, position: int, snapshot: bytes) -> bool:
        """Keep the snapshot of the first `position` events unless a newer one is kept; True if it was kept."""
        return await self._keep_newest(run_prefix(run) + "snap", position, snapshot)

    async def trim_log(self, run: str, before: str) -> int:
        """Drop the events with ids lower than `before`; returns how many."""
        key = run_prefix(run) + "log"
        # "=": exactly. The default trims whole nodes and leaves some of the older events.
        return int(await self._bulk.execute("XTRIM", key, "MINID", "=", before, timeout_seconds=self._bulk_timeout))

    async def close(self) -> None:
        """Close connections; blocked readers fail with `StoreUnavailableError`."""
        for client in (self._hot, self._feedback, self._bulk, *self._readers):
            await client.close()


def _identity(value: bytes) -> RunIdentity:
    born, _, fingerprint = value.partition(b" ")
    return RunIdentity(born.decode(errors="replace"), fingerprint)


def _log_entry(entry: Reply) -> LogEntry:
    event_id, words = entry
    fields = dict(zip(words[::2], words[1::2], strict=True))
    try:
        return LogEntry(event_id.decode(), fields[b"d"].decode(), fields[b"p"], fields[b"s"])
    except KeyError as error:
        raise ForeignEntryError(
            f"event {event_id.decode()} of the log lacks the field {error}; the stream was written by another program"
        ) from error
