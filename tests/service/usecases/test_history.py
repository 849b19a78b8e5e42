"""What a gateway has decided reaches the store once, in spite of a store that is away, and its charts with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from router_core.attempts import Attempt, Outcome
from service.errors import StoreUnavailableError
from service.stores.memory import MemoryStore
from service.stores.protocol import Activity
from service.usecases import watch
from service.usecases.decisions import StoredDecision
from service.usecases.history import NEWEST, Decided, DecisionHistory


class AwayStore(MemoryStore):
    """A store that does not answer while `away`."""

    away = False

    async def tell_activity(
        self, run: str, counts: Mapping[str, float], newest: Sequence[tuple[int, bytes]], *, keep: int, seconds: float
    ) -> None:
        self._check()
        await super().tell_activity(run, counts, newest, keep=keep, seconds=seconds)

    async def activity(self, run: str, *, newest: int) -> Activity:
        self._check()
        return await super().activity(run, newest=newest)

    def _check(self) -> None:
        if self.away:
            raise StoreUnavailableError("away", where="here")


def decided(number: int, arm: int = 0) -> Decided:
    attempt = Attempt(arm, 0, Outcome.ANSWERED, rewards=[1.0, 0.0], price=0.5)
    stored = StoredDecision(
        n=2,
        x=b"",
        offsets=[0.0, 0.0],
        means=[0.0, 0.0],
        sds=[1.0, 1.0],
        propensities=[0.5, 0.5],
        policy="bayesian",
        version=0,
        time_ms=number,
        attempts=[attempt],
        arm=arm,
        rewards=[1.0, 0.0],
        verdict=0,
        propensity=0.5,
    )
    return Decided(f"d{number}", stored, None, True, None)


async def test_what_the_store_could_not_take_is_told_once_later() -> None:
    store, history = AwayStore(window_seconds=60), DecisionHistory()
    other = DecisionHistory()
    other.add(decided(1, arm=1))
    await other.tell(store, "r")
    history.add(decided(2))
    store.away = True
    with pytest.raises(StoreUnavailableError):
        await history.tell(store, "r")
    history.add(decided(3))
    assert [one.decision_id for one in await history.read(store, "r", newest=True)] == ["d2", "d3"]
    assert history.totals.decisions == 2
    store.away = False
    await history.tell(store, "r")
    await history.tell(store, "r")
    assert [one.decision_id for one in await history.read(store, "r", newest=True)] == ["d1", "d2", "d3"]
    totals = history.totals
    assert (totals.decisions, totals.price, totals.asked) == (3, 1.5, {0: 2, 1: 1})


async def test_only_the_newest_are_told_and_all_are_counted() -> None:
    store, history, reader = AwayStore(window_seconds=60), DecisionHistory(), DecisionHistory()
    for number in range(NEWEST + 5):
        history.add(decided(number))
    await history.tell(store, "r")
    found = await reader.read(store, "r", newest=True)
    assert [one.decision_id for one in found] == [f"d{number}" for number in range(5, NEWEST + 5)]
    assert reader.totals.decisions == NEWEST + 5


async def test_a_decision_in_other_words_is_left_out() -> None:
    store, history = AwayStore(window_seconds=60), DecisionHistory()
    await store.tell_activity("r", {"decisions": 1}, [(1, b"\x80")], keep=3, seconds=60)
    assert await history.read(store, "r", newest=True) == []
    assert history.totals.decisions == 1


def test_a_point_is_what_happened_since_the_one_before() -> None:
    before = watch.Sample(1, 10, 20.0, [4, 6], None, None, 0)
    now = watch.Sample(2, 14, 30.0, [4, 8, 2], None, None, 0)
    point = watch._point(before, now)
    assert (point.decisions, point.price, point.asked) == (4, 2.5, [0.0, 0.5, 0.5])
    quiet = watch._point(now, now)
    assert (quiet.decisions, quiet.price, quiet.asked) == (0, None, None)
