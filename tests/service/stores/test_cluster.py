"""The store on a real cluster whose slots move and whose primaries die, and what its URL and slots mean."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from service.errors import ConfigurationError, StoreUnavailableError
from service.stores.cluster import ClusterClient, is_cluster_url, parse_seeds, slot_of
from service.stores.protocol import FeedbackRecord, FeedbackStatus
from service.stores.redis import RedisStore
from service.stores.resp import ReplyError
from tests.conftest import ValkeyProcess, free_port
from tests.support.cluster import Node, ValkeyCluster
from tests.support.gateway import until
from tests.support.traffic import Traffic, check_log, decision

TIMEOUT_SECONDS = 15.0
"""Timeout of the stores here: longer than a failover takes on a busy machine."""


@pytest.fixture
def run() -> str:
    return f"cluster-{os.urandom(6).hex()}"


@pytest.fixture(scope="module")
def movable(valkey_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    """Three primaries whose slots these tests move; each test moves the slot of its own run only."""
    with ValkeyCluster(valkey_binary, tmp_path_factory.mktemp("movable")) as cluster:
        yield cluster


@pytest.fixture
async def store(movable: ValkeyCluster) -> AsyncIterator[RedisStore]:
    store = RedisStore(movable.url, window_seconds=3600, timeout_seconds=TIMEOUT_SECONDS)
    yield store
    await store.close()


def another(cluster: ValkeyCluster, node: Node) -> Node:
    """A primary that is not this one."""
    return next(other for other in cluster.nodes[:3] if other is not node)


# The URL and the slots.


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (("SET", "k", "v"), "k"),
        (("EVALSHA", "sha", 2, "k", "l", "word"), "k"),
        (("XREAD", "COUNT", 1, "BLOCK", 5, "STREAMS", "k", "0-0"), "k"),
        (("XINFO", "STREAM", "k"), "k"),
        (("CLUSTER", "INFO"), None),
    ],
)
def test_the_key_of_a_command_is_found(command: tuple[str | int, ...], key: str | None) -> None:
    assert slot_of(command) == (None if key is None else key_slot(key.encode()))


def test_a_cluster_url_names_nodes_account_and_certificates_once() -> None:
    seeds, words = parse_seeds("rediss+cluster://ann:p%40ss@one:7000,two,[::1]:7002/0?ssl_cert_reqs=none")
    assert [(seed.host, seed.port) for seed in seeds] == [("one", 7000), ("two", 6379), ("::1", 7002)]
    assert (words["username"], words["password"]) == ("ann", "p@ss")
    assert words["ssl_cert_reqs"] == "none"
    assert not any("p@ss" in seed.shown for seed in seeds)
    assert is_cluster_url("redis+cluster://h")
    assert not is_cluster_url("redis://h")


@pytest.mark.parametrize(
    "url", ["redis+cluster://", "redis+cluster://h/1", "redis+cluster://h?colour=red", "redis+cluster://h:port"]
)
def test_a_cluster_url_that_cannot_be_used_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigurationError, match="store's URL"):
        RedisStore(url, window_seconds=1)


async def test_a_server_that_is_no_cluster_is_named_with_the_remedy(valkey_server: object) -> None:
    port = valkey_server.port  # type: ignore[attr-defined]
    store = RedisStore(f"redis+cluster://127.0.0.1:{port}", window_seconds=1, timeout_seconds=0.3)
    with pytest.raises(StoreUnavailableError, match=r"redis://HOST:PORT/0.*luster mode is not enabled"):
        await store.ping()
    await store.close()


async def test_a_cluster_node_asked_as_a_single_server_names_the_remedy(movable: ValkeyCluster, run: str) -> None:
    other = another(movable, movable.owner(run))
    store = RedisStore(f"redis://{other.address}/0", window_seconds=1, timeout_seconds=5)
    with pytest.raises(StoreUnavailableError, match=r"MOVED.*redis\+cluster://HOST:PORT"):
        await store.open_run(run, b"f")
    await store.close()


@pytest.fixture
async def guarded(valkey_binary: Path, tmp_path: Path) -> AsyncIterator[ValkeyProcess]:
    """A cluster of one node that tells no address; `ann` has the rights that docs/operations.md lists, and SET."""
    server = ValkeyProcess(valkey_binary, tmp_path)
    try:
        server.start(
            cluster_enabled="yes",
            cluster_port=str(free_port()),
            cluster_preferred_endpoint_type="unknown-endpoint",
        )
        with redis.Redis(port=server.port) as admin:
            ask = admin.execute_command
            ask("ACL", "SETUSER", "ann", "on", ">p@ss", "~*", "+cluster|slots", "+cluster|info", "+set")
            ask("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            await until(lambda: b"state:ok" in ask("CLUSTER", "INFO"), "the slots to be served", 60)
            ask("CONFIG", "SET", "requirepass", "pw")
        yield server
    finally:
        server.kill()


async def test_an_account_needs_no_more_rights_than_documented(guarded: ValkeyProcess, run: str) -> None:
    store = RedisStore(f"redis+cluster://ann:p%40ss@127.0.0.1:{guarded.port}", window_seconds=60, timeout_seconds=15)
    await store.ping()
    await store.save_decisions(run, [decision()])
    await store.close()


@pytest.mark.parametrize(("account", "word"), [("", "NOAUTH"), ("ann:secret@", "WRONGPASS"), (":secret@", "WRONGPASS")])
async def test_a_refused_account_names_the_remedy_and_no_password(
    guarded: ValkeyProcess, account: str, word: str
) -> None:
    store = RedisStore(f"redis+cluster://{account}127.0.0.1:{guarded.port}", window_seconds=60, timeout_seconds=0.5)
    with pytest.raises(StoreUnavailableError, match=f"{word}.*store's URL") as refused:
        await store.ping()
    assert "secret" not in str(refused.value) + str(refused.value.where)
    await store.close()


# Data.


async def test_runs_lie_on_all_nodes_and_each_on_one(store: RedisStore, movable: ValkeyCluster, run: str) -> None:
    names = [f"{run}-{i}" for i in range(12)]
    for name in names:
        record = decision("content")
        await store.open_run(name, b"f")
        await store.save_decisions(name, [record])
        await store.apply_feedback(name, [FeedbackRecord(b"1", decision_id=record.decision_id)])
        await store.save_snapshot(name, 1, b"s")
    held = [{key.decode() for key in node.ask("KEYS", f"*{run}*")} for node in movable.nodes]
    assert all(held)
    for name in names:
        assert [sum(f"{{{name}}}" in key for key in keys) for keys in held].count(0) == 2


async def test_commands_of_one_call_must_share_a_slot(movable: ValkeyCluster) -> None:
    client = ClusterClient(movable.url, timeout_seconds=5)
    with pytest.raises(ReplyError, match="lie in the slots"):
        await client.pipeline([("GET", f"{{{name}}}") for name in "abcdefgh"])
    await client.close()


async def test_a_refused_command_is_not_repeated(store: RedisStore, movable: ValkeyCluster, run: str) -> None:
    movable.owner(run).ask("SET", f"rr:{{{run}}}:log", "no stream")
    record = decision()
    await store.save_decisions(run, [record])
    with pytest.raises(ReplyError, match="WRONGTYPE"):
        await store.apply_feedback(run, [FeedbackRecord(b"1", decision_id=record.decision_id)])


async def test_only_a_call_without_xadd_is_repeated_when_its_connection_breaks(
    store: RedisStore, movable: ValkeyCluster, run: str
) -> None:
    owner = movable.owner(run)

    async def broken(command: str, call: Coroutine[Any, Any, Any]) -> Any:
        """Break the call's connection when the server has the command and has not carried it out."""
        owner.ask("CLIENT", "PAUSE", 60_000, "WRITE")
        task = asyncio.create_task(call)
        await until(lambda: f"cmd={command}".encode() in owner.ask("CLIENT", "LIST"), f"{command} to arrive", 60)
        owner.ask("CLIENT", "KILL", "TYPE", "normal")
        owner.ask("CLIENT", "UNPAUSE")
        return await task

    await broken("set", store.save_decisions(run, [decision()]))
    with pytest.raises(StoreUnavailableError):
        await broken("xadd", store.exchange_scores(run, [b"m"], after="0-0", count=10))
    assert (await store.exchange_scores(run, [], after="0-0", count=10)).entries == []


