"""Has an arm changed? A cumulative sum of what its rewards say against the posterior (docs/math/router.md, "Changes").

Two sums per arm, for a fall and for a rise. Each grows by the logarithm of how much better a reward r in [0, 1] is
explained by a probability p₁ than by p₀, where p₀ lies `MARGIN` from what the posterior predicts and p₁ `CHANGE`
farther:

    S ← max(0, S + r log(p₁/p₀) + (1 − r) log((1 − p₁)/(1 − p₀))).

While the arm is within `MARGIN` of the prediction, e^{increment} has a mean of at most 1 whatever the contexts, so that
S passes log(2/α) at most once in 2/α events of the arm (Lorden 1971; Shin, Ramdas & Rinaldo 2022, arXiv 2203.03532):
both sums together raise at most α false alarms per event.

Knows numbers; nothing of events or logs. Called by `posterior.fold`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

MARGIN = 0.1
"""By how much a prediction may be wrong without a change: calibration is never exact on every kind of text."""

CHANGE = 0.15
"""Beyond the margin, the smallest change that is looked for."""

WARM_UP = 64.0
"""Events of an arm, since its start or its last alarm, from which the posterior first learns where the arm stands."""

_EDGE = 0.02
"""Probabilities nearer to 0 or 1 are not tested against."""


class Watch(NamedTuple):
    """What is kept of an arm.

    Attributes:
        events: since the start, or since the last alarm.
        fall: S of a fall.
        rise: S of a rise.
        alarms: how many there were.
    """

    events: float = 0.0
    fall: float = 0.0
    rise: float = 0.0
    alarms: float = 0.0

    def after(self, predicted: float, reward: float, rate: float) -> Watch:
        """Return the watch after one more event. After an alarm all sums start at 0 again, and `alarms` is one higher.

        Args:
            predicted: what the posterior expected, before it learned of the reward.
            reward: in [0, 1].
            rate: α, false alarms per event at most.

        >>> watch = Watch(events=WARM_UP)
        >>> for _ in range(22):
        ...     watch = watch.after(0.9, 0.0, 1e-5)
        >>> watch.alarms
        1.0
        """
        if self.events < WARM_UP:
            return self._replace(events=self.events + 1.0)
        fall = max(0.0, self.fall + _increment(reward, predicted - MARGIN, predicted - MARGIN - CHANGE))
        rise = max(0.0, self.rise + _increment(reward, predicted + MARGIN, predicted + MARGIN + CHANGE))
        if max(fall, rise) >= math.log(2.0 / rate):
            return Watch(alarms=self.alarms + 1.0)
        return Watch(self.events + 1.0, fall, rise, self.alarms)


def _increment(reward: float, usual: float, changed: float) -> float:
    """r log(p₁/p₀) + (1 − r) log((1 − p₁)/(1 − p₀)), or 0 where one of them is too near to 0 or 1."""
    if min(usual, changed) < _EDGE or max(usual, changed) > 1.0 - _EDGE:
        return 0.0
    return reward * math.log(changed / usual) + (1.0 - reward) * math.log((1.0 - changed) / (1.0 - usual))
