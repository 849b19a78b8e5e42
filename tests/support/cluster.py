"""A real Redis Cluster for tests: Valkey processes on loopback, formed by the cluster's own commands.

Three primaries share the slots; with replicas, each has one. Nodes can be killed, frozen and started again, and slots
moved, key by key as older tools do it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS as SLOTS
from redis.crc import key_slot

from tests.conftest import free_port

FORM_SECONDS = 60.0
"""Longest wait for the nodes to agree, on a busy machine."""

NODE_TIMEOUT_MS = 2000
"""After so long without a word a primary counts as dead, where it has a replica: failovers shall be quick."""

PATIENT_NODE_TIMEOUT_MS = 15_000
"""Where it has none: a busy machine shall not look like a dead node."""


@dataclass(slots=True)
class Node:
    """One server of the cluster."""

    binary: Path
    folder: Path
    port: int
    bus_port: int
    timeout_ms: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """`host:port`."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it; it remembers the cluster in its folder. A new one takes other ports where its own are taken."""
        new = not self.folder.exists()
        self.folder.mkdir(exist_ok=True)
        for _ in range(5):
            if self._answers():
                return
            assert new, f"{self.address} left: {(self.folder / 'valkey.log').read_text()[-1000:]}"
            self.port, self.bus_port = free_port(), free_port()
        raise AssertionError(f"no node starts in {self.folder}")

    def _answers(self) -> bool:
        """Start its process; False if that leaves before it answers."""
        words = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": self.folder,
            "appendonly": "yes",
            "appendfsync": "no",
            "save": "",
            "logfile": self.folder / "valkey.log",
            "cluster-enabled": "yes",
            "cluster-port": self.bus_port,
            "cluster-node-timeout": self.timeout_ms,
            "cluster-announce-ip": "127.0.0.1",
            # A replica that just came takes part in the vote at once, and data arrive without a pause for others.
            "cluster-replica-validity-factor": 0,
            "repl-diskless-sync-delay": 0,
        }
        options = [word for name, value in words.items() for word in (f"--{name}", str(value))]
        process = self.process = subprocess.Popen([str(self.binary), *options], stdin=subprocess.DEVNULL)
        until(lambda: process.poll() is not None or self.ask("PING") in (True, b"PONG"), f"{self.address} to answer")
        return process.poll() is None

    def ask(self, *words: Any) -> Any:
        """One command on a connection of its own; the server's refusal is raised, None when nobody listens."""
        client = redis.Redis(port=self.port, socket_timeout=10)
        try:
            return client.execute_command(*words)
        except redis.ConnectionError:
            return None
        finally:
            client.close()

    def info(self, *words: str) -> dict[str, str]:
        """INFO, or another command that answers in lines of `name:value`."""
        answer = self.ask(*words)
        # redis-py reads INFO itself, and leaves the others as they came.
        pairs = answer.items() if isinstance(answer, dict) else _lines(answer or b"")
        return {name: str(value) for name, value in pairs}

    def id(self) -> str:
        """Its name in the cluster."""
        name = self.ask("CLUSTER", "MYID")
        assert isinstance(name, bytes)
        return name.decode()

    def signal(self, number: int) -> None:
        """SIGSTOP freezes it, SIGCONT wakes it."""
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class ValkeyCluster:
    """Three primaries, and a replica of each when wanted; a context manager that ends them.

    Args:
        binary: of the server.
        folder: for the nodes' data.
        replicas: of each primary, 0 or 1.
    """

    def __init__(self, binary: Path, folder: Path, *, replicas: int = 0) -> None:
        count = 3 * (1 + replicas)
        timeout_ms = NODE_TIMEOUT_MS if replicas else PATIENT_NODE_TIMEOUT_MS
        self.nodes = [Node(binary, folder / f"node-{i}", free_port(), free_port(), timeout_ms) for i in range(count)]

    @property
    def url(self) -> str:
        """Two of the nodes as seeds: clients find the others."""
        return "redis+cluster://" + ",".join(node.address for node in self.nodes[:2])

    def __enter__(self) -> Self:
        try:
            self._form()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End all nodes."""
        for node in self.nodes:
            if node.process is not None:
                node.signal(signal.SIGCONT)
            node.kill()

    def _form(self) -> None:
        for epoch, node in enumerate(self.nodes, 1):
            node.start()
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", epoch)
        for index, node in enumerate(self.nodes[:3]):
            node.ask("CLUSTER", "ADDSLOTSRANGE", index * SLOTS // 3, (index + 1) * SLOTS // 3 - 1)
        for node in self.nodes[1:]:
            self.nodes[0].ask("CLUSTER", "MEET", "127.0.0.1", node.port, node.bus_port)
        until(self._all_met, "the nodes to know each other")
        for primary, replica in zip(self.nodes[:3], self.nodes[3:], strict=False):
            # Refused until the primary's name has come round.
            until(lambda p=primary, r=replica: _accepted(r, "CLUSTER", "REPLICATE", p.id()), "a replica to attach")  # type: ignore[misc]
        until(self._serves, "the cluster to serve")

    def _all_met(self) -> bool:
        known = {node.info("CLUSTER", "INFO").get("cluster_known_nodes") for node in self.nodes}
        return known == {str(len(self.nodes))}

    def _serves(self) -> bool:
        links = [node.info("INFO", "replication") for node in self.nodes[3:]]
        return all(node.info("CLUSTER", "INFO").get("cluster_state") == "ok" for node in self.nodes) and all(
            link.get("role") in ("slave", "replica") and link.get("master_link_status") == "up" for link in links
        )

    def owner(self, run: str) -> Node:
        """The primary that has the run now, as the nodes that live say."""
        slot = key_slot(run.encode())
        for node in self.nodes:
            if node.process is None:
                continue
            for first, last, (_, port, *_), *_ in node.ask("CLUSTER", "SLOTS") or ():
                if first <= slot <= last:
                    return next(n for n in self.nodes if n.port == port)
        raise AssertionError(f"no node has slot {slot}")

    def replica_of(self, primary: Node) -> Node:
        """Its replica, as it was formed."""
        return self.nodes[(self.nodes.index(primary) + 3) % 6]

    def begin_move(self, run: str, target: Node) -> Node:
        """Open the run's slot for moving from its owner to the target: MIGRATING here, IMPORTING there."""
        slot, source = key_slot(run.encode()), self.owner(run)
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id())
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id())
        return source

    def move_keys(self, run: str, source: Node, target: Node, count: int = 10_000) -> int:
        """Move so many keys of the slot, in one step each; how many there were."""
        keys = source.ask("CLUSTER", "GETKEYSINSLOT", key_slot(run.encode()), count)
        for key in keys:
            source.ask("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
        return len(keys)

    def end_move(self, run: str, source: Node, target: Node) -> None:
        """Give the slot to the target, which must have all keys."""
        for node in (target, source):
            node.ask("CLUSTER", "SETSLOT", key_slot(run.encode()), "NODE", target.id())


def _lines(answer: bytes) -> list[tuple[str, str]]:
    return [(name, value) for name, _, value in (line.partition(":") for line in answer.decode().splitlines())]


def _accepted(node: Node, *words: Any) -> bool:
    try:
        node.ask(*words)
    except redis.ResponseError:
        return False
    return True


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for it, in a thread that may sleep."""
    deadline = time.monotonic() + FORM_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {FORM_SECONDS:g} s for {what}"
        time.sleep(0.02)
