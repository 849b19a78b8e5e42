"""What the arms said of B instances, as arrays: who answered, which response each prefers, and by how much.

Knows verdicts and scores; nothing of offsets or of what an answer is worth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from router_core.errors import ShapeMismatchError
from router_core.records import TIE

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """Answers of K arms about B instances, any subset of them.

    Attributes:
        verdicts: (B, K) int64, the preferred response's index, or TIE; read only where `answered`.
        answered: (B, K) bool; False where an arm was not asked, failed, or abstained: it has no vote.
        margins: (B, K) float64, by how much the preferred response leads the second in the arm's own scores; NaN where
            the arm gives no scores.
        responses: (B,) int64, number of responses of each instance, at least 1.
    """

    verdicts: NDArray[np.int64]
    answered: NDArray[np.bool_]
    margins: Array
    responses: NDArray[np.int64]

    def __post_init__(self) -> None:
        shapes = {self.verdicts.shape, self.answered.shape, self.margins.shape}
        if len(shapes) != 1 or self.verdicts.ndim != 2 or self.responses.shape != self.verdicts.shape[:1]:
            raise ShapeMismatchError(
                f"answers: verdicts {self.verdicts.shape}, answered {self.answered.shape} and margins "
                f"{self.margins.shape} must be (B, K), responses {self.responses.shape} (B,)"
            )

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def votes(self) -> NDArray[np.bool_]:
        """(B, K): the arms that prefer one response; a tie is an answer, but no vote."""
        return np.asarray(self.answered & (self.verdicts != TIE))

    def only(self, asked: NDArray[np.bool_]) -> Answers:
        """The same with the answers of these arms alone: asked (B, K)."""
        return replace(self, answered=self.answered & asked)

    def rows(self, index: NDArray[np.int64]) -> Answers:
        """The answers about these instances, in this order."""
        return Answers(self.verdicts[index], self.answered[index], self.margins[index], self.responses[index])


def right_of(preferred: NDArray[np.int64], labels: NDArray[np.int64], responses: NDArray[np.int64]) -> Array:
    """1 right, 0 wrong, 1/n on a tie, as an even choice would earn: all (B,).

    >>> right_of(np.array([1, 0, TIE]), np.array([1, 1, 1]), np.array([2, 2, 4])).tolist()
    [1.0, 0.0, 0.25]
    """
    return np.where(preferred == TIE, 1.0 / responses, (preferred == labels).astype(np.float64))


def margins_of(scores: Array) -> Array:
    """Best score less second best along the last axis; NaN where there are fewer than two.

    Args:
        scores: (…, n), NaN beyond an instance's own responses, or everywhere where an arm gives none.

    >>> margins_of(np.array([[0.5, 2.0, np.nan], [np.nan, np.nan, np.nan]])).tolist()
    [1.5, nan]
    """
    if scores.shape[-1] < 2:
        return np.full(scores.shape[:-1], np.nan)
    ordered = np.sort(np.where(np.isnan(scores), -np.inf, scores), axis=-1)
    best, second = ordered[..., -1], ordered[..., -2]
    known = np.isfinite(second)
    return np.where(known, np.where(known, best, 0.0) - np.where(known, second, 0.0), np.nan)
