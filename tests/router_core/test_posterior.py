"""The fold: textbook regression by hand, equality bit for bit however the log is cut, bounded drift, discount."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_core.errors import FeedbackError, NotFiniteError, NotPositiveDefiniteError, ShapeMismatchError
from router_core.linalg import inverse_probe, inverse_residual, inverse_spd
from router_core.posterior import NO_ARM, FoldSettings, Posterior, events_to_refresh, fold, start
from router_core.prior import Hyperparameters, Prior, linucb_prior, no_prior, paper_prior
from router_core.records import Event, Feedback, Shadow, Signal
from tests.router_core.events import context_of, make_events, unit_contexts, with_shadows

HYPER = Hyperparameters(lambda0=2.0, sigma2=0.25, v=0.5)
SMALL = FoldSettings(block_size=4, refresh_events=12)


def regression(prior: Prior, events: list[Event], arm: int) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and covariance of one arm by solving the normal equations of all its events at once."""
    x = np.array([context_of(e) for e in events if e.arm == arm]).reshape(-1, prior.n_weights)
    targets = np.array([e.credit - e.offset for e in events if e.arm == arm and e.credit is not None])
    lam = prior.hyper.lambda0 * np.eye(prior.n_weights) + x.T @ x / prior.hyper.sigma2
    b = prior.hyper.lambda0 * prior.means[arm] + x.T @ targets / prior.hyper.sigma2
    covariance = np.linalg.inv(lam)
    return covariance @ b, covariance


def test_one_event_by_hand() -> None:
    # lambda0 = 1, sigma2 = 1, x = e1, reward 1: Lambda_11 = 2, so mu = (1/2, 0) and the variance along x is 1/2.
    prior = no_prior(1, 2, Hyperparameters(1.0, 1.0, 1.0))
    x = np.array([1.0, 0.0], dtype=np.float32)
    state = fold(start(prior), [Event(0, x.tobytes(), 0.0, 1, Feedback(Signal.PREFERENCE, 1.0))])
    assert state.arms[0].mean.tolist() == [0.5, 0.0]
    assert state.arms[0].variance(np.array([1.0, 0.0])) == pytest.approx(0.5)
    assert state.arms[0].variance(np.array([0.0, 1.0])) == pytest.approx(1.0)
    assert state.count == 1


@pytest.mark.parametrize("n", [1, 3, 4, 5, 12, 13, 50])
def test_fold_is_the_textbook_regression_at_every_position_of_the_blocks(n: int) -> None:
    rng = np.random.default_rng(n)
    prior = paper_prior(rng.standard_normal((3, 6)), HYPER)
    events = make_events(rng, n, 6, 3, offset=0.3)
    state = fold(start(prior, SMALL), events)
    probes = unit_contexts(rng, 5, 6).astype(np.float64)
    for arm in range(3):
        mean, covariance = regression(prior, events, arm)
        # Between blocks Σx is read in single precision; at a block's end everything is double again.
        exact = len(state.arms[arm].targets) == 0
        np.testing.assert_allclose(state.arms[arm].mean, mean, atol=1e-12 if exact else 1e-6)
        for probe in probes:
            assert state.arms[arm].variance(probe) == pytest.approx(
                probe @ covariance @ probe, rel=1e-10 if exact else 1e-5
            )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 17), min_size=1, max_size=12), st.sampled_from([1.0, 0.9]))
def test_fold_of_a_log_equals_the_fold_of_its_pieces_bit_for_bit(seed: int, pieces: list[int], gamma: float) -> None:
    rng = np.random.default_rng(seed)
    prior = no_prior(3, 5, Hyperparameters(2.0, 0.25, 0.5, gamma))
    events = with_shadows(rng, make_events(rng, sum(pieces), 5, 3), 3)
    whole = fold(start(prior, SMALL), events)
    state, position = start(prior, SMALL), 0
    for size in pieces:
        state = fold(state, events[position : position + size])
        position += size
    assert state.digest() == whole.digest()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 90), min_size=1, max_size=8))
def test_fold_of_losses_scaled_by_quantiles_equals_the_fold_of_its_pieces_bit_for_bit(
    seed: int, pieces: list[int]
) -> None:
    rng = np.random.default_rng(seed)
    events = make_events(rng, sum(pieces), 5, 3, signal=Signal.LOSS)
    whole = fold(start(linucb_prior(3, 5), SMALL), events)
    state, position = start(linucb_prior(3, 5), SMALL), 0
    for size in pieces:
        state = fold(state, events[position : position + size])
        position += size
    assert state.digest() == whole.digest()


def test_the_history_of_losses_is_part_of_the_digest() -> None:
    events = make_events(np.random.default_rng(0), 20, 5, 2, signal=Signal.LOSS)
    state = fold(start(linucb_prior(2, 5), SMALL), events)
    other = dataclasses.replace(state.statistics, loss_history=state.statistics.loss_history[::-1].copy())
    assert dataclasses.replace(state, statistics=other).digest() != state.digest()


