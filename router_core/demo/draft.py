"""One unlabelled-by-position draft of a preference pair, and the helpers that every domain's generator shares.

Knows nothing of models, files or splits. Called by the four domain modules and by `domains`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt with one response that is right and one that is wrong, by construction.

    `subset` names the family inside the domain (`arithmetic-add`); a checker may use it, a reward model never sees it.
    """

    prompt: str
    right: str
    wrong: str
    subset: str


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Return one of `options` with equal probability. `options` must not be empty."""
    return options[int(rng.integers(len(options)))]


def chance(rng: np.random.Generator, probability: float) -> bool:
    """Return True with the given probability."""
    return bool(rng.random() < probability)
