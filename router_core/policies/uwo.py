"""`uwo`: ask every RM, and be the more careful the less they agree (Coste et al. 2023, arXiv 2310.02743). K calls."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from router_core.errors import UnknownScaleError
from router_core.policies.base import AllCalls, Array
from router_core.policies.scale import ScoreScale

UWO_CHOICE_LAMBDA = 0.5
"""λ by which the preferred response is chosen: Coste et al.'s for best-of-n sampling (released code: `uwo_weights`)."""

UWO_REWARD_LAMBDA = 0.1
"""λ of the reward that the trainer gets: Coste et al.'s for PPO (released code: `uwo_weight`)."""


@dataclass(frozen=True, slots=True)
class UwoPolicy(AllCalls):
    """Uncertainty-weighted optimisation: mean − λ·variance over the RMs' scores.

    Each RM's scores are normalised first, as Coste et al. do after training; see docs/math/router.md, "Policies", for
    where the scale comes from.
    """

    name: str = "uwo"

    @property
    def needs_scale(self) -> bool:
        """True: a mean over RMs needs their scores on one scale."""
        return True

    def combine(self, rewards: Array, scale: ScoreScale | None) -> Array:
        """The conservative reward with λ = 0.1; see `AskAll.combine`."""
        return uncertainty_weighted(rewards, scale, UWO_REWARD_LAMBDA)

    def preference(self, rewards: Array, scale: ScoreScale | None) -> Array:
        """The same with λ = 0.5."""
        return uncertainty_weighted(rewards, scale, UWO_CHOICE_LAMBDA)


def uncertainty_weighted(rewards: Array, scale: ScoreScale | None, weight: float) -> Array:
    """u_i = z̄_i − λ·(1/K) Σ_k (z_ki − z̄_i)², z the normalised rewards (Coste et al. 2023, section 3).

    Args:
        rewards: (K, n) raw rewards.
        scale: of those RMs; None: `ScoreScale.of_group`.
        weight: λ.

    Returns:
        (n,) float64.

    Raises:
        UnknownScaleError: a single response without a scale: there is nothing to compare it with.

    >>> import numpy as np
    >>> one = ScoreScale(np.zeros(2), np.ones(2))
    >>> uncertainty_weighted(np.array([[1.0, 3.0], [1.0, 0.0]]), one, 0.5).tolist()
    [1.0, 0.375]
    """
    if scale is None and rewards.shape[1] == 1:
        raise UnknownScaleError(
            "the scale of the reward models is not known yet, and one response alone does not tell: send pairs or "
            "groups first, try again, or serve a checkpoint that holds the scales"
        )
    z = (scale or ScoreScale.of_group(rewards)).normalise(rewards)
    if not np.isnan(z).any():
        whole: Array = z.mean(axis=0) - weight * z.var(axis=0)
        return whole
    # A response without a reward from some RMs (NaN) is judged by the others; without one from any, it has none.
    told = ~np.isnan(z)
    counted = np.maximum(told.sum(axis=0), 1)
    mean = np.where(told, z, 0.0).sum(axis=0) / counted
    variance = np.where(told, np.square(z - mean), 0.0).sum(axis=0) / counted
    out: Array = np.where(told.any(axis=0), mean - weight * variance, np.nan)
    return out