def test_an_event_with_shadows_moves_every_arm_whose_verdict_is_known_as_if_each_had_been_asked() -> None:
    rng = np.random.default_rng(9)
    prior = no_prior(4, 6, HYPER)
    events = with_shadows(rng, make_events(rng, 50, 6, 4, offset=0.3), 4)
    assert any(event.shadows for event in events)
    # The same verdicts as a log of one arm each, in the fixed order: the asked arm, then the others.
    spread = []
    for event in events:
        spread.append(dataclasses.replace(event, shadows=()))
        for arm, offset, credit in sorted(event.shadows):
            spread.append(dataclasses.replace(event, arm=arm, offset=offset, credit=credit, shadows=()))
    large = FoldSettings(block_size=4, refresh_events=1024)
    together, apart = fold(start(prior, large), events), fold(start(prior, large), spread)
    assert (together.count, apart.count) == (50, len(spread))
    assert dataclasses.replace(together, count=apart.count, spoken=apart.spoken).digest() == apart.digest()


def test_shadows_fold_alike_in_whatever_order_they_are_listed_and_as_plain_tuples() -> None:
    rng = np.random.default_rng(10)
    [event] = make_events(rng, 1, 4, 3)
    event = dataclasses.replace(event, arm=1)
    listed = (Shadow(2, 0.25, 1), Shadow(0, 0.5, 0))
    prior = no_prior(3, 4, HYPER)
    digests = {
        fold(start(prior, SMALL), [dataclasses.replace(event, shadows=shadows)]).digest()
        for shadows in (listed, listed[::-1], tuple(tuple(shadow) for shadow in listed))
    }
    assert len(digests) == 1


def test_shadows_of_a_decision_that_asked_everyone_are_learned_from() -> None:
    [event] = make_events(np.random.default_rng(11), 1, 4, 3)
    event = dataclasses.replace(event, arm=NO_ARM, shadows=((0, 0.5, 1), (2, 0.5, 0)))
    state = fold(start(no_prior(3, 4, HYPER), SMALL), [event])
    assert state.statistics.count.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("signal", [Signal.LOSS, Signal.REWARD])
def test_shadows_with_a_signal_that_says_nothing_of_them_are_refused(signal: Signal) -> None:
    [event] = make_events(np.random.default_rng(12), 1, 4, 3, signal=signal)
    event = dataclasses.replace(event, arm=1, shadows=((0, 0.5, 1),))
    with pytest.raises(FeedbackError, match="'preference' only"):
        fold(start(no_prior(3, 4, HYPER), SMALL), [event])


@pytest.mark.parametrize("arms", [[1], [0, 0], [3], [-1]])
def test_shadows_of_the_asked_arm_twice_of_one_or_of_none_are_refused(arms: list[int]) -> None:
    [event] = make_events(np.random.default_rng(13), 1, 4, 3)
    event = dataclasses.replace(event, arm=1, shadows=tuple((arm, 0.5, 0) for arm in arms))
    with pytest.raises(ShapeMismatchError, match="once at most"):
        fold(start(no_prior(3, 4, HYPER), SMALL), [event])
    with pytest.raises(NotFiniteError):
        fold(start(no_prior(3, 4, HYPER), SMALL), [dataclasses.replace(event, shadows=((0, float("nan"), 0),))])


def test_digest_tells_two_orders_of_the_same_events_apart() -> None:
    rng = np.random.default_rng(0)
    events = make_events(rng, 9, 5, 2)
    prior = no_prior(2, 5, HYPER)
    assert fold(start(prior, SMALL), events).digest() != fold(start(prior, SMALL), events[::-1]).digest()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_precision_stays_positive_definite_and_the_covariance_its_inverse(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    state = fold(start(no_prior(2, 6, HYPER), SMALL), make_events(rng, n, 6, 2))
    for arm in state.arms:
        assert np.array_equal(arm.precision, arm.precision.T)
        assert np.linalg.eigvalsh(arm.precision).min() > 0
        assert inverse_residual(arm.precision, arm.covariance) < 1e-10


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, 30))
def test_variance_at_x_never_grows_after_observing_x(seed: int, earlier: int) -> None:
    rng = np.random.default_rng(seed)
    state = fold(start(no_prior(1, 4, HYPER), SMALL), make_events(rng, earlier, 4, 1))
    [event] = make_events(rng, 1, 4, 1)
    x = context_of(event)
    assert fold(state, [event]).arms[0].variance(x) <= state.arms[0].variance(x) * (1 + 1e-12)


def test_an_event_moves_no_other_arm() -> None:
    rng = np.random.default_rng(1)
    before = fold(start(no_prior(3, 4, HYPER), SMALL), make_events(rng, 7, 4, 3))
    event = dataclasses.replace(make_events(rng, 1, 4, 3)[0], arm=1)
    after = fold(before, [event])
    assert after.arms[0] is before.arms[0]
    assert after.arms[2] is before.arms[2]
    assert not np.array_equal(after.arms[1].mean, before.arms[1].mean)


def test_fold_leaves_the_state_it_was_given_as_it_was() -> None:
    rng = np.random.default_rng(2)
    events = make_events(rng, 40, 4, 2)
    state = fold(start(no_prior(2, 4, HYPER), SMALL), events[:10])
    digest = state.digest()
    fold(state, events[10:])
    fold(state, events[20:])
    assert state.digest() == digest


