"""`Rate`: a bound on how much of something, requests or tokens, goes to a scorer in a minute.

`service.scorers.requests` holds one per bound. Knows no kind.
"""

from __future__ import annotations

from aiolimiter import AsyncLimiter


class Rate:
    """A bound per minute of one process. Not thread-safe; one event loop.

    A tenth of a minute's amount may come at once, so that a minute never has more than a tenth too much.

    Args:
        per_minute: the bound, positive; None for none.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._burst = 1.0 if per_minute is None else max(per_minute / 10.0, 1.0)
        self._limiter = None if per_minute is None else AsyncLimiter(self._burst, 60.0 * self._burst / per_minute)
        self._last = 1.0

    @property
    def has_room(self) -> bool:
        """True if as much as was taken last may be taken without waiting, up to a burst."""
        return self._limiter is None or self._limiter.has_capacity(self._last)

    async def take(self, amount: float) -> None:
        """Wait until an amount may go, and count it. More than a burst is waited for in bursts, and counted whole."""
        if self._limiter is None:
            return
        self._last = min(amount, self._burst)
        while amount > 0.0:
            part = min(amount, self._burst)
            await self._limiter.acquire(part)
            amount -= part
