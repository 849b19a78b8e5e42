"""History: what a run has decided of late on this gateway, for people who watch it.

Kept in memory, the newest decisions only. `score` adds to it, `watch` reads it.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from router_core.attempts import ASKED
from router_core.records import Instance
from service.usecases.decisions import StoredDecision

NEWEST = 40
"""Decisions that are kept: 100 kB for each run at d = 576, without texts."""

SHOWN_CHARACTERS = 2_000
"""Of a prompt or a response, where texts are kept."""

SHOWN_RESPONSES = 8


@dataclass(frozen=True, slots=True)
class Texts:
    """The beginnings of an instance's texts."""

    prompt: str
    responses: list[str]


@dataclass(frozen=True, slots=True)
class Decided:
    """One decision.

    Attributes:
        decision_id: its name.
        stored: what the store has of it.
        draws: of every arm (K,), −inf for arms that the policy never asks; None where an earlier draw was followed.
        recorded: False if it could not be saved.
        texts: None where texts are not kept.
    """

    decision_id: str
    stored: StoredDecision
    draws: list[float] | None
    recorded: bool
    texts: Texts | None


class DecisionHistory:
    """The newest decisions of one run, and totals since the run was opened here.

    Attributes:
        newest: oldest first.
        decisions: how many there were.
        price: of all of them, in units of the cheapest scorer.
        asked: how many of them each arm was asked about, by index.
    """

    def __init__(self) -> None:
        self.newest: deque[Decided] = deque(maxlen=NEWEST)
        self.decisions = 0
        self.price = 0.0
        self.asked: Counter[int] = Counter()

    def add(self, decided: Decided) -> None:
        """Take one more."""
        self.newest.append(decided)
        self.decisions += 1
        for attempt in decided.stored.attempts:
            self.price += attempt.price
            if attempt.outcome in ASKED:
                self.asked[attempt.arm] += 1


def beginnings(instance: Instance) -> Texts:
    """Return the beginnings of the instance's texts."""
    responses = [response[:SHOWN_CHARACTERS] for response in instance.responses[:SHOWN_RESPONSES]]
    return Texts(instance.prompt[:SHOWN_CHARACTERS], responses)
