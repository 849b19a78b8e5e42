"""Comparisons of n responses two at a time: which pairs are compared, and what strengths the outcomes make.

Used by scorers that compare rather than grade (`service.scorers.judge`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

PRIOR_GAMES: Final = 0.1
"""Games that each response is taken to have drawn against one of strength 1. Keeps the strengths finite."""

TOLERANCE: Final = 1e-6
"""Largest change of a log strength at which the iteration ends."""

MAX_STEPS: Final = 2_000
"""Bound on the iteration; each step costs n² operations."""


def choose_pairs(n: int, bound: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Return the pairs (i, j), i < j, of n responses that are compared, in ascending order.

    All pairs where the bound allows it. Else a random path through all responses, so that every two are connected, and
    then pairs of those that have met the fewest others.

    Args:
        n: responses, at least 2.
        bound: pairs at most; n - 1 are chosen where it is less, since fewer connect nothing.
        rng: of the choice.

    >>> choose_pairs(3, 5, np.random.default_rng(0))
    [(0, 1), (0, 2), (1, 2)]
    """
    left = [(i, j) for i in range(n) for j in range(i + 1, n)]
    if len(left) <= bound:
        return left
    path = rng.permutation(n).tolist()
    chosen = [(min(pair), max(pair)) for pair in pairwise(path)]
    met = [sum(response in pair for pair in chosen) for response in range(n)]
    rng.shuffle(left)
    left = [pair for pair in left if pair not in set(chosen)]
    while len(chosen) < bound:
        i, j = min(left, key=lambda pair: (met[pair[0]] + met[pair[1]], max(met[pair[0]], met[pair[1]])))
        left.remove((i, j))
        chosen.append((i, j))
        met[i] += 1
        met[j] += 1
    return sorted(chosen)


def connects(n: int, pairs: Iterable[tuple[int, int]]) -> bool:
    """Return True if the pairs join all n responses into one whole.

    >>> connects(3, [(0, 1), (1, 2)]), connects(3, [(0, 1)])
    (True, False)
    """
    group = list(range(n))
    for i, j in pairs:
        old, new = group[i], group[j]
        group = [new if one == old else one for one in group]
    return len(set(group)) == 1


def bradley_terry(wins: NDArray[np.float64], *, prior_games: float = PRIOR_GAMES) -> NDArray[np.float64]:
    """Return the log strengths under which the outcomes are most probable: P(i beats j) = γ_i / (γ_i + γ_j).

    Minorisation-maximisation, γ_i ← W_i / Σ_j N_ij / (γ_i + γ_j), of Hunter, "MM algorithms for generalized
    Bradley-Terry models", Annals of Statistics 32 (2004), equation 3. Each response also has `prior_games` games,
    half of them won, against a response of strength 1.

    Args:
        wins: (n, n); `wins[i, j]` is how often i beat j, fractions allowed. The diagonal is not read.
        prior_games: positive.

    Returns:
        (n,) log strengths with mean 0.

    >>> bradley_terry(np.array([[0, 3], [1, 0]], float), prior_games=1e-9).round(3)
    array([ 0.549, -0.549])
    """
    wins = wins - np.diag(np.diag(wins))
    games = wins + wins.T
    won = wins.sum(axis=1) + prior_games / 2
    log_strengths = np.zeros(len(wins))
    for _ in range(MAX_STEPS):
        gamma = np.exp(log_strengths)
        expected = (games / (gamma[:, None] + gamma[None, :])).sum(axis=1) + prior_games / (gamma + 1.0)
        step = np.log(won / expected) - log_strengths
        log_strengths = log_strengths + step
        if np.abs(step).max() < TOLERANCE:
            break
    centred: NDArray[np.float64] = log_strengths - log_strengths.mean()
    return centred