# Slots that move.


async def test_a_slot_moved_key_by_key_under_traffic_loses_nothing(
    store: RedisStore, movable: ValkeyCluster, run: str
) -> None:
    traffic = Traffic(store, run)
    feeders = [asyncio.create_task(traffic()) for _ in range(8)]
    await traffic.further(100)
    target = another(movable, movable.owner(run))

    def move() -> None:
        source = movable.begin_move(run, target)
        while movable.move_keys(run, source, target, 20):
            pass
        movable.end_move(run, source, target)

    await asyncio.to_thread(move)
    await traffic.further(100)
    traffic.stop()
    await asyncio.gather(*feeders)
    assert movable.owner(run) is target
    assert traffic.refused == 0, "the wait for the move is shorter than the timeout"
    await check_log(store, run, traffic.acknowledged)


async def test_a_slot_moved_atomically_under_traffic_loses_nothing(
    store: RedisStore, movable: ValkeyCluster, run: str
) -> None:
    traffic = Traffic(store, run)
    feeders = [asyncio.create_task(traffic()) for _ in range(8)]
    await traffic.further(100)
    source = movable.owner(run)
    target = another(movable, source)
    slot = key_slot(run.encode())
    assert source.ask("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", target.id()) == b"OK"
    await until(lambda: movable.owner(run) is target, "the slot to move", 60)
    await traffic.further(100)
    traffic.stop()
    await asyncio.gather(*feeders)
    assert traffic.refused == 0
    await check_log(store, run, traffic.acknowledged)


