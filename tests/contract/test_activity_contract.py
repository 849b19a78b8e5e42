"""What every store must do with the activity of a run: add up what gateways tell, keep the newest, one point a slot."""

from __future__ import annotations

from service.stores.protocol import Activity, Store
from tests.contract.conftest import WINDOW_SECONDS
from tests.contract.test_store_contract import AWKWARD
from tests.support.clock import Clock


async def test_counts_of_several_tellers_add_up(store: Store, run: str) -> None:
    assert await store.activity(run, newest=3) == Activity({}, [])
    await store.tell_activity(run, {"decisions": 2, "price": 0.25}, [], keep=3, seconds=60)
    await store.tell_activity(run, {"decisions": 1, "price": 0.5, "asked:0": 1}, [], keep=3, seconds=60)
    found = await store.activity(run, newest=0)
    assert found.counts == {"decisions": 3.0, "price": 0.75, "asked:0": 1.0}
    assert found.newest == []


async def test_the_newest_are_those_of_all_tellers_by_time(store: Store, run: str) -> None:
    await store.tell_activity(run, {"decisions": 3}, [(10, AWKWARD), (30, b"30"), (50, b"50")], keep=3, seconds=60)
    await store.tell_activity(run, {"decisions": 2}, [(20, b"20"), (40, b"40")], keep=3, seconds=60)
    assert (await store.activity(run, newest=3)).newest == [b"30", b"40", b"50"]
    assert (await store.activity(run, newest=2)).newest == [b"40", b"50"]


async def test_decisions_are_forgotten_and_counts_kept(store: Store, run: str, clock: Clock) -> None:
    await store.tell_activity(run, {"decisions": 1}, [(1, b"one")], keep=3, seconds=WINDOW_SECONDS)
    clock.advance(WINDOW_SECONDS + 1, run)
    found = await store.activity(run, newest=3)
    assert (found.counts, found.newest) == ({"decisions": 1.0}, [])


async def test_of_two_points_of_a_slot_the_first_stands(store: Store, run: str) -> None:
    assert await store.keep_point(run, 7, AWKWARD, seconds=60) == AWKWARD
    assert await store.keep_point(run, 7, b"late", seconds=60) == AWKWARD
    assert await store.keep_point(run, 9, b"nine", seconds=60) == b"nine"
    assert await store.points(run, range(6, 10)) == [AWKWARD, b"nine"]
    assert await store.points(f"{run}x", [7]) == []
