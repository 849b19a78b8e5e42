"""The part of `RedisStore` that audits need: what was chosen and not refereed, and the newest audits for people.

Knows their keys and scripts; never looks inside a task. `service.stores.redis.RedisStore` inherits it.

Keys of a run R, beside those of `service.stores.redis`:

    rr:{R}:schedule   hash: count, start, see `AuditProgress`                 for ever
    rr:{R}:waiting    sorted set: decision id, end of its lease (0: none)     until refereed
    rr:{R}:t:<id>     task of a waiting decision, its texts included          until refereed, or it expires
    rr:{R}:g:<id>     parts that a collected task has had                    as its task may be kept
    rr:{R}:spent      price of the audits of this hour                        an hour from the first one
    rr:{R}:audited    sorted set: decision id, when it was refereed           the newest ones
    rr:{R}:b:<id>     hash: p payload, t what people are shown                as long as it is among these
    rr:{R}:h:<id>     marker of a person's verdict: "<event id> <value>"      as an applied feedback's
"""

from __future__ import annotations

from collections.abc import Sequence

from service.stores.protocol import (
    AuditedDecision,
    AuditProgress,
    AuditQueue,
    AuditTask,
    AuditVerdict,
    DecisionRecord,
    FeedbackResult,
    FeedbackStatus,
    RunIdentity,
    lost_run,
)
from service.stores.records import response_count
from service.stores.redis_base import RedisBase, run_prefix
from service.stores.resp import Arg
from service.stores.scripts import Script, identity_value

CLAIM = Script.load("claim_audits.lua")
COLLECT = Script.load("collect_audit.lua")
FINISH = Script.load("finish_audit.lua")
JUDGE = Script.load("judge_audit.lua")


