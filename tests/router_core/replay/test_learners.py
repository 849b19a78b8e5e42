"""Learners with a state of their own: they find who is right where, and are told only what has arrived."""

from __future__ import annotations

import numpy as np
import pytest

from router_core.errors import FeedbackError, UnknownPolicyError
from router_core.records import Signal
from router_core.replay import Delay, Scenario, replay, select, tabulate
from tests.support.replay import POOL, specialists, undecided


@pytest.mark.parametrize("name", ["neural", "dueling"])
def test_it_learns_who_is_right_where(name: str) -> None:
    pairs, x = specialists(400)
    table = tabulate(pairs, POOL)
    trace = replay(table, x, [name], priors=undecided, signal=Signal.PREFERENCE, seeds=[0, 1])[name]
    late = np.mean([part.correct[-100:].mean() for part in trace.passes])
    assert late > 0.8
    assert late > np.mean([part.correct[:20].mean() for part in trace.passes])
    assert trace.calls_per_instance == {"neural": 1.0, "dueling": 2.0}[name]


@pytest.mark.parametrize("name", ["neural", "dueling"])
def test_it_learns_nothing_from_feedback_that_never_arrives(name: str) -> None:
    pairs, x = specialists(200)
    late = Scenario(delay=Delay(steps=200))
    traces = [
        replay(tabulate(given, POOL), x, [name], priors=undecided, signal=Signal.PREFERENCE, seeds=[0], scenario=late)
        for given in (pairs, pairs[1:] + pairs[:1])
    ]
    first, second = (each[name].passes[0].asked.tolist() for each in traces)
    assert first == second


def test_losses_are_refused_and_unknown_forms_too() -> None:
    pairs, x = specialists(10)
    with pytest.raises(FeedbackError, match="--signal preference"):
        replay(tabulate(pairs, POOL), x, ["neural"], priors=undecided, signal=Signal.LOSS, seeds=[0])
    with pytest.raises(UnknownPolicyError):
        select("neural:linucb", POOL)
