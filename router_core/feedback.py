"""Raw feedback to the reward that the posterior learns from (docs/math/router.md, "Signals").

The state is per arm: how many feedbacks, their mean reward, and for the loss signal the moving averages of the loss and
of its square; and, for priors that compare arms by their losses, the same over all arms together, or their last losses.
Called by `posterior.fold`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from router_core.errors import FeedbackError
from router_core.records import Feedback, Signal

LOSS_EMA_RATE = 0.01
"""α of the paper's exponential moving averages of the loss and its square."""

LOSS_WARM_UP = 5
"""An arm's first feedbacks only warm its averages up (paper)."""

Z_CLIP = 2.0
"""z is clipped to ±2 (paper)."""

MAX_LOSS = 1e6
"""Largest |loss| that is accepted. DPO losses are below a few hundred; a larger one would swamp the moving averages of
its arm for thousands of feedbacks, and above 1e154 its square is infinite for good."""


LOSS_HISTORY = 256
"""Losses that the quantiles are taken of, over all arms. LASER's released code keeps every one since the start."""

LOSS_QUANTILES = (0.2, 0.8)
"""Quantiles of −loss that become the rewards 0 and 1 (LASER, arXiv 2410.01735)."""


LOSS_FORGETTING = 0.03
"""f, by how much every loss lowers what is believed of the asked arm, with `LossScale.POOLED`: what is asked fades
towards what is not, unless its losses are 4f standard deviations better than the others'. 0 never forgets the offsets,
and stays with an arm that is wrong where nothing contradicts it; docs/soundness.md, `losses`, has both."""


class LossScale(StrEnum):
    """How a loss becomes a reward."""

    Z = "z"
    """z = (mean − loss)/sd in [−2, 2] (BayesianRouter, arXiv 2510.02850)."""
    UNIT_Z = "unit_z"
    """(z + 2)/4 in [0, 1]."""
    POOLED = "pooled"
    """o_k(x) + z/4 − f, z against the averages of all arms together: a residual that does not depend on the offset."""
    QUANTILE = "quantile"
    """Place of −loss between the 20% and the 80% quantile of the last ones, in [0, 1] (LASER)."""


@dataclass(frozen=True, slots=True)
class SignalStatistics:
    """Running statistics per arm; arrays of shape (K,) float64 that are never written to.

    Attributes:
        count: feedbacks of the arm.
        reward_sum: sum of the rewards that were learned from.
        reward_count: how many there were (fewer than `count` while the loss signal warms up).
        loss_mean: moving average of the loss.
        loss_square: moving average of its square.
        loss_history: (h,) the last h <= `LOSS_HISTORY` losses of all arms, oldest first; empty but for
            `LossScale.QUANTILE`.
        pooled: (3,) over all arms, for `LossScale.POOLED`: number of losses, moving averages of the loss and of its
            square.
    """

    count: NDArray[np.float64]
    reward_sum: NDArray[np.float64]
    reward_count: NDArray[np.float64]
    loss_mean: NDArray[np.float64]
    loss_square: NDArray[np.float64]
    loss_history: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    pooled: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))

    @classmethod
    def empty(cls, n_arms: int) -> SignalStatistics:
        """No feedback yet for any of K arms."""
        zeros = np.zeros(n_arms)
        return cls(zeros, zeros, zeros, zeros, zeros)

    def extended(self, added: int) -> SignalStatistics:
        """The same, with so many arms more that have no feedback yet."""
        if not added:
            return self
        named = ("count", "reward_sum", "reward_count", "loss_mean", "loss_square")
        return replace(self, **{name: np.append(getattr(self, name), np.zeros(added)) for name in named})

    def mean_reward(self) -> NDArray[np.float64]:
        """Mean learned reward per arm (K,); NaN for an arm without any."""
        with np.errstate(invalid="ignore"):
            return self.reward_sum / np.where(self.reward_count > 0, self.reward_count, np.nan)


