"""What counts as an answer of `/classify`: one usable reward per item.

Pure: bytes in, numbers out. `service.scorers.rm.dialogue` reads workers' answers with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import Final, NamedTuple

import msgspec

from router_core.records import MAX_ABS_SCORE
from service.scorers.transport.exchange import AnswerError, AnswerShapeError
from service.scorers.wire import UNREADABLE, ClassifyAnswer

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


class Heads:
    """Which labels of an RM's answer make its reward: one of them, or a weighted sum of all.

    Args:
        head: index of the one label.
        weights: name to weight, in the order of the labels; every label has a name.

    Raises:
        ValueError: not exactly one of them is given, or no weight is other than 0.
    """

    def __init__(self, head: int | None = None, weights: Mapping[str, float] | None = None) -> None:
        if (head is None) == (weights is None):
            raise ValueError("give exactly one of `head` and `heads`")
        if weights is not None and not (all(map(math.isfinite, weights.values())) and any(weights.values())):
            raise ValueError(f"heads are {dict(weights)}; use finite weights, at least one other than 0")
        self._head = head
        self._weights = None if weights is None else dict(weights)

    def names(self, labels: int) -> tuple[str, ...]:
        """Return the names of the labels.

        Raises:
            AnswerShapeError: the answer has another number of labels.
        """
        if self._weights is not None:
            if len(self._weights) != labels:
                raise AnswerShapeError(f"{labels} labels, and `heads` in the pool file names {len(self._weights)}")
            return tuple(self._weights)
        assert self._head is not None
        if self._head >= labels:
            raise AnswerShapeError(f"{labels} labels, and `head` in the pool file is {self._head}: count from 0")
        return tuple(f"head_{index}" for index in range(labels))

    def reward(self, values: Sequence[float]) -> float:
        """Return the reward that the labels' values make.

        >>> Heads(weights={"helpful": 0.5, "safe": 2.0}).reward([4.0, 1.0]), Heads(head=1).reward([4.0, 1.0])
        (4.0, 1.0)
        """
        if self._weights is None:
            assert self._head is not None
            return values[self._head]
        return math.fsum([weight * value for weight, value in zip(self._weights.values(), values, strict=True)])


class Rewards(NamedTuple):
    """What an answer says.

    Attributes:
        rewards: one per item, in order.
        heads: name of a label to its values per item; empty for an RM with one.
    """

    rewards: list[float]
    heads: dict[str, list[float]] = {}  # noqa: RUF012 - nobody writes to it


def read_rewards(body: bytes, count: int, heads: Heads | None = None) -> Rewards:
    """The rewards in an answer, in the order of the items.

    Args:
        body: of a response with status 200.
        count: items that were asked about.
        heads: what makes a reward of several labels; None for an RM with one.

    Raises:
        AnswerShapeError: another number of rewards or labels, or an index twice.
        AnswerError: no `/classify` reply, or a reward that is null, NaN, infinite or beyond `MAX_ABS_SCORE`.
    """
    try:
        rows = _DECODER.decode(body).data
    except UNREADABLE as error:
        raise AnswerError(f"the answer is not a /classify reply: {error}") from error
    if len(rows) != count:
        raise AnswerShapeError(f"{len(rows)} answers to {count} items")
    values: list[list[float]] = [[]] * count
    seen: set[int] = set()
    labels = len(rows[0].probs) if heads is not None and rows else 1
    for row in rows:
        if row.num_classes != labels or len(row.probs) != labels:
            raise AnswerShapeError(
                f"{row.num_classes} classes; a reward model has one (of several labels? set `head` or `heads`)"
                if heads is None
                else f"{len(row.probs)} labels where another item has {labels}"
            )
        if not 0 <= row.index < count or row.index in seen:
            raise AnswerShapeError(f"index {row.index} is out of range or repeated")
        seen.add(row.index)
        values[row.index] = row.probs
    if heads is None:
        rewards = [one[0] for one in values]
        _within(rewards, MAX_ABS_SCORE)
        return Rewards(rewards)
    names = heads.names(labels)
    parts = {name: [one[index] for one in values] for index, name in enumerate(names)}
    for part in parts.values():
        _within(part, MAX_ABS_SCORE)
    rewards = [heads.reward(one) for one in values]
    _within(rewards, MAX_ABS_SCORE)
    return Rewards(rewards, parts)
