"""Which node of a Redis Cluster owns a key: the slot of a key, the URL of a cluster, the map from slots to primaries.

Knows the cluster's words and asks its nodes; knows no key of ours, and sends nothing that changes data. Called by
`service.stores.cluster`, whose clients share one `Topology`.
"""

from __future__ import annotations

import asyncio
import binascii
from collections.abc import Callable, Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from service.errors import ConfigurationError, StoreUnavailableError
from service.stores.resp import Arg, Endpoint, Reply, ReplyError, RespClient, parse_endpoint

SCHEMES = ("redis+cluster://", "rediss+cluster://")
"""How the URL of a cluster begins."""

SLOTS = 16_384
"""Hash slots of a cluster, fixed by its protocol."""

ASKED_AT_ONCE = 3
"""Nodes that are asked for the map of slots at the same time, so that one that hangs delays nobody."""

_KEY_AT = {"EVAL": 3, "EVALSHA": 3, "XINFO": 2}
"""Where a command's first key stands, for those that do not have it right behind the name."""

_KEYLESS = frozenset({"PING", "CLUSTER"})


def is_cluster_url(url: str) -> bool:
    """Return True if the URL names a cluster."""
    return url.startswith(SCHEMES)


def parse_seeds(url: str) -> list[Endpoint]:
    """The nodes of `redis+cluster://[user:password@]host:port[,host:port…][?ssl_…]`: some nodes, not all.

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
    return [parse_endpoint(f"{scheme}://{account}{at}{name}/0{query}") for name in names]


def hash_slot(key: Arg) -> int:
    """Slot of a key: CRC-16/XMODEM of its hash tag, or of all of it without one (Redis Cluster specification).

    >>> hash_slot("123456789"), hash_slot("{user}:1") == hash_slot("user")
    (12739, True)
    """
    raw = key if isinstance(key, bytes) else str(key).encode()
    begin = raw.find(b"{")
    end = raw.find(b"}", begin + 1)
    if begin >= 0 and end > begin + 1:
        raw = raw[begin + 1 : end]
    return binascii.crc_hqx(raw, 0) % SLOTS


def slot_of(command: tuple[Arg, ...]) -> int | None:
    """Slot of a command's first key; None for a command that any node can answer."""
    name = command[0]
    if name in _KEYLESS:
        return None
    at = command.index("STREAMS") + 1 if name == "XREAD" else _KEY_AT.get(str(name), 1)
    return hash_slot(command[at])


