"""Whoever says which of two responses is better, and the checker as one (for the upper bound only).

Knows tasks and nothing of policies, tensors or the network. Called by `dpo`; the running service is in `service_judge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from loadtests.table1.task import Task
from loadtests.table1.tasks import check


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt with two different responses."""

    task: Task
    responses: tuple[str, str]

    def truth(self) -> int | None:
        """Index of the only right response; None where both are right or both wrong."""
        a, b = (check(self.task, response) for response in self.responses)
        return None if a == b else int(b)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was said of a pair.

    Attributes:
        preferred: index of the better response; None on a tie.
        model: the RM that was asked, or the policy's name where all were.
        calls: RM calls it took.
        decision: id for the feedback; "" where nobody learns.
    """

    preferred: int | None
    model: str
    calls: int
    decision: str


class Judge(Protocol):
    """Says which responses are better, and is told how it went."""

    seconds: float
    """Time spent waiting for it."""

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """A verdict per pair."""

    def learn(self, pairs: Sequence[Pair], verdicts: Sequence[Verdict], losses: Sequence[float]) -> None:
        """Hand the per-pair losses back; returns when they were learned from."""


class Checker:
    """The true checker as judge: what a perfect reward model would give. Never a row of the paper's table."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """The right response; a tie where both are right or both wrong."""
        return [Verdict(pair.truth(), "checker", 0, "") for pair in pairs]

    def learn(self, pairs: Sequence[Pair], verdicts: Sequence[Verdict], losses: Sequence[float]) -> None:
        """Nothing to learn."""
