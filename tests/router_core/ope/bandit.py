"""A small bandit whose truth is known, and logs of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router_core.ope import LoggedData, one_reward_per_row, with_shadows
from router_core.propensity import argmax_propensities

POOL = ("a", "b", "c")

VALUE = np.array([[0.9, 0.4, 0.6], [0.3, 0.8, 0.5], [0.5, 0.5, 0.7], [0.2, 0.6, 0.9]])
"""Chance of reward 1 at each of four contexts, per arm."""

CONTEXTS = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.6, 0.8, 0.0]], np.float32)

BEST = np.eye(3)[VALUE.argmax(axis=1)]
"""(4, K): the best arm of each context."""


def truth(pi: NDArray[np.float64]) -> float:
    """Value of a policy (4, K) when all contexts are as likely."""
    return float((pi * VALUE).sum(axis=1).mean())


def hand_log(
    arm: list[int],
    reward: list[float],
    propensities: list[list[float]],
    *,
    available: list[list[bool]] | None = None,
) -> LoggedData:
    """A log of a few rows, given in full."""
    e = np.array(propensities)
    arms = np.array(arm, np.int64)
    can = np.ones(e.shape, np.bool_) if available is None else np.array(available)
    rewards = one_reward_per_row(arms, np.array(reward), e.shape[1])
    return LoggedData(tuple("abcdef"[: e.shape[1]]), np.ones((len(arm), 1), np.float32), arms, e, can, rewards)


def random_log(n: int, rng: np.random.Generator) -> tuple[LoggedData, NDArray[np.int64]]:
    """n rows of fixed, uneven exploration, and which context each was."""
    context = rng.integers(4, size=n)
    e = np.broadcast_to([0.6, 0.3, 0.1], (n, 3)).copy()
    arm = (rng.random((n, 1)) > e.cumsum(axis=1)).sum(axis=1)
    return _log(context, arm, e, rng), context


def thompson_log(n: int, rng: np.random.Generator, scale: float = 1.0) -> tuple[LoggedData, NDArray[np.int64]]:
    """n rows of a sampler that learns each arm's mean (it sees no context), and which context each was."""
    context = rng.integers(4, size=n)
    arm, e = np.empty(n, np.int64), np.empty((n, 3))
    rewards = (rng.random((n, 3)) < VALUE[context]).astype(np.float64)
    sums, counts = np.full(3, 0.5), np.ones(3)
    for t in range(n):
        means, sds = sums / counts, scale / np.sqrt(counts)
        e[t] = argmax_propensities(means[None], sds[None])[0]
        arm[t] = int((means + sds * rng.standard_normal(3)).argmax())
        sums[arm[t]] += rewards[t, arm[t]]
        counts[arm[t]] += 1
    return _log(context, arm, e, rng, rewards), context


def _log(
    context: NDArray[np.int64],
    arm: NDArray[np.int64],
    e: NDArray[np.float64],
    rng: np.random.Generator,
    rewards: NDArray[np.float64] | None = None,
) -> LoggedData:
    if rewards is None:
        rewards = (rng.random(e.shape) < VALUE[context]).astype(np.float64)
    asked = one_reward_per_row(arm, rewards[np.arange(len(arm)), arm], 3)
    return LoggedData(POOL, CONTEXTS[context], arm, e, np.ones(e.shape, np.bool_), asked)


DRAWN = np.array([[0.6, 0.3, 0.5], [0.5, 0.6, 0.4], [0.4, 0.3, 0.6], [0.5, 0.4, 0.6]])
"""Means of the Gaussian draws of a sampler that stands still, at each context; their sd is `SPREAD`."""

SPREAD = 0.25

FAILS = np.array([[True, False, False], [False, False, False], [True, False, False], [False, False, False]])
"""(4, K): arm "a" fails when it is asked at the first and the third context, the best draw that is left answers."""

LEFT = argmax_propensities(np.where(FAILS, -np.inf, DRAWN), np.full((4, 3), SPREAD))
"""(4, K): who answers, among those that do not fail."""

FIRST = argmax_propensities(DRAWN, np.full((4, 3), SPREAD))
"""(4, K): who is asked first."""


def value_of_first() -> NDArray[np.float64]:
    """(4, K): expected reward of asking an arm first. P(j next | a first) = (P(j largest without a) − P(j))/P(a)."""
    after = np.where(FAILS, 0.0, LEFT - FIRST)
    following = (after * VALUE).sum(axis=1, keepdims=True) / np.maximum(after.sum(axis=1, keepdims=True), 1e-12)
    return np.where(FAILS, following, VALUE)


def truth_of_first(pi: NDArray[np.float64]) -> float:
    """Value of a policy (4, K) that chooses whom to ask first, in the log of `failing_logs`."""
    return float((pi * value_of_first()).sum(axis=1).mean())


def failing_logs(
    n: int, rng: np.random.Generator, shadow: float = 0.0
) -> tuple[LoggedData, LoggedData, NDArray[np.int64]]:
    """n rows in which arm "a" fails at some contexts: by the first choice; with failed arms masked; the contexts.

    Args:
        n: rows.
        rng: of all that is drawn.
        shadow: share of the rows, of the first log only, whose other arms are asked too.
    """
    context = rng.integers(4, size=n)
    draws = DRAWN[context] + SPREAD * rng.standard_normal((n, 3))
    first, answered = draws.argmax(axis=1), np.where(FAILS[context], -np.inf, draws).argmax(axis=1)
    rewards = (rng.random((n, 3)) < VALUE[context]).astype(np.float64)
    outcome = rewards[np.arange(n), answered]
    everywhere = np.ones((n, 3), np.bool_)
    seen = one_reward_per_row(first, outcome, 3)
    told = (rng.random(n) < shadow)[:, None]
    seen = np.where(told, np.where(FAILS[context], outcome[:, None], rewards), seen)
    e = with_shadows(FIRST[context], first, everywhere, seen)
    by_first = LoggedData(POOL, CONTEXTS[context], first, e, everywhere, seen)
    fell = (first != answered)[:, None]
    masked = LoggedData(
        POOL,
        CONTEXTS[context],
        answered,
        np.where(fell, LEFT[context], FIRST[context]),
        ~(fell & FAILS[context]),
        one_reward_per_row(answered, outcome, 3),
    )
    return by_first, masked, context
