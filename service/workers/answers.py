"""What counts as an answer of `/classify`: one usable reward per item.

Pure: bytes in, numbers out. `service.workers.requests` reads workers' answers with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Final

import msgspec

from router_core.records import MAX_ABS_SCORE
from service.workers.wire import ClassifyAnswer

LEARNED_FROM: Final = 64
"""Rewards from which an RM's usual size is learned."""

OUTLIER_FACTOR: Final = 100.0
"""A reward so many times larger than the RM's usual one is a fault of the worker, not an opinion."""

SMALLEST_USUAL: Final = 10.0
"""The usual size is taken to be at least this: rewards near 0 at the start do not make a logit of 30 an outlier."""

_DECODER = msgspec.json.Decoder(ClassifyAnswer)


class AnswerError(Exception):
    """The body does not hold one usable reward per item; the message says why, without addresses."""


class AnswerShapeError(AnswerError):
    """Of another shape than asked for: no input makes a reward model do that."""


class RewardBound:
    """How large a raw reward of one RM may be. Mutable; one per RM.

    Args:
        limit: the bound, if the pool file sets it. Otherwise it is `MAX_ABS_SCORE` until `LEARNED_FROM` rewards have
            been seen, and then `OUTLIER_FACTOR` times their median size, which few outliers cannot move.
    """

    def __init__(self, limit: float | None = None) -> None:
        self._learning: list[float] | None = [] if limit is None else None
        self.value = MAX_ABS_SCORE if limit is None else limit

    def learn(self, rewards: Sequence[float]) -> None:
        """Count rewards that were accepted."""
        if self._learning is None:
            return
        self._learning.extend(map(abs, rewards))
        if len(self._learning) >= LEARNED_FROM:
            usual = max(median(self._learning), SMALLEST_USUAL)
            self.value = min(OUTLIER_FACTOR * usual, MAX_ABS_SCORE)
            self._learning = None


def read_rewards(body: bytes, count: int, limit: float = MAX_ABS_SCORE) -> list[float]:
    """The rewards in an answer, in the order of the items.

    Args:
        body: of a response with status 200.
        count: items that were asked about.
        limit: largest size of a reward.

    Raises:
        AnswerShapeError: another number of rewards, several classes, or an index twice.
        AnswerError: no `/classify` reply, or a reward that is null, NaN, infinite or larger.
    """
    try:
        rows = _DECODER.decode(body).data
    except msgspec.MsgspecError as error:
        raise AnswerError(f"the answer is not a /classify reply: {error}") from error
    if len(rows) != count:
        raise AnswerShapeError(f"{len(rows)} answers to {count} items")
    rewards = [math.nan] * count
    for row in rows:
        if row.num_classes != 1 or len(row.probs) != 1:
            raise AnswerShapeError(
                f"{row.num_classes} classes; a reward model has one (is it a classifier of several labels?)"
            )
        if not 0 <= row.index < count or not math.isnan(rewards[row.index]):
            raise AnswerShapeError(f"index {row.index} is out of range or repeated")
        reward = row.probs[0]
        if not abs(reward) <= limit:
            raise AnswerError(
                f"the reward of item {row.index} is {reward:.6g}, beyond the bound of {limit:g} (`reward_limit` in the "
                "pool file)"
            )
        rewards[row.index] = reward
    return rewards
