"""Stores of every kind, for the contract that they all keep."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import TYPE_CHECKING

import pytest

from service.stores.memory import MemoryStore
from service.stores.protocol import Store
from service.stores.redis import RedisStore
from tests.support.clock import Clock

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess
    from tests.support.cluster import ValkeyCluster

WINDOW_SECONDS = 3600.0
_RUNS = count()

Open = Callable[[float], Store]


@pytest.fixture
def clock(request: pytest.FixtureRequest, kind: str) -> Clock:
    """The clock of the stores that `open_store` opens."""
    if kind == "memory":
        return Clock()
    if kind == "redis":
        server: ValkeyProcess = request.getfixturevalue("valkey_server")
        return Clock(lambda run: server.url)
    cluster: ValkeyCluster = request.getfixturevalue("valkey_cluster")
    return Clock(lambda run: f"redis://{cluster.owner(run).address}/0")


@pytest.fixture(params=["memory", "redis", "cluster"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which store."""
    return str(request.param)


@pytest.fixture
async def open_store(request: pytest.FixtureRequest, kind: str, clock: Clock) -> AsyncIterator[Open]:
    """Opens stores of one kind with a given feedback window, and closes them."""
    opened: list[Store] = []

    def open_(window_seconds: float) -> Store:
        store: Store
        if kind == "memory":
            store = MemoryStore(window_seconds=window_seconds, now_ms=clock.now_ms)
        else:
            name = "valkey_server" if kind == "redis" else "valkey_cluster"
            server: ValkeyProcess | ValkeyCluster = request.getfixturevalue(name)
            store = RedisStore(server.url, window_seconds=window_seconds, timeout_seconds=10, now_ms=clock.now_ms)
        opened.append(store)
        return store

    yield open_
    for store in opened:
        await store.close()


@pytest.fixture
def store(open_store: Open) -> Store:
    return open_store(WINDOW_SECONDS)


@pytest.fixture
def run() -> str:
    """A run of this test's own: the server is shared and may hold other sessions' keys."""
    return f"run-{next(_RUNS)}-{os.urandom(4).hex()}"