class SignalAccumulator:
    """Mutable copy of the statistics for the length of one fold.

    >>> stats = SignalAccumulator(SignalStatistics.empty(1))
    >>> stats.observe(0, Feedback(Signal.PREFERENCE, 1.0), credit=1.0)
    1.0

    Args:
        statistics: where it begins; not changed.
        loss_scale: see `Prior.loss_scale`.
    """

    def __init__(self, statistics: SignalStatistics, loss_scale: LossScale = LossScale.UNIT_Z) -> None:
        self._loss_scale = loss_scale
        self._count = statistics.count.copy()
        self._reward_sum = statistics.reward_sum.copy()
        self._reward_count = statistics.reward_count.copy()
        self._loss_mean = statistics.loss_mean.copy()
        self._loss_square = statistics.loss_square.copy()
        self._loss_history = statistics.loss_history
        self._pooled = statistics.pooled.copy()

    def observe(self, arm: int, feedback: Feedback, *, credit: float | None, offset: float = 0.0) -> float | None:
        """Reward of one feedback; None while the loss statistics warm up, and for a preference that says nothing.

        * `preference`: the RM's `credit`.
        * `reward`: the number itself.
        * `loss`: by `loss_scale`. z = (mean − loss)/sd against the arm's averages before this loss, clipped to ±2; the
          averages use rate max(α, 1/n), the plain mean until the window is full. With `POOLED` the averages are over
          all arms, so that an arm whose losses are lower than the others' gains; the reward is z/4 −
          `LOSS_FORGETTING` above the offset. With `QUANTILE` see `quantile_reward`.

        Args:
            arm: index of the asked arm.
            feedback: kind and value.
            credit: what a preference says of the arm (`records.credit`); not read for other signals.
            offset: o_k(x) of the arm, for `LossScale.POOLED`.
        """
        self._count[arm] += 1
        if feedback.signal is Signal.LOSS:
            reward = self._loss_reward(arm, feedback.value, offset)
        elif feedback.signal is Signal.PREFERENCE:
            reward = credit
        else:
            reward = feedback.value
        if reward is not None:
            self._reward_sum[arm] += reward
            self._reward_count[arm] += 1
        return reward

    def _loss_reward(self, arm: int, loss: float, offset: float) -> float | None:
        n = self._count[arm]
        mean, square = self._loss_mean[arm], self._loss_square[arm]
        rate = max(LOSS_EMA_RATE, 1.0 / n)
        self._loss_mean[arm] = (1 - rate) * mean + rate * loss
        self._loss_square[arm] = (1 - rate) * square + rate * loss * loss
        if self._loss_scale is LossScale.QUANTILE:
            self._loss_history = np.append(self._loss_history, loss)[-LOSS_HISTORY:]
            return None if len(self._loss_history) < LOSS_WARM_UP else quantile_reward(self._loss_history)
        if self._loss_scale is LossScale.POOLED:
            return self._pooled_reward(loss, offset)
        if n <= LOSS_WARM_UP:
            return None
        z = _z(loss, mean, square)
        return (z + Z_CLIP) / (2 * Z_CLIP) if self._loss_scale is LossScale.UNIT_Z else z

    def _pooled_reward(self, loss: float, offset: float) -> float | None:
        """o + z/4 − f, with averages before this loss. A bound at 1 would cut good losses and be a forgetting too."""
        n, mean, square = self._pooled
        rate = max(LOSS_EMA_RATE, 1.0 / (n + 1))
        self._pooled[:] = (
            n + 1,
            (1 - rate) * mean + rate * loss,
            (1 - rate) * square + rate * loss * loss,
        )
        if n < LOSS_WARM_UP:
            return None
        return offset + _z(loss, mean, square) / (2 * Z_CLIP) - LOSS_FORGETTING

    def freeze(self) -> SignalStatistics:
        """The statistics after everything observed so far."""
        return SignalStatistics(
            self._count.copy(),
            self._reward_sum.copy(),
            self._reward_count.copy(),
            self._loss_mean.copy(),
            self._loss_square.copy(),
            self._loss_history,
            self._pooled.copy(),
        )


def _z(loss: float, mean: float, square: float) -> float:
    """(mean − loss)/sd, clipped to ±`Z_CLIP`; 0 where there is no spread."""
    sd = math.sqrt(max(square - mean * mean, 0.0))
    return 0.0 if sd == 0.0 else float(min(max((mean - loss) / sd, -Z_CLIP), Z_CLIP))


def quantile_reward(history: NDArray[np.float64]) -> float:
    """r = clip((q − q20)/(q80 − q20), 0, 1), q = −loss of the last entry among all entries (LASER, arXiv 2410.01735).

    The quantiles interpolate linearly between order statistics, as `np.quantile` does. Where both are equal the reward
    is 1 above, 0 below and 1/2 at them.

    Args:
        history: (h,) losses, oldest first, h >= 1; the last one is the one to be scaled.

    >>> quantile_reward(np.array([4.0, 3.0, 1.0, 0.0, 2.0])), quantile_reward(np.array([0.0, 1.0, 9.0]))
    (0.5, 0.0)
    """
    ordered = np.sort(-history)
    value = -history[-1]
    low, high = np.interp(np.multiply(LOSS_QUANTILES, len(history) - 1), np.arange(len(history)), ordered)
    if high > low:
        return float(min(max((value - low) / (high - low), 0.0), 1.0))
    return 0.5 if value == low else float(value > low)


def validate(feedback: Feedback) -> Feedback:
    """Return the feedback if its value is in the domain of its signal.

    Raises:
        FeedbackError: NaN or infinity; a loss beyond ±`MAX_LOSS`; a preference that is not an index; a reward outside
            [0, 1].
    """
    value = feedback.value
    if not math.isfinite(value):
        raise FeedbackError(f"{feedback.signal} is {value}: send a finite number")
    if feedback.signal is Signal.LOSS and abs(value) > MAX_LOSS:
        raise FeedbackError(
            f"loss is {value:g}: send a number in [{-MAX_LOSS:g}, {MAX_LOSS:g}]; is the training diverging?"
        )
    if feedback.signal is Signal.PREFERENCE and (value < 0 or value != int(value)):
        raise FeedbackError(f"preferred is {value}: send the index of the better response, 0 for the first")
    if feedback.signal is Signal.REWARD and not 0 <= value <= 1:
        raise FeedbackError(f"reward is {value}: send a number in [0, 1]")
    return feedback
