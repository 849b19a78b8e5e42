"""What a preference says of an RM's rewards, and how right a verdict is: by hand, and for an RM that guesses."""

from __future__ import annotations

import numpy as np
import pytest

from router_core.records import TIE, Instance, LabelledPair, correctness, credit, verdict_of


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_guess_and_a_constant_earn_half_for_any_n(n: int) -> None:
    assert credit([1.0] * n, n - 1) == 0.5
    assert np.mean([credit(list(range(n)), preferred) for preferred in range(n)]) == 0.5


def test_credit_is_the_share_of_implied_pairs_that_are_right() -> None:
    assert credit([0.3, 0.1, 0.3 + 1e-9, 0.9], 0) == pytest.approx((0.5 + 1.0) / 3)
    assert credit([0.3, 0.1], 0) == 1.0
    assert credit([0.3], 0) is None


@pytest.mark.parametrize(("verdict", "expected"), [(2, 1.0), (0, 0.0), (TIE, 0.5)])
def test_a_winner_among_w_is_right_with_chance_one_in_w(verdict: int, expected: float) -> None:
    assert correctness(verdict, [1.0, 2.0, 2.0, 0.0], 4, 2) == expected


def test_a_tie_without_scores_is_one_of_all() -> None:
    assert correctness(TIE, None, 4, 2) == 0.25


def test_verdicts_without_scores_leave_the_rest_open() -> None:
    three = LabelledPair("p", Instance("q", ("a", "b", "c")), 1, {}, {"right": 1, "wrong": 0, "tied": TIE})
    assert [three.credit(name) for name in ("right", "wrong", "tied")] == [1.0, 0.25, 0.5]


def test_credit_of_two_responses_is_correctness() -> None:
    for verdict in (0, 1, TIE):
        pair = LabelledPair("p", Instance("q", ("a", "b")), 1, {"R": (1.0, 1.0)}, {"R": verdict})
        assert pair.credit("R") == pair.correctness("R")


@pytest.mark.parametrize(
    ("rewards", "verdict"),
    [([0.5, 0.5 + 1e-9], TIE), ([0.5, 0.6, 0.6], TIE), ([0.5, 0.6], 1), ([float("nan"), 0.6], TIE), ([0.6], TIE)],
)
def test_what_rounding_could_explain_is_a_tie(rewards: list[float], verdict: int) -> None:
    assert verdict_of(rewards) == verdict
