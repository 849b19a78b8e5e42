"""The reward model: knows only the past, learns, and keeps to the rewards' range."""

from __future__ import annotations

import numpy as np

from router_core.ope import LoggedData, sequential_ridge
from router_core.ope.reward_model import FIRST_BLOCK
from tests.router_core.ope.bandit import VALUE, random_log


def test_a_prediction_uses_no_reward_of_its_own_row_or_of_later_ones() -> None:
    log, _ = random_log(400, np.random.default_rng(0))
    before = sequential_ridge(log)
    for row in (0, 10, 150, 399):
        rewards = log.rewards.copy()
        rewards[row:] = 1.0 - rewards[row:]
        changed = sequential_ridge(LoggedData(log.pool, log.x, log.arm, log.propensities, log.available, rewards))
        assert np.array_equal(before[: row + 1], changed[: row + 1])


def test_it_learns_what_each_arm_is_worth_where() -> None:
    log, context = random_log(6000, np.random.default_rng(1))
    q = sequential_ridge(log)
    assert (q[:FIRST_BLOCK] == 0.5).all()
    error = np.abs(q[4000:] - VALUE[context[4000:]]).mean()
    assert error < 0.1
    assert error < 0.7 * np.abs(log.reward.mean() - VALUE[context[4000:]]).mean()
    assert q.min() >= 0.0
    assert q.max() <= 1.0


def test_long_contexts_are_projected_and_empty_logs_are_nothing() -> None:
    log, context = random_log(200, np.random.default_rng(2))
    wide = np.random.default_rng(3).standard_normal((4, 200)).astype(np.float32)
    q = sequential_ridge(LoggedData(log.pool, wide[context], log.arm, log.propensities, log.available, log.rewards))
    assert np.isfinite(q).all()
    assert sequential_ridge(log.rows(slice(0))).shape == (0, 3)
