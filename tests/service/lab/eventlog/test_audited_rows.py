"""Audited decisions in a log: with which probability each is there, and what it tells of every RM."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router_core.attempts import Attempt, Outcome
from router_core.audits.schedule import is_chosen
from router_core.records import Feedback, Signal, Source
from service.lab.eventlog.load import EventLog, logged_data
from service.lab.eventlog.record import Header, LoggedEvent
from service.usecases.decisions import StoredAudit, StoredDecision

PRINT = {"pool": ["a", "b"], "d": 1, "signal": "preference", "prior": "none"}
HEADER = Header("r", PRINT, 0, True, "test")
PREFERENCE = Feedback(Signal.PREFERENCE, 0.0)


def name_of(chosen: bool, inclusion: float) -> str:
    """Return a decision's id that the hash chooses, or does not."""
    return next(name for name in map(str, range(1000)) if is_chosen(name, inclusion) == chosen)


def decision(inclusion: float) -> StoredDecision:
    attempts = [Attempt(0, 0, Outcome.ANSWERED, rewards=[1.0, 0.0], verdict=0)]
    x = np.ones(1, "<f4").tobytes()
    return StoredDecision(
        2, x, [0.5] * 2, [0.5] * 2, [0.1] * 2, [0.75, 0.25], "bayesian", 0, 0, attempts, 0, [1.0, 0.0], 0, 0.75,
        inclusion=inclusion,
    )  # fmt: skip


def audited(event: LoggedEvent, *, after_gold: bool = False) -> LoggedEvent:
    """The event of an audit that has asked `b`, which is wrong."""
    stored = decision(event.decision.inclusion or 0.0)
    stored.shadows = [Attempt(1, 0, Outcome.ANSWERED, rewards=[0.0, 1.0], verdict=1)]
    stored.audit = StoredAudit("judge", 0, 0.9, [1.0, 0.0])
    learned = ((1, 0.0),) if after_gold else ((0, 1.0), (1, 0.0))
    return replace(event, decision=stored, learned=learned, source=Source.AUDIT, after_gold=after_gold)


def gold(name: str, inclusion: float) -> LoggedEvent:
    return LoggedEvent("1-1", name, decision(inclusion), PREFERENCE, ((0, 1.0),))


def test_audits_without_feedback_are_a_sample_that_shows_every_rm() -> None:
    events = [audited(gold("x", 0.5)), audited(gold("y", 0.1))]
    data = logged_data(EventLog(HEADER, tuple(events)))
    assert data.inclusion == pytest.approx([0.5, 0.1])
    assert data.propensities == pytest.approx(np.ones((2, 2)))
    assert data.rewards.tolist() == [[1.0, 0.0]] * 2


def test_an_audit_after_feedback_adds_the_other_rms() -> None:
    chosen, other = gold(name_of(True, 0.2), 0.2), gold(name_of(False, 0.2), 0.2)
    data = logged_data(EventLog(HEADER, (chosen, other, audited(chosen, after_gold=True))))
    assert data.inclusion is None, "feedback has come for all that were audited"
    assert data.rewards[0].tolist() == [1.0, 0.0]
    assert np.isnan(data.rewards[1, 1])
    share = min(1.0, 0.2 * (1 / 0.4))
    assert data.propensities[:, 1] == pytest.approx([0.25 + 0.75 * share] * 2)


def test_half_of_the_feedback_is_missing() -> None:
    first, second = gold(name_of(True, 0.2), 0.2), audited(gold("z", 0.2))
    data = logged_data(EventLog(HEADER, (first, audited(first, after_gold=True), second)))
    assert data.inclusion == pytest.approx([0.5 + 0.5 * 0.2] * 2)
