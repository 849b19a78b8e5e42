"""Prices: who is asked first, what budgets buy on practice pairs, and what a checkpoint keeps of them."""

from __future__ import annotations

import numpy as np
import pytest

from router_core.combine import (
    Answers,
    Combination,
    Multipliers,
    Pacer,
    Practice,
    Votes,
    first_arms,
    multiplier_for,
    relative_prices,
)
from router_core.combine.cascade import follow
from router_core.errors import HyperparameterError, ShapeMismatchError
from router_core.policies.combined import further_shares, supposed_answers

N, K = 300, 3


def votes() -> Votes:
    """Bayes' rule, and one typical margin that says nothing."""
    weights = np.zeros((2, 4, K))
    weights[0, 1] = 1.0
    return Votes(weights, np.ones(K), np.zeros((1, K)))


def practice(seed: int = 0) -> Practice:
    """Arms that are right as often as their offsets say; the last one is the best, by far."""
    rng = np.random.default_rng(seed)
    offsets = np.column_stack([rng.uniform(0.6, 0.85, (N, 2)), rng.uniform(0.9, 0.97, N)])
    verdicts = (rng.random((N, K)) > offsets).astype(np.int64)
    said = Answers(verdicts, np.ones((N, K), np.bool_), rng.exponential(1.0, (N, K)), np.full(N, 2))
    return Practice(offsets, said)


def test_the_first_call_is_worth_its_price_too() -> None:
    offsets, prices = np.array([[0.7, 0.95], [0.9, 0.95]]), np.array([1.0, 5.0])
    assert first_arms(offsets, prices, 0.0).tolist() == [1, 1]
    assert first_arms(offsets, prices, 0.02).tolist() == [1, 0]  # .95 − .08 lies between .7 and .9.
    assert first_arms(offsets, np.array([3.0, 3.0]), 1.0).tolist() == [1, 1]


def test_a_budget_below_the_best_arms_price_is_kept() -> None:
    known, prices = practice(), np.array([1.0, 1.0, 8.0])
    multipliers = Multipliers.practised(votes(), known, prices)
    for budget in (1.5, 2.0, 4.0):
        played = known.play(votes(), prices, multipliers.at(budget)).spent[:, -1].mean()
        assert played == pytest.approx(budget, abs=0.15)
    assert known.play(votes(), prices, multipliers.at(1.0)).spent.max() == 1.0


def test_paths_by_price_cost_what_playing_them_costs() -> None:
    known, prices, tried = practice(), np.array([1.0, 3.0, 8.0]), np.array([1.0, 0.1, 0.02, 0.004, 1e-6])
    played = [known.play(votes(), prices, multiplier).spent[:, -1].mean() for multiplier in tried.tolist()]
    assert known.prices_of(votes(), prices, tried) == pytest.approx(played)


def test_equal_prices_give_the_same_multipliers_as_calls() -> None:
    known = practice()
    paths = follow(votes(), known.offsets, known.answers, known.offsets.argmax(axis=1))
    found = Multipliers.practised(votes(), known, np.full(K, 2.0))
    assert found.at(1.5) == pytest.approx(multiplier_for(paths, 1.5), rel=0.05)


def test_a_part_of_the_pool_has_multipliers_of_its_own() -> None:
    whole = Combination(votes(), practice=practice()).priced()
    part = Combination(votes().select([2, 0]), practice=practice().select([2, 0])).priced()
    assert whole.multipliers is not None
    assert part.multipliers is not None
    assert part.multiplier(1.5) != whole.multiplier(1.5)
    assert part.priced(np.array([4.0, 1.0])).costs.tolist() == [4.0, 1.0]
    with pytest.raises(ShapeMismatchError, match="one for each of 2 arms"):
        part.priced(np.ones(3))


def test_the_pace_is_as_slow_as_the_dearest_call() -> None:
    pacer = Combination(votes(), practice=practice()).priced(np.array([1.0, 1.0, 10.0])).pacer("cascade:2")
    assert pacer is not None
    assert pacer.rate == Pacer.rate_at(10.0) == pytest.approx(0.005)


def test_practice_pairs_survive_a_checkpoint() -> None:
    known = practice().rounded()
    gaps = Practice(known.offsets, known.answers.only(np.arange(K)[None] < np.arange(N)[:, None] % 3 + 1))
    read = Practice.of_arrays(*(array.astype(np.float64) for array in gaps.arrays()))
    assert np.array_equal(read.offsets, gaps.offsets)
    assert np.array_equal(read.answers.answered, gaps.answers.answered)
    heard = gaps.answers.answered
    assert np.array_equal(read.answers.verdicts[heard], gaps.answers.verdicts[heard])
    assert np.array_equal(read.answers.margins[heard], gaps.answers.margins[heard])


@pytest.mark.parametrize("prices", [[1.0, 0.0], [1.0, -2.0], [1.0, float("nan")]])
def test_prices_that_cannot_be_are_refused(prices: list[float]) -> None:
    with pytest.raises(HyperparameterError, match="positive"):
        relative_prices(prices)


def test_two_are_asked_at_once_only_where_every_margin_leaves_doubt() -> None:
    weights = np.zeros((2, 4, K))
    weights[0, 1], weights[0, 2] = 1.0, 3.0
    sharp = Combination(Votes(weights, np.ones(K), np.array([[0.0] * K, [1.0] * K])))
    offsets = np.array([[0.7, 0.75, 0.8]])
    said = supposed_answers(sharp.votes, 2, 2)
    assert said.margins[:, 2].tolist() == pytest.approx([0.0, np.expm1(1.0) / 2])
    # With the wide margin P is .99 and a second opinion is worth little, so one call may do.
    assert further_shares(sharp, offsets, said, [0, 1], 0.01) is None
    shares = further_shares(sharp, offsets, said, [0, 1], 0.0001)
    assert shares is not None
    assert shares.sum() == pytest.approx(1.0)
    assert shares[2] == 0.0
