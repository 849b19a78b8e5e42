"""Fitting the learned votes: to what is known to be true, from gaps, ties and several responses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router_core.combine import Answers, budget_of, verdicts_of, wanted_combined
from router_core.errors import UnknownPolicyError
from router_core.offline.votes import Judged, fit_votes, recorded_answers
from router_core.records import TIE, Instance, LabelledPair


def world(N: int, seed: int, n: int = 2, copies: bool = False, margins: bool = False) -> Judged:
    """Arms that are right as often as their offsets say; with `copies` arms 1 and 2 are the same arm twice."""
    rng = np.random.default_rng(seed)
    offsets = rng.uniform(0.55, 0.95, (N, 4))
    labels = rng.integers(0, n, N)
    right = rng.random((N, 4)) < offsets
    wrong = (labels[:, None] + rng.integers(1, n, (N, 4))) % n
    verdicts = np.where(right, labels[:, None], wrong)
    if copies:
        offsets[:, 2], verdicts[:, 2] = offsets[:, 1], verdicts[:, 1]
    wide = np.where(verdicts == labels[:, None], 2.0, 0.5) * rng.exponential(1.0, (N, 4))
    answered = np.ones((N, 4), dtype=bool)
    said = Answers(verdicts, answered, wide if margins else np.full((N, 4), np.nan), np.full(N, n))
    return Judged(offsets, said, labels, [str(i // 2) for i in range(N)])


def accuracy(fitted_on: Judged, judged: Judged) -> tuple[float, float]:
    """Accuracy of the learned votes with all arms, and the mean p_right that they claim."""
    fitted = fit_votes(fitted_on, np.random.default_rng(0))
    assert fitted is not None
    verdicts = verdicts_of(fitted[0].probabilities(judged.offsets, judged.answers))
    return float((verdicts.preferred == judged.labels).mean()), float(verdicts.right.mean())


@pytest.mark.parametrize("n", [2, 3])
def test_independent_arms_are_as_good_as_the_truth_allows_and_p_right_says_so(n: int) -> None:
    judged = world(2000, 1, n)
    reached, claimed = accuracy(world(600, 0, n), judged)
    o, others = judged.offsets, n - 1
    odds = np.log(o) - np.log1p(-o) + np.log(others)
    best = np.stack([np.where(judged.answers.verdicts == i, odds, 0.0).sum(axis=1) for i in range(n)], axis=1)
    assert reached >= float((best.argmax(axis=1) == judged.labels).mean()) - 0.01
    assert claimed == pytest.approx(reached, abs=0.025)


def test_an_arm_heard_twice_counts_about_once() -> None:
    fitted = fit_votes(world(1500, 0, copies=True), np.random.default_rng(0))
    assert fitted is not None
    offsets, both = np.array([[0.9, 0.75, 0.75, 0.9]]), np.array([[False, True, True, False]])
    said = Answers(np.array([[0, 1, 1, 0]]), both, np.full((1, 4), np.nan), np.array([2]))
    claimed = float(fitted[0].probabilities(offsets, said)[0, 1])
    # Independent arms would make .90 of it. Less than .75, because the other two arms are said to be better here.
    assert 0.62 < claimed < 0.85


def test_margins_help_where_they_tell_right_from_wrong() -> None:
    with_margins, judged = world(800, 0, margins=True), world(2000, 1, margins=True)
    blind = np.full(judged.answers.margins.shape, np.nan)
    without = replace(judged, answers=replace(judged.answers, margins=blind))
    blind_fit = replace(with_margins, answers=replace(with_margins.answers, margins=np.full((800, 4), np.nan)))
    assert accuracy(with_margins, judged)[0] > accuracy(blind_fit, without)[0] + 0.01


def test_gaps_ties_and_lone_responses_are_no_obstacle() -> None:
    data = world(400, 0)
    rng = np.random.default_rng(3)
    verdicts = np.where(rng.random((400, 4)) < 0.1, TIE, data.answers.verdicts)
    responses = np.where(np.arange(400) % 50 == 0, 1, 2)
    answered = rng.random((400, 4)) < 0.7
    gappy = replace(data, answers=Answers(verdicts, answered, data.answers.margins, responses))
    reached, _ = accuracy(gappy, world(1000, 1))
    assert reached > float((world(1000, 1).answers.verdicts[:, 0] == world(1000, 1).labels).mean())


def test_too_few_pairs_or_groups_teach_nothing() -> None:
    assert fit_votes(world(30, 0), np.random.default_rng(0)) is None
    assert fit_votes(replace(world(60, 0), groups=["one"] * 60), np.random.default_rng(0)) is None


def test_equal_pairs_and_seeds_give_equal_votes() -> None:
    first, second = (fit_votes(world(100, 0), np.random.default_rng(7)) for _ in range(2))
    assert first is not None
    assert second is not None
    np.testing.assert_array_equal(first[0].weights, second[0].weights)
    np.testing.assert_array_equal(first[1].values, second[1].values)


def test_recorded_answers_are_those_of_the_pool() -> None:
    pair = LabelledPair("p", Instance("x", ("r", "s", "t")), 1, {"A": (0.0, 3.0, 1.0)}, {"A": 1, "B": TIE, "C": 0})
    said = recorded_answers([pair], ("B", "A", "D"))
    assert said.verdicts.tolist() == [[TIE, 1, TIE]]
    assert said.answered.tolist() == [[True, True, False]]
    assert said.margins[0, 1] == 2.0
    assert np.isnan(said.margins[0, [0, 2]]).all()
    assert said.responses.tolist() == [3]


def test_a_budget_is_at_least_one_call() -> None:
    assert wanted_combined(["uwo", "cascade:2", "stacked"]) == ("cascade:2", "stacked")
    for name in ("cascade:", "cascade:0.5", "cascade:inf", "cascade:many"):
        with pytest.raises(UnknownPolicyError, match=r"cascade:1\.5"):
            budget_of(name)
