"""The logs that coverage is measured on are those of the real policies."""

from __future__ import annotations

import numpy as np
import pytest

from loadtests.ope_coverage import Logger, Population, make_logs, measure, summarise
from router_core.policies import BayesianPolicy
from router_core.posterior import fold, start
from router_core.prior import Hyperparameters, no_prior
from router_core.propensity import argmax_propensities
from router_core.records import Event, Feedback, Signal

HYPER = Hyperparameters(lambda0=1.0, sigma2=0.25, v=0.5)


def population() -> Population:
    """60 instances of which each RM is right on some."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 4)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    correctness = (rng.random((60, 3)) < 0.5 + 0.4 * x[:, :3]).astype(np.float64)
    return Population(("a", "b", "c"), x, correctness, np.clip(0.5 + 0.4 * x[:, :3].astype(np.float64), 0, 1))


@pytest.mark.parametrize("informed", [False, True])
def test_batched_logs_are_thompson_sampling_as_the_router_does_it(informed: bool) -> None:
    made = population()
    streams = make_logs(made, Logger("t", HYPER, informed), 3, 80, np.random.default_rng(1))
    index, arm, propensities = streams.index, streams.arm, streams.propensities
    assert np.array_equal(arm, streams.first)
    for log in range(3):
        state = start(no_prior(3, 4, HYPER))
        for t in range(80):
            i, k = index[log, t], arm[log, t]
            offsets = made.offsets[i : i + 1] if informed else np.full((1, 3), 0.5)
            beliefs = BayesianPolicy().beliefs(made.x[i : i + 1], offsets, state)
            expected = argmax_propensities(beliefs.means, beliefs.sds)[0]
            assert propensities[log, t] == pytest.approx(expected, abs=2e-3)
            right = Feedback(Signal.REWARD, float(made.correctness[i, k]))
            state = fold(state, [Event(int(k), made.x[i].tobytes(), float(offsets[0, k]), 0, right)])


def test_coverage_is_near_what_the_intervals_promise() -> None:
    """80 logs of 200 rows by the policy random; 0.95 has a standard error of 0.024 per target."""
    made = population()
    figures = measure(made, Logger("random", None), 80, [200], 0, 1e-3, 0.05)
    row = summarise(figures)["200"]
    for how in ("ips", "snips", "dr", "dr_uniform"):
        assert 0.9 <= row[how]["coverage"] <= 1.0
        assert row[how]["refused"] == 0.0
    assert row["safe"]["lowest_coverage"] >= 0.93
    assert row["dr"]["rmse"] < row["ips"]["rmse"]
    assert row["safe"]["width"] > row["dr"]["width"]


def test_a_settled_sampler_leaves_most_targets_without_support() -> None:
    settled = Logger("settled", Hyperparameters(lambda0=1.0, sigma2=0.05, v=0.05))
    row = summarise(measure(population(), settled, 10, [200], 0, 1e-3, 0.05))["200"]
    assert row["dr"]["refused"] > 0.5
    assert row["safe"]["refused"] == 0.0
    shadowed = Logger("settled", Hyperparameters(lambda0=1.0, sigma2=0.05, v=0.05), shadow=0.2)
    row = summarise(measure(population(), shadowed, 10, [200], 0, 1e-3, 0.05))["200"]
    assert row["dr"]["refused"] == 0.0
    assert row["dr"]["coverage"] > 0.8
