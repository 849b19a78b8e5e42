"""From the probabilities of comparisons to rewards. Pure: numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router_core.tournament import bradley_terry

SHOWN_FIRST = "shown_first"
SHOWN_SECOND = "shown_second"
"""Components: mean probability that a response is preferred, where it is shown first and where it is shown second."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two responses, compared in both orders.

    Attributes:
        pair: indices (i, j) of the responses.
        i_first: probability that the response shown first is better, where that is i.
        j_first: the same where it is j.
    """

    pair: tuple[int, int]
    i_first: float
    j_first: float

    @property
    def probability(self) -> float:
        """Probability that i is better: the mean of both orders."""
        return (self.i_first + 1.0 - self.j_first) / 2.0

    @property
    def consistent(self) -> bool:
        """True if both orders prefer the same response."""
        return (self.i_first - 0.5) * (self.j_first - 0.5) < 0.0


def rewards_of(n: int, comparisons: Sequence[Comparison]) -> list[float]:
    """Return the responses' strengths in log-odds, with mean 0.

    Of two responses, ±½ logit p, so that the margin is the log-odds of the preference; of more, Bradley-Terry
    strengths, whose differences are log-odds too.

    Args:
        n: responses.
        comparisons: that connect them.
    """
    if n == 2:
        p = comparisons[0].probability if comparisons[0].pair == (0, 1) else 1.0 - comparisons[0].probability
        margin = math.log(p) - math.log1p(-p)
        return [margin / 2.0, -margin / 2.0]
    wins = np.zeros((n, n))
    for one in comparisons:
        i, j = one.pair
        wins[i, j] += one.probability
        wins[j, i] += 1.0 - one.probability
    return [float(strength) for strength in bradley_terry(wins)]


def components_of(n: int, comparisons: Sequence[Comparison]) -> dict[str, list[float]]:
    """Return what each order made of each response, mean over its comparisons: their difference is position bias."""
    first: list[list[float]] = [[] for _ in range(n)]
    second: list[list[float]] = [[] for _ in range(n)]
    for one in comparisons:
        i, j = one.pair
        first[i].append(one.i_first)
        first[j].append(one.j_first)
        second[i].append(1.0 - one.j_first)
        second[j].append(1.0 - one.i_first)
    return {
        SHOWN_FIRST: [sum(values) / len(values) for values in first],
        SHOWN_SECOND: [sum(values) / len(values) for values in second],
    }