class RedisAudits(RedisBase):
    """See `service.stores.protocol.Store` for the methods."""

    async def save_audited(
        self, run: str, decisions: Sequence[DecisionRecord], tasks: Sequence[AuditTask], *, counted: int, seconds: float
    ) -> AuditProgress:
        """Save decisions, count them, and queue those that were chosen, in one write."""
        self._check_safe()
        prefix, milliseconds = run_prefix(run), max(round(seconds * 1000), 1)
        commands = self._save_commands(run, decisions)
        for task in tasks:
            if task.collect_seconds is not None:
                continue
            commands.append(("SET", f"{prefix}t:{task.decision_id}", task.task, "PX", milliseconds))
            commands.append(("ZADD", prefix + "waiting", "NX", 0, task.decision_id))
        commands.append(("HINCRBY", prefix + "schedule", "count", counted))
        commands.append(("HGET", prefix + "schedule", "start"))
        *_, count, start = [self._hot.checked(reply) for reply in await self._hot.pipeline(commands)]
        parts: list[tuple[Arg, ...]] = [
            (
                1,
                prefix + "waiting",
                prefix,
                it.decision_id,
                it.task,
                it.parts,
                round(it.collect_seconds * 1000),
                milliseconds,
            )
            for it in tasks
            if it.collect_seconds is not None
        ]
        if parts:
            await self._run_script(self._hot, COLLECT, parts, self._timeout)
        return AuditProgress(int(count), int(start or 0))

    async def audit_progress(self, run: str) -> AuditProgress:
        """Return how far the run has come on its schedule."""
        count, start = await self._hot.execute("HMGET", run_prefix(run) + "schedule", "count", "start")
        return AuditProgress(int(count or 0), int(start or 0))

    async def restart_audits(self, run: str, start: int) -> None:
        """Let the schedule begin anew after so many decisions, unless it began later."""
        standing = await self.audit_progress(run)
        if start > standing.start:
            await self._hot.execute("HSET", run_prefix(run) + "schedule", "start", start)

    async def claim_audits(
        self, run: str, *, count: int, lease_seconds: float, keep: int, budget: float | None = None
    ) -> AuditQueue:
        """Take up to `count` of the queued decisions, oldest first; nobody else gets them for `lease_seconds`."""
        prefix = run_prefix(run)
        words: tuple[Arg, ...] = (
            *(2, prefix + "waiting", prefix + "spent"),
            *(prefix, count, round(lease_seconds * 1000), keep, "" if budget is None else repr(budget)),
        )
        (reply,) = await self._run_script(self._hot, CLAIM, [words], self._timeout)
        waiting, dropped, *found = reply
        tasks = [AuditTask(name.decode(), task) for name, task in zip(found[::2], found[1::2], strict=True)]
        return AuditQueue(tasks, waiting, dropped)

    async def finish_audits(
        self, run: str, verdicts: Sequence[AuditVerdict], *, identity: RunIdentity, keep: int
    ) -> list[FeedbackResult]:
        """Take decisions out of the queue, each with its event, atomically.

        Raises:
            NotReadyError: the run has another identity, or none: the store has lost the run.
        """
        self._check_safe()
        prefix, expected = run_prefix(run), identity_value(identity)
        keys: tuple[Arg, ...] = (5, *(prefix + name for name in ("log", "meta", "waiting", "spent", "audited")))
        words: list[tuple[Arg, ...]] = [
            (*keys, prefix, it.decision_id, it.payload, it.value, expected, repr(it.price), it.shown, keep, _n(it))
            for it in verdicts
        ]
        replies = await self._run_script(self._hot, FINISH, words, self._timeout)
        if any(reply[0] == b"lost" for reply in replies):
            raise lost_run(run)
        return [_result(it.decision_id, reply) for it, reply in zip(verdicts, replies, strict=True)]

    async def audits_waiting(self, run: str) -> int:
        """Return how many decisions are chosen and not refereed."""
        return int(await self._hot.execute("ZCARD", run_prefix(run) + "waiting"))

    async def newest_audits(self, run: str, count: int) -> list[AuditedDecision]:
        """Return up to `count` of the audits that are kept for people, newest first."""
        found = await self._hot.execute("ZREVRANGE", run_prefix(run) + "audited", 0, count - 1)
        audits = [await self.audited(run, name.decode()) for name in found]
        return [audit for audit in audits if audit is not None]

    async def audited(self, run: str, decision_id: str) -> AuditedDecision | None:
        """Return one of the audits that are kept for people; None if it is not kept."""
        prefix = run_prefix(run)
        commands: list[tuple[Arg, ...]] = [
            ("HMGET", f"{prefix}b:{decision_id}", "p", "t"),
            ("GET", f"{prefix}h:{decision_id}"),
        ]
        found, marker = [self._hot.checked(reply) for reply in await self._hot.pipeline(commands)]
        if found[0] is None:
            return None
        judged = None if marker is None else bytes(marker).partition(b" ")[2]
        return AuditedDecision(decision_id, found[0], found[1] or b"", judged)

    async def judge_audit(
        self, run: str, record: DecisionRecord, value: bytes, *, identity: RunIdentity
    ) -> FeedbackResult:
        """Append what a person says of an audited decision, once.

        Raises:
            NotReadyError: the run has another identity, or none: the store has lost the run.
        """
        self._check_safe()
        prefix = run_prefix(run)
        words: tuple[Arg, ...] = (
            *(2, prefix + "log", prefix + "meta"),
            *(prefix, record.decision_id, record.payload, value, identity_value(identity), 2 * self._window_ms),
            response_count(record),
        )
        (reply,) = await self._run_script(self._hot, JUDGE, [words], self._timeout)
        if reply[0] == b"lost":
            raise lost_run(run)
        return _result(record.decision_id, reply)


def _n(verdict: AuditVerdict) -> int:
    return response_count(DecisionRecord(verdict.decision_id, verdict.payload)) if verdict.value else 0


def _result(decision_id: str, reply: list[bytes]) -> FeedbackResult:
    status, event_id, standing = [*reply, None, None][:3]
    return FeedbackResult(
        FeedbackStatus((status or b"").decode()), decision_id, event_id.decode() if event_id else None, standing
    )
