"""What RedisStore promises beyond the contract: where keys live, how long, and which of its errors is whose."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import msgspec
import pytest

from service.errors import ConfigurationError, StoreUnavailableError
from service.stores.ids import new_decision_id
from service.stores.protocol import DecisionRecord, FeedbackRecord, FeedbackStatus, ForeignEntryError
from service.stores.redis import RedisStore
from service.stores.resp import ReplyError, RespClient

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

WINDOW_SECONDS = 100


@pytest.fixture
def run() -> str:
    return f"keys-{os.urandom(6).hex()}"


@pytest.fixture
async def store(valkey_server: ValkeyProcess) -> AsyncIterator[RedisStore]:
    store = RedisStore(valkey_server.url, window_seconds=WINDOW_SECONDS, timeout_seconds=10)
    yield store
    await store.close()


@pytest.fixture
async def raw(valkey_server: ValkeyProcess) -> AsyncIterator[RespClient]:
    client = RespClient(valkey_server.url, timeout_seconds=10)
    yield client
    await client.close()


def decision(content_key: str | None = None) -> DecisionRecord:
    decision_id = new_decision_id(time.time_ns() // 1_000_000, os.urandom(10))
    return DecisionRecord(decision_id, msgspec.msgpack.encode({"n": 2}), content_key)


async def test_all_keys_of_a_run_share_its_hash_tag_and_live_as_long_as_they_should(
    store: RedisStore, raw: RespClient, run: str
) -> None:
    record = decision("hash")
    await store.open_run(run, b"f")
    waiting = decision()
    await store.save_decisions(run, [record, waiting])
    await store.apply_feedback(run, [FeedbackRecord(b"1", content_key="hash")])
    await store.save_snapshot(run, 1, b"s")
    keys = {key.decode() for key in await raw.execute("KEYS", f"*{run}*")}
    lives = {key: await raw.execute("PTTL", key) for key in keys}
    tag, window_ms = f"rr:{{{run}}}:", WINDOW_SECONDS * 1000
    assert keys == {
        # The decision that got its feedback is in the log, and nowhere else.
        tag + name
        for name in (f"d:{waiting.decision_id}", "c:hash", f"f:{record.decision_id}", "log", "snap", "meta")
    }
    assert {key for key, life in lives.items() if life == -1} == {tag + "log", tag + "snap", tag + "meta"}
    assert 0 < lives[tag + f"d:{waiting.decision_id}"] <= window_ms
    assert window_ms < lives[tag + "c:hash"] <= 2 * window_ms
    assert window_ms < lives[tag + f"f:{record.decision_id}"] <= 2 * window_ms


async def test_a_log_key_of_another_type_is_an_error_that_marks_nothing(
    store: RedisStore, raw: RespClient, run: str
) -> None:
    record = decision()
    await store.save_decisions(run, [record])
    await raw.execute("SET", f"rr:{{{run}}}:log", "no stream")
    with pytest.raises(ReplyError, match="WRONGTYPE"):
        await store.apply_feedback(run, [FeedbackRecord(b"1", decision_id=record.decision_id)])
    await raw.execute("DEL", f"rr:{{{run}}}:log")
    (result,) = await store.apply_feedback(run, [FeedbackRecord(b"1", decision_id=record.decision_id)])
    assert result.status is FeedbackStatus.APPLIED


async def test_a_full_server_refuses_feedback_and_marks_nothing(own_valkey_server: ValkeyProcess, run: str) -> None:
    store = RedisStore(own_valkey_server.url, window_seconds=WINDOW_SECONDS, timeout_seconds=10)
    record = decision()
    feedback = [FeedbackRecord(b"1", decision_id=record.decision_id)]
    await store.save_decisions(run, [record])
    own_valkey_server.ask(b"CONFIG SET maxmemory 1\r\n")
    with pytest.raises(StoreUnavailableError, match="OOM"):
        await store.save_decisions(run, [decision()])
    with pytest.raises(StoreUnavailableError, match="OOM"):
        await store.apply_feedback(run, feedback)
    own_valkey_server.ask(b"CONFIG SET maxmemory 0\r\n")
    assert [result.status for result in await store.apply_feedback(run, feedback)] == [FeedbackStatus.APPLIED]
    assert (await store.log_status(run)).appended == 1
    await store.close()


async def test_a_stream_of_another_program_is_refused(store: RedisStore, raw: RespClient, run: str) -> None:
    await raw.execute("XADD", f"rr:{{{run}}}:log", "*", "other", "1")
    with pytest.raises(ForeignEntryError, match="written by another program"):
        await store.read_log(run, "0-0", count=1, block_ms=0)


async def test_closing_ends_a_blocked_reader(valkey_server: ValkeyProcess, run: str) -> None:
    store = RedisStore(valkey_server.url, window_seconds=WINDOW_SECONDS, timeout_seconds=10)
    reader = asyncio.create_task(store.read_log(run, "0-0", count=1, block_ms=60_000))
    await asyncio.sleep(0.05)
    await store.close()
    with pytest.raises(StoreUnavailableError, match="closed by us"):
        await reader


async def test_readers_reuse_their_connections(store: RedisStore, raw: RespClient, run: str) -> None:
    async def connections() -> int:
        return int(str(await raw.execute("INFO", "clients")).partition("connected_clients:")[2].partition("\\r")[0])

    await store.read_log(run, "0-0", count=1, block_ms=0)
    before = await connections()
    for _ in range(5):
        await store.read_log(run, "0-0", count=1, block_ms=1)
    assert await connections() == before


@pytest.mark.parametrize("words", [{"window_seconds": 0}, {"timeout_seconds": 0}, {"connections": 0}])
def test_settings_out_of_range_are_refused(words: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(words))):
        RedisStore("redis://h", **{"window_seconds": 1, **words})  # type: ignore[arg-type]
