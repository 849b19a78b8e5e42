"""Changes of the pool in a fold: arms are added and retired at a position, and equality stays bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_core.errors import ShapeMismatchError
from router_core.policies import BayesianPolicy, draw_batch
from router_core.pools import PROBATION_EVENTS, PROBATION_SHARE, Mark, PoolChange, PoolState
from router_core.posterior import FoldSettings, Posterior, fold, start
from router_core.prior import Hyperparameters, Prior, no_prior
from router_core.records import Event
from router_core.snapshot import Snapshot, dump, parse
from tests.router_core.events import make_events, unit_contexts

D = 5
HYPER = Hyperparameters(2.0, 0.25, 0.5, 0.95, adapt=True, alarm_rate=1e-3)
SMALL = FoldSettings(block_size=4, refresh_events=12)
Entry = Event | PoolChange | Mark


def prior_of(K: int, gamma: float = 0.95) -> Prior:
    return no_prior(K, D, replace(HYPER, gamma=gamma))


def change(K: int, *retired: int, gamma: float = 0.95, probation: float = 0.0) -> PoolChange:
    """A pool of K arms without those that are retired; the last one on probation."""
    state = PoolState(
        tuple(k in retired for k in range(K)),
        (0.0,) * (K - 1) + (probation,),
        f"{K} {retired} {gamma} {probation}".encode(),
    )
    return PoolChange(prior_of(K, gamma), state)


def story(seed: int, length: int) -> list[Entry]:
    """Feedback of a pool that grows from three to five arms, loses one and gets it back, with acts between."""
    rng = np.random.default_rng(seed)
    changes = [change(4), change(4, 1), change(5, 1, gamma=0.8), change(5)]
    places = sorted(rng.choice(length, len(changes), replace=False).tolist())
    entries: list[Entry] = []
    K = 3
    for place in range(length):
        if place in places:
            entries.append(changes[places.index(place)])
            K = entries[-1].prior.n_arms  # type: ignore[union-attr]
        entries.extend(make_events(rng, 1, D, K))
        if rng.random() < 0.1:
            entries.append(Mark("export"))
    return entries


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 17), min_size=1, max_size=8))
def test_a_replica_that_lived_through_changes_equals_one_that_starts_later(seed: int, pieces: list[int]) -> None:
    entries = story(seed, max(sum(pieces), 4))
    whole = fold(start(prior_of(3), SMALL), entries)
    state, position = start(prior_of(3), SMALL), 0
    for size in [*pieces, len(entries)]:
        state = fold(state, entries[position : position + size])
        position += size
    assert state.digest() == whole.digest()
    assert state.count == len(entries)


@pytest.mark.parametrize("seed", range(4))
def test_a_snapshot_of_a_changed_pool_goes_on_bit_for_bit(seed: int) -> None:
    entries = story(seed, 40)
    at = 36
    state = fold(start(prior_of(3), SMALL), entries[:at])
    data = dump(Snapshot(state, "9-0"), "print")
    priors = {event.state.specification: event.prior for event in entries if isinstance(event, PoolChange)}
    back = parse(data, "print", prior_of(3), SMALL, lambda specification: priors[specification]).posterior
    assert back.digest() == state.digest()
    assert back.pool == state.pool
    assert fold(back, entries[at:]).digest() == fold(state, entries[at:]).digest()


def test_a_mark_moves_the_position_and_nothing_else() -> None:
    events = make_events(np.random.default_rng(0), 3, D, 3)
    plain = fold(start(prior_of(3), FoldSettings()), events)
    marked = fold(start(prior_of(3), FoldSettings()), [*events, Mark()])
    assert marked.count == plain.count + 1
    assert all((one.mean == other.mean).all() for one, other in zip(plain.arms, marked.arms, strict=True))


def test_a_retired_arm_learns_from_feedback_that_comes_late() -> None:
    events = make_events(np.random.default_rng(1), 8, D, 1)
    state = fold(start(prior_of(2), FoldSettings()), [change(2, 0), *events])
    assert state.statistics.count.tolist() == [8.0, 0.0]
    assert state.active.tolist() == [False, True]


def test_a_change_takes_no_arm_away() -> None:
    with pytest.raises(ShapeMismatchError, match="only adds"):
        fold(start(prior_of(3)), [change(2)])


def drawn(state: Posterior) -> np.ndarray:
    """Propensities (K,) of the draw, where nobody is barred."""
    rng = np.random.default_rng(0)
    x = unit_contexts(rng, 1, D)
    return draw_batch(BayesianPolicy(), x, state.prior.offsets(x), state, rng).propensities[0]


def test_an_arm_on_probation_has_its_share_and_no_more() -> None:
    rng = np.random.default_rng(2)
    state = fold(
        start(prior_of(3), FoldSettings()), [*make_events(rng, 30, D, 3), change(4, probation=PROBATION_EVENTS)]
    )
    assert drawn(state)[3] == pytest.approx(PROBATION_SHARE, abs=1e-3)
    x = unit_contexts(np.random.default_rng(0), 1, D)[0].tobytes()
    taught = [replace(event, arm=3, credit=1.0, x=x) for event in make_events(rng, 40, D, 3)]
    early = fold(state, taught[:20])
    assert drawn(early)[3] == pytest.approx(PROBATION_SHARE, abs=1e-3)
    late = fold(state, taught)
    assert late.on_probation is None
    assert drawn(late)[3] > 2 * PROBATION_SHARE


def test_two_on_probation_divide_the_share_and_alone_nobody_is() -> None:
    state = PoolState((False,) * 3, (0.0, 32.0, 32.0), b"two")
    two = fold(start(prior_of(3)), [PoolChange(prior_of(3), state)])
    assert drawn(two)[1:].sum() == pytest.approx(PROBATION_SHARE, abs=1e-3)
    alone = fold(two, [PoolChange(prior_of(3), PoolState((True, False, False), (0.0, 32.0, 32.0), b"alone"))])
    assert drawn(alone)[1:] == pytest.approx(drawn(alone)[1:].mean(), abs=0.2)
    assert drawn(alone)[1] > PROBATION_SHARE
