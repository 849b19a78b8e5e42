"""What a referee's verdicts teach, and how gold judges it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router_core.audits.referee import Lesson, Standing
from router_core.errors import AuditError
from router_core.posterior import FoldSettings, Posterior, fold, start
from router_core.prior import CALIBRATED_HYPERPARAMETERS, Prior, PriorForm
from router_core.records import TIE, Audit, Event, Feedback, Signal, Source
from router_core.snapshot import Snapshot, dump, parse
from tests.router_core.events import make_events, unit_contexts

RNG = np.random.default_rng(3)
PLAIN = replace(CALIBRATED_HYPERPARAMETERS, adapt=False, alarm_rate=0.0)
PRIOR = Prior(PriorForm.CALIBRATED, np.zeros((2, 4)), PLAIN, constant_offset=0.5)
X = unit_contexts(RNG, 400, 4)


def audit_event(i: int, credit: float | None, **fields: object) -> Event:
    audit = Audit("judge", 0, 0.1, **fields)  # type: ignore[arg-type]
    return Event(0, X[i].tobytes(), 0.5, credit, Feedback(Signal.PREFERENCE, 0.0), f"d{i}", (), Source.AUDIT, audit)


def gold_event(i: int, credit: float, preferred: int, audit: Audit | None = None) -> Event:
    feedback = Feedback(Signal.PREFERENCE, float(preferred))
    return Event(0, X[i].tobytes(), 0.5, credit, feedback, f"d{i}", audit=audit)


def learned(state: Posterior) -> tuple[np.ndarray, np.ndarray]:
    """Return (Λ, b) of arm 0 with its tail applied."""
    arm, sigma2 = state.arms[0], state.prior.hyper.sigma2
    precision = arm.precision + arm.contexts.T @ arm.contexts / sigma2
    return precision, arm.information + arm.targets @ arm.contexts / sigma2


@pytest.mark.parametrize("accuracy", [0.75, 0.9])
def test_corrected_reward_is_unbiased_at_its_weight(accuracy: float) -> None:
    lesson = Standing(1e6, 1e6 * accuracy, 0.0).lesson(0.9, 0.16)
    right = RNG.random(400_000) < 0.7
    said = np.where(RNG.random(len(right)) < accuracy, right, ~right).astype(float)
    rewards = np.array([lesson.reward(0.0), lesson.reward(1.0)])[said.astype(int)]
    assert rewards.mean() == pytest.approx(0.7, abs=0.006)
    assert lesson.weight == pytest.approx(0.16 / (0.16 + (rewards - right).var()), rel=0.03)


def test_perfect_referee_teaches_like_feedback() -> None:
    earned = RNG.integers(2, size=40).astype(float)
    audited = fold(start(PRIOR), [audit_event(i, c, trust=1.0) for i, c in enumerate(earned)])
    told = fold(start(PRIOR), [gold_event(i, c, 0) for i, c in enumerate(earned)])
    assert audited.arms[0].mean == pytest.approx(told.arms[0].mean, rel=0.1)


def test_gold_after_audit_leaves_what_gold_teaches() -> None:
    said, gold = RNG.integers(2, size=(2, 30)).astype(float)
    standing_still = fold(start(PRIOR), [])
    for i, (z, g) in enumerate(zip(said, gold, strict=True)):
        audit = Audit("judge", int(z != g), 0.1, taught=((0, z),))
        standing_still = replace(standing_still, referees={})
        standing_still = fold(standing_still, [audit_event(i, z), gold_event(i, g, 0, audit)])
    expected = fold(start(PRIOR), [gold_event(i, g, 0) for i, g in enumerate(gold)])
    for got, want in zip(learned(standing_still), learned(expected), strict=True):
        assert got == pytest.approx(want, abs=1e-9)


def test_audit_after_gold_teaches_no_arm_twice() -> None:
    before = fold(start(PRIOR), [gold_event(0, 1.0, 0)])
    late = replace(audit_event(0, None, after_gold=True, earned=1.0), arm=-1, shadows=((1, 0.5, 0.0),), credit=None)
    after = fold(before, [late])
    assert np.array_equal(after.arms[0].mean, before.arms[0].mean)
    assert after.arms[1].targets.tolist() == [-0.5]
    assert after.referees == {"judge": Standing(1.0, 1.0, 1.0)}


def test_accuracy_is_estimated_where_gold_is() -> None:
    right = RNG.random(300) < 0.85
    events = [gold_event(i, 0.0, 0, Audit("judge", int(not r), 0.1)) for i, r in enumerate(right)]
    standing = fold(start(PRIOR), events).referees["judge"]
    assert standing.judged == 300
    assert standing.accuracy(0.5) == pytest.approx((right.sum() + 8) / 316)


def test_referee_no_better_than_the_rms_stops_teaching() -> None:
    judged = [gold_event(i, 1.0, 0, Audit("judge", int(i % 4 == 0), 0.1)) for i in range(40)]
    state = fold(start(PRIOR), judged)
    after = fold(state, [audit_event(50, 0.0)])
    assert not state.referees["judge"].teaches()
    assert np.array_equal(after.arms[0].mean, state.arms[0].mean)
    assert not np.array_equal(
        fold(state, [replace(audit_event(50, 0.0), audit=Audit("other", 0, 0.1))]).arms[0].mean, state.arms[0].mean
    )


def test_tie_teaches_nothing_and_counts_one_half() -> None:
    tie = replace(audit_event(0, None), audit=Audit("judge", TIE, 0.1))
    assert np.array_equal(fold(start(PRIOR), [tie]).arms[0].mean, np.zeros(4))
    state = fold(start(PRIOR), [gold_event(0, 1.0, 0, Audit("judge", TIE, 0.1))])
    assert state.referees["judge"] == Standing(1.0, 0.5, 1.0)


@pytest.mark.parametrize(
    "audit",
    [None, Audit("", 0, 0.1), Audit("j", 0, 0.0), Audit("j", 0, 1.5), Audit("j", 0, 0.1, 0.4), Audit("j", -2, 0.1)],
)
def test_impossible_audit_is_refused(audit: Audit | None) -> None:
    with pytest.raises(AuditError, match="d0"):
        fold(start(PRIOR), [replace(audit_event(0, 1.0), audit=audit)])


def mixed_log(n: int) -> list[Event]:
    """Return feedback, audits, and both about one decision, at random."""
    events = []
    for i, event in enumerate(make_events(RNG, n, 4, 2, offset=0.5)):
        kind, credit = RNG.integers(4), float(RNG.integers(2))
        said = Audit(f"r{RNG.integers(2)}", int(RNG.integers(2)), 0.2)
        if kind == 1:
            event = replace(event, source=Source.AUDIT, audit=said, credit=credit)
        elif kind == 2:
            event = replace(event, audit=said._replace(taught=((event.arm, credit),)))
        elif kind == 3:
            event = replace(event, source=Source.AUDIT, audit=said._replace(after_gold=True, earned=credit))
        events.append(replace(event, decision_id=str(i)))
    return events


def test_log_may_be_cut_anywhere() -> None:
    prior = replace(PRIOR, hyper=CALIBRATED_HYPERPARAMETERS)
    events, settings = mixed_log(150), FoldSettings(block_size=16, refresh_events=32)
    whole = fold(start(prior, settings), events)
    cut = start(prior, settings)
    for begin in range(0, 150, 7):
        cut = fold(cut, events[begin : begin + 7])
    assert cut.digest() == whole.digest()


def test_snapshot_keeps_the_referees() -> None:
    events, settings = mixed_log(96), FoldSettings(block_size=16, refresh_events=32)
    state = fold(start(PRIOR, settings), events[:64])
    back = parse(dump(Snapshot(state, "64-0"), "f"), "f", PRIOR, settings).posterior
    assert back.referees == state.referees
    assert len(back.referees) == 2
    assert fold(back, events[64:]).digest() == fold(state, events[64:]).digest()


def test_lesson_of_a_coin_is_nothing() -> None:
    assert Standing(1e6, 5e5, 0.0).lesson(0.9, 0.16).weight == 0.0
    assert Lesson(0.8, 0.5).seen(1.0) == pytest.approx(0.8)
