"""How a batch is cut into pieces that go their own ways: while the RMs are asked about some, the next are encoded.

Without it every RM would wait until the last text of the batch is encoded, the encoder until the last RM has answered,
and a single request until the RMs have done with the whole batch. Called by `service.usecases.score`; it encodes
nothing and asks nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from router_core.policies import Policy
from router_core.records import Instance
from service.usecases.runs import Run

PIECES_ASKED = 4
"""Pieces of a batch's run and policy that RMs are asked about at once: a slow answer to one leaves no RM idle."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive instances of one run and policy.

    Attributes:
        run: their run.
        policy: who draws, as the run's pool was when the call came.
        indices: their places in the call.
        instances: what is scored, by place.
        named: False if the policy is the run's own, which another one takes the place of where the pool changes.
    """

    run: Run
    policy: Policy
    indices: Sequence[int]
    instances: Sequence[Instance]
    named: bool = True


def divide(piece: Piece, places: Collection[int]) -> tuple[Piece, Piece]:
    """Return the part of a piece at these places of it, and the rest."""
    at = [place for place in range(len(piece.instances)) if place in places]
    rest = [place for place in range(len(piece.instances)) if place not in places]
    first, second = (
        replace(piece, indices=[piece.indices[i] for i in part], instances=[piece.instances[i] for i in part])
        for part in (at, rest)
    )
    return first, second


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
        replace(whole, indices=whole.indices[start:end], instances=whole.instances[start:end])
        for start, end in zip(starts, [*starts[1:], len(whole.instances)], strict=True)
    ]


def _responses(instances: Sequence[Instance]) -> int:
    return sum(len(instance.responses) for instance in instances)
