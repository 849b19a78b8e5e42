"""`stacked` and `cascade:B` along a stream: what they cost, what they learn from, and that one call is routing."""

from __future__ import annotations

import numpy as np
import pytest

from router_core.combine import Multipliers, Votes
from router_core.errors import DatasetError, UnknownPolicyError
from router_core.prior import CALIBRATED_HYPERPARAMETERS, Prior, calibrated_prior
from router_core.records import Signal
from router_core.replay import Combination, Delay, Scenario, Table, Trace, replay, tabulate
from tests.support.replay import pair

ARMS = ("a", "b", "c")
SIGNALS = (Signal.PREFERENCE, Signal.REWARD)


def independent() -> Votes:
    weights = np.zeros((2, 4, 3))
    weights[0, 1] = 1.0
    return Votes(weights, np.ones(3), np.zeros((1, 3)))


COMBINATION = Combination(
    independent(), Multipliers(np.array([1.0, 1.5, 2.0, 3.0]), np.array([1.0, 0.03, 0.01, 0.001]))
)


def stream(n: int = 600, seed: int = 0) -> tuple[Table, np.ndarray]:
    """Three RMs that are right about equally often and err independently; no scores."""
    rng = np.random.default_rng(seed)
    where = rng.integers(4, size=n)
    right = rng.random((n, 3)) < chances()[where]
    labels = rng.integers(2, size=n)
    pairs = [
        pair(i, int(labels[i]), {name: int(labels[i] if right[i, k] else 1 - labels[i]) for k, name in enumerate(ARMS)})
        for i in range(n)
    ]
    return tabulate(pairs, ARMS), np.eye(4, dtype=np.float32)[where]


def chances() -> np.ndarray:
    return np.random.default_rng(9).uniform(0.7, 0.8, size=(4, 3))


def informed(form: str | None) -> Prior:
    return calibrated_prior(3, 4, lambda x: np.asarray(x @ chances(), dtype=np.float64), CALIBRATED_HYPERPARAMETERS)


def run(names: list[str], signal: Signal = Signal.PREFERENCE, **given: object) -> dict[str, Trace]:
    table, x = stream()
    words: dict[str, object] = {"priors": informed, "signal": signal, "seeds": [0, 1], "combination": COMBINATION}
    return replay(table, x, names, **(words | given))  # type: ignore[arg-type]


@pytest.mark.parametrize("signal", SIGNALS)
def test_one_call_is_routing_draw_by_draw(signal: Signal) -> None:
    traces = run(["bayesian:calibrated", "cascade:1"], signal)
    np.testing.assert_array_equal(traces["cascade:1"].correct, traces["bayesian:calibrated"].correct)
    np.testing.assert_array_equal(traces["cascade:1"].asked, traces["bayesian:calibrated"].asked)
    assert traces["cascade:1"].calls_per_instance == 1.0


def test_more_calls_are_more_often_right_and_cost_their_budget() -> None:
    traces = run(["cascade:1", "cascade:1.5", "cascade:2", "stacked"])
    assert traces["stacked"].calls_per_instance == 3.0
    for budget in (1.5, 2.0):
        assert traces[f"cascade:{budget:g}"].calls_per_instance == pytest.approx(budget, abs=0.1)
    earned = {name: float(trace.correct.mean()) for name, trace in traces.items()}
    assert min(earned["stacked"], earned["cascade:1.5"], earned["cascade:2"]) > earned["cascade:1"] + 0.02


@pytest.mark.parametrize("scenario", [Scenario(delay=Delay.parse("batch:32")), Scenario(missing=0.3)])
def test_late_and_missing_feedback_leave_the_budget_alone(scenario: Scenario) -> None:
    traces = run(["cascade:1.5"], scenario=scenario)
    assert traces["cascade:1.5"].calls_per_instance == pytest.approx(1.5, abs=0.15)


def test_without_votes_or_with_an_impossible_budget_it_says_so() -> None:
    with pytest.raises(DatasetError, match="needs learned votes"):
        run(["stacked"], combination=None)
    with pytest.raises(UnknownPolicyError, match="at least 1"):
        run(["cascade:0.9"])
