"""The bound on rewards that is learned from the first ones: outliers are refused, whatever the RM's scale."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.records import MAX_ABS_SCORE
from service.scorers.rm.answers import LEARNED_FROM, AnswerError, RewardBound


def refuses(bound: RewardBound, rewards: list[float]) -> bool:
    """Judge an answer and learn from it, as a request does."""
    try:
        bound.check(rewards)
    except AnswerError:
        return True
    finally:
        bound.learn(rewards)
    return False


@given(st.lists(st.floats(-1000.0, 1000.0), min_size=1, max_size=100), st.floats(1e5, MAX_ABS_SCORE, exclude_min=True))
def test_an_outlier_is_refused_from_the_second_reward_on(rewards: list[float], outlier: float) -> None:
    bound = RewardBound()
    for reward in rewards:
        assert not refuses(bound, [reward])
        # Again and again: what was refused never becomes usual.
        assert refuses(bound, [outlier])
        assert refuses(bound, [reward, -outlier])


def test_an_outlier_beside_others_stays_one_when_it_is_asked_alone() -> None:
    bound = RewardBound()
    assert refuses(bound, [1.0, 1e6])
    assert refuses(bound, [1e6])
    assert not refuses(bound, [2.0])


@pytest.mark.parametrize("size", [1e-6, 1.0, 30.0, 5000.0, 1e5])
def test_an_rm_of_any_scale_is_not_refused(size: float) -> None:
    bound = RewardBound()
    for index in range(3 * LEARNED_FROM):
        assert not refuses(bound, [size * (1 + index % 7), -size])


def test_a_set_bound_is_not_learned() -> None:
    bound = RewardBound(50.0)
    assert not refuses(bound, [50.0] * 100)
    assert refuses(bound, [51.0])
