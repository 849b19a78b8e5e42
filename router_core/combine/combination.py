"""What a checkpoint knows about combining: votes, and what budgets buy at the prices of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from router_core.combine.cascade import Multipliers, Practice
from router_core.combine.names import STACKED, budget_of
from router_core.combine.pacer import Pacer
from router_core.combine.votes import Votes
from router_core.errors import ShapeMismatchError

Array = NDArray[np.float64]

_START = 0.01
"""μ at the start where nothing says better: about right for two calls of four to nine RMs."""


@dataclass(frozen=True, slots=True, eq=False)
class Combination:
    """A checkpoint's learned votes, at the prices of a pool.

    Attributes:
        votes: of K arms.
        multipliers: μ by budget at these prices; None: not known.
        practice: pairs that they can be found on for other prices; None where there are none.
        prices: (K,) in units of the cheapest; None: equal.
    """

    votes: Votes
    multipliers: Multipliers | None = None
    practice: Practice | None = None
    prices: Array | None = None

    @property
    def costs(self) -> Array:
        """Return the prices (K,), 1 each where they are equal."""
        return np.ones(self.votes.n_arms) if self.prices is None else self.prices

    def priced(self, prices: Array | None = None) -> Combination:
        """Return the same at other prices, with multipliers found anew unless the prices are those they were found at.

        Args:
            prices: (K,) in units of the cheapest; None: equal.

        Raises:
            ShapeMismatchError: not one price for each arm.
        """
        K = self.votes.n_arms
        if prices is not None and prices.shape != (K,):
            raise ShapeMismatchError(f"prices have shape {prices.shape}, expected one for each of {K} arms")
        uneven = prices if prices is not None and not (prices == prices[0]).all() else None
        if uneven is None and self.prices is None and self.multipliers is not None:
            return self
        made = replace(self, prices=uneven)
        if self.practice is None:
            return replace(made, multipliers=None)
        return replace(made, multipliers=Multipliers.practised(self.votes, self.practice, made.costs))

    def placed(self, rows: Sequence[int | None], prices: Array) -> Combination:
        """Return the votes of a pool that has changed, at its prices.

        Args:
            rows: per arm its row here; None for an arm without a vote.
            prices: (K,) in units of the cheapest arm that is asked.
        """
        there = [arm for arm, row in enumerate(rows) if row is not None]
        index = [row for row in rows if row is not None]
        multipliers = None
        if there and self.practice is not None:
            costs = prices[there] / prices[there].min()
            part = Combination(self.votes.select(index), None, self.practice.select(index)).priced(costs)
            multipliers = part.multipliers
        uneven = None if (prices == prices[0]).all() else prices
        return Combination(self.votes.placed(rows), multipliers, None, uneven)

    def multiplier(self, budget: float) -> float:
        """Return the μ at which instances cost the budget on average, as the training pairs had it."""
        return _START if self.multipliers is None else self.multipliers.at(budget)

    def pacer(self, name: str) -> Pacer | None:
        """Return the pacer of `cascade:B` at the start; None for `stacked`, which asks all."""
        if name == STACKED:
            return None
        budget = budget_of(name)
        # One instance moves ln μ by no more than a call of the dearest arm would at equal prices.
        return Pacer(budget, self.multiplier(budget), rate=Pacer.rate_at(float(self.costs.max())))
