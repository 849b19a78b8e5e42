"""What tells that an arm has changed: sums by hand, false alarms, and what an alarm does to a posterior."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from router_core.changes import WARM_UP, Watch
from router_core.posterior import FoldSettings, Posterior, fold, start
from router_core.prior import Hyperparameters, Prior, calibrated_prior
from router_core.records import Event, Feedback, Signal
from router_core.snapshot import Snapshot, dump, parse
from tests.router_core.events import unit_contexts

SETTINGS = FoldSettings(block_size=16, refresh_events=64)
HYPER = Hyperparameters(lambda0=100.0, sigma2=0.16, v=0.2, adapt=True, alarm_rate=1e-3)
RATE = 1e-5


def prior(hyper: Hyperparameters = HYPER) -> Prior:
    return calibrated_prior(2, 3, lambda x: np.full((len(x), 2), 0.9), hyper)


def falling(n: int, at: int) -> list[Event]:
    """Both arms in turn; arm 0 is right .9 of the time and from `at` on never, arm 1 always .9 of the time."""
    rng = np.random.default_rng(0)
    events = []
    rows = unit_contexts(rng, n, 3) * np.float32([0, 0.5, 0.5]) + np.float32([0.8, 0, 0])
    for step, x in enumerate(rows):
        right = rng.random() < 0.9 and not (step % 2 == 0 and step >= at)
        events.append(Event(step % 2, x.tobytes(), 0.9, float(right), Feedback(Signal.PREFERENCE, 0.0)))
    return events


def test_the_sums_by_hand() -> None:
    # p = .8: a fall is .7 against .55; a rise, .9 against 1.05, is not looked for.
    watch = Watch(WARM_UP).after(0.8, 0.0, RATE)
    assert watch == pytest.approx((WARM_UP + 1, math.log(0.45 / 0.3), 0.0, 0.0))
    assert watch.after(0.8, 1.0, RATE).fall == pytest.approx(math.log(0.45 / 0.3) + math.log(0.55 / 0.7))
    assert watch.after(0.8, 1.0, RATE).after(0.8, 1.0, RATE).fall == 0.0
    # p = .3: a rise is .4 against .55.
    assert Watch(WARM_UP).after(0.3, 1.0, RATE).rise == pytest.approx(math.log(0.55 / 0.4))


def test_the_first_events_are_not_judged() -> None:
    watch = Watch()
    for _ in range(int(WARM_UP)):
        watch = watch.after(0.9, 0.0, RATE)
    assert watch == Watch(WARM_UP)


@pytest.mark.parametrize(("predicted", "after"), [(0.9, 0.0), (0.2, 1.0)])
def test_an_alarm_begins_anew(predicted: float, after: float) -> None:
    watch, events = Watch(WARM_UP), 0
    while not watch.alarms:
        watch, events = watch.after(predicted, after, RATE), events + 1
    assert watch == Watch(alarms=1.0)
    assert 10 < events < 40


@pytest.mark.parametrize("wrong", [-0.1, 0.0, 0.1])
def test_false_alarms_are_rarer_than_said(wrong: float) -> None:
    # 50,000 events at a rate of 1e-3: 50 at most are expected; the bound is far from tight.
    rng, watch = np.random.default_rng(1), Watch()
    for right in rng.random(50_000) < 0.5 + wrong:
        watch = watch.after(0.5, float(right), 1e-3)
    assert watch.alarms <= 50


def test_an_arm_that_changed_starts_from_its_prior_and_no_other_does() -> None:
    events = falling(600, at=300)
    before, state = fold(start(prior(), SETTINGS), events[:300]), start(prior(), SETTINGS)
    assert [watch.alarms for watch in before.watches] == [0.0, 0.0]
    for event in events:
        state = fold(state, [event])
        if state.watches[0].alarms:
            break
    assert 300 < state.count < 400
    # The event of the alarm is the first that is learned from again.
    assert len(state.arms[0].targets) == 1
    assert np.array_equal(state.arms[0].precision, 100.0 * np.eye(3))
    assert state.precisions[0].tolist() == [100.0] * 3
    assert state.watches[1].alarms == 0.0
    assert state.events[1] > 100 > 2 > state.events[0]


def test_nothing_is_watched_at_a_rate_of_zero() -> None:
    unwatched = prior(replace(HYPER, alarm_rate=0.0))
    state = fold(start(unwatched, SETTINGS), falling(600, at=300))
    assert state.watches == (Watch(), Watch())


def test_a_watched_log_folds_to_the_same_bits_wherever_it_is_cut() -> None:
    events = falling(500, at=250)
    whole = fold(start(prior(), SETTINGS), events)
    assert whole.watches[0].alarms == 1.0
    for cut in (1, 63, 64, 100, 251, 290, 320):
        assert fold(fold(start(prior(), SETTINGS), events[:cut]), events[cut:]).digest() == whole.digest()
    state = start(prior(), SETTINGS)
    for event in events:
        state = fold(state, [event])
    assert state.digest() == whole.digest()


def test_a_snapshot_keeps_the_watches() -> None:
    events = falling(500, at=250)
    at: Posterior = fold(start(prior(), SETTINGS), events[:256])
    back = parse(dump(Snapshot(at, "1-1"), "run"), "run", prior(), SETTINGS).posterior
    assert back.digest() == at.digest()
    assert back.watches == at.watches != (Watch(), Watch())
    assert fold(back, events[256:]).digest() == fold(start(prior(), SETTINGS), events).digest()
    other = replace(at, watches=(Watch(), Watch()))
    assert other.digest() != at.digest()
