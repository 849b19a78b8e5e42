"""The score log on one gateway: failures are told to everybody who waits, and cost no reward that can be given."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from router_core.moments import Moments, ScoreScales
from router_core.policies import ScoreScale
from service.errors import StoreUnavailableError
from service.stores.memory import MemoryStore
from service.stores.protocol import ScoreEntry
from service.telemetry import Telemetry
from service.usecases.normalise import (
    Normaliser,
    ScoreLogError,
    decode_entry,
    dump_scales,
    encode_entry,
    first_scales,
    healed,
    moments_by_arm,
    parse_scales,
)
from service.usecases.runs import Run


class BrittleStore(MemoryStore):
    """Fails where it is told to."""

    def __init__(self) -> None:
        super().__init__(window_seconds=60)
        self.exchange_error: Exception | None = None
        self.save_error: Exception | None = None
        self.exchanges = 0

    async def exchange_scores(self, *args: Any, **more: Any) -> Any:
        await asyncio.sleep(0)
        self.exchanges += 1
        if self.exchange_error is not None:
            raise self.exchange_error
        return await super().exchange_scores(*args, **more)

    async def save_scale(self, *args: Any, **more: Any) -> None:
        if self.save_error is not None:
            raise self.save_error
        await super().save_scale(*args, **more)


def run(refresh_events: int = 4) -> Run:
    """What a normaliser reads of a run."""
    settings = SimpleNamespace(refresh_events=refresh_events)
    template = SimpleNamespace(arms=(0, 1), first_scale=None, fold_settings=settings)
    return cast(Run, SimpleNamespace(name="r", template=template, founding=template))


async def test_requests_that_come_together_share_exchanges() -> None:
    store = BrittleStore()
    normaliser = Normaliser(store, Telemetry(), required=True)
    one = run()
    found = await asyncio.gather(*(normaliser.normalise(one, [(0, [float(i), i + 1.0])]) for i in range(50)))
    assert store.exchanges <= 3
    assert max(result.version for result in found) == 50


@pytest.mark.parametrize("error", [StoreUnavailableError("away"), RuntimeError("a bug")])
async def test_a_failure_is_told_to_everybody_who_waits_and_the_next_one_works(error: Exception) -> None:
    store = BrittleStore()
    normaliser = Normaliser(store, Telemetry(), required=True)
    one = run()
    store.exchange_error = error
    outcomes = await asyncio.gather(
        *(normaliser.normalise(one, [(0, [1.0, 2.0])]) for _ in range(5)), return_exceptions=True
    )
    assert outcomes == [error] * 5
    store.exchange_error = None
    assert (await normaliser.normalise(one, [(0, [1.0, 3.0])])).rewards == [[-1.0, 1.0]]


async def test_a_snapshot_that_cannot_be_kept_costs_no_reward() -> None:
    store, telemetry = BrittleStore(), Telemetry()
    normaliser = Normaliser(store, telemetry, required=True)
    one = run(refresh_events=2)
    store.save_error = StoreUnavailableError("away")
    for _ in range(3):
        await normaliser.normalise(one, [(0, [1.0, 3.0])])
    assert await store.load_scale("r") is None
    assert telemetry.store_errors.labels("save_scale")._value.get() == 1.0
    store.save_error = None
    await normaliser.normalise(one, [(1, [1.0, 3.0])])
    snapshot = await store.load_scale("r")
    assert snapshot is not None
    fresh = Normaliser(store, Telemetry(), required=True)
    again = await fresh.normalise(one, [(0, [1.0, 3.0])])
    assert (again.version, again.rewards) == (5, [[-1.0, 1.0]])


async def test_a_store_that_lost_entries_is_noticed() -> None:
    store = BrittleStore()
    normaliser = Normaliser(store, Telemetry(), required=True)
    one = run(refresh_events=2)
    for _ in range(4):
        await normaliser.normalise(one, [(0, [1.0, 3.0])])
    emptied = BrittleStore()
    snapshot = await store.load_scale("r")
    assert snapshot is not None
    await emptied.save_scale("r", 4, snapshot, trim_before="0-0")
    with pytest.raises(ScoreLogError, match="lost"):
        await Normaliser(emptied, Telemetry(), required=True).normalise(one, [(0, [1.0])])


def test_a_caller_that_is_gone_leaves_the_others_their_answer() -> None:
    async def scenario() -> list[Any]:
        normaliser = Normaliser(BrittleStore(), Telemetry(), required=True)
        one = run()
        tasks = [asyncio.create_task(normaliser.normalise(one, [(0, [1.0, 3.0])])) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *others = asyncio.run(scenario())
    assert isinstance(first, asyncio.CancelledError)
    assert [other.rewards for other in others] == [[[-1.0, 1.0]]] * 2


def test_entries_and_snapshots_come_back_exactly() -> None:
    seen = moments_by_arm([(1, [0.1, 0.2]), (0, [1e-300, 1 / 3]), (1, [7.7])])
    assert [arm for arm, _ in seen] == [0, 1]
    assert decode_entry(ScoreEntry("1-0", encode_entry(seen))) == seen
    scales = first_scales(2, None).observe("1-0", seen)
    assert parse_scales(dump_scales(scales)) == scales


def test_a_snapshot_with_absurd_moments_heals_to_where_that_rm_began() -> None:
    first = first_scales(2, ScoreScale(np.array([1.0, 2.0]), np.array([3.0, 4.0])))
    kept = Moments.of([5.0, 6.0])
    poisoned = ScoreScales(7, "7-0", (Moments(9.0, 1e300, 1e305), kept))
    read = parse_scales(dump_scales(poisoned))
    assert healed(read, first) == ScoreScales(7, "7-0", (first.arms[0], kept))


def test_scores_beyond_the_bound_are_in_no_entry() -> None:
    assert moments_by_arm([(0, [1e300, 1.0]), (1, [math.nan]), (0, [3.0])]) == [(0, Moments.of([1.0, 3.0]))]


@pytest.mark.parametrize("data", [b"", b"{}", b'{"format": "other", "arms": []}'])
def test_a_snapshot_of_something_else_is_refused(data: bytes) -> None:
    with pytest.raises(ScoreLogError, match="use a new run name"):
        parse_scales(data)


def test_an_entry_that_is_none_is_refused_by_its_id() -> None:
    with pytest.raises(ScoreLogError, match="7-0"):
        decode_entry(ScoreEntry("7-0", b"\xc1"))
