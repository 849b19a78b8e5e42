"""`sum`, `min`, `gate`, `within`: what becomes of several rewards, of abstaining and of failing scorers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.attempts import TOO_LONG, Attempt, Outcome
from router_core.errors import UnknownPolicyError
from router_core.policies import Given, make_policy
from router_core.records import TIE, verdict_of

POOL = ("rule", "rm", "judge")
NAN = math.nan


def said(arm: int, *rewards: float) -> Attempt:
    return Attempt(arm, 0, Outcome.ANSWERED, rewards=[*rewards], verdict=verdict_of(rewards))


def made(name: str, *attempts: Attempt) -> Given:
    return make_policy(name, POOL).conclude(attempts, lambda arms, rewards: None)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "rewards", "verdict"),
    [
        ("sum", [11.0, 22.0], 1),
        ("sum:rule=10,judge", [14.0, 8.0], 0),
        ("min", [1.0, 0.0], 0),
        ("min:rm,judge", [4.0, 8.0], 1),
        ("gate:rule,rm", [1 / (1 + math.exp(-6.0)), 0.0], 0),
        ("within:rule,rm", [1.0, 0.0], 0),
    ],
)
def test_each_combines_as_it_says(name: str, rewards: list[float], verdict: int) -> None:
    told = made(name, said(0, 1.0, 0.0), said(1, 6.0, 14.0), said(2, 4.0, 8.0))
    assert told.rewards == pytest.approx(rewards)
    assert (told.verdict, told.arm) == (verdict, None)


def test_only_named_scorers_are_asked() -> None:
    policy = make_policy("sum:judge=1,rule=2", POOL)
    beliefs = policy.beliefs(np.zeros((1, 2), np.float32), np.zeros((1, 3)), None)  # type: ignore[arg-type]
    assert np.isfinite(beliefs.means).tolist() == [[True, False, True]]


@pytest.mark.parametrize(
    ("name", "rewards"),
    [
        ("sum:rule,rm", [2.0, 4.0]),
        ("min:rule,rm", [2.0, 4.0]),
        ("gate:rule,rm", [1 / (1 + math.exp(-2.0)), 1 / (1 + math.exp(-4.0))]),
        ("within:rule,rm", [0.45, 0.55]),
    ],
)
def test_a_rule_that_abstains_has_no_part(name: str, rewards: list[float]) -> None:
    told = made(name, Attempt(0, 0, Outcome.ABSTAINED, "abstained"), said(1, 2.0, 4.0))
    assert told.rewards == pytest.approx(rewards)


@pytest.mark.parametrize("name", ["sum:rule,rm", "min:rule,rm", "gate:rule,rm", "within:rule,rm"])
@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.AWAY])
def test_a_part_that_is_missing_leaves_no_reward(name: str, outcome: Outcome) -> None:
    told = made(name, Attempt(0, 0, outcome, "worker_timeout"), said(1, 2.0, 4.0))
    assert all(map(math.isnan, told.rewards))
    assert told.verdict == TIE


@pytest.mark.parametrize("name", ["sum:rule,rm", "min:rule,rm", "gate:rule,rm", "within:rule,rm"])
def test_a_part_that_cannot_read_it_leaves_no_reward(name: str) -> None:
    told = made(name, Attempt(0, 0, Outcome.ABSTAINED, TOO_LONG), said(1, 2.0, 4.0))
    assert all(map(math.isnan, told.rewards))


def test_a_gate_s_zero_is_final_however_long() -> None:
    told = made("gate:rule,rm", said(0, 0.0, 1.0), Attempt(1, 1, Outcome.ABSTAINED, TOO_LONG))
    assert told.rewards[0] == 0.0
    assert math.isnan(told.rewards[1])


@pytest.mark.parametrize("name", ["sum:rule,rm", "min:rule,rm", "gate:rule,rm", "within:rule,rm"])
def test_a_response_without_one_part_alone_has_no_reward(name: str) -> None:
    told = made(name, said(0, 1.0, NAN, 1.0), said(1, 2.0, 4.0, 3.0))
    assert [math.isnan(reward) for reward in told.rewards] == [False, True, False]
    assert told.verdict == (TIE if name.startswith("min") else 2)


@pytest.mark.parametrize(
    ("attempts", "wanted"),
    [
        ([], [0]),
        ([said(0, 1.0, 0.0)], [1]),
        ([said(0, 0.0, -1.0)], []),
        ([said(0, 0.0, NAN)], []),
        ([said(0, 1.0, NAN)], [1]),
        ([Attempt(0, 0, Outcome.ABSTAINED, "abstained")], [1]),
        ([Attempt(0, 0, Outcome.ABSTAINED, TOO_LONG)], []),
        ([Attempt(0, 0, Outcome.FAILED, "worker_timeout")], [1]),
        ([Attempt(1, 0, Outcome.ABSENT), said(0, 1.0, 0.0)], [1]),
        ([said(0, 1.0, 0.0), said(1, 2.0, 4.0)], []),
    ],
)
def test_a_gate_asks_the_rm_about_what_passes(attempts: list[Attempt], wanted: list[int]) -> None:
    policy = make_policy("gate:rule,rm", POOL)
    assert [*policy.next_arms([1, 0], attempts)] == wanted  # type: ignore[attr-defined]
    # A scorer that does not apply is not in the order.
    assert [*policy.next_arms([1], [])] == [1]  # type: ignore[attr-defined]


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.floats(-50, 50)), min_size=1, max_size=8))
def test_within_never_ranks_wrong_above_right(pairs: list[tuple[float, float]]) -> None:
    rule, model = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    rewards = made("within:rule,rm", said(0, *rule), said(1, *model)).rewards
    for v, r, one in zip(rule, model, rewards, strict=True):
        assert abs(one - v) <= 0.05 + 1e-9
        for w, s, other in zip(rule, model, rewards, strict=True):
            if v == w and r < s:
                assert one <= other
            if v < w:
                assert one < other


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sum:nobody=1", "no model 'nobody' in the pool"),
        ("sum:rm=much", "'much' is no weight"),
        ("min:rm,rm", "twice"),
        ("gate:rule", "use gate:RULE,RM"),
        ("within", "use within:RULE,RM"),
    ],
)
def test_a_name_that_cannot_be_used_says_what_can(name: str, words: str) -> None:
    with pytest.raises(UnknownPolicyError, match=words):
        make_policy(name, POOL)
