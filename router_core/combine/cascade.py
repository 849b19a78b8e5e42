"""Cascades over recorded answers: who would be asked next, what would be believed, and where a multiplier stops.

Knows answers of all arms, as only recorded data have them. Called by `offline.votes`, `offline.table` and `frontier`.
A plan that runs asks one step of the same rule: the largest `call_values` per price, while it exceeds the multiplier.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.combine.answers import Answers
from router_core.combine.pacer import HIGHEST, LOWEST
from router_core.combine.value import call_values
from router_core.combine.votes import Votes, verdicts_of
from router_core.errors import NotFiniteError, ShapeMismatchError

Array = NDArray[np.float64]

_BISECTIONS = 50


@dataclass(frozen=True, slots=True, eq=False)
class Paths:
    """Each instance's whole sequence; a multiplier only decides where it ends. T calls at most.

    Attributes:
        arms: (B, T) int64, in the order of asking; −1 once no arm is left.
        preferred: (B, T) int64, the verdict after each call, or TIE.
        right: (B, T) float64, its `p_right`.
        values: (B, T) float64, value per unit of price of the call after this one; −inf after the last.
        spent: (B, T) float64, price of the calls so far.
    """

    arms: NDArray[np.int64]
    preferred: NDArray[np.int64]
    right: Array
    values: Array
    spent: Array

    def ends(self, multiplier: float) -> NDArray[np.int64]:
        """(B,) index of the last call: the first one after which another is worth no more than the multiplier."""
        return np.asarray((self.values <= multiplier).argmax(axis=1))

    def price(self, multiplier: float) -> float:
        """Mean price of an instance."""
        return float(self.spent[np.arange(len(self.spent)), self.ends(multiplier)].mean())


@dataclass(frozen=True, slots=True, eq=False)
class Multipliers:
    """μ by budget, as training pairs had it with equal prices.

    Attributes:
        budgets: (G,) mean calls per instance, rising, from 1.
        values: (G,) the multiplier that keeps to it, falling.
    """

    budgets: Array
    values: Array

    def __post_init__(self) -> None:
        if self.budgets.ndim != 1 or self.budgets.shape != self.values.shape or not len(self.budgets):
            raise ShapeMismatchError(
                f"multipliers: budgets {self.budgets.shape} and values {self.values.shape} must be (G,); train again"
            )
        if not ((self.values > 0).all() and np.isfinite(self.budgets).all()):
            raise NotFiniteError("multipliers must be positive and budgets finite; train again")

    def at(self, budget: float) -> float:
        """μ for a budget; the last one beyond the grid. With the budget 1 no second call is made.

        >>> round(Multipliers(np.array([1.0, 2.0]), np.array([1.0, 0.01])).at(1.5), 9)
        0.1
        """
        value = float(np.exp(np.interp(budget, self.budgets, np.log(self.values))))
        return min(max(value, LOWEST), HIGHEST)

    def rounded(self) -> Multipliers:
        """The same numbers as a checkpoint's float32 tensors hold them."""
        return Multipliers(*(a.astype(np.float32).astype(np.float64) for a in (self.budgets, self.values)))

    @classmethod
    def of(cls, paths: Paths, step: float = 0.05) -> Multipliers:
        """On a grid of budgets from 1 to what asking as long as the paths go costs; equal prices of 1."""
        last = float(paths.spent.max(axis=1).mean())
        budgets = np.linspace(1.0, last, max(round((last - 1.0) / step), 1) + 1)
        # With the budget 1 nothing is ever worth a second call, on pairs to come either.
        return cls(budgets, np.array([HIGHEST, *(multiplier_for(paths, float(budget)) for budget in budgets[1:])]))


def follow(
    votes: Votes,
    offsets: Array,
    answers: Answers,
    first: NDArray[np.int64],
    prices: Array | None = None,
    calls: int | None = None,
    multiplier: float | None = None,
) -> Paths:
    """Ask the first arm, then again and again the one whose answer is worth most for its price.

    Args:
        votes: learned.
        offsets: (B, K).
        answers: of every arm that may be asked; the others are never asked.
        first: (B,) the routed arm of each instance.
        prices: (K,) at least 1, in units of the cheapest; None: equal.
        calls: T at most; None: K.
        multiplier: μ where each path ends; what would come after is not worked out. None: whole paths.
    """
    B, K = offsets.shape
    T = min(calls or K, K)
    least = -np.inf if multiplier is None else multiplier
    prices = np.ones(K) if prices is None else prices
    rows = np.arange(B)
    asked, spent = np.zeros((B, K), dtype=bool), np.zeros(B)
    nxt, going = first.astype(np.int64), answers.answered[rows, first]
    arms, preferred = np.full((B, T), -1, dtype=np.int64), np.full((B, T), -1, dtype=np.int64)
    right, values, costs = np.empty((B, T)), np.full((B, T), -np.inf), np.empty((B, T))
    for t in range(T):
        if t and not going.any():
            preferred[:, t:], right[:, t:], costs[:, t:] = (
                preferred[:, t - 1, None],
                right[:, t - 1, None],
                spent[:, None],
            )
            break
        asked[rows[going], nxt[going]] = True
        spent = spent + np.where(going, prices[nxt], 0.0)
        arms[:, t] = np.where(going, nxt, -1)
        known = answers.only(asked)
        verdicts = verdicts_of(votes.probabilities(offsets, known))
        preferred[:, t], right[:, t], costs[:, t] = verdicts.preferred, verdicts.right, spent
        if t + 1 < T:
            left = answers.answered & ~asked
            worth = np.where(left, call_values(votes, offsets, known) / prices, -np.inf)
            nxt = worth.argmax(axis=1)
            values[:, t] = worth[rows, nxt]
            going = left[rows, nxt] & (worth[rows, nxt] > least)
    return Paths(arms, preferred, right, values, costs)


def multiplier_for(paths: Paths, budget: float) -> float:
    """The smallest multiplier, `LOWEST` at least, at which an instance costs no more than the budget on average;
    `HIGHEST` where none does.

    Args:
        paths: of training pairs, never of those that are judged.
        budget: mean price.
    """
    if paths.price(LOWEST) <= budget:
        return LOWEST
    low, high = LOWEST, HIGHEST
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        if paths.price(middle) <= budget:
            high = middle
        else:
            low = middle
    return high
