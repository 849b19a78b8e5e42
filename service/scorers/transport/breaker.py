"""A circuit breaker: when to stop asking a replica that fails, and when to try it again.

Knows counts and times; knows nothing of HTTP. `replica` beside it holds one per replica. The clock
is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class BreakerState(StrEnum):
    """closed -> open after consecutive failures -> half-open after a back-off -> closed, or open for longer."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When to open and for how long.

    Attributes:
        failures_to_open: consecutive failures that open a closed breaker.
        backoff_seconds: time from opening to the first trial; doubles with each failed trial.
        max_backoff_seconds: bound of that doubling.
    """

    failures_to_open: int = 3
    backoff_seconds: float = 0.5
    max_backoff_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.failures_to_open < 1 or not 0 < self.backoff_seconds <= self.max_backoff_seconds:
            raise ValueError(
                f"breaker policy {self}: failures_to_open >= 1 and 0 < backoff_seconds <= max_backoff_seconds"
            )


class CircuitBreaker:
    """One replica's breaker.

    A caller takes a permit, makes its request, and reports how it went. A report whose permit is from before the last
    change of state is ignored: a slow failure of yesterday must not open a breaker that a trial has just closed.
    """

    def __init__(self, policy: BreakerPolicy, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._clock = clock
        self._open = False
        self._trial = False
        self._failures = 0
        self._epoch = 0
        self._backoff = policy.backoff_seconds
        self._retry_at = 0.0
        self._held = False

    @property
    def state(self) -> BreakerState:
        """The state now; open turns half-open by the passing of time alone."""
        if not self._open:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if self._clock() >= self._retry_at else BreakerState.OPEN

    @property
    def allows(self) -> bool:
        """True if `acquire` would give a permit now."""
        return not self._open or (not self._trial and self._clock() >= self._retry_at)

    @property
    def held(self) -> bool:
        """Open until `close`, without trials."""
        return self._held

    @property
    def consecutive_failures(self) -> int:
        """Failures since the last success."""
        return self._failures

    def acquire(self) -> int | None:
        """A permit for one request, or None. Half-open gives exactly one until its outcome is known."""
        if not self.allows:
            return None
        self._trial = self._open
        return self._epoch

    def success(self, permit: int) -> None:
        """The request was answered."""
        if permit == self._epoch:
            if self._open:
                self.close()
            self._failures = 0

    def failure(self, permit: int) -> bool:
        """The request failed by the replica's fault. Returns whether that opened the breaker."""
        if permit != self._epoch:
            return False
        self._failures += 1
        if self._open:
            self._reopen()
            return True
        if self._failures >= self._policy.failures_to_open:
            self.trip()
            return True
        return False

    def abandon(self, permit: int) -> None:
        """The request ended without saying anything about the replica (cancelled, or never sent)."""
        if permit == self._epoch:
            self._trial = False

    def trip(self) -> None:
        """Open at once: the failure leaves no doubt (connection refused). No effect on an open one."""
        if not self._open:
            self._open = True
            self._backoff = self._policy.backoff_seconds
            self._restart()

    def close(self) -> None:
        """Close at once: the replica has just been seen to answer."""
        if self._open:
            self._open = False
            self._held = False
            self._trial = False
            self._epoch += 1
        self._failures = 0

    def hold(self) -> None:
        """Open until `close`, however long that takes: no request may be spent on finding out."""
        self._open = True
        self._held = True
        self._trial = False
        self._epoch += 1
        self._retry_at = math.inf

    def _reopen(self) -> None:
        self._backoff = min(2 * self._backoff, self._policy.max_backoff_seconds)
        self._restart()

    def _restart(self) -> None:
        self._trial = False
        self._epoch += 1
        self._retry_at = self._clock() + self._backoff
