"""Cascades over recorded answers: who would be asked next, what would be believed, and where a multiplier stops.

Knows answers of all arms, as only recorded data have them. Called by `offline.votes`, `offline.table` and `frontier`.
A plan that runs asks one step of the same rule: the largest `call_values` per price, while it exceeds the multiplier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.combine.answers import Answers
from router_core.combine.pacer import HIGHEST, LOWEST
from router_core.combine.value import call_values
from router_core.combine.votes import Votes, verdicts_of
from router_core.errors import HyperparameterError, NotFiniteError, ShapeMismatchError
from router_core.records import TIE

Array = NDArray[np.float64]

_BISECTIONS = 50

MOST_CALLS = 10
"""Multipliers are found for budgets of up to so many calls."""

_UNASKED, _UNKNOWN = -2.0, -1.0
"""What stands in a checkpoint for the verdict of an arm that was not asked, and for a margin that is not known."""

_STEPS = 241
"""Multipliers that are tried, from the highest to the lowest, where prices differ."""

_PATHS = 2048
"""Paths that are followed for that, at most."""

_NOTHING = 1e-9


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
    """μ by budget, as training pairs had it.

    Attributes:
        budgets: (G,) mean price per instance, rising, from 1 where prices are equal.
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
    def practised(cls, votes: Votes, practice: Practice, prices: Array) -> Multipliers:
        """Return those of any pool and prices, from pairs with held-out offsets.

        Args:
            votes: learned, of the practice's arms.
            practice: the pairs.
            prices: (K,) in units of the cheapest.
        """
        if (prices == prices[0]).all():
            first = practice.first(prices, 0.0)
            return cls.of(follow(votes, practice.offsets, practice.answers, first, calls=MOST_CALLS))
        values = np.geomspace(HIGHEST, LOWEST, _STEPS)
        spent = practice.prices_of(votes, prices, values)
        rising = np.maximum.accumulate(spent)
        # Of equal spending the lowest multiplier counts, but for the first: with the least budget nothing is asked.
        last = np.concatenate([np.diff(rising) > _NOTHING, [True]])
        budgets = np.concatenate([rising[:1], rising[last] + _NOTHING])
        return cls(budgets, np.concatenate([values[:1], values[last]]))

    @classmethod
    def of(cls, paths: Paths, step: float = 0.05) -> Multipliers:
        """On a grid of budgets from 1 to what asking as long as the paths go costs; equal prices of 1."""
        last = float(paths.spent.max(axis=1).mean())
        budgets = np.linspace(1.0, last, max(round((last - 1.0) / step), 1) + 1)
        # With the budget 1 nothing is ever worth a second call, on pairs to come either.
        return cls(budgets, np.array([HIGHEST, *(multiplier_for(paths, float(budget)) for budget in budgets[1:])]))


