"""A single server fails over to its replica while the learner waits in a blocking read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.conftest import ValkeyProcess
from tests.support.gateway import Gateway, open_gateway, pair, until


@pytest.fixture
def replica(valkey_binary: Path, tmp_path: Path, own_valkey_server: ValkeyProcess) -> Iterator[ValkeyProcess]:
    """A replica of the test's own server, in step with it."""
    folder = tmp_path / "replica"
    folder.mkdir()
    server = ValkeyProcess(valkey_binary, folder)
    server.start()
    follow(server, own_valkey_server)
    yield server
    server.kill()


def follow(server: ValkeyProcess, primary: ValkeyProcess) -> None:
    """Make a server the replica of another, and return when it has all of it."""
    with redis.Redis.from_url(primary.url) as client:
        client.config_set("repl-diskless-sync-delay", 0)
    with redis.Redis.from_url(server.url) as client:
        client.replicaof("127.0.0.1", primary.port)  # type: ignore[no-untyped-call]
        info: dict[str, Any] = {}
        while info.get("master_link_status") != "up" or info.get("master_sync_in_progress"):
            info = client.info("replication")


def promote(server: ValkeyProcess) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.replicaof("NO", "ONE")  # type: ignore[no-untyped-call]


async def acknowledge(gateway: Gateway, index: int) -> None:
    reply = await gateway.client.ok("/reward", pair(index))
    await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 0})


def held(server: ValkeyProcess, run: str, decision_id: str) -> bool:
    """Return True if the server has the decision, the last thing that was written."""
    with redis.Redis.from_url(server.url) as client:
        return bool(client.exists(f"rr:{{{run}}}:d:{decision_id}"))


async def blocked(server: ValkeyProcess) -> int:
    """Readers that wait in the server."""
    with redis.Redis.from_url(server.url) as client:
        return int(client.info("clients")["blocked_clients"])


async def test_a_learner_outlives_a_real_failover_and_back(
    own_valkey_server: ValkeyProcess, replica: ValkeyProcess, caplog: pytest.LogCaptureFixture
) -> None:
    primary = own_valkey_server
    async with open_gateway(primary.url, store_timeout_seconds=5) as gateway:
        await acknowledge(gateway, 0)
        await gateway.learned(1)
        await until(lambda: blocked(primary), "the learner waits in a blocking read")
        # The replica takes over, and the old primary follows it: it unblocks its readers with an error.
        reply = await gateway.client.ok("/reward", pair(2))
        waiting = {"decision_id": reply["decision_id"], "preferred": 1}
        await until(lambda: held(replica, gateway.run, reply["decision_id"]), "the replica holds all")
        promote(replica)
        await asyncio.to_thread(follow, primary, replica)
        await until(lambda: "UNBLOCKED" in caplog.text or "learner waits" in caplog.text, "the read was broken off")

        async def refused() -> bool:
            return (await gateway.client.get("/readyz")).status == 503

        await until(refused, "not ready at a replica")
        refused_feedback = await gateway.client.post("/feedback", waiting)
        assert (refused_feedback.status, refused_feedback.error["code"]) == (503, "store_unavailable")
        # Back: what was acknowledged stands, and the run goes on.
        promote(primary)

        async def ready() -> bool:
            return (await gateway.client.get("/readyz")).status == 200

        await until(ready, "ready again")
        await acknowledge(gateway, 1)
        await gateway.client.ok("/feedback", waiting)
        assert (await gateway.learned(3))["digest"] == gateway.folded().digest()
