"""What off-policy evaluation starts from: a log as arrays, a target policy as probabilities, an estimate as numbers.

Knows nothing of files, stores or networks. Called by the estimators of this package, and by whoever reads a log
(`service.lab.eventlog`) or makes one (`loadtests.ope_coverage`). Equations and sources: docs/off-policy.md.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.errors import NotFiniteError, RouterCoreError, ShapeMismatchError
from router_core.propensity import choice_propensities

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


class NoSupportError(RouterCoreError):
    """The log says (almost) nothing about what the target policy would have asked."""


@dataclass(frozen=True, slots=True)
class LoggedData:
    """N decisions of one run that have feedback, in the order of the log: what was learned before is what came before.

    Attributes:
        pool: K names, in arm order.
        x: (N, d) float32 contexts.
        arm: (N,) int64, the arm that was asked first: what a policy chooses.
        propensities: (N, K) float64, probability that the arm's reward is in the log: that it was asked first, among
            the available ones, or shadowed.
        available: (N, K) bool, the arms that were not known to be away. One that failed when it was asked is one.
        rewards: (N, K) float64, what came back for asking the arm first, from another one where it failed; NaN where
            that is not in the log. That of `arm` always is.
        draws: (N,) int64 from 0 in order of first appearance: rows of one number share a draw, which chance made once;
            None: every row has a draw of its own.
        inclusion: (N,) in (0, 1], probability that the decision came into the log at all; None: all did. Estimates
            are of all decisions then, rows weighing 1/inclusion (Horvitz & Thompson 1952, Hájek 1971).
    """

    pool: tuple[str, ...]
    x: NDArray[np.float32]
    arm: NDArray[np.int64]
    propensities: Array
    available: Mask
    rewards: Array
    draws: NDArray[np.int64] | None = None
    inclusion: Array | None = None

    def __post_init__(self) -> None:
        """Raises ShapeMismatchError or NotFiniteError where the arrays cannot be a log."""
        n, k = len(self.arm), len(self.pool)
        shapes = {
            "x": (self.x.shape[:1], (n,)),
            "propensities": (self.propensities.shape, (n, k)),
            "available": (self.available.shape, (n, k)),
            "rewards": (self.rewards.shape, (n, k)),
            "draws": ((n,) if self.draws is None else self.draws.shape, (n,)),
            "inclusion": ((n,) if self.inclusion is None else self.inclusion.shape, (n,)),
        }
        for name, (found, expected) in shapes.items():
            if found != expected:
                raise ShapeMismatchError(f"{name} of the log has shape {found}, expected {expected}: N={n}, K={k}")
        if n and (self.arm.min() < 0 or self.arm.max() >= k):
            raise ShapeMismatchError(
                f"arm of the log is outside 0 … {k - 1}: leave out decisions that asked every RM (arm -1)"
            )
        if not (np.isfinite(self.reward).all() and np.isfinite(self.propensities).all()):
            raise NotFiniteError("reward or propensities of the log hold NaN: leave out events without a reward")
        if self.inclusion is not None and not ((self.inclusion > 0) & (self.inclusion <= 1)).all():
            raise ShapeMismatchError("inclusion of the log holds numbers outside (0, 1]: the log is damaged")
        if (self.propensities < 0).any() or not self.available[np.arange(n), self.arm].all():
            raise ShapeMismatchError("a propensity is negative, or an asked arm was not available: the log is damaged")

    def __len__(self) -> int:
        """N."""
        return len(self.arm)

    @property
    def reward(self) -> Array:
        """(N,) of the arm that was asked first."""
        asked: Array = self.rewards[np.arange(len(self)), self.arm]
        return asked

    @property
    def seen(self) -> Mask:
        """(N, K): the arm's reward is in the log."""
        return ~np.isnan(self.rewards)

    @property
    def unit_rewards(self) -> bool:
        """True if every reward is inside [0, 1]."""
        values = self.rewards[self.seen]
        return bool(((values >= 0) & (values <= 1)).all())

    @property
    def reward_range(self) -> tuple[float, float]:
        """(0, 1) for rewards inside it, else the observed smallest and largest."""
        if self.unit_rewards:
            return 0.0, 1.0
        return float(np.nanmin(self.rewards)), float(np.nanmax(self.rewards))

    @property
    def share(self) -> Array:
        """(N,) positive: how much each row counts, of mean 1: 1/inclusion over its mean."""
        if self.inclusion is None:
            return np.ones(len(self))
        weight: Array = 1.0 / self.inclusion
        weight /= weight.mean()
        return weight

    def rows(self, index: NDArray[np.integer] | slice) -> LoggedData:
        """The same of some rows."""
        return LoggedData(
            self.pool,
            self.x[index],
            self.arm[index],
            self.propensities[index],
            self.available[index],
            self.rewards[index],
            None if self.draws is None else numbered(self.draws[index].tolist()),
            None if self.inclusion is None else self.inclusion[index],
        )

    def per_draw(self, values: Array) -> Array:
        """Sums of (N,) values over the rows that share a draw: (G,), in order of each draw's first row."""
        if self.draws is None:
            return values
        sums: Array = np.bincount(self.draws, values).astype(np.float64)
        return sums


