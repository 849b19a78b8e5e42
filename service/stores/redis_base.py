"""What the parts of the store on a Redis or Valkey server share: connections, scripts, keys, the refusal to save.

`service.stores.redis.RedisStore` is made of the parts: `redis_scores`, `redis_audits`, `redis_acts`, `redis_activity`,
and its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import hiredis

from service.errors import ConfigurationError, UnsafeStoreError
from service.stores.cluster import Client, ClusterClient, is_cluster_url
from service.stores.ids import check_run
from service.stores.protocol import DecisionRecord, LogStatus
from service.stores.records import response_count, system_ms
from service.stores.resp import Arg, Reply, RespClient
from service.stores.scripts import Script

BULK_TIMEOUT_FACTOR = 10
"""Snapshots of tens of megabytes may take this many times longer than an ordinary call."""

REPLICATED_CONNECTIONS = 4
"""Connections for feedback that waits for replicas: each stands still for one round trip to them."""

SAVE_NEWEST = Script.load("save_snapshot.lua")


def run_prefix(run: str) -> str:
    """What the keys of a run begin with, its hash tag included."""
    return f"rr:{{{check_run(run)}}}:"


def decision_value(decision: DecisionRecord) -> bytes:
    """`<n> <payload>`, as `apply_feedback.lua` reads it."""
    return b"%d %b" % (response_count(decision), decision.payload)


class RedisBase:
    """Connections to one Redis >= 7.0 or Valkey server, or to a cluster of them.

    Three kinds of connection to a single server: pipelined ones for the hot path, one for snapshots (large values would
    hold up the others), and one per reader of a log that is blocked at the same time. `ClusterClient` has its own.

    Args:
        url: `redis://`, `rediss://` or `unix://`, see `parse_endpoint`; of a cluster `redis+cluster://`, see
            `parse_seeds`.
        window_seconds: feedback window: how long a decision waits for its feedback.
        timeout_seconds: how long a call waits before it counts as unavailable.
        connections: pipelined connections for the hot path.
        replicas: replicas of the server that must hold a feedback before it is acknowledged; a failover to one that
            does not would lose it.
        now_ms: clock, milliseconds since 1970; read only to tell an expired decision id from an unknown one.
    """

    def __init__(
        self,
        url: str,
        *,
        window_seconds: float,
        timeout_seconds: float = 1.0,
        connections: int = 1,
        replicas: int = 0,
        now_ms: Callable[[], int] = system_ms,
    ) -> None:
        if window_seconds < 0.001:
            raise ConfigurationError(f"window_seconds = {window_seconds} must be at least 0.001")
        if replicas < 0:
            raise ConfigurationError(f"replicas = {replicas} must be 0 or more")
        self._url = url
        self._window_ms = round(window_seconds * 1000)
        self._timeout = timeout_seconds
        self._now_ms = now_ms
        self._cluster = ClusterClient(url, timeout_seconds=timeout_seconds) if is_cluster_url(url) else None
        self._replicas = replicas
        self._hot = self._client(connections)
        self._feedback = self._client(REPLICATED_CONNECTIONS) if replicas else self._hot
        self._bulk_timeout = timeout_seconds * BULK_TIMEOUT_FACTOR
        self._bulk = self._client()
        self._refusal: str | None = None
        self._idle_readers: list[Client] = []
        self._readers: list[Client] = []

    def _client(self, connections: int = 1) -> Client:
        return self._cluster or RespClient(self._url, timeout_seconds=self._timeout, connections=connections)

    def refuse(self, reason: str | None) -> None:
        """Save no decision and take no feedback from now on, for this reason; None: as usual again."""
        self._refusal = reason

    def _check_safe(self) -> None:
        if self._refusal is not None:
            raise UnsafeStoreError(f"nothing is saved: {self._refusal}", where=self._hot.shown)

    def _save_commands(self, run: str, decisions: Sequence[DecisionRecord]) -> list[tuple[Arg, ...]]:
        prefix = run_prefix(run)
        window, alias_window = self._window_ms, 2 * self._window_ms
        commands: list[tuple[Arg, ...]] = []
        for decision in decisions:
            value = decision_value(decision)
            commands.append(("SET", f"{prefix}d:{decision.decision_id}", value, "PX", window))
            if decision.content_key is not None:
                key = f"{prefix}c:{decision.content_key}"
                commands.append(("SET", key, decision.decision_id, "PX", alias_window))
        return commands

    async def _run_script(
        self,
        client: Client,
        script: Script,
        calls: Sequence[tuple[Arg, ...]],
        timeout_seconds: float,
        replicas: int = 0,
    ) -> list[Reply]:
        """EVALSHA for each call in one write; those that the server has no script for go again with its text."""
        replies = await client.pipeline(
            [("EVALSHA", script.sha1, *words) for words in calls], timeout_seconds=timeout_seconds, replicas=replicas
        )
        while again := [index for index, reply in enumerate(replies) if _is_noscript(reply)]:
            # The first one brings the text, so the others need its name only.
            commands = [("EVAL", script.text, *calls[again[0]])]
            commands += [("EVALSHA", script.sha1, *calls[index]) for index in again[1:]]
            found = await client.pipeline(commands, timeout_seconds=timeout_seconds, replicas=replicas)
            for index, reply in zip(again, found, strict=True):
                replies[index] = reply
        return [client.checked(reply) for reply in replies]

    async def _keep_newest(self, key: str, position: int, data: bytes) -> bool:
        words = (1, key, position, data)
        (kept,) = await self._run_script(self._bulk, SAVE_NEWEST, [words], self._bulk_timeout)
        return bool(kept)

    def _log_status(self, reply: Reply) -> tuple[LogStatus, str]:
        """Status of a log and the id of its first event, from the reply to XINFO STREAM."""
        if isinstance(reply, hiredis.ReplyError) and "no such key" in str(reply):
            return LogStatus(0, "0-0"), "0-0"
        info = self._hot.checked(reply)
        fields = dict(zip(info[::2], info[1::2], strict=True))
        if b"entries-added" not in fields:
            raise ConfigurationError(f"store {self._hot.shown} is too old; use Valkey, or Redis 7.0 or newer")
        appended, first = int(fields[b"entries-added"]), fields[b"first-entry"]
        status = LogStatus(appended, fields[b"last-generated-id"].decode(), appended - int(fields[b"length"]))
        return status, "0-0" if first is None else first[0].decode()


def _is_noscript(reply: Reply) -> bool:
    return isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT")
