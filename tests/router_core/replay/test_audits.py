"""Replay with a referee's verdicts in the place of feedback."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router_core.audits.schedule import Schedule
from router_core.errors import AuditError, FeedbackError
from router_core.novelty import Landmarks
from router_core.policies import make_policy
from router_core.prior import Hyperparameters, no_prior
from router_core.records import Signal
from router_core.replay import Audits, Scenario, make_plan, replay, tabulate
from router_core.replay.audits import credits_against
from router_core.replay.passes import Loop, Stage
from tests.support.replay import POOL, pair, specialists, undecided

PAIRS, X = specialists(600)
TABLE = tabulate(PAIRS, POOL)


def accuracy(audits: Audits | None, signal: Signal = Signal.PREFERENCE) -> float:
    scenario = Scenario(audits=audits)
    traces = replay(TABLE, X, ["bayesian"], priors=undecided, signal=signal, seeds=[0, 1], scenario=scenario)
    return float(traces["bayesian"].correct.mean())


def test_few_audits_teach_what_nothing_cannot() -> None:
    assert accuracy(Audits(0.0)) < 0.65
    assert accuracy(Audits(0.1)) > 0.85


def test_a_coin_teaches_nothing() -> None:
    assert accuracy(Audits(0.3, accuracy=0.5, trust=0.5)) < 0.65


def test_audits_count_their_calls() -> None:
    scenario = Scenario(audits=Audits(0.2, "even"))
    words = {"priors": undecided, "signal": Signal.PREFERENCE, "seeds": [0], "scenario": scenario}
    traces = replay(TABLE, X, ["bayesian", "random"], **words)  # type: ignore[arg-type]
    assert traces["bayesian"].calls_per_instance == pytest.approx(1.2, abs=0.05)
    assert traces["random"].calls_per_instance == 1.0


def test_referee_errs_as_often_as_said() -> None:
    audits, rng = Audits(0.1, accuracy=0.8), np.random.default_rng(0)
    said = np.array([audits.verdict(1, 4, u) for u in rng.random(8000)])
    assert (said == 1).mean() == pytest.approx(0.8, abs=0.02)
    assert np.bincount(said[said != 1], minlength=4)[[0, 2, 3]].std() < 60


def test_wrong_verdict_turns_the_credits() -> None:
    table = tabulate([pair(0, 0, {"left": 0, "right": 1})], POOL)
    assert credits_against(table, 0, 0).tolist() == table.credit[0].tolist() == [1.0, 0.0]
    assert credits_against(table, 0, 1).tolist() == [0.0, 1.0]


def test_impossible_audits_are_refused() -> None:
    for given in ({"rate": 2.0}, {"rate": 0.1, "accuracy": 0.4}, {"rate": 0.1, "schedule": "late"}):
        with pytest.raises(AuditError):
            Audits(**given)  # type: ignore[arg-type]
    with pytest.raises(FeedbackError, match="referee"):
        accuracy(Audits(0.1), Signal.REWARD)


def in_order(stage: Stage) -> Loop:
    """One pass over the pairs as they are listed."""
    plan = replace(make_plan(stage.table, stage.scenario, 0), order=np.arange(len(stage.table)))
    loop = Loop(stage, plan)
    while loop.step < len(plan):
        loop.advance()
    return loop


def fresh_start(loop: Loop, change: int, within: int) -> int:
    """Return where after the change the probabilities are those of a first instance."""
    first = Schedule(0.1, "front", len(loop.chances)).probability(1)
    found = [step for step in range(change, change + within) if loop.chances[step] == first]
    assert found, loop.chances[change : change + within]
    return found[0]


def test_new_texts_start_the_schedule_again() -> None:
    n = len(PAIRS)
    x = np.stack([np.ones(n), 9.0 * (np.arange(n) >= n // 2)], axis=1).astype(np.float32)
    prior = replace(undecided(None), landmarks=Landmarks(np.zeros((8, 1), np.float32), 1.0))
    scenario = Scenario(audits=Audits(0.1))
    loop = in_order(
        Stage(TABLE, x, prior.offsets(x), make_policy("bayesian", POOL), prior, Signal.PREFERENCE, scenario)
    )
    assert (np.diff(loop.chances[2 : n // 2]) <= 0).all()
    assert fresh_start(loop, n // 2, 40) > n // 2


def test_a_changed_rm_starts_the_schedule_again() -> None:
    n = 1600
    pairs = [pair(i, 0, {"left": int(i >= n // 2), "right": i % 2}) for i in range(n)]
    table, x = tabulate(pairs, POOL), np.ones((n, 1), np.float32)
    prior = no_prior(2, 1, Hyperparameters(1.0, 0.1, 0.5, alarm_rate=1e-3))
    scenario = Scenario(audits=Audits(0.1))
    loop = in_order(
        Stage(table, x, prior.offsets(x), make_policy("bayesian", POOL), prior, Signal.PREFERENCE, scenario)
    )
    assert (np.diff(loop.chances[2 : n // 2]) <= 0).all()
    assert fresh_start(loop, n // 2, 600) > n // 2


def test_learners_of_feedback_refuse_audits() -> None:
    scenario = Scenario(audits=Audits(0.1))
    with pytest.raises(FeedbackError, match="neural"):
        replay(TABLE, X, ["neural:none"], priors=undecided, signal=Signal.PREFERENCE, seeds=[0], scenario=scenario)
