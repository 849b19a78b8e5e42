"""Sticky choices and the score log, as every store keeps them: MemoryStore, RedisStore on Valkey and on a cluster."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

from service.stores.memory import MemoryStore
from service.stores.protocol import Store
from service.stores.redis import RedisStore
from tests.support.clock import Clock

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess
    from tests.support.cluster import ValkeyCluster

AWKWARD = b"\x00\r\n$5 \xff value "


@pytest.fixture
async def store(request: pytest.FixtureRequest, kind: str, clock: Clock) -> AsyncIterator[Store]:
    """One of the stores."""
    if kind == "memory":
        yield MemoryStore(window_seconds=60, now_ms=clock.now_ms)
        return
    name = "valkey_server" if kind == "redis" else "valkey_cluster"
    server: ValkeyProcess | ValkeyCluster = request.getfixturevalue(name)
    opened = RedisStore(server.url, window_seconds=60, timeout_seconds=10, now_ms=clock.now_ms)
    yield opened
    await opened.close()


@pytest.fixture
def run() -> str:
    """A run of this test alone."""
    return f"s-{os.urandom(5).hex()}"


async def test_the_first_choice_stands(store: Store, run: str) -> None:
    assert await store.stick(run, [("k", AWKWARD), ("k", b"second"), ("other", b"o")], seconds=60) == [
        None,
        AWKWARD,
        None,
    ]
    assert await store.stick(run, [("k", b"third")], seconds=60) == [AWKWARD]
    assert await store.stick(run + "-2", [("k", b"of another run")], seconds=60) == [None]


async def test_of_many_callers_at_once_one_is_first(store: Store, run: str) -> None:
    offers = [b"%d" % i for i in range(50)]
    outcomes = await asyncio.gather(*(store.stick(run, [("k", offer)], seconds=60) for offer in offers))
    followed = {outcome[0] for outcome in outcomes if outcome[0] is not None}
    (first,) = [offer for offer, outcome in zip(offers, outcomes, strict=True) if outcome[0] is None]
    assert followed == {first}


async def test_a_choice_is_gone_after_its_time(store: Store, clock: Clock, run: str) -> None:
    await store.stick(run, [("k", b"one")], seconds=3600)
    clock.advance(1800, run)
    assert await store.stick(run, [("k", b"two")], seconds=3600) == [b"one"]
    clock.advance(1801, run)
    assert await store.stick(run, [("k", b"two")], seconds=60) == [None]


async def test_the_score_log_is_read_in_the_order_in_which_it_was_written(store: Store, run: str) -> None:
    empty = await store.exchange_scores(run, [], after="0-0", count=10)
    assert (empty.entries, empty.status.appended, empty.status.trimmed) == ([], 0, 0)
    first = await store.exchange_scores(run, [AWKWARD, b"b"], after="0-0", count=10)
    assert [entry.payload for entry in first.entries] == [AWKWARD, b"b"]
    more = await store.exchange_scores(run, [b"c"], after=first.entries[-1].entry_id, count=10)
    assert [entry.payload for entry in more.entries] == [b"c"]
    assert (more.status.appended, more.status.last_id) == (3, more.entries[-1].entry_id)
    part = await store.exchange_scores(run, [], after="0-0", count=2)
    assert [entry.payload for entry in part.entries] == [AWKWARD, b"b"]


async def test_what_was_trimmed_is_counted_and_the_newest_snapshot_stays(store: Store, run: str) -> None:
    assert await store.load_scale(run) is None
    part = await store.exchange_scores(run, [b"%d" % i for i in range(5)], after="0-0", count=10)
    await store.save_scale(run, 4, AWKWARD, trim_before=part.entries[3].entry_id)
    await store.save_scale(run, 2, b"older", trim_before=part.entries[1].entry_id)
    assert await store.load_scale(run) == AWKWARD
    left = await store.exchange_scores(run, [], after="0-0", count=10)
    assert [entry.payload for entry in left.entries] == [b"3", b"4"]
    assert (left.status.appended, left.status.trimmed) == (5, 3)
