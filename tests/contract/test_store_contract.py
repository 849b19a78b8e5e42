"""One suite that every store must pass: MemoryStore, and RedisStore on a real Valkey process and on a cluster."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import msgspec
import pytest

from service.errors import StoreUnavailableError, ValidationError
from service.stores.ids import new_decision_id
from service.stores.protocol import (
    DecisionRecord,
    FeedbackRecord,
    FeedbackResult,
    FeedbackStatus,
    LogEntry,
    LogStatus,
    Store,
)
from service.stores.redis import RedisStore
from tests.contract.conftest import WINDOW_SECONDS
from tests.support.clock import Clock

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

AWKWARD = b"\x00\r\n$5 \xff\x00 value "
"""Bytes that a text protocol, a C string or a separator would trip over."""


def fresh_id() -> str:
    return new_decision_id(time.time_ns() // 1_000_000, os.urandom(10))


def payload(n: int = 2, x: bytes = AWKWARD) -> bytes:
    return msgspec.msgpack.encode({"v": 1, "n": n, "x": x})


def decision(n: int = 2, *, content_key: str | None = None) -> DecisionRecord:
    return DecisionRecord(fresh_id(), payload(n), content_key)


def by_id(record: DecisionRecord, value: bytes = b"1", preferred: int | None = None) -> FeedbackRecord:
    return FeedbackRecord(value, decision_id=record.decision_id, preferred=preferred)


async def apply_one(store: Store, run: str, feedback: FeedbackRecord) -> FeedbackResult:
    (result,) = await store.apply_feedback(run, [feedback])
    return result


async def whole_log(store: Store, run: str) -> list[LogEntry]:
    return await store.read_log(run, "0-0", count=100_000, block_ms=0)


async def test_a_store_answers_a_ping(store: Store) -> None:
    await store.ping()


async def test_the_first_fingerprint_stands(store: Store, run: str) -> None:
    assert (await store.open_run(run, AWKWARD)).fingerprint == AWKWARD
    assert (await store.open_run(run, b"another")).fingerprint == AWKWARD
    assert (await store.open_run(run + "x", b"another")).fingerprint == b"another"


async def test_a_feedback_is_appended_once_with_its_bytes_verbatim(store: Store, run: str) -> None:
    record = decision()
    await store.save_decisions(run, [record])
    result = await apply_one(store, run, by_id(record, AWKWARD))
    assert (result.status, result.decision_id) == (FeedbackStatus.APPLIED, record.decision_id)
    assert result.event_id is not None
    assert await whole_log(store, run) == [LogEntry(result.event_id, record.decision_id, record.payload, AWKWARD)]


async def test_an_update_replaces_what_the_log_will_hold(store: Store, run: str) -> None:
    record, other = decision(content_key="content"), decision()
    await store.save_decisions(run, [record, other])
    later = DecisionRecord(record.decision_id, decision(3).payload)
    assert await store.update_decisions(run, [later]) == [True]
    # The response count is the new one, and the content key still finds it.
    result = await apply_one(store, run, FeedbackRecord(AWKWARD, content_key="content", preferred=2))
    assert (result.status, result.decision_id) == (FeedbackStatus.APPLIED, record.decision_id)
    await apply_one(store, run, by_id(other))
    assert [entry.payload for entry in await whole_log(store, run)] == [later.payload, other.payload]


async def test_an_update_after_the_feedback_changes_nothing(store: Store, run: str) -> None:
    applied, pending = decision(), decision()
    await store.save_decisions(run, [applied, pending])
    await apply_one(store, run, by_id(applied))
    records = [DecisionRecord(d.decision_id, decision(3).payload) for d in (applied, decision(), pending)]
    assert await store.update_decisions(run, records) == [False, False, True]
    assert [entry.payload for entry in await whole_log(store, run)] == [applied.payload]
    assert (await apply_one(store, run, by_id(applied))).status is FeedbackStatus.DUPLICATE
    unknown = await apply_one(store, run, FeedbackRecord(b"1", decision_id=records[1].decision_id))
    assert unknown.status is FeedbackStatus.UNKNOWN, "an update makes no decision"


async def test_an_update_does_not_lengthen_the_window(store: Store, clock: Clock, run: str) -> None:
    record = decision()
    await store.save_decisions(run, [record])
    clock.advance(WINDOW_SECONDS * 2 / 3, run)
    assert await store.update_decisions(run, [record]) == [True]
    clock.advance(WINDOW_SECONDS / 2, run)
    assert await store.update_decisions(run, [record]) == [False]
    assert (await apply_one(store, run, by_id(record))).status is FeedbackStatus.EXPIRED


async def test_an_update_without_decisions_is_nothing(store: Store, run: str) -> None:
    assert await store.update_decisions(run, []) == []


async def test_of_100_equal_feedbacks_at_once_one_is_applied(store: Store, run: str) -> None:
    record = decision()
    await store.save_decisions(run, [record])
    results = await asyncio.gather(*(apply_one(store, run, by_id(record)) for _ in range(100)))
    assert Counter(result.status for result in results) == {FeedbackStatus.APPLIED: 1, FeedbackStatus.DUPLICATE: 99}
    assert len({result.event_id for result in results}) == 1
    assert len(await whole_log(store, run)) == 1


async def test_of_100_different_feedbacks_at_once_one_stands(store: Store, run: str) -> None:
    record = decision()
    await store.save_decisions(run, [record])
    results = await asyncio.gather(*(apply_one(store, run, by_id(record, b"%d" % i)) for i in range(100)))
    assert Counter(result.status for result in results) == {FeedbackStatus.APPLIED: 1, FeedbackStatus.CONFLICT: 99}
    (entry,) = await whole_log(store, run)
    assert {result.standing_value for result in results} == {None, entry.value}


async def test_a_conflict_names_the_value_and_event_that_stand(store: Store, run: str) -> None:
    record = decision()
    await store.save_decisions(run, [record])
    applied = await apply_one(store, run, by_id(record, AWKWARD))
    conflict = await apply_one(store, run, by_id(record, AWKWARD + b"!"))
    assert conflict == FeedbackResult(FeedbackStatus.CONFLICT, record.decision_id, applied.event_id, AWKWARD)


@pytest.mark.parametrize("decision_id", ["", "nonsense", "d" + "0" * 25, "d" + "0" * 27])
async def test_an_id_that_no_store_made_is_unknown(store: Store, run: str, decision_id: str) -> None:
    await store.save_decisions(run, [decision()])
    result = await apply_one(store, run, FeedbackRecord(b"1", decision_id=decision_id))
    assert result.status is FeedbackStatus.UNKNOWN
    assert await whole_log(store, run) == []


async def test_a_young_id_without_decision_is_unknown_and_an_old_one_expired(store: Store, run: str) -> None:
    young, old = fresh_id(), new_decision_id(1_000, os.urandom(10))
    results = await store.apply_feedback(run, [FeedbackRecord(b"1", decision_id=id_) for id_ in (young, old)])
    assert [result.status for result in results] == [FeedbackStatus.UNKNOWN, FeedbackStatus.EXPIRED]


async def test_an_unknown_content_key_is_unknown(store: Store, run: str) -> None:
    result = await apply_one(store, run, FeedbackRecord(b"1", content_key="never"))
    assert result == FeedbackResult(FeedbackStatus.UNKNOWN)


async def test_after_the_window_a_pending_decision_is_expired_and_a_marked_one_still_marked(
    store: Store, clock: Clock, run: str
) -> None:
    pending, marked = decision(content_key="pending"), decision(content_key="marked")
    await store.save_decisions(run, [pending, marked])
    applied = await apply_one(store, run, by_id(marked))
    clock.advance(WINDOW_SECONDS * 1.1, run)
    results = await store.apply_feedback(
        run,
        [
            by_id(pending),
            FeedbackRecord(b"1", content_key="pending"),
            by_id(marked),
            by_id(marked, b"0"),
            FeedbackRecord(b"1", content_key="marked"),
        ],
    )
    assert [result.status for result in results] == [
        FeedbackStatus.EXPIRED,
        FeedbackStatus.EXPIRED,
        FeedbackStatus.DUPLICATE,
        FeedbackStatus.CONFLICT,
        FeedbackStatus.DUPLICATE,
    ]
    assert [entry.event_id for entry in await whole_log(store, run)] == [applied.event_id]


@pytest.mark.parametrize(
    ("n", "preferred", "fits"),
    [
        (2, 0, True),
        (2, 1, True),
        (2, 2, False),
        (2, -1, False),
        (12, 11, True),
        (12, 12, False),
        (1, 0, True),
        (1, 1, False),
    ],
)
async def test_a_preference_must_name_one_of_the_responses(
    store: Store, run: str, n: int, preferred: int, fits: bool
) -> None:
    record = decision(n)
    await store.save_decisions(run, [record])
    result = await apply_one(store, run, by_id(record, preferred=preferred))
    assert result.status is (FeedbackStatus.APPLIED if fits else FeedbackStatus.OUT_OF_RANGE)
    assert len(await whole_log(store, run)) == int(fits)


async def test_an_out_of_range_preference_leaves_the_decision_pending(store: Store, run: str) -> None:
    record = decision(2)
    await store.save_decisions(run, [record])
    await apply_one(store, run, by_id(record, b"2", preferred=2))
    assert (await apply_one(store, run, by_id(record, b"1", preferred=1))).status is FeedbackStatus.APPLIED


async def test_a_content_key_finds_the_latest_decision(store: Store, run: str) -> None:
    first, second = decision(content_key="same"), decision(content_key="same")
    await store.save_decisions(run, [first])
    await store.save_decisions(run, [second])
    result = await apply_one(store, run, FeedbackRecord(b"1", content_key="same"))
    assert (result.status, result.decision_id) == (FeedbackStatus.APPLIED, second.decision_id)
    assert (await apply_one(store, run, by_id(second))).status is FeedbackStatus.DUPLICATE
    assert (await apply_one(store, run, by_id(first))).status is FeedbackStatus.APPLIED


async def test_a_batch_is_answered_item_by_item_in_order(store: Store, run: str) -> None:
    records = [decision() for _ in range(200)]
    await store.save_decisions(run, records)
    feedback = [by_id(record, b"%d" % index) for index, record in enumerate(records)]
    results = await store.apply_feedback(run, [*feedback, feedback[7], FeedbackRecord(b"1", decision_id="nonsense")])
    assert [result.status for result in results] == [
        *[FeedbackStatus.APPLIED] * 200,
        FeedbackStatus.DUPLICATE,
        FeedbackStatus.UNKNOWN,
    ]
    log = await whole_log(store, run)
    assert [entry.event_id for entry in log] == [result.event_id for result in results[:200]]
    assert [entry.value for entry in log] == [item.value for item in feedback]


async def test_empty_batches_do_nothing(store: Store, run: str) -> None:
    await store.save_decisions(run, [])
    assert await store.apply_feedback(run, []) == []
    assert await store.log_status(run) == LogStatus(0, "0-0")


async def test_a_feedback_needs_exactly_one_reference(store: Store, run: str) -> None:
    for item in (FeedbackRecord(b"1"), FeedbackRecord(b"1", decision_id="d", content_key="c")):
        with pytest.raises(ValueError, match="exactly one"):
            await store.apply_feedback(run, [item])


@pytest.mark.parametrize("bad", [b"", b"\x80", b"no map", msgspec.msgpack.encode({"n": 0})])
async def test_a_payload_without_n_is_refused_and_none_of_its_batch_saved(store: Store, run: str, bad: bytes) -> None:
    good = decision()
    with pytest.raises(ValueError, match="payload of decision"):
        await store.save_decisions(run, [good, DecisionRecord(fresh_id(), bad)])
    assert (await apply_one(store, run, by_id(good))).status is FeedbackStatus.UNKNOWN


async def test_the_log_is_read_in_order_and_resumed_from_an_id(store: Store, run: str) -> None:
    records = [decision() for _ in range(25)]
    await store.save_decisions(run, records)
    await store.apply_feedback(run, [by_id(record) for record in records])
    seen: list[LogEntry] = []
    after = "0-0"
    while entries := await store.read_log(run, after, count=10, block_ms=0):
        assert len(entries) <= 10
        seen += entries
        after = entries[-1].event_id
    assert [entry.decision_id for entry in seen] == [record.decision_id for record in records]
    assert seen == await whole_log(store, run)


async def test_reading_an_empty_log_waits_and_returns_nothing(store: Store, run: str) -> None:
    assert await store.read_log(run, "0-0", count=10, block_ms=20) == []
    assert await store.read_log(run, "0-0", count=10, block_ms=0) == []


async def test_blocked_readers_wake_on_an_event_and_hold_up_nobody(store: Store, run: str) -> None:
    readers = [asyncio.create_task(store.read_log(run, "0-0", count=10, block_ms=60_000)) for _ in range(3)]
    other = asyncio.create_task(store.read_log(run + "other", "0-0", count=10, block_ms=60_000))
    await asyncio.sleep(0.05)
    record = decision()
    async with asyncio.timeout(30):
        await store.ping()
        await store.save_decisions(run, [record])
        assert await store.read_log(run, "0-0", count=10, block_ms=0) == []
        assert await store.save_snapshot(run, 1, b"s")
        assert not any(reader.done() for reader in readers)
        result = await apply_one(store, run, by_id(record))
        for entries in await asyncio.gather(*readers):
            assert [entry.event_id for entry in entries] == [result.event_id]
    assert not other.done()
    other.cancel()
    with pytest.raises(asyncio.CancelledError):
        await other
    assert len(await whole_log(store, run)) == 1


async def test_status_counts_what_was_appended_and_survives_trimming(store: Store, run: str) -> None:
    assert await store.log_status(run) == LogStatus(0, "0-0")
    records = [decision() for _ in range(250)]
    await store.save_decisions(run, records)
    results = await store.apply_feedback(run, [by_id(record) for record in records])
    ids = [result.event_id or "" for result in results]
    assert await store.log_status(run) == LogStatus(250, ids[-1])
    assert await store.trim_log(run, ids[103]) == 103
    assert [entry.event_id for entry in await whole_log(store, run)] == ids[103:]
    assert await store.log_status(run) == LogStatus(250, ids[-1], 103)
    assert await store.trim_log(run, ids[103]) == 0
    assert await store.trim_log(run, "99999999999999-0") == 147
    assert await store.log_status(run) == LogStatus(250, ids[-1], 250)


async def test_a_trimmed_feedback_is_still_a_duplicate(store: Store, run: str) -> None:
    record = decision()
    await store.save_decisions(run, [record])
    applied = await apply_one(store, run, by_id(record))
    await store.trim_log(run, "99999999999999-0")
    repeated = await apply_one(store, run, by_id(record))
    assert (repeated.status, repeated.event_id) == (FeedbackStatus.DUPLICATE, applied.event_id)


async def test_the_snapshot_of_more_events_wins(store: Store, run: str) -> None:
    assert await store.load_snapshot(run) is None
    assert await store.save_snapshot(run, 64, AWKWARD)
    assert not await store.save_snapshot(run, 63, b"older")
    assert await store.load_snapshot(run) == AWKWARD
    assert await store.save_snapshot(run, 128, b"newer")
    assert await store.load_snapshot(run) == b"newer"
    assert await store.load_snapshot(run + "x") is None


async def test_of_many_snapshots_at_once_the_newest_is_kept(store: Store, run: str) -> None:
    await asyncio.gather(*(store.save_snapshot(run, position, b"%d" % position) for position in (5, 3, 9, 1, 7)))
    assert await store.load_snapshot(run) == b"9"


async def test_a_snapshot_of_megabytes_comes_back_unchanged(store: Store, run: str) -> None:
    snapshot = os.urandom(1 << 20) * 8
    assert await store.save_snapshot(run, 1, snapshot)
    assert await store.load_snapshot(run) == snapshot


async def test_runs_do_not_meet(store: Store, run: str) -> None:
    record = decision(content_key="same")
    await store.save_decisions(run, [record])
    for item in (by_id(record), FeedbackRecord(b"1", content_key="same")):
        assert (await apply_one(store, run + "x", item)).status is FeedbackStatus.UNKNOWN
    assert (await apply_one(store, run, by_id(record))).status is FeedbackStatus.APPLIED
    assert await whole_log(store, run + "x") == []
    assert await store.log_status(run + "x") == LogStatus(0, "0-0")


@pytest.mark.parametrize("bad", ["", "a}b", "{a", "a b", "a\nb", "a\x00", "x" * 65])
async def test_a_run_name_that_could_leave_its_keys_is_refused(store: Store, bad: str) -> None:
    with pytest.raises(ValidationError, match="run is "):
        await store.open_run(bad, b"")


async def test_a_run_is_known_once_it_was_opened(store: Store, run: str) -> None:
    assert not await store.has_run(run)
    await store.open_run(run, b"f")
    assert await store.has_run(run)
    assert not await store.has_run(run + "x")
    assert run in await store.list_runs()
    assert run + "x" not in await store.list_runs()


# What only a store with a server can show.


@pytest.fixture
async def fragile(own_valkey_server: ValkeyProcess) -> AsyncIterator[RedisStore]:
    store = RedisStore(own_valkey_server.url, window_seconds=3600, timeout_seconds=10)
    yield store
    await store.close()


async def test_a_killed_server_loses_nothing_that_was_acknowledged(
    fragile: RedisStore, own_valkey_server: ValkeyProcess, run: str
) -> None:
    acknowledged: dict[str, str] = {}
    enough = asyncio.Event()
    refused = 0

    async def feed() -> None:
        nonlocal refused
        while not refused:
            record = decision()
            try:
                await fragile.save_decisions(run, [record])
                result = await apply_one(fragile, run, by_id(record))
            except StoreUnavailableError:
                refused += 1
                return
            assert result.event_id is not None
            acknowledged[result.event_id] = record.decision_id
            if len(acknowledged) >= 500:
                enough.set()

    feeders = [asyncio.create_task(feed()) for _ in range(16)]
    reader = asyncio.create_task(fragile.read_log(run, "99999999999999-0", count=1, block_ms=60_000))
    await asyncio.wait_for(enough.wait(), 60)
    own_valkey_server.kill()
    await asyncio.gather(*feeders)
    assert refused > 0
    with pytest.raises(StoreUnavailableError):
        await reader
    with pytest.raises(StoreUnavailableError):
        await fragile.log_status(run)

    own_valkey_server.start()
    async with asyncio.timeout(30):
        while True:
            try:
                status = await fragile.log_status(run)
                break
            except StoreUnavailableError:
                await asyncio.sleep(0.05)
    log = {entry.event_id: entry.decision_id for entry in await whole_log(fragile, run)}
    assert acknowledged.items() <= log.items()
    assert status == LogStatus(len(log), list(log)[-1])
    (repeated,) = await fragile.apply_feedback(run, [FeedbackRecord(b"1", decision_id=next(iter(log.values())))])
    assert repeated.status is FeedbackStatus.DUPLICATE


async def test_status_survives_trimming_and_a_restart(
    fragile: RedisStore, own_valkey_server: ValkeyProcess, run: str
) -> None:
    records = [decision() for _ in range(10)]
    await fragile.save_decisions(run, records)
    results = await fragile.apply_feedback(run, [by_id(record) for record in records])
    await fragile.trim_log(run, "99999999999999-0")
    own_valkey_server.kill()
    own_valkey_server.start()
    async with asyncio.timeout(30):
        while True:
            try:
                status = await fragile.log_status(run)
                break
            except StoreUnavailableError:
                await asyncio.sleep(0.05)
    assert status == LogStatus(10, results[-1].event_id or "", 10)


async def test_a_script_flush_is_survived_by_single_calls_and_batches(
    fragile: RedisStore, own_valkey_server: ValkeyProcess, run: str
) -> None:
    records = [decision() for _ in range(6)]
    await fragile.save_decisions(run, records)
    for chunk in (records[:1], records[1:]):
        assert own_valkey_server.ask(b"SCRIPT FLUSH\r\n") == b"+OK\r\n"
        results = await fragile.apply_feedback(run, [by_id(record) for record in chunk])
        assert {result.status for result in results} == {FeedbackStatus.APPLIED}
    assert own_valkey_server.ask(b"SCRIPT FLUSH\r\n") == b"+OK\r\n"
    assert await fragile.save_snapshot(run, 1, b"s")
    assert [entry.decision_id for entry in await whole_log(fragile, run)] == [record.decision_id for record in records]