def test_decisions_that_asked_everyone_are_counted_and_move_nothing() -> None:
    rng = np.random.default_rng(3)
    prior = no_prior(2, 4, HYPER)
    event = dataclasses.replace(make_events(rng, 1, 4, 2)[0], arm=NO_ARM)
    state = fold(start(prior, SMALL), [event])
    assert state.count == 1
    assert np.array_equal(state.means, start(prior).means)
    assert state.statistics.count.sum() == 0


def test_discount_forgets_towards_the_prior() -> None:
    rng = np.random.default_rng(4)
    prior = paper_prior(rng.standard_normal((1, 3)), Hyperparameters(2.0, 0.25, 1.0, gamma=0.5))
    x = unit_contexts(rng, 1, 3)[0]
    event = Event(0, x.tobytes(), 0.0, 1, Feedback(Signal.PREFERENCE, 1.0))
    learned = fold(start(prior, SMALL), [event] * 4)
    # One block: Lambda = gamma (2I + 4 xx'/s2) + (1 - gamma) 2I, and b in the same way.
    x64 = x.astype(np.float64)
    lam = 0.5 * (2 * np.eye(3) + 16 * np.outer(x64, x64)) + np.eye(3)
    b = 0.5 * (2 * prior.means[0] + 16 * x64) + prior.means[0]
    np.testing.assert_allclose(learned.arms[0].precision, lam, rtol=1e-12)
    np.testing.assert_allclose(learned.arms[0].mean, np.linalg.solve(lam, b), rtol=1e-10)
    # Blocks in which only others are counted still forget.
    silent = dataclasses.replace(event, arm=NO_ARM)
    forgotten = fold(learned, [silent] * 4 * 40)
    np.testing.assert_allclose(forgotten.arms[0].precision, 2 * np.eye(3), atol=1e-9)
    np.testing.assert_allclose(forgotten.arms[0].mean, prior.means[0], atol=1e-9)


def test_drift_is_measured_at_each_refresh_and_stays_tiny() -> None:
    rng = np.random.default_rng(5)
    state = fold(start(no_prior(2, 16, HYPER), FoldSettings(8, 512)), make_events(rng, 512, 16, 2))
    assert 0 < state.drift < 1e-10


def test_drift_beyond_the_tolerance_inverts_afresh() -> None:
    rng = np.random.default_rng(6)
    events = make_events(rng, 8, 6, 1)
    never = FoldSettings(8, 1024, drift_tolerance=np.inf)
    always = FoldSettings(8, 1024, drift_tolerance=0.0)
    prior = no_prior(1, 6, HYPER)
    corrected, inverted = fold(start(prior, never), events).arms[0], fold(start(prior, always), events).arms[0]
    assert np.array_equal(inverted.covariance, inverse_spd(inverted.precision))
    assert not np.array_equal(corrected.covariance, inverted.covariance)
    np.testing.assert_allclose(corrected.covariance, inverted.covariance, atol=1e-12)


def test_the_probe_sees_a_wrong_inverse() -> None:
    precision = np.diag([1.0, 2.0])
    assert inverse_probe(precision, np.diag([1.0, 0.5])) == 0.0
    assert inverse_probe(precision, np.diag([1.0, 0.6])) == pytest.approx(0.2 / np.sqrt(2))


def test_events_that_do_not_fit_are_refused() -> None:
    state = start(no_prior(2, 4, HYPER), SMALL)
    [event] = make_events(np.random.default_rng(7), 1, 4, 2)
    with pytest.raises(ShapeMismatchError, match="context of 2 numbers"):
        fold(state, [dataclasses.replace(event, x=event.x[:8])])
    with pytest.raises(ShapeMismatchError, match="asked arm 2 of 2"):
        fold(state, [dataclasses.replace(event, arm=2)])
    with pytest.raises(NotFiniteError, match="d0"):
        fold(state, [dataclasses.replace(event, offset=float("nan"))])
    bad = np.array([np.inf, 0, 0, 0], dtype=np.float32).tobytes()
    with pytest.raises(NotFiniteError):
        fold(state, [dataclasses.replace(event, x=bad)])


def test_a_matrix_that_cannot_be_inverted_says_why() -> None:
    with pytest.raises(NotPositiveDefiniteError, match="smallest eigenvalue -1"):
        inverse_spd(np.diag([1.0, -1.0]))
    with pytest.raises(NotFiniteError):
        inverse_spd(np.diag([1.0, np.nan]))


def test_fold_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ShapeMismatchError, match="multiple"):
        FoldSettings(block_size=8, refresh_events=20)


def test_events_to_refresh_counts_down_to_the_next_position() -> None:
    rng = np.random.default_rng(8)
    events = make_events(rng, 13, 4, 1)
    state: Posterior = start(no_prior(1, 4, HYPER), SMALL)
    assert events_to_refresh(state) == 12
    assert events_to_refresh(fold(state, events[:11])) == 1
    at = fold(state, events[:12])
    assert at.at_refresh
    assert events_to_refresh(at) == 12
