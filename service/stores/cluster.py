"""A client of a Redis Cluster: finds the node, follows MOVED and ASK, and outlives a failover.

Knows what the cluster's refusals mean; knows no key of ours. `RedisStore` uses it where a single server has a
`RespClient`, which is what talks to each node here.

All commands of one call must share a hash tag. What the cluster cannot do at once (a slot that is being moved, a
primary that died) is tried again until the call's timeout: so, as in `resp`, what is sent must be safe to repeat. Only
a call with XADD is not sent again once it may have been carried out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import hiredis

from service.errors import StoreUnavailableError
from service.stores.resp import Arg, Endpoint, NotReplicatedError, Reply, ReplyError, RespClient, reply_error
from service.stores.slots import Topology, slot_of

PAUSE_SECONDS = 0.05
"""Between two tries of what the cluster cannot do yet: a move of a slot and a failover take longer."""

_LATER = frozenset({"TRYAGAIN", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "READONLY"})
"""First words of the replies of a cluster in the middle of a change."""

_NON_LOCAL = "non local key"
"""In the reply to a script that reached for a key in a slot that is being moved."""

_SCRIPTS = frozenset({"EVAL", "EVALSHA"})

_NOT_TWICE = frozenset({"XADD"})
"""Commands whose repetition would change the data again."""


class ClusterClient:
    """Pipelined connections to every node that is needed; the calls of a `RespClient`.

    Args:
        topology: the map of slots, shared with other clients. The caller closes it.
        timeout_seconds: how long a call waits for its replies, redirections and repetitions included.
        connections: to each node.
    """

    def __init__(self, topology: Topology, *, timeout_seconds: float, connections: int = 1) -> None:
        self._topology = topology
        self._timeout = timeout_seconds
        self._connections = connections
        self._nodes: dict[Endpoint, RespClient] = {}
        self._closed = False
        topology.listeners.append(self._leave_all_but)

    @property
    def shown(self) -> str:
        """The cluster's seeds without secrets, for messages."""
        return self._topology.shown

    async def execute(self, *command: Arg, timeout_seconds: float | None = None) -> Reply:
        """Send one command and return its reply; PING asks the cluster whether it serves.

        Raises:
            StoreUnavailableError: the node is away or says that it cannot serve now, until the timeout.
            ReplyError: the node refused the command.
        """
        if command[0] == "PING":
            await self._topology.check()
            return b"PONG"
        (reply,) = await self.pipeline([command], timeout_seconds=timeout_seconds)
        return self.checked(reply)

    async def pipeline(
        self, commands: Sequence[tuple[Arg, ...]], *, timeout_seconds: float | None = None, replicas: int = 0
    ) -> list[Reply]:
        """Send commands to the node of their slot; as `RespClient.pipeline`, but that redirections are followed.

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
            seen = self._topology.version
            failure: StoreUnavailableError | None = None
            moved = answered = False
            try:
                async with asyncio.timeout_at(deadline + PAUSE_SECONDS):
                    node = await self._topology.owner(slot)
                    words = [commands[index] for index in waiting]
                    got = await self._try(node, words, deadline - loop.time(), replicas)
                    answered = True
                    for index, reply in zip(waiting, got, strict=True):
                        replies[index] = reply
                    waiting = [index for index in waiting if _is_later(replies[index])]
                    if not waiting:
                        return replies
                    failure = self._unfinished(replies[waiting[0]])
                    moved = await self._follow_move(replies[waiting[0]], node, seen, slot)
            except (NotReplicatedError, ReplyError):
                raise
            except StoreUnavailableError as error:
                failure = error
                self._topology.doubt(seen)
            except TimeoutError:
                failure = failure or StoreUnavailableError("the store did not answer", where=self.shown)
                self._topology.doubt(seen)
            hops += moved
            # Two nodes may send us to each other for a while; the first hop costs no time.
            pause = 0.0 if moved and hops == 1 else PAUSE_SECONDS
            if self._closed or not (repeatable or answered) or loop.time() + pause + PAUSE_SECONDS >= deadline:
                # A try that has no time for its answer would drop a connection that others use.
                raise failure
            await asyncio.sleep(pause)

    async def everywhere(self, commands: Sequence[tuple[Arg, ...]]) -> list[list[Reply]]:
        """Replies of every primary to these commands, error replies included.

        Raises:
            StoreUnavailableError: a primary does not answer.
        """
        seen = self._topology.version
        try:
            primaries = await self._topology.primaries()
            return list(await asyncio.gather(*(self._client(node).pipeline(commands) for node in primaries)))
        except StoreUnavailableError:
            self._topology.doubt(seen)
            raise

    async def _try(
        self, node: Endpoint, commands: Sequence[tuple[Arg, ...]], seconds: float, replicas: int
    ) -> list[Reply]:
        """Ask the slot's owner; what it has given away already is asked of the node that it names."""
        seconds = max(seconds, 0.001)
        replies = await self._client(node).pipeline(commands, timeout_seconds=seconds, replicas=replicas)
        asked: dict[Endpoint, list[int]] = {}
        for index, reply in enumerate(replies):
            if _word(reply) == "ASK" and commands[index][0] not in _SCRIPTS:
                target = self._topology.at(str(reply).split(" ")[2], node)
                asked.setdefault(target, []).append(index)
        for target, indices in asked.items():
            words: list[tuple[Arg, ...]] = [word for index in indices for word in (("ASKING",), commands[index])]
            given = await self._client(target).pipeline(words, timeout_seconds=seconds, replicas=replicas)
            for index, reply in zip(indices, given[1::2], strict=True):
                replies[index] = reply
        return replies

    async def _follow_move(self, reply: Reply, node: Endpoint, seen: int, slot: int | None) -> bool:
        """After MOVED, learn the map from the new owner, who knows best; False for another reply."""
        if _word(reply) != "MOVED":
            return False
        _, number, address = str(reply).split(" ")[:3]
        if int(number) != slot:
            raise ReplyError(f"the store: commands of one call lie in the slots {slot} and {number}", where=self.shown)
        await self._topology.refresh(seen, self._topology.at(address, node))
        return True

    def _unfinished(self, reply: Reply) -> StoreUnavailableError:
        """What is said of a reply that stayed one to wait for until the timeout."""
        error = reply_error(reply, self.shown)
        if not isinstance(error, ReplyError):
            return error
        return StoreUnavailableError(f"{error.message}; the slot is being moved: repeat the call", where=error.where)

    def checked(self, reply: Reply) -> Reply:
        """The reply, or the error that it is.

        Raises:
            StoreUnavailableError, ReplyError: see `reply_error`.
        """
        if isinstance(reply, hiredis.ReplyError):
            raise reply_error(reply, self.shown)
        return reply

    def _client(self, node: Endpoint) -> RespClient:
        if self._closed:
            raise StoreUnavailableError("the store was closed by us", where=self.shown)
        client = self._nodes.get(node)
        if client is None:
            client = RespClient(node, timeout_seconds=self._timeout, connections=self._connections)
            self._nodes[node] = client
        return client

    def _leave_all_but(self, primaries: frozenset[Endpoint]) -> None:
        """Drop connections to nodes that own nothing now: who waits there for a reply goes on at the new owner."""
        for node, client in self._nodes.items():
            if node not in primaries:
                client.disconnect("is no longer a primary")

    def disconnect(self, reason: str = "was disconnected by us") -> None:
        """Drop the live connections; the next call makes new ones."""
        for client in self._nodes.values():
            client.disconnect(reason)

    async def close(self) -> None:
        """Drop the connections and wait until the sockets are closed; later calls fail."""
        self._closed = True
        for client in list(self._nodes.values()):
            await client.close()


Client = RespClient | ClusterClient
"""What a store sends its commands with."""


def _word(reply: Reply) -> str:
    return str(reply).partition(" ")[0] if isinstance(reply, hiredis.ReplyError) else ""


def _is_later(reply: Reply) -> bool:
    """Return True if the same command may get another reply soon, here or at another node.

    A script reads keys that it does not name, and the node that a slot is moving to says "missing" of a key that has
    not come yet: so scripts do not follow ASK, but wait until the slot has moved.
    """
    if not isinstance(reply, hiredis.ReplyError):
        return False
    word = _word(reply)
    return word in _LATER or word in {"MOVED", "ASK"} or _NON_LOCAL in str(reply)
