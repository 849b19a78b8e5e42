"""The safe interval: narrows with data, holds with few rows, refuses what it cannot bound."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router_core.errors import FeedbackError
from router_core.ope import safe_interval
from tests.router_core.ope.bandit import BEST, hand_log, random_log, truth


def test_it_narrows_around_the_truth() -> None:
    """30 logs each of three lengths; 2.5 % may miss on either side."""
    rng = np.random.default_rng(7)
    widths, missed = [], 0
    for n in (100, 1000, 10000):
        bounds = []
        for _ in range(30):
            log, context = random_log(n, rng)
            bounds.append(safe_interval(log, BEST[context]))
        low, high = np.array(bounds).T
        missed += int(((low > truth(BEST)) | (high < truth(BEST))).sum())
        assert low.min() >= 0.0
        assert high.max() <= 1.0
        widths.append(float((high - low).mean()))
    assert missed <= 6
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


def test_it_holds_where_the_normal_interval_cannot() -> None:
    """20 rows, one of which weighs 20 times as much: 400 logs, 95 % of the intervals and more hold the truth."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        asked = (rng.random(20) < 0.05).astype(int)
        reward = (rng.random(20) < np.where(asked, 0.9, 0.2)).astype(float)
        log = hand_log(asked.tolist(), reward.tolist(), [[0.95, 0.05]] * 20)
        low, high = safe_interval(log, np.tile([0.0, 1.0], (20, 1)))
        hits += low <= 0.9 <= high
    assert hits >= 380


def test_it_holds_the_mean_of_a_value_that_moves() -> None:
    """Worth .95 in the first half and .60 in the second, 60 logs of each length: a bet against one constant fails."""
    for n in (300, 1000, 3000):
        bounds = np.array([_uniform_log(n, np.random.default_rng(seed), moving=True) for seed in range(60)])
        assert np.mean((bounds[:, 0] <= bounds[:, 2]) & (bounds[:, 2] <= bounds[:, 1])) >= 0.95, n
        assert (bounds[:, 0] <= bounds[:, 1]).all()


def test_rows_of_one_draw_count_as_one() -> None:
    """Six single responses a draw, each prompt worth .95 or .60."""
    told = np.array([_uniform_log(600, np.random.default_rng(seed), share=6) for seed in range(60)])
    assert np.mean((told[:, 0] <= told[:, 2]) & (told[:, 2] <= told[:, 1])) >= 0.95
    apart = np.array([_uniform_log(600, np.random.default_rng(seed), share=6, told=False) for seed in range(60)])
    assert np.mean(told[:, 1] - told[:, 0]) > 1.5 * np.mean(apart[:, 1] - apart[:, 0])


def test_bounds_that_cross_are_put_in_order() -> None:
    """A log whose propensities are far too low: both bounds say too much."""
    log = hand_log([0] * 200, [0.0, 1.0] * 100, [[0.1, 0.9]] * 200)
    low, high = safe_interval(log, np.tile([1.0, 0.0], (200, 1)))
    assert 0.0 <= low <= high <= 1.0


def _uniform_log(
    n: int, rng: np.random.Generator, *, moving: bool = False, share: int = 1, told: bool = True
) -> tuple[float, float, float]:
    """Safe interval of one of two arms, asked evenly, and the truth: low, high, mean value."""
    draw = np.arange(n) // share
    arm = rng.integers(2, size=n)[draw]
    value = np.where(np.arange(n) < n // 2, 0.95, 0.6) if moving else np.where(rng.random(n) < 0.5, 0.95, 0.6)[draw]
    log = hand_log(arm.tolist(), (rng.random(n) < value).astype(float).tolist(), [[0.5, 0.5]] * n)
    low, high = safe_interval(replace(log, draws=draw) if told else log, np.tile([1.0, 0.0], (n, 1)))
    return low, high, float(value.mean())


def test_a_higher_level_is_wider() -> None:
    log, context = random_log(400, np.random.default_rng(2))
    low, high = safe_interval(log, BEST[context])
    lower, higher = safe_interval(log, BEST[context], level=0.999)
    assert lower < low < high < higher


def test_rewards_outside_the_unit_interval_are_refused() -> None:
    log = hand_log([0, 1], [2.0, -1.0], [[0.5, 0.5]] * 2)
    with pytest.raises(FeedbackError, match="needs rewards in"):
        safe_interval(log, np.full((2, 2), 0.5))