@dataclass(frozen=True, slots=True, eq=False)
class Practice:
    """Pairs as fits saw them that had not seen their groups; multipliers of any pool and prices come from them.

    Attributes:
        offsets: (N, K) held out.
        answers: of the arms that were recorded.
    """

    offsets: Array
    answers: Answers

    def __post_init__(self) -> None:
        if self.offsets.shape != self.answers.verdicts.shape:
            raise ShapeMismatchError(
                f"practice: offsets {self.offsets.shape} and answers {self.answers.verdicts.shape} must both be (N, K)"
            )

    def select(self, arms: Sequence[int]) -> Practice:
        """Return the part of these arms, in this order, without pairs that none of them has answered."""
        index, said = list(arms), self.answers
        rows = np.flatnonzero(said.answered[:, index].any(axis=1))
        part = Answers(said.verdicts[:, index], said.answered[:, index], said.margins[:, index], said.responses)
        return Practice(self.offsets[rows][:, index], part.rows(rows))

    def rounded(self) -> Practice:
        """Return the same numbers as a checkpoint's float32 tensors hold them."""
        exact = self.answers.margins.astype(np.float32).astype(np.float64)
        return Practice(
            self.offsets.astype(np.float32).astype(np.float64),
            Answers(self.answers.verdicts, self.answers.answered, exact, self.answers.responses),
        )

    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Return offsets, verdicts, margins and numbers of responses as finite float32; `of_arrays` reads them back."""
        said = self.answers
        return (
            self.offsets.astype(np.float32),
            np.where(said.answered, said.verdicts, _UNASKED).astype(np.float32),
            np.where(np.isfinite(said.margins), said.margins, _UNKNOWN).astype(np.float32),
            said.responses.astype(np.float32),
        )

    @classmethod
    def of_arrays(cls, offsets: Array, verdicts: Array, margins: Array, responses: Array) -> Practice:
        """Return what `arrays` gave."""
        answered = verdicts != _UNASKED
        said = Answers(
            np.where(answered, verdicts, TIE).astype(np.int64),
            answered,
            np.where(margins == _UNKNOWN, np.nan, margins),
            responses.astype(np.int64),
        )
        return cls(offsets, said)

    def first(self, prices: Array, multiplier: float) -> NDArray[np.int64]:
        """Return the arm (N,) that a cascade asks first among those recorded."""
        return first_arms(np.where(self.answers.answered, self.offsets, -np.inf), prices, multiplier)

    def prices_of(self, votes: Votes, prices: Array, multipliers: Array) -> Array:
        """Return what cascades cost on these pairs, on average, at each multiplier: (M,) to (M,).

        A multiplier decides with which price a path begins and where it ends; what lies between does not depend on it.
        So there is one path for the best arm of each price. Where there are many prices, fewer pairs stand for all.
        """
        levels = np.unique(prices)
        part = self._rows(slice(max(_PATHS // len(levels), 1)))
        rows = np.arange(len(part.offsets))
        open_ = np.where(part.answers.answered, part.offsets, -np.inf)
        starts = [np.where(prices == level, open_, -np.inf) for level in levels]
        best = np.stack([start.max(axis=1) for start in starts], axis=1)
        paths = [
            follow(votes, part.offsets, part.answers, start.argmax(axis=1), prices, MOST_CALLS) for start in starts
        ]
        found = np.empty(len(multipliers))
        for m, multiplier in enumerate(multipliers.tolist()):
            chosen = (best - multiplier * levels).argmax(axis=1)
            spent = np.stack([path.spent[rows, path.ends(multiplier)] for path in paths], axis=1)
            found[m] = spent[rows, chosen].mean()
        return found

    def _rows(self, rows: slice) -> Practice:
        index = np.arange(len(self.offsets))[rows]
        return Practice(self.offsets[index], self.answers.rows(index))

    def play(self, votes: Votes, prices: Array, multiplier: float) -> Paths:
        """Return what a cascade does on these pairs."""
        first = self.first(prices, multiplier)
        return follow(votes, self.offsets, self.answers, first, prices, MOST_CALLS, multiplier)


def first_arms(offsets: Array, prices: Array, multiplier: float) -> NDArray[np.int64]:
    """argmax_k o_k − μ·(price_k − least price): the first call is worth its price, too. (B, K) to (B,).

    With equal prices it is the best arm, whatever the multiplier.

    >>> first_arms(np.array([[0.8, 0.9]]), np.array([1.0, 4.0]), 0.05).tolist()
    [0]
    """
    return np.asarray((offsets - surcharges(prices, multiplier)).argmax(axis=1))


def surcharges(prices: Array, multiplier: float) -> Array:
    """μ·(price_k − least price), (K,): what a draw loses for its arm's price; all 0 where prices are equal."""
    out: Array = multiplier * (prices - prices.min())
    return out


def relative_prices(prices: Sequence[float]) -> Array:
    """Prices in units of the cheapest, (K,).

    >>> relative_prices([0.5, 2.0]).tolist()
    [1.0, 4.0]

    Raises:
        HyperparameterError: one is not a positive number.
    """
    values = np.array(prices, dtype=np.float64)
    if not (np.isfinite(values).all() and (values > 0.0).all()):
        raise HyperparameterError(f"prices {list(prices)}: each must be a positive number")
    relative: Array = values / values.min()
    return relative


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
