"""`single:<model>`: always the same RM (the paper's rows RM0 … RM(K−1)). It has no fallback: another RM is another
row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.policies.base import Array, Beliefs, OneCall
from router_core.posterior import Posterior


@dataclass(frozen=True, slots=True)
class SinglePolicy(OneCall):
    """Asks arm `arm` and no other."""

    name: str
    arm: int

    def beliefs(self, x: NDArray[np.float32], offsets: Array, posterior: Posterior) -> Beliefs:
        """−inf of every arm but one."""
        means = np.full(offsets.shape, -np.inf)
        means[:, self.arm] = 0.0
        return Beliefs(means, np.zeros_like(means))