def numbered(keys: Iterable[Hashable]) -> NDArray[np.int64]:
    """Numbers from 0 in order of first appearance, equal for equal keys: (N,) int64.

    >>> numbered(["b", "a", "b"]).tolist()
    [0, 1, 0]
    """
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def one_reward_per_row(arm: NDArray[np.int64], reward: Array, n_arms: int) -> Array:
    """`LoggedData.rewards` where only that of the first arm is known: (N,) and (N,) to (N, K).

    >>> one_reward_per_row(np.array([1]), np.array([0.5]), 2).tolist()
    [[nan, 0.5]]
    """
    rewards = np.full((len(arm), n_arms), np.nan)
    rewards[np.arange(len(arm)), arm] = reward
    return rewards


def with_shadows(
    propensities: Array, arm: NDArray[np.int64], available: Mask, rewards: Array, chosen: Array | None = None
) -> Array:
    """P(arm's reward is in the log) = e + (1 − e)·s_tk where some of the instances also ask the other arms.

    s_tk is the chance c_t with which the row was chosen for that, times the share of such rows in which k, available
    but not asked first, has answered: less what came too late, or when k had gone away. Without `chosen` c_t = 1, and s
    is that share alone. An arm that was asked first wherever it was available has no such rows: there the share is that
    of all arms together. Right as long as shadows are chosen, and lost, whatever the draw and the verdict.

    Args:
        propensities: (N, K), of being asked first.
        arm: (N,), the arm that was asked first.
        available: (N, K).
        rewards: (N, K), NaN where unknown; a shadowed row knows those of all arms that were asked then, also where
            they failed.
        chosen: (N,) c, where it is known and differs from row to row, as for audits; None: one rate for all.
    """
    chance = np.ones(len(arm)) if chosen is None else chosen
    others = available.copy()
    others[np.arange(len(arm)), arm] = False
    told, asked = (others & ~np.isnan(rewards)).sum(axis=0), (others * chance[:, None]).sum(axis=0)
    everywhere = told.sum() / asked.sum() if asked.sum() else 0.0
    share = np.divide(told, asked, out=np.full(propensities.shape[1], everywhere), where=asked > 0)
    share = np.minimum(chance[:, None] * share, 1.0)
    seen: Array = np.where(available, propensities + (1.0 - propensities) * share, propensities)
    return seen


@dataclass(frozen=True, slots=True)
class Estimate:
    """The value of a target policy as one estimator sees it.

    Attributes:
        value: mean reward per instance.
        ci95: interval that is meant to hold it 95 times in 100.
        n: rows that were used.
        ess: effective sample size (Σw)²/Σw² of the weights w: how many rows of the target's own this log is worth.
        mean_weight: mean of the weights, whose expectation is 1 (less what was clipped or has no support). Far from it
            the log's propensities are wrong, or a few rare rows that did not occur carry the difference.
        max_weight: largest weight after clipping.
        clipped: share of the rows whose weight was clipped.
        lost: mean probability that the target gives to arms whose propensity is below the floor; what the log cannot
            say about them widens `ci95`.
        dropped: rows left out because no arm that the target may ask was available.
    """

    value: float
    ci95: tuple[float, float]
    n: int
    ess: float
    mean_weight: float
    max_weight: float
    clipped: float
    lost: float
    dropped: int


def available_propensities(propensities: Array, means: Array, sds: Array, floors: Array, available: Mask) -> Array:
    """Propensities of the first choice among the available arms: as logged where all are, else from the draw's beliefs.

    Args:
        propensities: (N, K) as drawn, over all arms.
        means: (N, K) of the draws.
        sds: (N, K) of the draws.
        floors: (N, K) of the draws.
        available: (N, K).
    """
    out = propensities.copy()
    partial = np.flatnonzero(~available.all(axis=1))
    if partial.size:
        means = np.where(available, means, -np.inf)
        out[partial] = choice_propensities(means[partial], sds[partial], floors[partial])
    return out


def among_available(pi: Array, available: Mask) -> Array:
    """The target's probabilities (N, K) given that only the available arms can answer; rows of zeros where it would ask
    none of them.
    """
    left = np.where(available, pi, 0.0)
    total = left.sum(axis=1, keepdims=True)
    shares: Array = np.divide(left, total, out=np.zeros_like(left), where=total > 0)
    return shares
