"""What counts as an answer of `/classify`: one usable reward per item.

Pure: bytes in, numbers out. `service.scorers.rm.client` reads workers' answers with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median_low
from typing import Final

import msgspec

from router_core.records import MAX_ABS_SCORE
from service.scorers.requests import AnswerError, AnswerShapeError
from service.scorers.wire import ClassifyAnswer

LEARNED_FROM: Final = 64
"""Rewards from which an RM's usual size is learned."""

OUTLIER_FACTOR: Final = 100.0
"""A reward so many times larger than the RM's usual one is a fault of the worker, not an opinion."""

SMALLEST_USUAL: Final = 10.0
"""The usual size is taken to be at least this: rewards near 0 at the start do not make a logit of 30 an outlier."""

_DECODER = msgspec.json.Decoder(ClassifyAnswer)


class RewardBound:
    """How large a raw reward of one RM may be. Mutable; one per RM.

    The bound is `OUTLIER_FACTOR` times the lower median size of the first `LEARNED_FROM` rewards, which few outliers
    cannot move. Until there are so many, an answer is judged by the ones so far together with its own: from the second
    reward on, a lone outlier is refused.

    Args:
        limit: the bound, if the pool file sets it; nothing is learned then.
    """

    def __init__(self, limit: float | None = None) -> None:
        self._limit = limit
        self._sizes: list[float] = []

    def limit(self, rewards: Sequence[float]) -> float:
        """Largest size that a reward of this answer may have."""
        return _learned([*self._sizes, *map(abs, rewards)]) if self._limit is None else self._limit

    def check(self, rewards: Sequence[float]) -> None:
        """Judge an answer.

        Raises:
            AnswerError: one of its rewards is larger than the bound.
        """
        _within(rewards, self.limit(rewards))

    def learn(self, rewards: Sequence[float]) -> None:
        """Count those rewards of an answer that keep the bound."""
        if self._limit is not None:
            return
        limit = self.limit(rewards)
        self._sizes.extend(size for size in map(abs, rewards) if size <= limit)
        if len(self._sizes) >= LEARNED_FROM:
            self._limit = _learned(self._sizes)
            self._sizes = []


def _learned(sizes: Sequence[float]) -> float:
    return min(OUTLIER_FACTOR * max(median_low(sizes), SMALLEST_USUAL), MAX_ABS_SCORE)


def _within(rewards: Sequence[float], limit: float) -> None:
    for index, reward in enumerate(rewards):
        if not abs(reward) <= limit:
            raise AnswerError(
                f"the reward of item {index} is {reward:.6g}, beyond the bound of {limit:g} (`reward_limit` in the "
                "pool file)"
            )


def read_rewards(body: bytes, count: int) -> list[float]:
    """The rewards in an answer, in the order of the items.

    Args:
        body: of a response with status 200.
        count: items that were asked about.

    Raises:
        AnswerShapeError: another number of rewards, several classes, or an index twice.
        AnswerError: no `/classify` reply, or a reward that is null, NaN, infinite or beyond `MAX_ABS_SCORE`.
    """
    try:
        rows = _DECODER.decode(body).data
    except msgspec.MsgspecError as error:
        raise AnswerError(f"the answer is not a /classify reply: {error}") from error
    if len(rows) != count:
        raise AnswerShapeError(f"{len(rows)} answers to {count} items")
    rewards = [math.nan] * count
    seen: set[int] = set()
    for row in rows:
        if row.num_classes != 1 or len(row.probs) != 1:
            raise AnswerShapeError(
                f"{row.num_classes} classes; a reward model has one (is it a classifier of several labels?)"
            )
        if not 0 <= row.index < count or row.index in seen:
            raise AnswerShapeError(f"index {row.index} is out of range or repeated")
        seen.add(row.index)
        rewards[row.index] = row.probs[0]
    _within(rewards, MAX_ABS_SCORE)
    return rewards
