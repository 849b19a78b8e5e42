"""`majority`: ask every RM, each has one vote (the paper's row "Majority vote"). K calls per instance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router_core.policies.base import AllCalls, Array
from router_core.policies.scale import ScoreScale
from router_core.records import TIE, verdict_of


@dataclass(frozen=True, slots=True)
class MajorityPolicy(AllCalls):
    """One vote per RM that answered; the rewards are the shares of the votes, so that the scale does not matter.

    A response to which no RM gave a reward has none (NaN): nobody could vote for it.

    >>> MajorityPolicy().combine(np.array([[1.0, 2.0, np.nan], [0.0, 5.0, np.nan]]), None).tolist()
    [0.0, 1.0, nan]
    """

    name: str = "majority"

    def combine(self, rewards: Array, scale: ScoreScale | None) -> Array:
        """`vote_shares` of the RMs' verdicts; see `AskAll.combine`."""
        verdicts = [verdict_of(row) for row in rewards.tolist()]
        shares = np.array(vote_shares(verdicts, rewards.shape[1]))
        out: Array = np.where(np.isnan(rewards).all(axis=0), np.nan, shares)
        return out


def vote_shares(verdicts: Sequence[int], n_responses: int) -> list[float]:
    """Share of the votes per response; an RM whose verdict is a tie gives every response the same part of its vote.

    Args:
        verdicts: one per RM that answered: a response's index, or TIE. At least one.
        n_responses: n.

    >>> vote_shares([0, 1, 1, TIE], 2)
    [0.375, 0.625]
    """
    # In whole n-ths of a vote, so that equal shares are equal in every bit.
    ties = sum(verdict == TIE for verdict in verdicts)
    parts = [ties] * n_responses
    for verdict in verdicts:
        if verdict != TIE:
            parts[verdict] += n_responses
    return [part / (n_responses * len(verdicts)) for part in parts]


def majority_verdict(verdicts: Sequence[int], n_responses: int = 2) -> int:
    """The response with most votes; TIE where the best two have equal shares.

    >>> majority_verdict([0, 1, 1, TIE]), majority_verdict([0, 1])
    (1, -1)
    """
    return verdict_of(vote_shares(verdicts, n_responses))
