"""`laser`: LinUCB over the RMs, one RM per batch (Nguyen et al. 2024, arXiv 2410.01735, the paper's row "LASER")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.policies.base import Array, Beliefs, OneCall
from router_core.policies.bayesian import posterior_beliefs
from router_core.posterior import Posterior
from router_core.prior import PriorForm


@dataclass(frozen=True, slots=True)
class LaserPolicy(OneCall):
    """Asks the arm with the largest upper confidence bound xᵀθ_k + α√(xᵀA_k⁻¹x), θ_k = A_k⁻¹b_k.

    With the prior form `linucb` (λ₀ = σ² = 1, v = α, no offset) A, b and θ are our Λ, b and μ, so that folding, logs
    and replicas are the same as of any other run. Departures: docs/math/router.md, "Policies".
    """

    name: str = "laser"
    prior: PriorForm | None = PriorForm.LINUCB
    one_arm_per_batch: bool = True

    def beliefs(self, x: NDArray[np.float32], offsets: Array, posterior: Posterior) -> Beliefs:
        """Point masses at the upper confidence bounds."""
        bounds = posterior_beliefs(x, offsets, posterior)
        return Beliefs(bounds.means + bounds.sds, np.zeros_like(bounds.means))
