"""How far a referee is right, and what its verdict is worth as a lesson (docs/audits.md, "What an audit teaches").

Where gold and an audit meet at one decision, the referee is judged. Its accuracy a is the mean of a Beta posterior
whose prior is what the operator expects, worth `PRIOR_VERDICTS` verdicts. A referee that errs at random with
probability 1 − a shows an RM's credit r in [0, 1] as z with mean (2a − 1) r + 1 − a, so that
r' = (z − (1 − a))/(2a − 1) is unbiased for r.

Knows numbers. Called by `posterior.fold`, which keeps a standing per referee.
"""

from __future__ import annotations

from typing import NamedTuple

PRIOR_VERDICTS = 16.0
"""Verdicts that the operator's word for the referee counts."""

PRIOR_LEAD = 1.6
"""By so many verdicts a referee is taken to be ahead of the RMs before anything is known: a tenth of the prior's."""

MAX_WEIGHT = 0.98
"""Weight of a perfect referee's verdict: gold that comes later must have some weight left to win with."""

LEAST_EDGE = 0.05
"""Smallest 2a − 1 that is learned from; below it the correction would multiply noise by more than twenty."""


class Standing(NamedTuple):
    """What gold has said of a referee.

    Attributes:
        judged: verdicts that gold exists for.
        right: how many of them were right; a tie counts one half.
        rms: Σ of the credits of the asked RMs on the same decisions.

    >>> Standing().accuracy(0.9), Standing(16.0, 16.0, 12.0).accuracy(0.9)
    (0.9, 0.95)
    """

    judged: float = 0.0
    right: float = 0.0
    rms: float = 0.0

    def after(self, right: float, rm: float) -> Standing:
        """Return the standing with one judged verdict more.

        Args:
            right: 1, 0, or one half for a tie.
            rm: credit of the asked RM against gold.
        """
        return Standing(self.judged + 1.0, self.right + right, self.rms + rm)

    def accuracy(self, trust: float) -> float:
        """Return a, the mean of Beta(t·n₀ + right, (1 − t)·n₀ + wrong), n₀ = `PRIOR_VERDICTS`.

        Args:
            trust: t, what the operator expects.
        """
        return (self.right + PRIOR_VERDICTS * trust) / (self.judged + PRIOR_VERDICTS)

    def teaches(self) -> bool:
        """Return False if the referee was no better than the RMs that it should teach.

        >>> Standing().teaches(), Standing(40.0, 30.0, 34.0).teaches()
        (True, False)
        """
        return self.right + PRIOR_LEAD > self.rms

    def lesson(self, trust: float, variance: float) -> Lesson:
        """Return how its next verdict is learned from.

        Args:
            trust: what the operator expects.
            variance: σ² of a reward around its mean.
        """
        accuracy = self.accuracy(trust)
        if not self.teaches() or 2.0 * accuracy - 1.0 < LEAST_EDGE:
            return Lesson(accuracy, 0.0)
        noise = accuracy * (1.0 - accuracy) / (2.0 * accuracy - 1.0) ** 2
        return Lesson(accuracy, min(variance / (variance + noise), MAX_WEIGHT))


class Lesson(NamedTuple):
    """How a verdict is learned from.

    Attributes:
        accuracy: a.
        weight: ω in [0, `MAX_WEIGHT`], of the squared error: σ²/(σ² + a(1 − a)/(2a − 1)²), gold's variance over the
            corrected reward's. 0: nothing is learned.
    """

    accuracy: float
    weight: float

    def reward(self, credit: float) -> float:
        """Return r' = (z − (1 − a))/(2a − 1).

        >>> round(Lesson(0.9, 0.5).reward(1.0), 3), round(Lesson(0.9, 0.5).reward(0.5), 3)
        (1.125, 0.5)
        """
        return (credit - (1.0 - self.accuracy)) / (2.0 * self.accuracy - 1.0)

    def seen(self, probability: float) -> float:
        """Return with which probability a referee calls right what is right with this probability."""
        return (2.0 * self.accuracy - 1.0) * probability + 1.0 - self.accuracy

    def correction(self, gold: float, credit: float, offset: float) -> tuple[float, float]:
        """Return (weight, target) that turn what the audit has taught into what gold alone would have taught.

        With the audit's ω x xᵀ/σ² and ω (r' − o) x/σ² in Λ and b, these add (1 − ω) x xᵀ/σ² and
        ((g − o) − ω (r' − o)) x/σ².

        Args:
            gold: g, credit against gold.
            credit: z, credit against the referee.
            offset: o.

        >>> weight, target = Lesson(1.0, 0.75).correction(0.0, 1.0, 0.5)
        >>> 0.75 * (1.0 - 0.5) + weight * target
        -0.5
        """
        left = 1.0 - self.weight
        return left, ((gold - offset) - self.weight * (self.reward(credit) - offset)) / left
