"""Raw feedback to the reward that the posterior learns from (docs/math/router.md, "Signals").

The only state is per arm: how many feedbacks, their mean reward, and for the loss signal the moving averages of the
loss and of its square. Pure: `observe` returns a new value. Called by `posterior.fold`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.errors import FeedbackError
from router_core.records import TIE, Feedback, Signal

LOSS_EMA_RATE = 0.01
"""α of the paper's exponential moving averages of the loss and its square."""

LOSS_WARM_UP = 5
"""An arm's first feedbacks only warm its averages up (paper)."""

Z_CLIP = 2.0
"""z is clipped to ±2 (paper)."""

MAX_LOSS = 1e6
"""Largest |loss| that is accepted. DPO losses are below a few hundred; a larger one would swamp the moving averages of
its arm for thousands of feedbacks, and above 1e154 its square is infinite for good."""


@dataclass(frozen=True, slots=True)
class SignalStatistics:
    """Running statistics per arm; arrays of shape (K,) float64 that are never written to.

    Attributes:
        count: feedbacks of the arm.
        reward_sum: sum of the rewards that were learned from.
        reward_count: how many there were (fewer than `count` while the loss signal warms up).
        loss_mean: moving average of the loss.
        loss_square: moving average of its square.
    """

    count: NDArray[np.float64]
    reward_sum: NDArray[np.float64]
    reward_count: NDArray[np.float64]
    loss_mean: NDArray[np.float64]
    loss_square: NDArray[np.float64]

    @classmethod
    def empty(cls, n_arms: int) -> SignalStatistics:
        """No feedback yet for any of K arms."""
        zeros = np.zeros(n_arms)
        return cls(zeros, zeros, zeros, zeros, zeros)

    def mean_reward(self) -> NDArray[np.float64]:
        """Mean learned reward per arm (K,); NaN for an arm without any."""
        with np.errstate(invalid="ignore"):
            return self.reward_sum / np.where(self.reward_count > 0, self.reward_count, np.nan)


class SignalAccumulator:
    """Mutable copy of the statistics for the length of one fold.

    >>> stats = SignalAccumulator(SignalStatistics.empty(1))
    >>> stats.observe(0, Feedback(Signal.PREFERENCE, 1.0), verdict=1, unit_rewards=True)
    1.0
    """

    def __init__(self, statistics: SignalStatistics) -> None:
        self._count = statistics.count.copy()
        self._reward_sum = statistics.reward_sum.copy()
        self._reward_count = statistics.reward_count.copy()
        self._loss_mean = statistics.loss_mean.copy()
        self._loss_square = statistics.loss_square.copy()

    def observe(self, arm: int, feedback: Feedback, *, verdict: int, unit_rewards: bool) -> float | None:
        """Reward of one feedback, or None while the arm's loss averages warm up.

        * `preference`: 1 if the RM's verdict is the preferred response, 0 if it is another one, 1/2 on a tie.
        * `reward`: the number itself.
        * `loss`: z = (mean − loss)/sd against the averages before this loss, clipped to ±2; mapped to (z + 2)/4 in [0,
          1] when `unit_rewards`. The averages use rate max(α, 1/n), the plain mean until the window is full.

        Args:
            arm: index of the asked arm.
            feedback: kind and value.
            verdict: the asked RM's verdict: a response's index, or TIE.
            unit_rewards: see `Prior.unit_rewards`.
        """
        self._count[arm] += 1
        if feedback.signal is Signal.LOSS:
            reward = self._loss_reward(arm, feedback.value, unit_rewards)
        elif feedback.signal is Signal.PREFERENCE:
            reward = 0.5 if verdict == TIE else float(verdict == int(feedback.value))
        else:
            reward = feedback.value
        if reward is not None:
            self._reward_sum[arm] += reward
            self._reward_count[arm] += 1
        return reward

    def _loss_reward(self, arm: int, loss: float, unit_rewards: bool) -> float | None:
        n = self._count[arm]
        mean, square = self._loss_mean[arm], self._loss_square[arm]
        rate = max(LOSS_EMA_RATE, 1.0 / n)
        self._loss_mean[arm] = (1 - rate) * mean + rate * loss
        self._loss_square[arm] = (1 - rate) * square + rate * loss * loss
        if n <= LOSS_WARM_UP:
            return None
        sd = math.sqrt(max(square - mean * mean, 0.0))
        z = 0.0 if sd == 0.0 else min(max((mean - loss) / sd, -Z_CLIP), Z_CLIP)
        return (z + Z_CLIP) / (2 * Z_CLIP) if unit_rewards else float(z)

    def freeze(self) -> SignalStatistics:
        """The statistics after everything observed so far."""
        return SignalStatistics(
            self._count.copy(),
            self._reward_sum.copy(),
            self._reward_count.copy(),
            self._loss_mean.copy(),
            self._loss_square.copy(),
        )


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
