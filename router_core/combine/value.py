"""What one more answer is worth: the expected gain in the probability of being right (docs/math/combination.md).

Knows votes, offsets and prices; nothing of budgets, and draws nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router_core.combine.answers import Answers
from router_core.combine.votes import Votes, log_odds, per_response, softmax, voters_log

Array = NDArray[np.float64]

FORESIGHT = 0.25
"""κ: weight of steps towards another verdict that one call alone cannot bring about. Anything from 0.05 to 1 measured
alike (docs/experiments.md); without it no call is worth anything where it takes two to turn the verdict."""


def call_values(votes: Votes, offsets: Array, answers: Answers) -> Array:
    """v_j = E[Φ(P after arm j's answer)] − Φ(E[P after]), Φ(P) = max_i P_i + ½κ Σ_i P_i².

    Arm j prefers response i with probability q_i = p_j P_i + (1 − p_j)(1 − P_i)/(n − 1), P as of now and p_j the
    probability that it finds the best of n, 1/(1 + (n − 1)(1 − o_j)/o_j); each of its typical margins is as likely as
    another. The first part of Φ is the gain in accuracy that this one call brings; the second, small and never 0, what
    it does towards turning the verdict with calls that follow.

    Args:
        votes: learned.
        offsets: (B, K), o_k(x) with the posterior's residual where there is one.
        answers: so far.

    Returns:
        (B, K) float64, at least 0 and below 1. Those of arms that have answered mean nothing: leave them out. 0 with
        one response.
    """
    n = int(answers.responses.max(initial=1))
    constant, growth = votes.strengths(offsets, answers.margins)
    now = softmax(log_odds(constant, growth, answers), answers.responses)
    heard = predicted(now, offsets, answers.responses)
    voted = answers.votes
    more = voters_log(voted.sum(axis=1) + 1)[:, None]
    base = per_response(np.where(voted, constant + more * growth, 0.0), answers.verdicts, n)
    values = np.zeros_like(offsets)
    outcomes = votes.expected_strengths(offsets)
    for c, g in outcomes:
        w = c + more * g
        after = softmax(base[:, None, None, :] + w[:, :, None, None] * np.eye(n), answers.responses)
        mean = np.einsum("bki,bkij->bkj", heard, after)
        values += np.einsum("bki,bki->bk", heard, _worth(after)) - _worth(mean)
    return np.maximum(values / len(outcomes), 0.0)


def next_call(
    values: Array, prices: Array, multiplier: float | Array, available: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], Array]:
    """Is another call worth its price, and with which probability each arm is drawn for it.

    An arm's probability is proportional to its surplus value/price − μ, so that no arm is drawn whose answer is not
    worth asking for, and the propensity of a sequence of calls is the product of exact ones.

    Args:
        values: (B, K) of `call_values`.
        prices: (K,), in units of the cheapest.
        multiplier: μ, one for all or (B, 1).
        available: (B, K), arms that apply and have not been asked.

    Returns:
        (B,) True where another call is made, and (B, K) probabilities: rows sum to 1 there, and are 0 elsewhere.

    >>> v, free = np.array([[0.03, 0.02, 0.3]]), np.array([[True, True, False]])
    >>> next_call(v, np.ones(3), 0.01, free)[1].round(3).tolist()
    [[0.667, 0.333, 0.0]]
    """
    surplus = np.where(available, np.maximum(values / prices - multiplier, 0.0), 0.0)
    total = surplus.sum(axis=1)
    going = total > 0.0
    return going, surplus / np.where(going, total, 1.0)[:, None]


def predicted(now: Array, offsets: Array, responses: NDArray[np.int64]) -> Array:
    """q_i: probability that an arm will prefer response i; now (B, n), offsets (B, K), responses (B,) to (B, K, n)."""
    # The only response there is cannot be misjudged.
    o = np.where(responses[:, None] == 1, 1.0, np.clip(offsets, 0.0, 1.0))[:, :, None]
    others = np.maximum(responses - 1, 1)[:, None, None]
    o = o / (o + others * (1.0 - o))
    own = (np.arange(now.shape[1]) < responses[:, None])[:, None, :]
    P = now[:, None, :]
    return np.where(own, o * P + (1.0 - o) * (1.0 - P) / others, 0.0)


def _worth(probabilities: Array) -> Array:
    """Φ over the last axis."""
    worth: Array = probabilities.max(axis=-1) + 0.5 * FORESIGHT * np.square(probabilities).sum(axis=-1)
    return worth
