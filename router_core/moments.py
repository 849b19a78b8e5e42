"""Running mean and sd of each RM's scores, and scores on that scale (docs/decisions/009-scores-have-their-own-log.md).

A state comes to be in one way: `Moments.merge`, entry by entry in the order of a log. It is plain float arithmetic
without any grouping, so the same log gives the same bits wherever it is cut. Scores beyond `MAX_ABS_SCORE` are never
part of a state, which keeps it finite. Knows no store and no clock. Called by `service.usecases.normalise`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from router_core.errors import NotFiniteError
from router_core.records import MAX_ABS_SCORE

MEMORY_SCORES = 65_536.0
"""Scores that count in full: older ones fade as newer ones come, so that the scale follows a policy that drifts."""

KNOWN_SCORES = 4.0
"""An RM that gave so many scores without any spread is taken to be constant; with fewer, its scale is unknown."""

MAX_COUNT = 2.0**32
"""Largest number of scores in one entry; no request could hold so many."""

ROUNDING = 1.0 + 1e-9
"""Factor by which rounding may take moments beyond what exact arithmetic allows."""


def is_usable(score: float) -> bool:
    """Return whether a score may be folded and put on a scale.

    >>> is_usable(-3.5), is_usable(1e300), is_usable(math.nan)
    (True, False, False)
    """
    return abs(score) <= MAX_ABS_SCORE


@dataclass(frozen=True, slots=True)
class Moments:
    """Number, mean and sum of squared deviations of some scores.

    Attributes:
        count: how many; a float, because faded ones count in part.
        mean: their mean; 0 for none.
        squares: Σ (r − mean)².
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, scores: Sequence[float]) -> Moments:
        """Return the moments of n >= 1 scores, with exactly rounded sums.

        >>> Moments.of([1.0, 3.0])
        Moments(count=2.0, mean=2.0, squares=2.0)

        Raises:
            NotFiniteError: a score is NaN, infinite, or larger than `MAX_ABS_SCORE`.
        """
        if not all(map(is_usable, scores)):
            raise NotFiniteError(
                f"scores {list(scores)[:4]} are not all finite and within {MAX_ABS_SCORE:g}: what does the RM answer?"
            )
        if min(scores) == max(scores):
            # The quotient of the sum may miss the score by a rounding, and leave a spread where there is none.
            return cls(float(len(scores)), float(scores[0]), 0.0)
        mean = math.fsum(scores) / len(scores)
        squares = math.fsum((score - mean) * (score - mean) for score in scores)
        return cls(float(len(scores)), mean, squares)

    @property
    def possible(self) -> bool:
        """True if some scores within `MAX_ABS_SCORE` have these moments: 0 <= squares <= count·MAX², |mean| <= MAX.

        >>> Moments.of([1.0, 3.0]).possible, Moments(2.0, 0.0, 1e300).possible
        (True, False)
        """
        largest = MAX_ABS_SCORE * ROUNDING
        return (
            0.0 <= self.count <= MAX_COUNT
            and abs(self.mean) <= largest
            and 0.0 <= self.squares <= self.count * largest * largest
        )

    def merge(self, other: Moments) -> Moments:
        """Both together (Chan et al. 1979), then faded to `MEMORY_SCORES`; finite and possible if both are.

        >>> Moments.of([1.0]).merge(Moments.of([3.0])) == Moments.of([1.0, 3.0])
        True
        """
        if other.count == 0.0:
            return self
        total = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / total)
        squares = self.squares + other.squares + delta * delta * (self.count * (other.count / total))
        fade = min(1.0, MEMORY_SCORES / total)
        return Moments(total * fade, mean, squares * fade)

    @property
    def sd(self) -> float | None:
        """Standard deviation; 0 for an RM that is known to be constant, None while there is too little to tell."""
        if self.squares > 0.0:
            return math.sqrt(self.squares / self.count)
        return 0.0 if self.count >= KNOWN_SCORES else None

    def normalise(self, scores: Sequence[float]) -> list[float | None]:
        """z = (r − mean)/sd; r − mean where sd is 0. None while the sd is unknown, and for a score that is not usable.

        >>> Moments.of([1.0, 3.0]).normalise([4.0]), Moments.of([1.0]).normalise([1.0])
        ([2.0], [None])
        """
        sd = self.sd
        if sd is None:
            return [None] * len(scores)
        return [(score - self.mean) / (sd or 1.0) if is_usable(score) else None for score in scores]


@dataclass(frozen=True, slots=True)
class ScoreScales:
    """What a run knows of its RMs' scores after the first `count` entries of its score log.

    Attributes:
        count: entries folded: the scale's version.
        last_id: id of the last of them; "0-0" for none.
        arms: (K,) moments per RM, in pool order.
    """

    count: int
    last_id: str
    arms: tuple[Moments, ...]

    def of_arms(self, n_arms: int) -> ScoreScales:
        """The same with at least so many arms, of whose scores nothing is known: a pool only grows."""
        missing = n_arms - len(self.arms)
        return self if missing <= 0 else ScoreScales(self.count, self.last_id, (*self.arms, *[Moments()] * missing))

    def observe(self, entry_id: str, seen: Sequence[tuple[int, Moments]]) -> ScoreScales:
        """One entry more. Moments that no usable scores have, or of no RM of the pool, are left out.

        Args:
            entry_id: its id in the log.
            seen: (arm, moments of its scores), each arm of the pool once at most.
        """
        arms = list(self.arms)
        for arm, moments in seen:
            if 0 <= arm < len(arms) and moments.possible:
                arms[arm] = arms[arm].merge(moments)
        return ScoreScales(self.count + 1, entry_id, tuple(arms))
