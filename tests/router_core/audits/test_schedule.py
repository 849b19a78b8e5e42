"""Which decisions are audited."""

from __future__ import annotations

import numpy as np
import pytest

from router_core.audits.schedule import FALSE_RESTARTS, Progress, Schedule, is_chosen
from router_core.errors import AuditError

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.1])
def test_front_spends_the_root_of_the_time(rate: float) -> None:
    schedule = Schedule(rate, "front", 1600)
    spent = schedule.probabilities(np.arange(1, 1601)).cumsum()
    for t in (400, 1600):
        assert spent[t - 1] == pytest.approx(rate * 1600 * np.sqrt(t / 1600), abs=max(0.0, rate * 40 - 1) + 1.0)
    assert schedule.probability(5000) == rate / 2


def test_both_schedules_spend_alike_over_the_horizon() -> None:
    t = np.arange(1, 1001)
    assert Schedule(0.02, "front", 1000).probabilities(t).sum() == pytest.approx(20.0)
    assert Schedule(0.02, "even", 1000).probabilities(t).sum() == pytest.approx(20.0)


def test_share_chosen_is_the_probability() -> None:
    chosen = np.mean([is_chosen(f"decision-{i}", 0.05) for i in range(20_000)])
    assert chosen == pytest.approx(0.05, abs=0.005)


def test_choice_grows_with_the_probability() -> None:
    ids = [str(i) for i in range(500)]
    few, many = ({i for i in ids if is_chosen(i, p)} for p in (0.1, 0.3))
    assert few < many


@pytest.mark.parametrize("text", ["x", "0.1:often", "1.5", "-0.1:even", "nan"])
def test_bad_schedule_is_named(text: str) -> None:
    with pytest.raises(AuditError, match="audit"):
        Schedule.parse(text)


def test_steady_texts_seldom_restart() -> None:
    restarts, steps = 0, 40_000
    for share in (0.1, 0.25, 0.6, 0.95):
        progress = Progress()
        for novel in RNG.random(steps // 4) < share:
            progress = progress.next(novel=bool(novel))
        restarts += progress.restarts
    assert restarts <= 2 * FALSE_RESTARTS * steps


def test_new_texts_and_alarms_restart() -> None:
    progress = Progress()
    for novel in RNG.random(400) < 0.25:
        progress = progress.next(novel=bool(novel))
    before = progress.restarts
    for novel in RNG.random(60) < 0.9:
        progress = progress.next(novel=bool(novel))
    assert progress.restarts > before
    assert progress.t < 60
    assert progress.next(alarms=1.0).t == 1
    assert progress.next(alarms=1.0).next(alarms=1.0).t == 2
