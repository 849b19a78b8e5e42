"""Audited decisions as a sample of all: estimates of the whole stream, though most audits are early."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from router_core.audits.schedule import Schedule
from router_core.errors import FeedbackError, ShapeMismatchError
from router_core.ope import LoggedData, doubly_robust, ips, safe_interval, sequential_ridge, snips
from tests.router_core.ope.bandit import hand_log

T, LOGS = 2000, 400
CHANCES = Schedule(0.1, "front", T).probabilities(np.arange(1, T + 1))
PI = np.array([0.7, 0.3])
"""Of the target, at every decision."""


def stream(rng: np.random.Generator) -> NDArray[np.float64]:
    """Rewards (T, 2) of two arms: the first one falls from .9 to .4, the second is right half of the time."""
    right = np.stack([np.linspace(0.9, 0.4, T), np.full(T, 0.5)], axis=1)
    return (rng.random((T, 2)) < right).astype(np.float64)


def audited(rewards: NDArray[np.float64], ask_all: bool, rng: np.random.Generator) -> LoggedData:
    """The log of a run without feedback."""
    rows = np.flatnonzero(rng.random(T) < CHANCES)
    arm = rng.integers(2, size=len(rows))
    seen = rewards[rows].copy()
    if not ask_all:
        seen[np.arange(len(rows)), 1 - arm] = np.nan
    e = np.full(seen.shape, 1.0 if ask_all else 0.5)
    x = np.ones((len(rows), 1), np.float32)
    return LoggedData(("a", "b"), x, arm, e, np.ones(e.shape, bool), seen, None, CHANCES[rows])


@pytest.mark.parametrize("ask_all", [True, False])
def test_front_loaded_audits_speak_of_the_whole_stream(ask_all: bool) -> None:
    rng = np.random.default_rng(0)
    errors: dict[str, list[float]] = {"ips": [], "snips": [], "dr": [], "unweighted": []}
    held = dict.fromkeys(errors, 0)
    for _ in range(LOGS):
        rewards = stream(rng)
        truth = float((rewards @ PI).mean())
        log = audited(rewards, ask_all, rng)
        pi = np.broadcast_to(PI, (len(log), 2)).copy()
        found = {
            "ips": ips(log, pi),
            "snips": snips(log, pi),
            "dr": doubly_robust(log, pi, sequential_ridge(log)),
            "unweighted": snips(replace(log, inclusion=None), pi),
        }
        for name, estimate in found.items():
            errors[name].append(estimate.value - truth)
            held[name] += estimate.ci95[0] <= truth <= estimate.ci95[1]
    for name in ("ips", "snips", "dr"):
        # 400 logs: a standard error of .0025 of the mean, of .011 of the coverage.
        assert abs(np.mean(errors[name])) < 0.01, name
        assert held[name] / LOGS > 0.92, name
    assert np.mean(errors["unweighted"]) > 0.05


def test_a_row_counts_by_the_inverse_of_its_probability() -> None:
    log = replace(hand_log([0, 0], [1.0, 0.0], [[1.0, 0.0], [1.0, 0.0]]), inclusion=np.array([0.5, 0.125]))
    pi = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert [estimator(log, pi).value for estimator in (ips, snips)] == pytest.approx([0.2, 0.2])
    assert snips(log, pi).ess == pytest.approx((2 + 8) ** 2 / (4 + 64))
    assert log.rows(np.array([1])).inclusion == pytest.approx([0.125])


def test_no_safe_interval_of_a_sample() -> None:
    log = hand_log([0], [1.0], [[1.0, 0.0]])
    with pytest.raises(FeedbackError, match="sample"):
        safe_interval(replace(log, inclusion=np.array([0.5])), np.array([[1.0, 0.0]]))
    with pytest.raises(ShapeMismatchError, match="inclusion"):
        replace(log, inclusion=np.array([0.0]))
