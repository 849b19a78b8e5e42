"""What audits say: intervals by hand and by simulation, alarms with planted faults and without."""

from __future__ import annotations

import numpy as np
import pytest

from router_core.audits.summary import fall_evidence, following, half_width, kinds_of, liked, mean_interval


def test_a_mean_is_weighted_by_inverse_probabilities() -> None:
    found = mean_interval(np.array([1.0, 0.0, np.nan]), np.array([1.0, 3.0, 100.0]))
    assert found is not None
    assert (found.value, found.count) == (0.25, 2)
    assert (found.low, found.high) == (0.0, 1.0)
    assert mean_interval(np.array([np.nan]), np.array([1.0])) is None


def test_a_confidence_sequence_holds_whenever_one_looks() -> None:
    rng, missed, looks = np.random.default_rng(0), 0, [10, 20, 40, 80, 160, 320, 640]
    for _ in range(300):
        values = (rng.random(640) < 0.8).astype(float)
        intervals = [mean_interval(values[:n], np.ones(n)) for n in looks]
        missed += any(one is not None and not one.low <= 0.8 <= one.high for one in intervals)
    assert missed <= 0.05 * 300 + 10
    assert half_width(0.16, 640) < 0.07


def test_an_unequal_sample_estimates_the_mean_of_all() -> None:
    rng = np.random.default_rng(1)
    probability = np.linspace(1.0, 0.02, 20_000)
    right = (rng.random(20_000) < np.linspace(0.5, 1.0, 20_000)).astype(float)
    chosen = rng.random(20_000) < probability
    found = mean_interval(right[chosen], 1.0 / probability[chosen])
    assert found is not None
    assert right[chosen].mean() < 0.7
    assert found.value == pytest.approx(0.75, abs=0.02)


def test_a_planted_fall_is_found_and_none_is_not() -> None:
    rng, false, delays = np.random.default_rng(2), 0, []
    for _ in range(100):
        steady = (rng.random(500) < 0.85).astype(float)
        false += any(fall_evidence(steady[:n]) >= 1.0 for n in range(50, 501, 50))
        fallen = np.append(steady[:300], (rng.random(300) < 0.6).astype(float))
        delays.append(next((n for n in range(0, 301, 10) if fall_evidence(fallen[: 300 + n]) >= 1.0), 400))
    assert false <= 5
    assert np.median(delays) <= 90
    assert max(delays) < 400


def planted(bias: float, decisions: int = 400, seed: int = 3) -> tuple[list[np.ndarray], ...]:
    """Rewards of an RM, of the referee, and lengths, where the RM likes length beyond quality by so much."""
    rng = np.random.default_rng(seed)
    quality, length = rng.normal(size=(decisions, 2)), rng.normal(size=(decisions, 2))
    referee = quality + 0.3 * length
    rm = referee + 0.5 * rng.normal(size=(decisions, 2)) + bias * length
    return [*rm], [*referee], [*length]


def test_a_planted_length_bias_shows_and_the_referees_own_does_not() -> None:
    partial, more = following(*planted(0.0))
    assert partial is not None
    assert more is not None
    assert partial.low < 0 < partial.high
    assert more.low < 0 < more.high
    partial, more = following(*planted(0.8))
    assert partial is not None
    assert more is not None
    assert partial.low > 0.2
    assert more.low > 0


def test_a_sign_that_never_differs_says_nothing() -> None:
    rewards, referee, length = planted(0.5)
    assert following(rewards, referee, [0 * one for one in length]) == (None, None)
    assert following(rewards[:2], referee[:2], length[:2]) == (None, None)


def test_what_is_liked_best_before_and_after() -> None:
    rewards = [np.array([0.0, float(i % 3)]) for i in range(30)] + [np.array([0.0, 3.0 + i % 3]) for i in range(30)]
    earned = np.array([1.0] * 30 + [0.0] * 30)
    found = liked(rewards, earned)
    assert found is not None
    assert found[0] > 1
    assert found[1:] == (1.0, 0.0)
    assert liked(rewards[:30], earned[:30]) is None


def test_kinds_are_named_by_their_typical_words() -> None:
    contexts = np.concatenate([np.eye(2)[np.zeros(40, int)], np.eye(2)[np.ones(40, int)]])
    kind, names = kinds_of(contexts, [["please", "add"]] * 40 + [["please", "rhyme"]] * 40)
    assert sorted(set(kind.tolist())) == [0, 1]
    assert {names[kind[0]].split()[0], names[kind[-1]].split()[0]} == {"add", "rhyme"}
    assert kinds_of(contexts[:10], [["a"]] * 10)[1] == ["all"]
