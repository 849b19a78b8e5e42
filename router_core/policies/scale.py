"""Scores of different RMs on one scale: (r − shift)/scale per RM, known beforehand or from a run's score log.

Knows raw rewards only. Called by the policies that combine several RMs, by the score use case and by replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.errors import NotFiniteError, ShapeMismatchError
from router_core.moments import Moments
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

    @classmethod
    def of_moments(cls, moments: Sequence[Moments], rewards: Array) -> ScoreScale | None:
        """The scale of RMs of whose scores these moments are known; None for one response while no RM shows a spread.

        An RM that has shown no spread is normalised inside the group.

        Args:
            moments: (K',) of the RMs that answered.
            rewards: (K', n) their rewards of the group that is to be normalised.

        >>> ScoreScale.of_moments([Moments(2.0, 1.0, 8.0), Moments()], np.array([[0.0, 1.0], [2.0, 4.0]]))
        ScoreScale(shift=array([1., 3.]), scale=array([2., 1.]))
        """
        if rewards.shape[1] == 1 and not any(seen.squares > 0 for seen in moments):
            return None
        group = cls.of_group(rewards)
        known = np.array([seen.squares > 0 for seen in moments])
        shift = np.array([seen.mean for seen in moments])
        scale = np.array([seen.sd or 1.0 for seen in moments])
        return cls(np.where(known, shift, group.shift), np.where(known, scale, group.scale))
