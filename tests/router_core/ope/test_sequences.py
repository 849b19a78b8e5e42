"""Cascades and learned votes from logs: values that hold, and logs that cannot tell."""

from __future__ import annotations

import numpy as np
import pytest

from loadtests.ope_coverage import Population
from loadtests.ope_sequences import Logger, World, beginning
from router_core.ope import NoSupportError, SequenceLog, evaluate_sequences
from router_core.ope.sequences import begun, whole

M, K = 60, 3


@pytest.fixture(scope="module")
def world() -> World:
    """Three arms, right with the probability that their offsets say."""
    rng = np.random.default_rng(0)
    offsets = rng.uniform(0.55, 0.95, (M, K))
    right = (rng.random((M, K)) < offsets).astype(np.float64)
    return World(Population(("a", "b", "c"), np.zeros((M, 1), np.float32), right, offsets))


def logged(world: World, logger: Logger, n: int, seed: int = 0) -> tuple[SequenceLog, np.ndarray]:
    rng = np.random.default_rng(seed)
    index = rng.integers(M, size=n)
    return beginning(world.log(logger, index, rng), n), index


def test_probabilities_of_all_sequences_sum_to_one(world: World) -> None:
    policy = world.policy(0.02, 0.1)
    there = np.ones((M, K), np.bool_)
    drawn = [policy.sample(world.answers, there, np.random.default_rng(seed)) for seed in range(400)]
    total = np.zeros(M)
    for row in range(M):
        one = np.array([row])
        seen = {tuple(arms[row].tolist()) for arms in drawn}
        for sequence in seen:
            arms = np.array([sequence])
            actions = policy.rows(one).actions(arms, world.answers.rows(one), there[one])
            total[row] += whole(actions, arms)[0]
            assert begun(actions, arms)[0] >= whole(actions, arms)[0]
    assert total.max() <= 1.0 + 1e-9
    assert total.min() > 0.9  # All but what 400 draws have not met.


@pytest.mark.parametrize(
    ("logger", "target"),
    [
        (Logger("as the target", 0.02, 0.15), (0.02, 0.05)),
        (Logger("more calls", 0.003, 0.3), (0.02, 0.15)),
        (Logger("fewer calls, shadows", 0.05, 0.15, 0.2), (0.003, 0.15)),
        (Logger("one call, shadows", np.inf, 0.15, 0.2), (0.01, 0.15)),
    ],
)
def test_estimates_have_the_truth_as_their_mean(world: World, logger: Logger, target: tuple[float, float]) -> None:
    policy = world.policy(*target)
    truth, values = world.value(policy), []
    for seed in range(60):
        log, index = logged(world, logger, 400, seed)
        values.append(evaluate_sequences(log, policy.rows(index)).estimates["ips"].value)
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - truth) < 4 * error


def test_learned_votes_of_all_come_from_shadows_alone(world: World) -> None:
    everyone = world.policy(0.0, 0.1, "stacked")
    log, index = logged(world, Logger("shadowed", 0.02, 0.15, 0.3), 2000)
    found = evaluate_sequences(log, everyone.rows(index))
    low, high = found.estimates["snips"].ci95
    assert low <= world.value(everyone) <= high
    assert found.calls == pytest.approx(K)
    log, index = logged(world, Logger("not shadowed", 0.02, 0.15), 2000)
    with pytest.raises(NoSupportError, match=r"100\.0% of what the target would have asked"):
        evaluate_sequences(log, everyone.rows(index))


def test_a_log_of_fewer_calls_says_that_it_cannot_tell(world: World) -> None:
    log, index = logged(world, Logger("one call", np.inf, 0.15), 400)
    with pytest.raises(NoSupportError, match="shadow rate"):
        evaluate_sequences(log, world.policy(0.003, 0.15).rows(index))


def test_where_the_logging_policy_is_unknown_shadows_alone_count(world: World) -> None:
    policy = world.policy(0.02, 0.15)
    log, index = logged(world, Logger("shadowed", 0.02, 0.15, 0.5), 2000)
    blind = SequenceLog(log.answers, log.labels, log.arms, log.chances, log.there, log.complete, log.inclusion, None)
    found = evaluate_sequences(blind, policy.rows(index)).estimates["snips"]
    assert found.ci95[0] <= world.value(policy) <= found.ci95[1]
    assert found.ess == pytest.approx(log.complete.sum(), rel=0.01)
