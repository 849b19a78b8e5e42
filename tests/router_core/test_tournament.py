"""Pairs and Bradley-Terry strengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from router_core.tournament import bradley_terry, choose_pairs, connects


@given(st.integers(2, 20), st.integers(1, 60), st.integers(0, 1000))
def test_chosen_pairs_are_bounded_and_connected(n: int, bound: int, seed: int) -> None:
    pairs = choose_pairs(n, bound, np.random.default_rng(seed))
    assert len(pairs) == min(max(bound, n - 1), n * (n - 1) // 2)
    assert len(set(pairs)) == len(pairs)
    assert all(0 <= i < j < n for i, j in pairs)
    assert connects(n, pairs)


def test_pairs_spread_evenly() -> None:
    pairs = choose_pairs(10, 20, np.random.default_rng(3))
    met = [sum(response in pair for pair in pairs) for response in range(10)]
    assert max(met) - min(met) <= 1


def test_the_seed_alone_chooses() -> None:
    assert choose_pairs(12, 15, np.random.default_rng(1)) == choose_pairs(12, 15, np.random.default_rng(1))
    assert choose_pairs(12, 15, np.random.default_rng(1)) != choose_pairs(12, 15, np.random.default_rng(2))


def test_strengths_recover_probabilities() -> None:
    truth = np.array([1.0, 0.2, -0.3, -0.9])
    wins = 1 / (1 + np.exp(truth[None, :] - truth[:, None]))
    np.testing.assert_allclose(bradley_terry(wins, prior_games=1e-9), truth, atol=1e-4)


def test_strengths_are_the_maximum_of_the_posterior() -> None:
    rng = np.random.default_rng(0)
    wins = rng.uniform(size=(5, 5)) * (rng.uniform(size=(5, 5)) < 0.6)
    np.fill_diagonal(wins, 0.0)
    prior = 0.1

    def loss(b: np.ndarray) -> float:
        margins = b[:, None] - b[None, :]
        return float(
            (wins * np.logaddexp(0, -margins)).sum() + prior / 2 * (np.logaddexp(0, -b) + np.logaddexp(0, b)).sum()
        )

    best = minimize(loss, np.zeros(5), tol=1e-12).x
    np.testing.assert_allclose(bradley_terry(wins, prior_games=prior), best - best.mean(), atol=1e-3)


def test_a_response_that_always_wins_is_finite() -> None:
    wins = np.triu(np.ones((6, 6)), 1)
    found = bradley_terry(wins)
    assert np.isfinite(found).all()
    assert (np.diff(found) < 0).all()


def test_a_chain_orders_what_never_met() -> None:
    wins = np.zeros((4, 4))
    for i in range(3):
        wins[i, i + 1], wins[i + 1, i] = 0.8, 0.2
    assert (np.diff(bradley_terry(wins)) < 0).all()


@pytest.mark.parametrize("pairs", [[(0, 1), (2, 3)], [(1, 2), (2, 3)]])
def test_pairs_that_leave_one_out_do_not_connect(pairs: list[tuple[int, int]]) -> None:
    assert not connects(4, pairs)
