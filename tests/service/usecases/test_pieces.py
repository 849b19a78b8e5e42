"""How a batch is cut, and which RMs its pieces may ask."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from router_core.policies import make_policy
from router_core.records import Instance
from service.usecases.pieces import Call, Piece, cut
from service.usecases.runs import Run
from service.workers.protocol import Arm

RUN = cast(Run, SimpleNamespace())


def whole(counts: list[int], policy: str = "random") -> Piece:
    """Instances with so many responses, at places 10, 11, …"""
    instances = [Instance(f"prompt {i}", tuple("r" * (n + 1) for n in range(count))) for i, count in enumerate(counts)]
    return Piece(RUN, make_policy(policy, ("a", "b")), list(range(10, 10 + len(counts))), instances)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 12))
def test_pieces_are_the_whole_in_order_and_none_is_too_large(counts: list[int], responses: int) -> None:
    given_piece = whole(counts)
    pieces = cut(given_piece, responses)
    assert [index for piece in pieces for index in piece.indices] == given_piece.indices
    assert [instance for piece in pieces for instance in piece.instances] == given_piece.instances
    for piece in pieces:
        held = [len(instance.responses) for instance in piece.instances]
        assert sum(held) <= responses or len(held) == 1
    for piece, following in pairwise(pieces):
        first = len(following.instances[0].responses)
        assert sum(len(instance.responses) for instance in piece.instances) + first > responses


def test_a_whole_that_fits_and_one_that_shall_not_be_cut_stay_one_piece() -> None:
    given_piece = whole([2] * 6)
    assert [len(cut(given_piece, responses)) for responses in (0, 4, 11, 12)] == [1, 3, 2, 1]


def test_a_policy_of_one_rm_for_all_is_never_cut() -> None:
    given_piece = whole([2] * 6, "laser")
    assert cut(given_piece, 4) == [given_piece]


@dataclass
class FullArm:
    """What a call asks of an arm before it asks it."""

    available: bool = True
    reachable: bool = True

    def slots(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(1)


async def test_a_call_is_admitted_until_the_rm_is_late() -> None:
    call, arm = Call(0.0, 2), FullArm()
    worker = cast(Arm, arm)
    arm.available = False
    assert not call.can_ask(0, worker)
    arm.available = True
    assert (await call.enter(0, worker, 3))[0] == 3
    arm.available = False
    assert call.can_ask(0, worker)
    assert not call.can_ask(1, worker)
    assert (await call.enter(0, worker, 2))[0] == 5
    call.leave(0, 2, late=False)
    assert call.can_ask(0, worker)
    call.leave(0, 3, late=True)
    assert not call.can_ask(0, worker)
    arm.available = True
    assert (await call.enter(0, worker, 1))[0] == 1
    arm.available = False
    assert call.can_ask(0, worker)


async def test_an_rm_on_trial_is_asked_again_when_the_trial_is_over() -> None:
    call, arm = Call(0.0, 2), FullArm()
    worker = cast(Arm, arm)
    await call.enter(0, worker, 1)
    arm.available = arm.reachable = False
    assert call.can_ask(0, worker)
    waiting = asyncio.create_task(call.enter(0, worker, 1))
    await asyncio.sleep(0)
    assert not waiting.done()
    call.leave(0, 1, late=False)
    assert (await waiting)[0] == 1
