"""Recorded streams whose right answer is known."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router_core.prior import Hyperparameters, Prior, no_prior
from router_core.records import Instance, LabelledPair

POOL = ("left", "right")


def pair(
    i: int,
    label: int,
    verdicts: dict[str, int],
    *,
    domain: str = "",
    subset: str = "",
    group: str = "",
    scores: dict[str, tuple[float, ...]] | None = None,
) -> LabelledPair:
    """Pair number i with these verdicts."""
    return LabelledPair(f"p{i}", Instance(f"q{i}", ("a", "b")), label, scores or {}, verdicts, domain, subset, group)


def specialists(n: int) -> tuple[list[LabelledPair], NDArray[np.float32]]:
    """Even pairs (domain `even`): `left` is right; odd pairs: `right` is. The context says which."""
    pairs = [
        pair(i, 0, {"left": i % 2, "right": 1 - i % 2}, domain=("even", "odd")[i % 2], group=f"g{i // 2}")
        for i in range(n)
    ]
    x = np.zeros((n, 2), np.float32)
    x[np.arange(n), np.arange(n) % 2] = 1.0
    return pairs, x


def undecided(_: str | None) -> Prior:
    """Nothing known of two arms in two dimensions."""
    return no_prior(2, 2, Hyperparameters(1.0, 0.1, 0.5))
