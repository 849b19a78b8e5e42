"""How a batch is cut into pieces that go their own ways: while the RMs are asked about some, the next are encoded.

Without it every RM would wait until the last text of the batch is encoded, the encoder until the last RM has answered,
and a single request until the RMs have done with the whole batch. What is here: where a batch is cut, and who waits for
whom. `service.usecases.score` and `.ask` call it; it encodes nothing and asks nobody.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from router_core.policies import Policy
from router_core.records import Instance
from service.usecases.runs import Run
from service.workers.protocol import Arm

PIECES_CHOSEN = 2
"""Pieces of a batch's run and policy that are encoded and drawn at once: one under way, one ready to follow."""

PIECES_ASKED = 4
"""Pieces of a batch's run and policy that RMs are asked about at once: a slow answer to one leaves no RM idle."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive instances of one run and policy.

    Attributes:
        run: their run.
        policy: who draws.
        indices: their places in the call.
        instances: what is scored, by place.
    """

    run: Run
    policy: Policy
    indices: Sequence[int]
    instances: Sequence[Instance]


def cut(whole: Piece, responses: int) -> list[Piece]:
    """The pieces of what one call asks of one run and policy, in order.

    Args:
        whole: all of it.
        responses: responses of a piece, at most, but for an instance that has more; 0 for one piece.

    Returns:
        One piece where the policy draws one RM for all of a request, or where all fit.
    """
    if responses == 0 or whole.policy.one_arm_per_batch or _responses(whole.instances) <= responses:
        return [whole]
    starts, held = [0], 0
    for index, instance in enumerate(whole.instances):
        if held and held + len(instance.responses) > responses:
            starts.append(index)
            held = 0
        held += len(instance.responses)
    return [
        Piece(whole.run, whole.policy, whole.indices[start:end], whole.instances[start:end])
        for start, end in zip(starts, [*starts[1:], len(whole.instances)], strict=True)
    ]


def _responses(instances: Sequence[Instance]) -> int:
    return sum(len(instance.responses) for instance in instances)


class Room:
    """For how many pieces of one run and policy there is room at once, in each stage.

    Attributes:
        choosing: of those that are encoded and drawn.
        asking: of those that RMs are asked about.
    """

    __slots__ = ("asking", "choosing")

    def __init__(self) -> None:
        self.choosing = asyncio.Semaphore(PIECES_CHOSEN)
        self.asking = asyncio.Semaphore(PIECES_ASKED)


class Call:
    """What the pieces of one call share.

    Made for every request, and most have one piece: nothing is made before it is wanted.

    Args:
        deadline: of choosing and asking, by the event loop's clock.
        pieces: how many there are.
    """

    __slots__ = ("_admitted", "_asked", "_returned", "_rooms", "_slots", "alone", "deadline")

    def __init__(self, deadline: float, pieces: int) -> None:
        self.deadline = deadline
        self.alone = pieces == 1
        self._asked: defaultdict[int, int] = defaultdict(int)
        self._admitted: set[int] = set()
        self._slots: dict[int, asyncio.Semaphore] = {}
        self._rooms: dict[tuple[str, str], Room] = {}
        self._returned: asyncio.Event | None = None

    def room(self, piece: Piece) -> Room | None:
        """That of the piece's run and policy: those of another one do not wait for these. None where none can wait."""
        if self.alone:
            return None
        return self._rooms.setdefault((piece.run.name, piece.policy.name), Room())

    def can_ask(self, arm: int, worker: Arm) -> bool:
        """Whether the RM is there. A call is admitted as a whole: one that took a piece of it takes the others too.

        Without that a long batch would find an RM full of its own pieces, or of other batches', and take it for away.
        """
        return worker.available or (arm in self._admitted and (worker.reachable or self._asked[arm] > 0))

    async def enter(self, arm: int, worker: Arm, instances: int) -> tuple[int, asyncio.Semaphore | None]:
        """Count instances that the RM is asked about from now on.

        Where the RM is on trial with another piece of this call, once that one is back.

        Returns:
            How many it is being asked about now, these among them; and the slots of the requests to it, where there are
            other pieces: they have no more of them in flight together than a whole batch has.
        """
        while self._asked[arm] > 0 and not worker.reachable:
            if self._returned is None:
                self._returned = asyncio.Event()
            await self._returned.wait()
        self._asked[arm] += instances
        if self.alone:
            return self._asked[arm], None
        self._admitted.add(arm)
        if arm not in self._slots:
            self._slots[arm] = worker.slots()
        return self._asked[arm], self._slots[arm]

    def leave(self, arm: int, instances: int, *, late: bool) -> None:
        """The RM has answered about these, or was `late`, or gone: then it has to take the next piece anew."""
        self._asked[arm] -= instances
        if late:
            self._admitted.discard(arm)
        # An event of its own for each return: whoever waits looks again, and waits for the next one if need be.
        if self._returned is not None:
            self._returned.set()
            self._returned = None