class Topology:
    """The map from slots to primaries, learned from the nodes; shared by the clients of one store.

    Args:
        url: see `parse_seeds`.
        timeout_seconds: how long one question to the nodes may take.
    """

    def __init__(self, url: str, *, timeout_seconds: float) -> None:
        self._seeds = parse_seeds(url)
        self._timeout = timeout_seconds
        self._owners: list[Endpoint | None] = [None] * SLOTS
        self._known: list[Endpoint] = []
        self._askers: dict[Endpoint, RespClient] = {}
        self._turn = 0
        self._lock = asyncio.Lock()
        self._doubted = True
        self.version = 0
        """Grows with every answer of the nodes, so that of many who doubt one map only the first asks."""
        self.listeners: list[Callable[[frozenset[Endpoint]], None]] = []
        """Called with the primaries after each answer."""

    @property
    def shown(self) -> str:
        """The seeds without secrets, for messages."""
        return "cluster " + ",".join(seed.shown for seed in self._seeds)

    async def owner(self, slot: int | None) -> Endpoint:
        """The primary of a slot; of any slot for None.

        Raises:
            StoreUnavailableError: no node answers, or none has the slot.
        """
        if self._doubted:
            await self.refresh(self.version)
        owners = self._owners
        owner = owners[slot] if slot is not None else next(filter(None, owners), None)
        if owner is None:
            self._doubted = True
            raise StoreUnavailableError(f"the store: no node serves slot {slot}; see CLUSTER SHARDS", where=self.shown)
        return owner

    async def primaries(self) -> list[Endpoint]:
        """All nodes that own slots.

        Raises:
            StoreUnavailableError: no node answers, or none owns a slot.
        """
        await self.owner(None)
        return list(dict.fromkeys(filter(None, self._owners)))

    def doubt(self, seen: int) -> None:
        """The map of version `seen` led nowhere: ask the nodes before it is used again."""
        if self.version == seen:
            self._doubted = True

    def at(self, address: str, told_by: Endpoint) -> Endpoint:
        """The endpoint of `host:port` as a node wrote it; without a host it means its own."""
        host, _, port = address.rpartition(":")
        return self._endpoint(host or told_by.host, int(port))

    def _endpoint(self, host: str, port: int) -> Endpoint:
        # All nodes have the seeds' account and certificates.
        first = self._seeds[0]
        scheme = "rediss" if first.tls else "redis"
        return replace(first, host=host, port=port, shown=f"{scheme}://{host}:{port}/0")

    async def refresh(self, seen: int, best: Endpoint | None = None) -> None:
        """Ask the nodes for the map, `best` before all others, unless it was learned since version `seen`.

        Raises:
            StoreUnavailableError: no node answers.
        """
        async with self._lock:
            if self.version != seen:
                return
            nodes = list(dict.fromkeys([*self._known, *self._seeds]))
            self._turn = (self._turn + 1) % len(nodes)
            nodes = nodes[self._turn :] + nodes[: self._turn]
            groups = [nodes[begin : begin + ASKED_AT_ONCE] for begin in range(0, len(nodes), ASKED_AT_ONCE)]
            if best is not None:
                groups.insert(0, [best])
            failure: StoreUnavailableError | None = None
            for group in groups:
                answer = await self._first_answer(group)
                if not isinstance(answer, StoreUnavailableError):
                    self._learn(*answer)
                    return
                failure = answer
            assert failure is not None
            raise failure

    async def _first_answer(self, nodes: Sequence[Endpoint]) -> tuple[Endpoint, Reply] | StoreUnavailableError:
        """The first map that one of the nodes gives, or the last refusal."""

        async def ask(node: Endpoint) -> tuple[Endpoint, Reply]:
            return node, await self._asker(node).execute("CLUSTER", "SLOTS")

        tasks = [asyncio.create_task(ask(node)) for node in nodes]
        failure = StoreUnavailableError("the store: no node has a map of slots", where=self.shown)
        try:
            for task in asyncio.as_completed(tasks):
                try:
                    node, rows = await task
                except ReplyError as error:
                    failure = StoreUnavailableError(
                        f"{error.message}; a server that is no cluster has the URL redis://HOST:PORT/0",
                        where=error.where,
                    )
                except StoreUnavailableError as error:
                    failure = error
                else:
                    if rows:
                        return node, rows
        finally:
            for left in tasks:
                left.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return failure

    def _learn(self, told_by: Endpoint, rows: Reply) -> None:
        """Take over the reply to CLUSTER SLOTS: [first, last, [host, port, …] of the primary, then of its replicas]."""
        owners: list[Endpoint | None] = [None] * SLOTS
        known: dict[Endpoint, None] = {}
        for first, last, *nodes in rows:
            endpoints = [
                self._endpoint((host or b"").decode() or told_by.host, port) for host, port, *_ in nodes if host != b"?"
            ]
            if endpoints:
                owners[first : last + 1] = [endpoints[0]] * (last + 1 - first)
            known.update(dict.fromkeys(endpoints))
        self._owners, self._known = owners, list(known)
        self._doubted = False
        self.version += 1
        primaries = frozenset(filter(None, owners))
        for listener in self.listeners:
            listener(primaries)

    async def check(self) -> None:
        """Return when a primary says that the cluster serves.

        Raises:
            StoreUnavailableError: no node answers, or some slots are not served.
        """
        seen = self.version
        node = await self.owner(None)
        try:
            info: bytes = await self._asker(node).execute("CLUSTER", "INFO")
        except StoreUnavailableError:
            self.doubt(seen)
            raise
        if b"cluster_state:ok" not in info:
            self.doubt(seen)
            raise StoreUnavailableError(
                "the store says that the cluster is down; see CLUSTER INFO",
                where=f"{self.shown}: {node.shown}",
            )

    def _asker(self, node: Endpoint) -> RespClient:
        if node not in self._askers:
            self._askers[node] = RespClient(node, timeout_seconds=self._timeout)
        return self._askers[node]

    async def close(self) -> None:
        """Close the connections on which the map is asked."""
        for client in self._askers.values():
            await client.close()
