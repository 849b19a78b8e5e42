"""Is the stream unlike what the offline stage learned from? Seen in the texts alone, before any feedback
(docs/math/router.md, "Texts unlike the offline stage's").

Feedback says how wrong the offsets are of RMs that were asked. Of the others it says nothing, and on texts of a kind
that the offline stage never saw those may be the better ones. So the prior precision λ₀ may not rise there as the
evidence of the asked ones would have it.

Knows contexts; nothing of arms, rewards or logs. Landmarks come from `offline.train` by way of the checkpoint; the
share of novel contexts is kept by `posterior.fold`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from router_core.errors import NotFiniteError, ShapeMismatchError

LANDMARKS = 256
"""Training pairs that are kept to measure distances from. All 1,036 of a fold gave the same shares within .05."""

NEIGHBOURS = 5
"""A context's distance is that to its fifth nearest landmark; one or ten tell domains apart as well."""

USUAL = 0.75
"""Share of the training pairs that lie within the radius; the rest would be called novel, which is allowed for."""

NOISE = 3.0
"""Standard errors by which the share of novel contexts must exceed the usual one before it counts."""

AUDITED_NOISE = 1.0
"""The same where referees speak of all arms: no arm is overlooked there, so that doubting early costs less."""

AUDITED_PRECISION = 4.0
"""λ_n where referees speak of all arms, unless `lambda_novel` is smaller (docs/experiments.md, "Audits")."""

MEMORY = 1024.0
"""Contexts that count in full; older ones fade, so that a stream that comes home is trusted again."""

_FEWEST = 4 * NEIGHBOURS
"""Training pairs without which there is no telling what is usual."""


@dataclass(frozen=True, slots=True, eq=False)
class Landmarks:
    """Where training pairs lie, and how near to them a pair of the same kind usually is.

    Attributes:
        positions: (L, q) float32, L > `NEIGHBOURS`: whitened leading directions, as `encoder.fuse.Fuse` has them in
            the last 1 + q columns of x.
        radius: distance to the fifth nearest landmark that `USUAL` of the training pairs do not exceed.
    """

    positions: NDArray[np.float32]
    radius: float
    _columns: NDArray[np.float64] = field(init=False, repr=False)
    """(q, L): sums over q are then of whole rows, a third of the time."""

    def __post_init__(self) -> None:
        if self.positions.ndim != 2 or len(self.positions) <= NEIGHBOURS or not self.positions.shape[1]:
            raise ShapeMismatchError(
                f"landmarks have shape {self.positions.shape}: give (L, q) with L > {NEIGHBOURS} and q >= 1"
            )
        if not (np.isfinite(self.positions).all() and math.isfinite(self.radius) and self.radius >= 0):
            raise NotFiniteError(f"landmarks hold NaN or infinity, or their radius is {self.radius}: train again")
        object.__setattr__(self, "_columns", np.ascontiguousarray(self.positions.T, dtype=np.float64))

    def is_novel(self, x: NDArray[np.float32]) -> bool:
        """True where the fifth nearest landmark is farther than the radius. O(L q), the same bits in any batch.

        Args:
            x: (d,) a context, whose last 1 + q columns are a multiple of [1; position].
        """
        q = self.positions.shape[1]
        if not x[-q - 1] > 0:
            return True  # No context that this fuse makes.
        within = _squared(self._columns, x[-q:] / x[-q - 1]) <= self.radius * self.radius
        return int(np.count_nonzero(within)) < NEIGHBOURS


@dataclass(frozen=True, slots=True)
class Tally:
    """How many contexts a run has met, and how many of them were novel; floats, because old ones fade."""

    met: float = 0.0
    novel: float = 0.0

    def add(self, novel: bool) -> Tally:
        """One context more.

        >>> Tally().add(True).add(False)
        Tally(met=2.0, novel=1.0)
        """
        return Tally(self.met + 1.0, self.novel + float(novel))

    @property
    def share(self) -> float | None:
        """Share of the contexts met that were novel; None before the first."""
        return self.novel / self.met if self.met else None

    def faded(self) -> Tally:
        """Half of everything once there are `MEMORY`: exact in floating point."""
        return self if self.met < MEMORY else Tally(self.met / 2.0, self.novel / 2.0)

    def excess(self, deviations: float = NOISE) -> float:
        """e in [0, 1]: by how much the novel share exceeds the usual one and its noise; 1: everything is novel.

        e = max(0, share − (1 − u) − z·√(u(1 − u)/n))/u with u = `USUAL`.

        Args:
            deviations: z.

        >>> Tally(100.0, 25.0).excess(), round(Tally(1e9, 1e9).excess(), 3)
        (0.0, 1.0)
        """
        share = self.share
        if share is None:
            return 0.0
        noise = deviations * math.sqrt(USUAL * (1.0 - USUAL) / self.met)
        return max(0.0, share - (1.0 - USUAL) - noise) / USUAL


def loosened(precision: float, excess: float, novel_precision: float) -> float:
    """λ₀ of a stream of which the share e is novel: 1/λ = (1 − e)/λ₀ + e/λ_n, the mixture's prior variance.

    Args:
        precision: λ₀, from the evidence.
        excess: e, of `Tally.excess`.
        novel_precision: λ_n > 0; where λ₀ is smaller already, nothing changes.

    >>> loosened(1000.0, 0.0, 30.0), round(loosened(1000.0, 0.5, 30.0), 1), loosened(10.0, 0.5, 30.0)
    (1000.0, 58.3, 10.0)
    """
    if excess <= 0.0 or precision <= novel_precision:
        return precision
    return 1.0 / ((1.0 - excess) / precision + excess / novel_precision)


def fit_landmarks(
    contexts: NDArray[np.float32], groups: Sequence[str], rng: np.random.Generator, limit: int = LANDMARKS
) -> Landmarks | None:
    """Landmarks and radius from the training pairs' contexts.

    A pair's distance is to landmarks of other groups: a pair to come shares its prompt with none of them either.

    Args:
        contexts: (N, 1 + q) float32, multiples of [1; position] with a positive first column.
        groups: (N,) groups; "" is a group of its own.
        rng: chooses the landmarks where there are more pairs.
        limit: landmarks at most.

    Returns:
        None where there are too few pairs, or too few of other groups.
    """
    if len(contexts) < _FEWEST:
        return None
    positions = np.ascontiguousarray(contexts[:, 1:] / contexts[:, :1], dtype=np.float32)
    chosen = np.sort(rng.permutation(len(positions))[:limit])
    names = [name or f"\0{i}" for i, name in enumerate(groups)]
    landmarks, owners = positions[chosen], np.array([names[i] for i in chosen])
    distances = []
    for position, name in zip(positions, names, strict=True):
        others = landmarks[owners != name]
        if len(others) >= NEIGHBOURS:
            distances.append(np.partition(_squared(others.T, position), NEIGHBOURS - 1)[NEIGHBOURS - 1])
    if len(distances) < _FEWEST:
        return None
    return Landmarks(landmarks, float(np.sqrt(np.quantile(distances, USUAL))))


def _squared(columns: NDArray[np.floating], position: NDArray[np.float32]) -> NDArray[np.float64]:
    """Squared distances of a position (q,) to landmarks (q, L): (L,)."""
    difference = columns - position.astype(np.float64)[:, None]
    squares: NDArray[np.float64] = np.square(difference, out=difference).sum(axis=0)
    return squares
