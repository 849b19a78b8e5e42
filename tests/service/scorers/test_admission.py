"""Which scorers the pieces of a call may ask."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, cast

from service.scorers.admission import Ticket
from service.usecases.ask import Tickets


@dataclass
class FullArm:
    """What a call asks of an arm before it asks it."""

    available: bool = True
    reachable: bool = True

    def slots(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(1)


async def test_a_ticket_stays_open_until_the_scorer_is_lost() -> None:
    arm = FullArm()
    ticket = Ticket(cast(Any, arm))
    arm.available = False
    assert not ticket.open
    arm.available = True
    assert await ticket.bring(3) == 3
    arm.available = False
    assert ticket.open
    assert await ticket.bring(2) == 5
    ticket.take_back(2, lost=False)
    assert ticket.open
    ticket.take_back(3, lost=True)
    assert not ticket.open
    arm.available = True
    assert await ticket.bring(1) == 1
    arm.available = False
    assert ticket.open


async def test_a_call_asks_who_has_room_or_took_a_piece_of_it() -> None:
    full, free = FullArm(), FullArm()
    tickets = Tickets([cast(Any, full), cast(Any, free)], [1.0, 1.0])
    await tickets[0].bring(1)
    full.available = free.available = False
    assert tickets.closed() == {1}


async def test_a_scorer_on_trial_is_asked_again_when_the_trial_is_over() -> None:
    arm = FullArm()
    ticket = Ticket(cast(Any, arm))
    await ticket.bring(1)
    arm.available = arm.reachable = False
    assert ticket.open
    waiting = asyncio.create_task(ticket.bring(1))
    await asyncio.sleep(0)
    assert not waiting.done()
    ticket.take_back(1, lost=False)
    assert await waiting == 1
