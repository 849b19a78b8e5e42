"""A client of a Redis Cluster on redis-py: its map of slots and its connections, and our deadline over all repetitions.

Knows which replies of a cluster are worth waiting for; knows no key of ours. `RedisStore` uses it where a single server
has a `RespClient`.

The commands of one call share a hash tag. A call is repeated until its timeout while a slot is being moved or a primary
is being replaced, so what is sent must be safe to repeat, as in `resp`. A call with XADD is not repeated once it may
have been carried out. docs/decisions/016-redis-cluster-on-redis-py.md says why redis-py's own client is not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import hiredis
from redis.asyncio.cluster import ClusterNode, NodesManager, PipelineCommand
from redis.asyncio.connection import parse_url
from redis.cluster import PRIMARY
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    MovedError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)

from service.errors import ConfigurationError, StoreUnavailableError
from service.stores.resp import (
    Arg,
    Endpoint,
    NotReplicatedError,
    Reply,
    ReplyError,
    RespClient,
    check_replicated,
    parse_endpoint,
    reply_error,
    wait_command,
)

SCHEMES = ("redis+cluster://", "rediss+cluster://")
"""How the URL of a cluster begins."""

PAUSE_SECONDS = 0.05
"""Between two tries of what the cluster cannot do yet. Moving a slot and replacing a primary take longer."""

CONNECTIONS = 32
"""Largest number of calls in flight to one node; further calls wait. Blocking reads are not counted."""

QUESTIONS_PER_TIMEOUT = 3
"""Nodes that can be asked for the map within one timeout: they are asked one after the other, and some may hang."""

_LATER = (AskError, MovedError, TryAgainError, ClusterDownError, BusyLoadingError, ReadOnlyError)
"""Replies of a cluster in the middle of a change."""

_NON_LOCAL = "non local key"
"""Part of the reply to a script that reads a key of a slot that is being moved."""

_SCRIPTS = frozenset({"EVAL", "EVALSHA"})

_NOT_TWICE = frozenset({"XADD"})
"""Commands whose repetition would change the data again."""

_KEY_AT = {"EVAL": 3, "EVALSHA": 3, "XINFO": 2}
"""Position of the first key, for commands that do not have it right behind the name."""


def is_cluster_url(url: str) -> bool:
    """Return True if the URL names a cluster."""
    return url.startswith(SCHEMES)


def parse_seeds(url: str) -> tuple[list[Endpoint], dict[str, Any]]:
    """Read `redis+cluster://[user:password@]host:port[,host:port…][?ssl_…]`, which names some of the nodes.

    Returns:
        The nodes, and redis-py's arguments for a connection to any node: account and certificates.

    Raises:
        ConfigurationError: a node or word that cannot be read, or another database than 0.
    """
    parts = urlsplit(url)
    account, at, hosts = parts.netloc.rpartition("@")
    if parts.path not in ("", "/", "/0"):
        raise ConfigurationError(f"the store's URL names the database {parts.path[1:]!r}; a cluster has only 0")
    names = [host for host in hosts.split(",") if host]
    if not names:
        raise ConfigurationError("the store's URL names no node; write redis+cluster://HOST:PORT,HOST:PORT")
    scheme = parts.scheme.removesuffix("+cluster")
    query = f"?{parts.query}" if parts.query else ""
    urls = [f"{scheme}://{account}{at}{name}/0{query}" for name in names]
    seeds = [parse_endpoint(one) for one in urls]
    words = {name: word for name, word in parse_url(urls[0]).items() if name not in ("host", "port", "db")}
    return seeds, words


def slot_of(command: tuple[Arg, ...]) -> int | None:
    """Return the slot of a command's first key, or None if any node can answer the command."""
    name = command[0]
    if name == "CLUSTER":
        return None
    key = command[command.index("STREAMS") + 1 if name == "XREAD" else _KEY_AT.get(str(name), 1)]
    return key_slot(key if isinstance(key, bytes) else str(key).encode())