async def test_a_blocked_reader_follows_its_log_to_the_new_owner(
    store: RedisStore, movable: ValkeyCluster, run: str
) -> None:
    first, second = decision(), decision()
    await store.save_decisions(run, [first, second])
    (applied,) = await store.apply_feedback(run, [FeedbackRecord(b"1", decision_id=first.decision_id)])
    assert applied.event_id is not None
    reader = asyncio.create_task(store.read_log(run, applied.event_id, count=10, block_ms=60_000))
    await asyncio.sleep(0.1)
    target = another(movable, movable.owner(run))
    source = movable.begin_move(run, target)
    movable.move_keys(run, source, target)
    movable.end_move(run, source, target)
    (later,) = await store.apply_feedback(run, [FeedbackRecord(b"1", decision_id=second.decision_id)])
    async with asyncio.timeout(30):
        assert [entry.event_id for entry in await reader] == [later.event_id]


async def test_in_the_middle_of_a_move_decisions_are_saved_and_feedback_waits_its_time(
    store: RedisStore, movable: ValkeyCluster, run: str
) -> None:
    """Half of the keys are there, half here: what is asked for under another name must never be called missing."""
    hasty = RedisStore(movable.url, window_seconds=3600, timeout_seconds=2)
    waiting, applied = decision("waiting"), decision("applied")
    await store.save_decisions(run, [waiting, applied])
    await store.apply_feedback(run, [FeedbackRecord(b"1", content_key="applied")])
    target = another(movable, movable.owner(run))
    source = movable.begin_move(run, target)
    # The log and the names go; decisions and markers stay.
    for name in ("log", "c:waiting", "c:applied"):
        source.ask("MIGRATE", "127.0.0.1", target.port, f"rr:{{{run}}}:{name}", 0, 5000)
    for key in ("waiting", "applied"):
        with pytest.raises(StoreUnavailableError, match=r"ASK|TRYAGAIN|moved"):
            await hasty.apply_feedback(run, [FeedbackRecord(b"1", content_key=key)])
    young = decision()
    await store.save_decisions(run, [young])
    assert (await store.open_run(run, b"f")).fingerprint == b"f"
    movable.move_keys(run, source, target)
    movable.end_move(run, source, target)
    results = await store.apply_feedback(
        run,
        [
            FeedbackRecord(b"1", content_key="waiting"),
            FeedbackRecord(b"1", content_key="applied"),
            FeedbackRecord(b"1", decision_id=young.decision_id),
        ],
    )
    assert [result.status for result in results] == [
        FeedbackStatus.APPLIED,
        FeedbackStatus.DUPLICATE,
        FeedbackStatus.APPLIED,
    ]
    await hasty.close()
