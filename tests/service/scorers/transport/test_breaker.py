"""The breaker's states, by hand, on a clock of the test's own."""

from __future__ import annotations

import pytest

from service.scorers.transport.breaker import BreakerPolicy, BreakerState, CircuitBreaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    policy = BreakerPolicy(failures_to_open=3, backoff_seconds=1.0, max_backoff_seconds=3.0)
    return CircuitBreaker(policy, clock)


def fail(breaker: CircuitBreaker, times: int) -> None:
    for _ in range(times):
        permit = breaker.acquire()
        assert permit is not None
        breaker.failure(permit)


def test_it_opens_after_consecutive_failures_only(breaker: CircuitBreaker) -> None:
    fail(breaker, 2)
    permit = breaker.acquire()
    assert permit is not None
    breaker.success(permit)
    fail(breaker, 2)
    assert breaker.state is BreakerState.CLOSED
    fail(breaker, 1)
    assert breaker.state is BreakerState.OPEN
    assert breaker.acquire() is None


def test_half_open_gives_one_trial_and_its_success_closes(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 0.99
    assert breaker.acquire() is None
    clock.now += 0.01
    assert breaker.state is BreakerState.HALF_OPEN
    permit = breaker.acquire()
    assert permit is not None
    assert breaker.acquire() is None
    breaker.success(permit)
    assert breaker.state is BreakerState.CLOSED
    assert breaker.consecutive_failures == 0


def test_held_it_gives_no_trial_however_long_until_it_is_closed(breaker: CircuitBreaker, clock: Clock) -> None:
    early = breaker.acquire()
    assert early is not None
    breaker.hold()
    clock.now += 1e9
    breaker.success(early)
    breaker.failure(early)
    breaker.trip()
    assert (breaker.state, breaker.held, breaker.acquire()) == (BreakerState.OPEN, True, None)
    breaker.close()
    assert (breaker.state, breaker.held) == (BreakerState.CLOSED, False)
    fail(breaker, 3)
    clock.now += 1.0
    assert breaker.acquire() is not None


def test_failed_trials_double_the_back_off_up_to_its_bound(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 3)
    for wait in (1.0, 2.0, 3.0, 3.0):
        clock.now += wait - 0.01
        assert breaker.state is BreakerState.OPEN
        clock.now += 0.01
        fail(breaker, 1)
    clock.now += 3.0
    permit = breaker.acquire()
    assert permit is not None
    breaker.success(permit)
    fail(breaker, 3)
    clock.now += 1.0
    assert breaker.state is BreakerState.HALF_OPEN


def test_an_abandoned_trial_gives_the_permit_back(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 1.0
    permit = breaker.acquire()
    assert permit is not None
    breaker.abandon(permit)
    assert breaker.state is BreakerState.HALF_OPEN
    assert breaker.acquire() is not None


def test_reports_from_before_a_change_of_state_are_ignored(breaker: CircuitBreaker, clock: Clock) -> None:
    old = breaker.acquire()
    assert old is not None
    fail(breaker, 3)
    breaker.success(old)
    assert breaker.state is BreakerState.OPEN
    breaker.close()
    for _ in range(3):
        assert not breaker.failure(old)
    assert breaker.state is BreakerState.CLOSED


def test_trip_opens_at_once_and_does_not_prolong(breaker: CircuitBreaker, clock: Clock) -> None:
    breaker.trip()
    assert breaker.state is BreakerState.OPEN
    clock.now += 0.9
    breaker.trip()
    clock.now += 0.1
    assert breaker.state is BreakerState.HALF_OPEN


@pytest.mark.parametrize(("failures", "first", "most"), [(0, 1.0, 2.0), (1, 0.0, 2.0), (1, 3.0, 2.0)])
def test_a_senseless_policy_is_refused(failures: int, first: float, most: float) -> None:
    with pytest.raises(ValueError, match="breaker policy"):
        BreakerPolicy(failures, first, most)
