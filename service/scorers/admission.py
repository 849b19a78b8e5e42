"""Admission: may a call ask this scorer now, and how much of it at once.

A call takes one ticket per scorer and uses it for every piece of its work. A scorer that took the first piece takes the
others too, however busy others keep it: without that, a long batch would find a scorer full of its own pieces and take
it for away. `service.usecases.ask` takes tickets, scorers read them; knows no policy and no HTTP.
"""

from __future__ import annotations

import asyncio
from typing import Protocol


class Admission(Protocol):
    """What a scorer says of its room."""

    @property
    def available(self) -> bool:
        """False while every server's circuit is open or the scorer is over its limit of requests in flight."""

    @property
    def reachable(self) -> bool:
        """False while every server's circuit is open; a scorer that is only over its limit is reachable."""

    def slots(self) -> asyncio.Semaphore:
        """Return as many slots as one call has requests in flight at most; pieces of one call share them."""


class Ticket:
    """One call's right to ask one scorer. Made when the call first needs it.

    Args:
        arm: the scorer.
        shared: several pieces of work use the ticket, so that they share their requests in flight.
    """

    __slots__ = ("_admitted", "_arm", "_in_hand", "_returned", "_slots", "shared")

    def __init__(self, arm: Admission, *, shared: bool = False) -> None:
        self._arm = arm
        self.shared = shared
        self._admitted = False
        self._in_hand = 0
        self._slots: asyncio.Semaphore | None = None
        self._returned: asyncio.Event | None = None

    @property
    def open(self) -> bool:
        """True if another piece may be brought: the scorer has room, or has taken a piece of this call before."""
        return self._arm.available or (self._admitted and (self._in_hand > 0 or self._arm.reachable))

    @property
    def slots(self) -> asyncio.Semaphore:
        """Bounds the call's requests in flight at the scorer, over all its pieces."""
        if self._slots is None:
            self._slots = self._arm.slots()
        return self._slots

    async def bring(self, instances: int) -> int:
        """Count instances that the scorer is asked about from now on, and return how many it has of this call.

        Waits while the scorer is on trial with another piece of the call.
        """
        while self._in_hand > 0 and not self._arm.reachable:
            if self._returned is None:
                self._returned = asyncio.Event()
            await self._returned.wait()
        self._admitted = True
        self._in_hand += instances
        return self._in_hand

    def take_back(self, instances: int, *, lost: bool) -> None:
        """Count instances that the scorer is done with.

        Args:
            instances: how many.
            lost: the scorer was too late or gone, so that it has to admit the next piece as the first one.
        """
        self._in_hand -= instances
        if lost:
            self._admitted = False
        # Each return has an event of its own: a waiter looks again, and waits for the next one if need be.
        if self._returned is not None:
            self._returned.set()
            self._returned = None
