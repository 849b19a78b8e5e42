"""Replay with a referee's verdicts in the place of feedback."""

from __future__ import annotations

import numpy as np
import pytest

from router_core.errors import AuditError, FeedbackError
from router_core.records import Signal
from router_core.replay import Audits, Scenario, replay, tabulate
from router_core.replay.audits import credits_against
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
