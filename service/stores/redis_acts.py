"""What operators do to runs, in a Redis or Valkey server: acts in a run's log, whole runs written and dropped.

Keys of a run R, beside those of `service.stores.redis`:

    rr:{R}:acts       stream of acts, as they stand in the log             for ever
    rr:acts           stream of acts on runs that are gone: r run, p payload, s value

The part of `RedisStore` that commands and `service.usecases.pools` need; see `service.stores.protocol.Store`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from service.errors import ConflictError
from service.stores.protocol import LogEntry, LogStatus, RunIdentity, lost_run
from service.stores.redis_base import RedisBase, run_prefix
from service.stores.resp import Arg, Reply
from service.stores.scripts import Script, identity_value

APPEND_ACT = Script.load("append_act.lua")
DROP = Script.load("drop_run.lua")

NOTES_KEY = "rr:acts"
"""Stream of acts on runs that are gone."""


class RedisActs(RedisBase):
    """Acts and whole runs."""

    async def append_act(
        self, run: str, name: str, payload: bytes, value: bytes, *, identity: RunIdentity, expected: int | None = None
    ) -> str | None:
        """Append an act to the run's log and to its acts; return its event's id, None where others were first."""
        self._check_safe()
        prefix = run_prefix(run)
        words: tuple[Arg, ...] = (
            *(3, prefix + "log", prefix + "acts", prefix + "meta", identity_value(identity)),
            *("" if expected is None else expected, name, payload, value),
        )
        (reply,) = await self._run_script(self._feedback, APPEND_ACT, [words], self._timeout, self._replicas)
        if reply[0] == b"lost":
            raise lost_run(run)
        return None if reply[0] == b"conflict" else bytes(reply[1]).decode()

    async def acts(self, run: str) -> list[LogEntry]:
        """Return every act of the run, oldest first."""
        reply = await self._bulk.execute(
            "XRANGE", run_prefix(run) + "acts", "-", "+", timeout_seconds=self._bulk_timeout
        )
        return [_act(entry) for entry in reply]

    async def drop_run(self, run: str) -> None:
        """Delete everything of a run."""
        prefix, cursor = run_prefix(run), b"0"
        while True:
            words: tuple[Arg, ...] = (1, prefix + "meta", prefix, cursor)
            (cursor,) = await self._run_script(self._bulk, DROP, [words], self._bulk_timeout)
            if cursor == b"0":
                break
        await self._hot.execute("SREM", "rr:runs", run)

    async def write_entries(self, run: str, entries: Sequence[LogEntry], *, acts: bool = False) -> None:
        """Append entries with their ids to the log of a run that has no identity yet, or to its acts."""
        key = run_prefix(run) + ("acts" if acts else "log")
        commands: list[tuple[Arg, ...]] = [
            ("XADD", key, it.event_id, "d", it.decision_id, "p", it.payload, "s", it.value) for it in entries
        ]
        for reply in await self._bulk.pipeline(commands, timeout_seconds=self._bulk_timeout):
            self._bulk.checked(reply)

    async def finish_run(
        self, run: str, fingerprint: bytes, status: LogStatus, snapshot: tuple[int, bytes] | None
    ) -> RunIdentity:
        """Give a run whose entries were written its counts, snapshot and identity: it can be opened then."""
        prefix = run_prefix(run)
        identity = RunIdentity(secrets.token_hex(8), fingerprint)
        commands: list[tuple[Arg, ...]] = []
        if status.appended:
            if status.trimmed == status.appended:
                # A stream must be there to have a status.
                commands.append(("XADD", prefix + "log", status.last_id, "d", "", "p", "", "s", ""))
                commands.append(("XDEL", prefix + "log", status.last_id))
            counts: tuple[Arg, ...] = ("ENTRIESADDED", status.appended)
            deleted: tuple[Arg, ...] = ("MAXDELETEDID", "0-1" if status.trimmed else "0-0")
            commands.append(("XSETID", prefix + "log", status.last_id, *counts, *deleted))
        if snapshot is not None:
            commands.append(("HSET", prefix + "snap", "position", snapshot[0], "data", snapshot[1]))
        commands.append(("SET", prefix + "meta", identity_value(identity), "NX"))
        *_, kept = [
            self._bulk.checked(reply)
            for reply in await self._bulk.pipeline(commands, timeout_seconds=self._bulk_timeout)
        ]
        if kept is None:
            raise ConflictError(f"run {run!r} was opened meanwhile: import it under another name")
        await self._hot.execute("SADD", "rr:runs", run)
        return identity

    async def note(self, run: str, payload: bytes, value: bytes) -> None:
        """Keep an act on a run that is gone."""
        await self._hot.execute("XADD", NOTES_KEY, "*", "r", run, "p", payload, "s", value)

    async def notes(self) -> list[LogEntry]:
        """Return the acts on runs that are gone, oldest first; the run's name is the entry's `decision_id`."""
        return [_act(entry, b"r") for entry in await self._hot.execute("XRANGE", NOTES_KEY, "-", "+")]


def _act(entry: Reply, name: bytes = b"d") -> LogEntry:
    event_id, words = entry
    fields = dict(zip(words[::2], words[1::2], strict=True))
    return LogEntry(event_id.decode(), fields[name].decode(), fields[b"p"], fields[b"s"])
