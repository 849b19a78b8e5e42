"""The safe interval: narrows with data, holds with few rows, refuses what it cannot bound."""

from __future__ import annotations

import numpy as np
import pytest

from router_core.errors import FeedbackError
from router_core.ope import safe_interval
from tests.router_core.ope.bandit import BEST, hand_log, random_log, truth


def test_it_narrows_around_the_truth() -> None:
    """30 logs each of three lengths; 2.5 % may miss on either side."""
    rng = np.random.default_rng(7)
    widths, missed = [], 0
    for n in (50, 500, 5000):
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


def test_a_higher_level_is_wider() -> None:
    log, context = random_log(400, np.random.default_rng(2))
    low, high = safe_interval(log, BEST[context])
    lower, higher = safe_interval(log, BEST[context], level=0.999)
    assert lower < low < high < higher


def test_rewards_outside_the_unit_interval_are_refused() -> None:
    log = hand_log([0, 1], [2.0, -1.0], [[0.5, 0.5]] * 2)
    with pytest.raises(FeedbackError, match="needs rewards in"):
        safe_interval(log, np.full((2, 2), 0.5))