class ClusterClient:
    """Connections to every node that is needed; the calls of a `RespClient`.

    Args:
        url: see `parse_seeds`.
        timeout_seconds: how long a call waits for its replies, redirections and repetitions included.
    """

    def __init__(self, url: str, *, timeout_seconds: float) -> None:
        if timeout_seconds <= 0:
            raise ConfigurationError(f"timeout_seconds = {timeout_seconds} of the store must be positive")
        self._seeds, words = parse_seeds(url)
        self._timeout = timeout_seconds
        self._words = {**words, "protocol": 2, "driver_info": None, "socket_connect_timeout": timeout_seconds}
        question = timeout_seconds / QUESTIONS_PER_TIMEOUT
        asking = {**self._words, "socket_timeout": question, "socket_connect_timeout": question}
        seeds = [ClusterNode(seed.host, seed.port, **asking) for seed in self._seeds]
        # A cluster may announce ports only: the host is then the one that clients know.
        self._map = NodesManager(
            seeds,
            require_full_coverage=False,
            connection_kwargs=asking,
            address_remap=lambda address: (address[0] or self._seeds[0].host, address[1]),
        )
        self._map_is_stale = True
        self._map_learned_at = -math.inf
        self._last_failed: str | None = None
        self._nodes: dict[str, ClusterNode] = {}
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(CONNECTIONS))
        self._closed = False

    @property
    def shown(self) -> str:
        """The seeds without secrets, for messages."""
        return "cluster " + ",".join(seed.shown for seed in self._seeds)

    async def execute(self, *command: Arg, timeout_seconds: float | None = None) -> Reply:
        """Send one command and return its reply; PING asks if the cluster serves all of its slots.

        Raises:
            StoreUnavailableError: the node is away or says that it cannot serve now, until the timeout.
            ReplyError: the node refused the command.
        """
        ping = command[0] == "PING"
        (reply,) = await self.pipeline([("CLUSTER", "INFO") if ping else command], timeout_seconds=timeout_seconds)
        reply = self.checked(reply)
        if not ping:
            return reply
        if b"cluster_state:ok" not in reply:
            self._map_is_stale = True
            raise StoreUnavailableError("the store says that the cluster is down; see CLUSTER INFO", where=self.shown)
        return b"PONG"

    async def pipeline(
        self, commands: Sequence[tuple[Arg, ...]], *, timeout_seconds: float | None = None, replicas: int = 0
    ) -> list[Reply]:
        """Send commands to the node of their slot and follow redirections; else as `RespClient.pipeline`.

        Raises:
            StoreUnavailableError: not done until the timeout. Some commands may have been carried out.
        """
        if not commands:
            return []
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (timeout_seconds or self._timeout)
        slot = slot_of(commands[0])
        replies: list[Reply] = [None] * len(commands)
        waiting = list(range(len(commands)))
        repeatable = all(command[0] not in _NOT_TWICE for command in commands)
        hops = 0
        while True:
            node: ClusterNode | None = None
            moved = answered = False
            try:
                async with asyncio.timeout_at(deadline):
                    node = await self._owner(slot)
                    words = [commands[index] for index in waiting]
                    got = await self._try(node, words, deadline - loop.time(), replicas)
                    answered = True
                    for index, reply in zip(waiting, got, strict=True):
                        replies[index] = reply
                    waiting = [index for index in waiting if _is_later(replies[index])]
                    if not waiting:
                        return [_plain(reply) for reply in replies]
                    failure = self._unavailable(replies[waiting[0]])
                    moved = await self._follow_move(replies[waiting[0]], node, slot)
            except (NotReplicatedError, ReplyError):
                raise
            except (StoreUnavailableError, RedisError, OSError, TimeoutError) as error:
                if not answered:
                    failure = self._unavailable(error)
                self._map_is_stale = True
                self._last_failed = None if node is None else node.name
            hops += moved
            # Two nodes may send us to each other for a while; the first hop costs no time.
            pause = 0.0 if moved and hops == 1 else PAUSE_SECONDS
            if self._closed or not (repeatable or answered) or loop.time() + pause >= deadline:
                raise failure
            await asyncio.sleep(pause)

    async def everywhere(self, commands: Sequence[tuple[Arg, ...]]) -> list[list[Reply]]:
        """Return the replies of every primary to these commands, error replies included.

        Raises:
            StoreUnavailableError: a primary does not answer.
        """
        try:
            async with asyncio.timeout(self._timeout):
                await self._owner(None)
                primaries = self._map.get_nodes_by_server_type(PRIMARY)
                found = await asyncio.gather(*(self._try(node, commands, self._timeout, 0) for node in primaries))
        except (StoreUnavailableError, RedisError, OSError, TimeoutError) as error:
            self._map_is_stale = True
            raise self._unavailable(error) from error
        return [[_plain(reply) for reply in replies] for replies in found]

    async def _try(
        self, node: ClusterNode, commands: Sequence[tuple[Arg, ...]], seconds: float, replicas: int
    ) -> list[Reply]:
        """Ask a node, and the target of a moving slot for keys that have gone there; errors are redis-py's."""
        replies = await self._ask(node, commands, seconds, replicas)
        asked: dict[tuple[str, int], list[int]] = {}
        for index, reply in enumerate(replies):
            # A script reads keys that it does not name, and the target says "missing" of those that are still to come.
            if type(reply) is AskError and commands[index][0] not in _SCRIPTS:
                asked.setdefault((reply.host or node.host, reply.port), []).append(index)
        for (host, port), indices in asked.items():
            words: list[tuple[Arg, ...]] = [word for index in indices for word in (("ASKING",), commands[index])]
            given = await self._ask(ClusterNode(host, port), words, seconds, replicas)
            for index, reply in zip(indices, given[1::2], strict=True):
                replies[index] = reply
        return replies

    async def _ask(
        self, node: ClusterNode, commands: Sequence[tuple[Arg, ...]], seconds: float, replicas: int
    ) -> list[Reply]:
        """Send commands on one connection, where WAIT follows them if replicas are to confirm.

        Raises:
            RedisError, OSError: the connection failed.
        """
        if self._closed:
            raise StoreUnavailableError("the store was closed by us", where=self.shown)
        if node.name not in self._nodes:
            self._nodes[node.name] = ClusterNode(node.host, node.port, **self._words, max_connections=2**31)
        words = [*commands, wait_command(replicas, seconds)] if replicas else commands
        sent = [PipelineCommand(index, *command) for index, command in enumerate(words)]
        blocks = commands[0][0] == "XREAD"
        async with contextlib.nullcontext() if blocks else self._turns[node.name]:
            try:
                await self._nodes[node.name].execute_pipeline(sent)
            finally:
                if self._closed:
                    await self._nodes[node.name].disconnect()
        replies = [command.result for command in sent]
        for reply in replies:
            if isinstance(reply, Exception) and not _is_reply(reply):
                raise reply
        if replicas:
            check_replicated(replies, _plain(replies.pop()), replicas, self.shown)
        return replies

    async def _owner(self, slot: int | None) -> ClusterNode:
        """Return the primary of a slot, or any primary for None.

        Raises:
            StoreUnavailableError: no node answers, or none has the slot.
        """
        if self._map_is_stale:
            await self._refresh()
        nodes = self._map.get_nodes_by_server_type(PRIMARY) if slot is None else self._map.slots_cache.get(slot)
        if not nodes:
            self._map_is_stale = True
            raise StoreUnavailableError(f"the store: no node serves slot {slot}; see CLUSTER SHARDS", where=self.shown)
        return nodes[0]

    async def _refresh(self) -> None:
        """Ask the nodes for the map of slots. Concurrent callers ask once, and not again within `PAUSE_SECONDS`.

        Raises:
            StoreUnavailableError: no node answers.
        """
        now = asyncio.get_running_loop().time()
        if now < self._map_learned_at + PAUSE_SECONDS:
            return
        for seed in self._seeds:
            # redis-py forgets the seeds that the cluster does not list.
            if (name := f"{seed.host}:{seed.port}") not in self._map.startup_nodes:
                self._map.startup_nodes[name] = ClusterNode(seed.host, seed.port, **self._map.connection_kwargs)
        try:
            await self._map.initialize(last_failed_node_name=self._last_failed)
        except (RedisError, RedisClusterException, IndexError) as error:
            # IndexError: redis-py found no primary.
            raise self._unavailable(error.__cause__ or error) from error
        self._map_is_stale = False
        self._map_learned_at = now
        await self._leave_replicas()

    async def _leave_replicas(self) -> None:
        """Close connections to nodes that are no primaries now, so that calls that wait there fail and are repeated."""
        primaries = {node.name for node in self._map.get_nodes_by_server_type(PRIMARY)}
        left = [node.disconnect() for name, node in self._nodes.items() if name not in primaries]
        await asyncio.gather(*left, return_exceptions=True)

    async def _follow_move(self, reply: Reply, node: ClusterNode, slot: int | None) -> bool:
        """Change the map as a MOVED reply says. Return False for another reply."""
        if not isinstance(reply, MovedError):
            return False
        if reply.slot_id != slot:
            sentence = f"the store: commands of one call lie in the slots {slot} and {reply.slot_id}"
            raise ReplyError(sentence, where=self.shown)
        reply.host = reply.host or node.host
        self._map.slots_cache.setdefault(reply.slot_id, [node])
        await self._map.move_slot(reply)
        await self._leave_replicas()
        return True

    def _unavailable(self, error: BaseException) -> StoreUnavailableError:
        """Return the service's error for what stayed unfinished until the timeout."""
        if isinstance(error, StoreUnavailableError):
            return error
        if isinstance(error, asyncio.TimeoutError):
            return StoreUnavailableError("the store did not answer", where=self.shown)
        if _is_reply(error):
            known = reply_error(_plain(error), self.shown)
            if isinstance(known, ReplyError):
                sentence = f"{known.message}; the slot is being moved: repeat the call"
                return StoreUnavailableError(sentence, where=known.where)
            return known
        return StoreUnavailableError(
            "the store cannot be reached; start the cluster or correct the store's URL; "
            "a server that is no cluster has the URL redis://HOST:PORT/0",
            where=f"{self.shown}: {error}",
        )

    def checked(self, reply: Reply) -> Reply:
        """Return the reply, or raise the error that it is.

        Raises:
            StoreUnavailableError, ReplyError: see `reply_error`.
        """
        if isinstance(reply, hiredis.ReplyError):
            raise reply_error(reply, self.shown)
        return reply

    def disconnect(self, reason: str = "") -> None:
        """Do nothing: a call that is cancelled closes its own connection."""

    async def close(self) -> None:
        """Close the connections; later calls fail."""
        self._closed = True
        await asyncio.gather(*(node.disconnect() for node in self._nodes.values()), return_exceptions=True)
        await self._map.aclose()
        await self._map.aclose("startup_nodes")


Client = RespClient | ClusterClient
"""What a store sends its commands with."""


def _is_reply(error: BaseException) -> bool:
    """Return True if a server said this, and not a connection that failed."""
    # LOADING and NOAUTH are replies too, but redis-py counts them among the failures of a connection.
    return isinstance(error, ResponseError) or getattr(error, "status_code", None) is not None


def _is_later(reply: Reply) -> bool:
    """Return True if the same command may get another reply soon, here or at another node."""
    return isinstance(reply, _LATER) or (isinstance(reply, RedisError) and _NON_LOCAL in str(reply))


def _plain(reply: Reply) -> Reply:
    """Return an error of redis-py as the error reply that the server sent."""
    if not isinstance(reply, RedisError):
        return reply
    return hiredis.ReplyError(f"{reply.status_code} {reply}" if reply.status_code else str(reply))
