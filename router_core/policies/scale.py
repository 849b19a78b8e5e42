"""Scores of different RMs on one scale: (r − shift)/scale per RM, known beforehand or learned on the way.

Knows raw rewards only. `ScoreScale` is a value; `RunningScale` is the mutable thing that makes one from what was seen.
Called by the policies that combine several RMs, by the score use case and by replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.errors import NotFiniteError, ShapeMismatchError
from router_core.records import MAX_ABS_SCORE

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ScoreScale:
    """Normalisation of raw rewards per RM, z = (r − shift)/scale.

    Attributes:
        shift: (K,) float64, finite; usually the RM's mean reward.
        scale: (K,) float64, positive and finite; usually its standard deviation.

    >>> ScoreScale(np.array([1.0]), np.array([2.0])).normalise(np.array([[1.0, 5.0]])).tolist()
    [[0.0, 2.0]]
    """

    shift: Array
    scale: Array

    def __post_init__(self) -> None:
        if self.shift.ndim != 1 or self.shift.shape != self.scale.shape:
            raise ShapeMismatchError(
                f"score shift has shape {self.shift.shape} and score scale {self.scale.shape}: give (K,) and (K,)"
            )
        if not (np.isfinite(self.shift).all() and np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise NotFiniteError(
                "score shift and scale: give finite numbers, and a positive scale; train the checkpoint again"
            )

    def rows(self, arms: Sequence[int]) -> ScoreScale:
        """The rows of these arms, in this order: of the RMs that answered."""
        index = list(arms)
        return ScoreScale(self.shift[index], self.scale[index])

    def normalise(self, rewards: Array) -> Array:
        """Rewards (K, n) of these RMs on the common scale, (K, n).

        Raises:
            ShapeMismatchError: the rewards are of another number of RMs.
        """
        if rewards.ndim != 2 or len(rewards) != len(self.shift):
            raise ShapeMismatchError(
                f"rewards have shape {rewards.shape} and the scale is of {len(self.shift)} RMs: give the rows of the "
                "RMs that answered"
            )
        return (rewards - self.shift[:, None]) / self.scale[:, None]

    @classmethod
    def of_group(cls, rewards: Array) -> ScoreScale:
        """Mean and standard deviation of each RM inside one group (K, n): what is left when nothing else is known.

        An RM whose rewards are all equal, as for n = 1, keeps the scale 1, and its normalised rewards are 0. Rewards
        beyond `MAX_ABS_SCORE` count as that large, NaN as 0.
        """
        bounded = np.nan_to_num(np.clip(rewards, -MAX_ABS_SCORE, MAX_ABS_SCORE))
        spread = bounded.std(axis=1)
        return cls(bounded.mean(axis=1), np.where(spread > 0, spread, 1.0))


class RunningScale:
    """Mean and variance per RM of all rewards seen so far (Chan et al.'s parallel update). Mutable; one per run.

    Args:
        n_arms: K.
    """

    def __init__(self, n_arms: int) -> None:
        self._count = np.zeros(n_arms)
        self._mean = np.zeros(n_arms)
        self._squares = np.zeros(n_arms)

    def observe(self, arms: Sequence[int], rewards: Array) -> None:
        """Count one group. A reward beyond `MAX_ABS_SCORE`, or NaN, is not counted.

        Args:
            arms: the K' RMs that answered, each once.
            rewards: (K', n) their raw rewards.
        """
        usable = np.abs(rewards) <= MAX_ABS_SCORE
        counted = usable.any(axis=1)
        index = np.asarray(arms)[counted]
        usable, rewards = usable[counted], np.where(usable, rewards, 0.0)[counted]
        n = usable.sum(axis=1)
        mean = rewards.sum(axis=1) / n
        delta, total = mean - self._mean[index], self._count[index] + n
        inside = np.square(np.where(usable, rewards - mean[:, None], 0.0)).sum(axis=1)
        self._squares[index] += inside + np.square(delta) * self._count[index] * n / total
        self._mean[index] += delta * n / total
        self._count[index] = total

    def knows_any(self, arms: Sequence[int]) -> bool:
        """Return True if some of these RMs have shown a spread, so that a single reward can be compared with it."""
        return bool((self._squares[list(arms)] > 0).any())

    def rows(self, arms: Sequence[int], rewards: Array) -> ScoreScale:
        """The scale of these RMs; an RM that has shown no spread so far is normalised inside this group.

        Args:
            arms: the K' RMs that answered.
            rewards: (K', n) their rewards of the group that is to be normalised; not counted.
        """
        index = list(arms)
        known = self._squares[index] > 0
        spread = np.sqrt(self._squares[index] / np.maximum(self._count[index], 1.0))
        group = ScoreScale.of_group(rewards)
        return ScoreScale(
            np.where(known, self._mean[index], group.shift), np.where(known, np.where(known, spread, 1.0), group.scale)
        )
