"""How a batch is cut."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from router_core.policies import make_policy
from router_core.records import Instance
from service.usecases.pieces import Piece, cut
from service.usecases.runs import Run

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
