"""Learned votes on numbers small enough for paper, and properties that hold for any weights."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.combine import (
    Answers,
    Multipliers,
    Pacer,
    Votes,
    call_values,
    follow,
    margins_of,
    multiplier_for,
    next_call,
    verdicts_of,
)
from router_core.combine.pacer import HIGHEST, LOWEST
from router_core.combine.value import predicted
from router_core.errors import HyperparameterError, NotFiniteError, ShapeMismatchError
from router_core.records import TIE


def naive(K: int) -> Votes:
    """β = 1, the rest 0: independent arms as good as their offsets say."""
    weights = np.zeros((2, 4, K))
    weights[0, 1] = 1.0
    return Votes(weights, np.ones(K), np.zeros((1, K)))


def learned(K: int, seed: int) -> Votes:
    rng = np.random.default_rng(seed)
    return Votes(
        rng.normal(0.3, 0.5, (2, 4, K)), rng.uniform(0.5, 2.0, K), np.sort(rng.uniform(0.0, 2.0, (3, K)), axis=0)
    )


def answers(verdicts: list[list[int]], n: int = 2, margins: list[list[float]] | None = None) -> Answers:
    said = np.array(verdicts, dtype=np.int64)
    given_margins = np.full(said.shape, np.nan) if margins is None else np.array(margins)
    return Answers(said, np.ones(said.shape, dtype=bool), given_margins, np.full(len(said), n, dtype=np.int64))


def random_answers(B: int, K: int, seed: int, n: int = 2) -> tuple[np.ndarray, Answers]:
    rng = np.random.default_rng(seed)
    offsets = rng.uniform(0.3, 0.98, (B, K))
    said = Answers(
        rng.integers(TIE, n, (B, K)),
        rng.random((B, K)) < 0.7,
        rng.exponential(1.0, (B, K)),
        np.full(B, n, dtype=np.int64),
    )
    return offsets, said


def test_independent_arms_add_their_log_odds() -> None:
    p = naive(2).probabilities(np.array([[0.8, 0.75]]), answers([[0, 0]]))
    assert p[0, 0] == pytest.approx(12 / 13)  # odds 4 · 3
    p = naive(2).probabilities(np.array([[0.8, 0.75]]), answers([[0, 1]]))
    assert p[0, 0] == pytest.approx(4 / 7)  # odds 4 / 3


def test_an_arm_that_guesses_among_three_says_nothing() -> None:
    p = naive(1).probabilities(np.array([[1 / 2]]), answers([[2]], n=3))
    assert p[0] == pytest.approx([1 / 3, 1 / 3, 1 / 3], abs=1e-3)
    p = naive(1).probabilities(np.array([[0.8]]), answers([[2]], n=3))
    assert p[0] == pytest.approx([1 / 6, 1 / 6, 4 / 6])  # odds 4 against each other response


def test_ties_and_abstentions_have_no_vote() -> None:
    votes, offsets = learned(3, 0), np.array([[0.9, 0.7, 0.8]])
    alone = answers([[1, 0, 0]]).only(np.array([[True, False, False]]))
    assert np.array_equal(votes.probabilities(offsets, answers([[1, TIE, TIE]])), votes.probabilities(offsets, alone))
    nobody = votes.probabilities(offsets, answers([[TIE, TIE, TIE]]))
    assert nobody.tolist() == [[0.5, 0.5]]
    assert verdicts_of(nobody).preferred.tolist() == [TIE]


def test_one_vote_alone_is_never_turned_round() -> None:
    p = naive(1).probabilities(np.array([[0.2]]), answers([[1]]))
    assert verdicts_of(p).preferred.tolist() == [1]
    assert 0.5 < p[0, 1] < 0.51


def test_what_all_arms_share_does_not_change_whom_to_believe() -> None:
    votes = replace(naive(3), level=np.array([1.0]))
    said = answers([[0, 1, 1]])
    logits = np.array([[2.0, 0.5, 1.0]])
    one, harder = (1.0 / (1.0 + np.exp(-(logits - shift))) for shift in (0.0, 0.7))
    assert votes.probabilities(one, said) == pytest.approx(votes.probabilities(harder, said))
    relative = logits[0] - logits.mean() + 1.0
    expected = 1.0 / (1.0 + np.exp(-(relative[0] - relative[1] - relative[2])))
    assert votes.probabilities(one, said)[0, 0] == pytest.approx(expected)
    assert votes.alone(0, one[0], np.nan, 2) == pytest.approx(1.0 / (1.0 + np.exp(-relative[0])))


def test_a_wider_margin_counts_more_and_an_unknown_one_as_the_mean() -> None:
    weights = np.zeros((2, 4, 1))
    weights[0, 2] = 1.0
    votes = Votes(weights, np.array([2.0]), np.array([[0.5], [1.5]]))
    offsets = np.array([[0.5]])
    log_odds = [
        math.log(p[0, 0] / p[0, 1])
        for margin in (0.0, 1.0, 4.0, math.nan)
        if (p := votes.probabilities(offsets, answers([[0]], margins=[[margin]]))) is not None
    ]
    assert log_odds == pytest.approx([1e-3, math.log(2.0), math.log(5.0), 1.0])


def test_what_grows_with_the_voters_takes_back_what_is_said_twice() -> None:
    weights = np.zeros((2, 4, 2))
    weights[0, 1], weights[1, 1] = 1.0, -0.5
    votes = Votes(weights, np.ones(2), np.zeros((1, 2)))
    p = votes.probabilities(np.array([[0.8, 0.8]]), answers([[0, 0]]))
    assert math.log(p[0, 0] / p[0, 1]) == pytest.approx(2 * math.log(4) * (1 - 0.5 * math.log(2)))


@given(st.integers(0, 10_000), st.integers(2, 4))
def test_a_batch_equals_one_by_one_and_the_names_of_responses_do_not_matter(seed: int, n: int) -> None:
    votes = learned(5, seed)
    offsets, said = random_answers(6, 5, seed, n)
    p, values = votes.probabilities(offsets, said), call_values(votes, offsets, said)
    assert p.sum(axis=1) == pytest.approx(np.ones(6))
    for i in range(6):
        row = np.array([i])
        assert votes.probabilities(offsets[row], said.rows(row))[0] == pytest.approx(p[i])
        assert call_values(votes, offsets[row], said.rows(row))[0] == pytest.approx(values[i])
    turned = Answers(
        np.where(said.verdicts == TIE, TIE, n - 1 - said.verdicts), said.answered, said.margins, said.responses
    )
    assert votes.probabilities(offsets, turned)[:, ::-1] == pytest.approx(p)
    assert call_values(votes, offsets, turned) == pytest.approx(values)


@given(st.integers(0, 10_000))
def test_values_are_gains_in_probability(seed: int) -> None:
    votes = learned(4, seed)
    offsets, said = random_answers(8, 4, seed, 3)
    values = call_values(votes, offsets, said)
    assert (values >= 0.0).all()
    assert (values < 1.0).all()
    now = votes.probabilities(offsets, said)
    assert predicted(now, offsets, said.responses).sum(axis=2) == pytest.approx(np.ones((8, 4)))


def test_instances_of_different_sizes_do_not_mix() -> None:
    votes = learned(2, 1)
    offsets = np.array([[0.8, 0.7], [0.8, 0.7], [0.8, 0.7]])
    verdicts = np.array([[0, 1], [0, 1], [TIE, TIE]])
    mixed = Answers(verdicts, np.ones((3, 2), dtype=bool), np.full((3, 2), np.nan), np.array([2, 3, 1]))
    p = votes.probabilities(offsets, mixed)
    assert p[0, :2] == pytest.approx(votes.probabilities(offsets[:1], answers([[0, 1]]))[0])
    assert p[0, 2] == 0.0
    assert p[2].tolist() == [1.0, 0.0, 0.0]
    assert call_values(votes, offsets, mixed)[2] == pytest.approx([0.0, 0.0])


def test_a_second_opinion_is_worth_most_where_the_first_is_unsure() -> None:
    asked = np.array([[True, False], [True, False]])
    said = answers([[0, 0], [0, 0]]).only(asked)
    unsure, sure = call_values(naive(2), np.array([[0.6, 0.8], [0.95, 0.8]]), said)[:, 1]
    assert unsure > 10 * sure > 0.0
    # By hand: P = .6, q(agree) = .56; the verdict turns to P = 8/11 with probability .44, else P = 6/7.
    gain = 0.56 * 6 / 7 + 0.44 * 8 / 11 - 0.6
    spread = 2 * 0.56 * 0.44 * (6 / 7 + 8 / 11 - 1) ** 2
    assert unsure == pytest.approx(gain + 0.125 * spread)


def test_cascades_begin_with_the_routed_arm_and_end_where_the_multiplier_says() -> None:
    votes = learned(4, 3)
    rng = np.random.default_rng(0)
    offsets = rng.uniform(0.6, 0.95, (200, 4))
    said = Answers(
        (rng.random((200, 4)) > offsets).astype(np.int64),
        np.ones((200, 4), dtype=bool),
        rng.exponential(1.0, (200, 4)),
        np.full(200, 2, dtype=np.int64),
    )
    first = offsets.argmax(axis=1)
    paths = follow(votes, offsets, said, first)
    assert np.array_equal(paths.arms[:, 0], first)
    assert np.array_equal(np.sort(paths.arms, axis=1), np.tile(np.arange(4), (200, 1)))
    assert np.array_equal(paths.preferred[:, 0], said.verdicts[np.arange(200), first])
    everything = verdicts_of(votes.probabilities(offsets, said))
    assert np.array_equal(paths.preferred[:, -1], everything.preferred)
    assert (paths.ends(HIGHEST) == 0).all()
    prices = [paths.price(mu) for mu in (0.0, 1e-3, 1e-2, 0.1, 1.0)]
    assert prices == sorted(prices, reverse=True)
    for budget in (1.0, 1.5, 2.0, 3.0):
        assert paths.price(multiplier_for(paths, budget)) <= budget
        assert paths.price(Multipliers.of(paths).at(budget)) <= budget + 0.02
    assert paths.price(multiplier_for(paths, 2.0)) > 1.9
    short = follow(votes, offsets, said, first, multiplier=0.01)
    ends = paths.ends(0.01)
    assert np.array_equal((short.arms >= 0).sum(axis=1), ends + 1)
    assert np.array_equal(short.preferred[:, -1], paths.preferred[np.arange(200), ends])
    assert np.array_equal(short.spent[:, -1], paths.spent[np.arange(200), ends])
    capped = follow(votes, offsets, said, first, calls=2)
    assert np.array_equal(capped.arms, paths.arms[:, :2])
    assert capped.price(0.0) == 2.0


def test_dear_arms_are_asked_less_and_absent_ones_never() -> None:
    votes, offsets = naive(3), np.array([[0.9, 0.8, 0.85]])
    said = answers([[0, 1, 1]])
    first = np.array([0])
    assert follow(votes, offsets, said, first).arms[0].tolist() == [0, 2, 1]
    dear = follow(votes, offsets, said, first, prices=np.array([1.0, 1.0, 50.0]))
    assert dear.arms[0].tolist() == [0, 1, 2]
    assert dear.spent[0].tolist() == [1.0, 2.0, 52.0]
    absent = follow(votes, offsets, said.only(np.array([[True, True, False]])), first)
    assert absent.arms[0].tolist() == [0, 1, -1]
    assert absent.price(0.0) == 2.0


def test_the_pacer_keeps_to_its_budget_whatever_comes() -> None:
    rng = np.random.default_rng(0)
    pacer, spent, T = Pacer(budget=1.5, multiplier=LOWEST), 0.0, 4000
    for t in range(T):
        gain = float(rng.exponential(0.02 if t < T // 2 else 0.2))  # The stream turns hard half way.
        price = 2.0 if gain > pacer.multiplier else 1.0
        spent += price
        pacer = pacer.spent(price)
    assert spent / T == pytest.approx(1.5, abs=math.log(HIGHEST / LOWEST) / pacer.rate / T)


def test_margins_are_best_less_second_best() -> None:
    scores = np.array([[1.0, 4.0, 2.5], [3.0, 3.0, np.nan], [np.nan, np.nan, np.nan]])
    assert margins_of(scores)[:2].tolist() == [1.5, 0.0]
    assert math.isnan(margins_of(scores)[2])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ShapeMismatchError, match="train again"):
        Votes(np.zeros((2, 3, 2)), np.ones(2), np.zeros((1, 2)))
    with pytest.raises(NotFiniteError, match="must be positive"):
        Votes(np.zeros((2, 4, 2)), np.array([1.0, 0.0]), np.zeros((1, 2)))
    with pytest.raises(ShapeMismatchError, match="answers"):
        Answers(np.zeros((2, 2), dtype=np.int64), np.ones((2, 1), dtype=bool), np.zeros((2, 2)), np.array([2, 2]))
    for budget, multiplier, rate in ((0.5, 0.1, 0.05), (2.0, 0.0, 0.05), (2.0, 0.1, 0.0)):
        with pytest.raises(HyperparameterError):
            Pacer(budget, multiplier, rate)


@given(st.integers(0, 10_000), st.sampled_from([0.0, 1e-3, 1e-2, 0.1]))
def test_a_call_is_drawn_where_following_the_largest_value_would_go_on(seed: int, multiplier: float) -> None:
    votes, prices = learned(4, seed), np.array([1.0, 1.0, 2.0, 5.0])
    offsets, said = random_answers(8, 4, seed)
    free = ~said.answered
    values = call_values(votes, offsets, said)
    going, probabilities = next_call(values, prices, multiplier, free)
    surplus = np.where(free, values / prices, -np.inf)
    assert np.array_equal(going, surplus.max(axis=1) > multiplier)
    assert probabilities.sum(axis=1) == pytest.approx(going.astype(float))
    assert (probabilities[surplus <= multiplier] == 0.0).all()
    best = surplus.argmax(axis=1)[going]
    assert (probabilities[going].argmax(axis=1) == best).all()


def test_doubts_of_one_arm_do_not_depend_on_who_else_is_in_the_pool() -> None:
    votes, (offsets, said) = learned(5, 2), random_answers(6, 5, 2)
    kept = [3, 1]
    part = Answers(said.verdicts[:, kept], said.answered[:, kept], said.margins[:, kept], said.responses)
    only = said.only(np.isin(np.arange(5), kept)[None].repeat(6, axis=0))
    assert votes.select(kept).probabilities(offsets[:, kept], part) == pytest.approx(votes.probabilities(offsets, only))


def test_a_barred_arm_says_nothing_of_how_hard_a_text_is() -> None:
    votes = replace(naive(3), level=np.array([0.8]))
    said = Answers(np.zeros((1, 3), np.int64), np.array([[True, True, False]]), np.full((1, 3), np.nan), np.array([2]))
    barred = np.array([[0.8, 0.7, -np.inf]])
    logits = np.log(barred[0, :2] / (1 - barred[0, :2]))
    odds = float((logits - logits.mean() + 0.8).sum())
    assert votes.probabilities(barred, said)[0, 0] == pytest.approx(1 / (1 + math.exp(-odds)))
    assert np.isfinite(votes.probabilities(np.full((1, 3), -np.inf), said)).all()
