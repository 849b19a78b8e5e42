"""Probabilities of target policies: deterministic, uniform, of a posterior, among the arms that are left."""

from __future__ import annotations

import numpy as np
import pytest

from router_core.errors import HyperparameterError, UnknownPolicyError
from router_core.ope import fixed_policy, softmax_policy
from router_core.policies import draw, make_policy
from router_core.posterior import fold, start
from router_core.prior import Hyperparameters, calibrated_prior
from router_core.records import Event, Feedback, Signal

POOL = ("a", "b", "c")
X = np.eye(3, dtype=np.float32)
OFFSETS = np.array([[0.9, 0.5, 0.1], [0.2, 0.8, 0.3], [0.4, 0.4, 0.7]])
ALL = np.ones((3, 3), np.bool_)
POSTERIOR = start(calibrated_prior(3, 3, lambda x: (x @ OFFSETS).astype(np.float64), Hyperparameters(1.0, 0.2, 0.3)))


def test_singles_random_and_offline() -> None:
    assert fixed_policy(make_policy("single:b", POOL), X, ALL, POSTERIOR).tolist() == [[0, 1, 0]] * 3
    assert fixed_policy(make_policy("random", POOL), X, ALL, POSTERIOR) == pytest.approx(np.full((3, 3), 1 / 3))
    assert fixed_policy(make_policy("offline", POOL), X, ALL, POSTERIOR).tolist() == np.eye(3).tolist()


def test_without_its_best_arm_offline_takes_the_next_and_a_single_has_none() -> None:
    left = np.array([[False, True, True]] * 3)
    assert fixed_policy(make_policy("offline", POOL), X, left, POSTERIOR).argmax(axis=1).tolist() == [1, 1, 2]
    assert fixed_policy(make_policy("single:a", POOL), X, left, POSTERIOR).tolist() == [[0, 0, 0]] * 3


def test_a_posterior_gives_the_probabilities_of_its_draws() -> None:
    event = Event(0, X[0].tobytes(), 0.9, 0.0, Feedback(Signal.PREFERENCE, 0.0))
    learned = fold(POSTERIOR, [event] * 3)
    policy = make_policy("bayesian", POOL)
    pi = fixed_policy(policy, X[:1], ALL[:1], learned)
    choices = draw(policy.beliefs(np.repeat(X[:1], 20_000, axis=0), np.repeat(OFFSETS[:1], 20_000, axis=0), learned),
                   np.random.default_rng(0))  # fmt: skip
    asked = np.bincount(choices.ranking[:, 0], minlength=3) / 20_000
    assert pi[0] == pytest.approx(asked, abs=0.015)
    assert pi[0, 0] < fixed_policy(policy, X[:1], ALL[:1], POSTERIOR)[0, 0]


@pytest.mark.parametrize("name", ["majority", "uwo", "laser"])
def test_what_is_no_single_answer_per_instance_is_refused(name: str) -> None:
    with pytest.raises(UnknownPolicyError, match="reward-router replay"):
        fixed_policy(make_policy(name, POOL), X, ALL, POSTERIOR)


def test_softmax_by_hand() -> None:
    means = np.array([[0.0, np.log(2.0), -np.inf], [1.0, 1.0, 1.0]])
    pi = softmax_policy(means, 1.0, np.array([[True] * 3, [True, True, False]]))
    assert pi == pytest.approx(np.array([[1 / 3, 2 / 3, 0], [0.5, 0.5, 0]]))
    with pytest.raises(HyperparameterError, match="temperature is 0"):
        softmax_policy(means, 0.0, ALL[:2])
