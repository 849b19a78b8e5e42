"""What a policy did on a stream: values only.

Made by `run` and by the replay over HTTP, read by `figures` and `curves`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ALL_ARMS = -1
"""`asked` of a step at which every RM was asked."""


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """One policy, once through one stream of T steps.

    Attributes:
        seed: of the stream.
        order: (T,) int64, index of the pair met at each step.
        correct: (T,) in {0, 0.5, 1}: was the verdict right that the policy gave.
        asked: (T,) int64: the asked arm, or `ALL_ARMS`.
        audited: steps at which a referee spoke.
    """

    seed: int
    order: NDArray[np.int64]
    correct: Array
    asked: NDArray[np.int64]
    audited: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """All passes of one policy over N pairs.

    Attributes:
        passes: at least one; several per seed where the stream is cut into folds.
        size: N.
        calls_per_instance: RM calls.
        price_per_instance: what they cost, in units of the cheapest RM; None: as many as the calls.
    """

    passes: tuple[Pass, ...]
    size: int
    calls_per_instance: float
    price_per_instance: float | None = None

    @property
    def price(self) -> float:
        """Mean price of an instance, in units of the cheapest RM."""
        return self.calls_per_instance if self.price_per_instance is None else self.price_per_instance

    @property
    def seeds(self) -> tuple[int, ...]:
        """Each seed once, in order of first appearance."""
        return tuple(dict.fromkeys(part.seed for part in self.passes))

    @property
    def correct(self) -> Array:
        """(S, N): what each seed earned on each pair, in the pairs' own order; the mean over repeats. NaN: not met."""
        sums, counts = np.zeros((len(self.seeds), self.size)), np.zeros((len(self.seeds), self.size))
        for row, part in self._rows():
            np.add.at(sums[row], part.order, part.correct)
            np.add.at(counts[row], part.order, 1.0)
        with np.errstate(invalid="ignore"):
            means: Array = sums / counts
        return means

    @property
    def asked(self) -> NDArray[np.int64]:
        """(S, N): the arm asked about each pair when it was last met."""
        last = np.full((len(self.seeds), self.size), ALL_ARMS)
        for row, part in self._rows():
            last[row, part.order] = part.asked
        return last

    def _rows(self) -> list[tuple[int, Pass]]:
        number = {seed: row for row, seed in enumerate(self.seeds)}
        return [(number[part.seed], part) for part in self.passes]


def merge(parts: Sequence[tuple[NDArray[np.int64], Mapping[str, Trace]]], size: int) -> dict[str, Trace]:
    """Traces of several streams as one per policy.

    Args:
        parts: per stream, the index of its pairs among all N, and the traces of the same policies on it.
        size: N.
    """
    names = list(parts[0][1])
    merged = {}
    for name in names:
        passes = [replace(part, order=index[part.order]) for index, traces in parts for part in traces[name].passes]
        weights = [len(index) for index, _ in parts]
        calls = np.average([traces[name].calls_per_instance for _, traces in parts], weights=weights)
        price = np.average([traces[name].price for _, traces in parts], weights=weights)
        merged[name] = Trace(tuple(passes), size, float(calls), float(price))
    return merged
