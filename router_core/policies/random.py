"""`random`: every RM with the same probability (the paper's row "Random router")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.policies.base import Array, Beliefs, OneCall
from router_core.posterior import Posterior


@dataclass(frozen=True, slots=True)
class RandomPolicy(OneCall):
    """Believes the same of every arm, so that the largest of K equal draws is uniform."""

    name: str = "random"

    def beliefs(self, x: NDArray[np.float32], offsets: Array, posterior: Posterior) -> Beliefs:
        """Standard normals."""
        return Beliefs(np.zeros_like(offsets), np.ones_like(offsets))
