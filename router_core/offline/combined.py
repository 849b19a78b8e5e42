"""Policies that combine several RMs' answers by the learned votes, judged on recorded pairs: `stacked`, `cascade:B`.

Knows a checkpoint, its offsets for the pairs, and what every RM said of them; fits nothing. Called by `offline.table`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.checkpoint import Checkpoint
from router_core.combine import CASCADE, STACKED, Answers, budget_of, follow, right_of, verdicts_of

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a policy did on N pairs: right (N,) in [0, 1], calls (N,), p_right (N,) what it believed."""

    right: Array
    calls: Array
    p_right: Array


def combined_outcomes(
    names: Sequence[str],
    checkpoint: Checkpoint,
    offsets: Array,
    answers: Answers,
    labels: NDArray[np.int64],
    first: NDArray[np.int64],
) -> dict[str, Outcome]:
    """Each policy on each pair; without those that the checkpoint cannot play: it holds no votes, or no multipliers.

    Args:
        names: `stacked`, `cascade:B`.
        checkpoint: fitted to other pairs; its multipliers keep to the budgets.
        offsets: (N, K) of the checkpoint.
        answers: of all K RMs.
        labels: (N,).
        first: (N,) the routed arm; `cascade:1` asks no other.
    """
    votes, multipliers = checkpoint.votes, checkpoint.multipliers
    if votes is None:
        return {}
    found: dict[str, Outcome] = {}
    if STACKED in names:
        verdicts = verdicts_of(votes.probabilities(offsets, answers))
        calls = answers.answered.sum(axis=1).astype(np.float64)
        found[STACKED] = Outcome(right_of(verdicts.preferred, labels, answers.responses), calls, verdicts.right)
    cascades = [name for name in names if name.startswith(CASCADE)]
    if cascades and multipliers is not None:
        paths = follow(votes, offsets, answers, first)
        rows = np.arange(len(labels))
        for name in cascades:
            ends = paths.ends(multipliers.at(budget_of(name)))
            right = right_of(paths.preferred[rows, ends], labels, answers.responses)
            found[name] = Outcome(right, paths.spent[rows, ends], paths.right[rows, ends])
    return {name: found[name] for name in names if name in found}
