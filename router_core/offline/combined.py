"""Policies that combine several RMs' answers by the learned votes, judged on recorded pairs: `stacked`, `cascade:B`.

Knows a checkpoint, its offsets for the pairs, and what every RM said of them; fits nothing. Called by `offline.table`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.checkpoint import Checkpoint
from router_core.combine import CASCADE, STACKED, Answers, budget_of, first_arms, follow, right_of, verdicts_of

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a policy did on N pairs: right (N,) in [0, 1], calls and price (N,), p_right (N,) what it believed."""

    right: Array
    calls: Array
    price: Array
    p_right: Array


def combined_outcomes(
    names: Sequence[str],
    checkpoint: Checkpoint,
    offsets: Array,
    answers: Answers,
    labels: NDArray[np.int64],
    first: NDArray[np.int64],
    prices: Array | None = None,
) -> dict[str, Outcome]:
    """Each policy on each pair; without those that the checkpoint cannot play: it holds no votes, or no multipliers.

    Args:
        names: `stacked`, `cascade:B`.
        checkpoint: fitted to other pairs; its multipliers keep to the budgets.
        offsets: (N, K) of the checkpoint.
        answers: of all K RMs.
        labels: (N,).
        first: (N,) the routed arm, which a cascade asks first where prices are equal; `cascade:1` asks no other.
        prices: (K,) in units of the cheapest; None: equal.
    """
    if checkpoint.combination is None:
        return {}
    combination = checkpoint.combination.priced(prices)
    votes, costs = combination.votes, combination.costs
    found: dict[str, Outcome] = {}
    for name in names:
        if name == STACKED:
            verdicts = verdicts_of(votes.probabilities(offsets, answers))
            asked = answers.answered
            right = right_of(verdicts.preferred, labels, answers.responses)
            found[name] = Outcome(right, asked.sum(axis=1).astype(np.float64), asked @ costs, verdicts.right)
        elif name.startswith(CASCADE) and combination.multipliers is not None:
            multiplier = combination.multiplier(budget_of(name))
            arms = first if combination.prices is None else first_arms(offsets, costs, multiplier)
            paths = follow(votes, offsets, answers, arms, costs, multiplier=multiplier)
            right = right_of(paths.preferred[:, -1], labels, answers.responses)
            calls = (paths.arms >= 0).sum(axis=1).astype(np.float64)
            found[name] = Outcome(right, calls, paths.spent[:, -1], paths.right[:, -1])
    return found
