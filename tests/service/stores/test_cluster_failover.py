"""The store on a cluster whose primaries die or freeze, each with one replica."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from service.errors import ConfigurationError, StoreUnavailableError
from service.stores.protocol import FeedbackRecord, FeedbackStatus
from service.stores.redis import RedisStore
from tests.support.cluster import ValkeyCluster
from tests.support.gateway import until
from tests.support.traffic import Traffic, check_log, decision

TIMEOUT_SECONDS = 30.0
"""Longer than a failover takes on a busy machine."""


@pytest.fixture
def run() -> str:
    return f"failover-{os.urandom(6).hex()}"


@pytest.fixture
def cluster(valkey_binary: Path, tmp_path: Path) -> Iterator[ValkeyCluster]:
    """Three primaries and their replicas, for one test."""
    with ValkeyCluster(valkey_binary, tmp_path, replicas=1) as cluster:
        yield cluster


@pytest.fixture
async def store(cluster: ValkeyCluster) -> AsyncIterator[RedisStore]:
    """Acknowledges what one replica holds."""
    store = RedisStore(cluster.url, window_seconds=3600, timeout_seconds=TIMEOUT_SECONDS, replicas=1)
    yield store
    await store.close()


async def test_a_killed_primary_is_replaced_and_loses_nothing_acknowledged(
    store: RedisStore, cluster: ValkeyCluster, run: str
) -> None:
    traffic = Traffic(store, run)
    feeders = [asyncio.create_task(traffic()) for _ in range(8)]
    await traffic.further(200)
    reader = asyncio.create_task(store.read_log(run, "99999999999999-0", count=1, block_ms=60_000))
    primary = cluster.owner(run)
    replica = cluster.replica_of(primary)
    for dying, heir in ((primary, replica), (replica, primary)):
        await asyncio.to_thread(dying.kill)
        await until(lambda heir=heir: cluster.owner(run) is heir, "the replica to take over", 60)
        # The heir has nobody who could confirm, until the old primary is back and follows it.
        await asyncio.to_thread(dying.start)
        await traffic.further(200)
    traffic.stop()
    await asyncio.gather(*feeders)
    assert traffic.refused == 0, "both failovers are shorter than the timeout"
    assert not reader.done(), "a reader that waits goes on at the new primary"
    reader.cancel()
    await check_log(store, run, traffic.acknowledged)


async def test_a_frozen_primary_is_left_when_its_replica_takes_over(
    store: RedisStore, cluster: ValkeyCluster, run: str
) -> None:
    """No connection breaks: only the silence tells."""
    hasty = RedisStore(cluster.url, window_seconds=3600, timeout_seconds=0.5)
    first, second = decision(), decision()
    await store.save_decisions(run, [first, second])
    (applied,) = await store.apply_feedback(run, [FeedbackRecord(b"1", decision_id=first.decision_id)])
    assert applied.event_id is not None
    reader = asyncio.create_task(hasty.read_log(run, applied.event_id, count=1, block_ms=60_000))
    await asyncio.sleep(0.1)
    primary = cluster.owner(run)
    primary.signal(signal.SIGSTOP)
    try:
        refused = 0
        async with asyncio.timeout(60):
            while True:
                try:
                    (later,) = await hasty.apply_feedback(run, [FeedbackRecord(b"1", decision_id=second.decision_id)])
                    break
                except StoreUnavailableError:
                    refused += 1
        assert refused > 0
        assert later.status is FeedbackStatus.APPLIED
        async with asyncio.timeout(30):
            assert [entry.event_id for entry in await reader] == [later.event_id]
    finally:
        primary.signal(signal.SIGCONT)
    # Awake again, it learns that it is a replica now, and nobody writes to it.
    (repeated,) = await store.apply_feedback(run, [FeedbackRecord(b"1", decision_id=second.decision_id)])
    assert repeated.status is FeedbackStatus.DUPLICATE
    await hasty.close()


async def test_feedback_that_no_replica_confirms_is_not_acknowledged_nor_is_its_repetition(
    store: RedisStore, cluster: ValkeyCluster, run: str
) -> None:
    hasty = RedisStore(cluster.url, window_seconds=3600, timeout_seconds=3, replicas=1)
    record = decision()
    feedback = [FeedbackRecord(b"1", decision_id=record.decision_id)]
    await store.save_decisions(run, [record])
    replica = cluster.replica_of(cluster.owner(run))
    replica.signal(signal.SIGSTOP)
    try:
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match=r"0 of 1 replicas confirmed.*repeat the call"):
                await hasty.apply_feedback(run, feedback)
        await store.save_decisions(run, [decision()])
    finally:
        replica.signal(signal.SIGCONT)
    (result,) = await store.apply_feedback(run, feedback)
    assert result.status is FeedbackStatus.DUPLICATE
    assert (await store.log_status(run)).appended == 1
    await hasty.close()


async def test_a_cluster_without_its_slots_is_unavailable_within_the_timeout(
    store: RedisStore, cluster: ValkeyCluster, run: str
) -> None:
    hasty = RedisStore(cluster.url, window_seconds=3600, timeout_seconds=1)
    await store.open_run(run, b"f")
    await store.ping()
    primary = cluster.owner(run)
    cluster.replica_of(primary).kill()
    primary.kill()
    async with asyncio.timeout(30):
        with pytest.raises(StoreUnavailableError):
            await hasty.save_decisions(run, [decision()])
    await until(lambda: cluster_is_down(cluster), "the others to notice", 60)
    with pytest.raises(StoreUnavailableError, match=r"CLUSTER|did not answer|cannot be reached"):
        await hasty.ping()
    await asyncio.to_thread(primary.start)
    assert await store.has_run(run)
    await hasty.close()


def cluster_is_down(cluster: ValkeyCluster) -> bool:
    living = [node for node in cluster.nodes if node.process is not None]
    return all(node.info("CLUSTER", "INFO").get("cluster_state") == "fail" for node in living)


def test_a_negative_number_of_replicas_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="replicas = -1"):
        RedisStore("redis://h", window_seconds=1, replicas=-1)
