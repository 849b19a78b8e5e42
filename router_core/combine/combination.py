"""What a checkpoint knows about combining: votes, and the multipliers that budgets start from."""

from __future__ import annotations

from dataclasses import dataclass

from router_core.combine.cascade import Multipliers
from router_core.combine.names import STACKED, budget_of
from router_core.combine.pacer import Pacer
from router_core.combine.votes import Votes

_START = 0.01
"""μ at the start of a run whose checkpoint does not say: about right for two calls of four to nine RMs."""


@dataclass(frozen=True, slots=True, eq=False)
class Combination:
    """A checkpoint's learned votes, and its multipliers where it holds any for this pool."""

    votes: Votes
    multipliers: Multipliers | None = None

    def pacer(self, name: str) -> Pacer | None:
        """Return the pacer of `cascade:B` at the start; None for `stacked`, which asks all."""
        if name == STACKED:
            return None
        budget = budget_of(name)
        return Pacer(budget, _START if self.multipliers is None else self.multipliers.at(budget))
