"""What is believed before any feedback: a Gaussian per arm over the weights, and the offset it is added to.

Four forms, selected by name (design: `docs/math/router.md`):

* `paper`: o = 0, mean = unit-norm Bradley-Terry embedding of the RM, Λ₀ = λ₀I (λ₀ = σ² = v = 1).
* `calibrated`: o_k(x) = calibrated probability that arm k is right; the posterior is over the residual, with zero mean.
* `none`: nothing is known; o = 1/2, zero mean.
* `linucb`: nothing is known, in LASER's way; o = 0, zero mean, λ₀ = σ² = 1, v = α = 0.1, losses scaled by quantiles.

Knows nothing of checkpoints: each form takes arrays and a function. Called by `service.gateway`, `replay`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from router_core.errors import HyperparameterError, NotFiniteError, ShapeMismatchError
from router_core.feedback import LossScale
from router_core.novelty import Landmarks

Array = NDArray[np.float64]
Offset = Callable[[NDArray[np.float32]], NDArray[np.floating]]
"""x (B, d) -> o (B, K): calibrated probability that each arm ranks the pair rightly."""


class PriorForm(StrEnum):
    """How the offline stage enters the online one."""

    PAPER = "paper"
    CALIBRATED = "calibrated"
    NONE = "none"
    LINUCB = "linucb"


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """The scalars of the online stage.

    Attributes:
        lambda0: prior precision λ₀ of every weight.
        sigma2: variance σ² of a reward around its mean; for rewards in {0, 1} near p(1 − p).
        v: exploration scale; the draw's standard deviation is v·√(xᵀΣx).
        gamma: discount per block of events; 1 never forgets.
        adapt: choose λ₀ anew at fixed positions of the log, as what makes the feedback so far most probable (empirical
            Bayes, docs/math/router.md); `lambda0` is then only where it starts.
        lambda_novel: with `adapt`, and a prior that has landmarks: the precision that λ₀ is drawn down to while the
            stream is unlike what the offline stage learned from (`router_core.novelty`); 0 makes no difference.
        floor: ε, share of the instances that go to arms of which little is known, whatever is drawn
            (`policies.bayesian.floors_of`).
        alarm_rate: α, false alarms per event at most of what resets an arm that has changed (`router_core.changes`); 0
            resets none. For rewards in [0, 1].
    """

    lambda0: float
    sigma2: float
    v: float
    gamma: float = 1.0
    adapt: bool = False
    lambda_novel: float = 0.0
    floor: float = 0.0
    alarm_rate: float = 0.0

    def __post_init__(self) -> None:
        """Raises HyperparameterError if a value is outside its domain."""
        inside = {
            "lambda0": 0.0 < self.lambda0 < math.inf,
            "sigma2": 0.0 < self.sigma2 < math.inf,
            "v": 0.0 <= self.v < math.inf,
            "gamma": 0.0 < self.gamma <= 1.0,
            "lambda_novel": 0.0 <= self.lambda_novel < math.inf,
            "floor": 0.0 <= self.floor < 1.0,
            "alarm_rate": 0.0 <= self.alarm_rate < 1.0,
        }
        for name, good in inside.items():
            if not good:
                raise HyperparameterError(
                    f"hyper-parameter {name} = {getattr(self, name)}: lambda0 and sigma2 must be positive and finite, "
                    "v and lambda_novel finite and at least 0, gamma inside (0, 1], floor and alarm_rate inside [0, 1)"
                )


LOSS_SCALES: Mapping[PriorForm, LossScale] = MappingProxyType(
    {
        PriorForm.PAPER: LossScale.Z,
        PriorForm.CALIBRATED: LossScale.POOLED,
        PriorForm.NONE: LossScale.UNIT_Z,
        PriorForm.LINUCB: LossScale.QUANTILE,
    }
)
"""How runs of each form turn losses into rewards."""

PAPER_HYPERPARAMETERS = Hyperparameters(lambda0=1.0, sigma2=1.0, v=1.0)
"""The paper's online setting: Λ₀ = I, unit noise, no scaling of the exploration."""

CALIBRATED_HYPERPARAMETERS = Hyperparameters(
    lambda0=100.0, sigma2=0.16, v=0.2, adapt=True, lambda_novel=30.0, floor=0.02, alarm_rate=1e-5
)
"""Measured on recorded pairs; `train` stores them as they are (docs/experiments.md, "Tuning the online stage")."""

CALIBRATED_LOSS_HYPERPARAMETERS = Hyperparameters(lambda0=100.0, sigma2=0.16, v=0.3)
"""For the loss signal. It compares arms with each other and says of none how good it is; and in a real training it says
little of who was right (docs/table1.md), so the offline stage is trusted. An evidence for λ₀ that weighs losses by
their own variance earns more on simulated losses and less on real ones (docs/experiments.md).
"""

NONE_HYPERPARAMETERS = Hyperparameters(lambda0=1.0, sigma2=0.25, v=0.3)
"""Nothing known: weak prior, Bernoulli noise at its largest."""

LINUCB_HYPERPARAMETERS = Hyperparameters(lambda0=1.0, sigma2=1.0, v=0.1)
"""LASER (arXiv 2410.01735): A = I at the start, and α = 0.1, the weight of the confidence width, in the place of v."""


@dataclass(frozen=True, slots=True)
class Prior:
    """The state of knowledge at the start of a run.

    Attributes:
        form: which of the forms.
        means: (K, W) float64, prior mean of each arm's weights.
        hyper: the scalars.
        offset: o(x), or None for a constant one.
        constant_offset: the offset where `offset` is None.
        first: the posterior reads the columns first … first + W of x; the offsets may read them all.
        d: columns of x, read by the posterior or not; by default first + W.
        landmarks: where the offline stage's pairs lie, or None where that is not known.
    """

    form: PriorForm
    means: Array
    hyper: Hyperparameters
    offset: Offset | None = None
    constant_offset: float = 0.0
    first: int = 0
    d: int = 0
    landmarks: Landmarks | None = None

    def __post_init__(self) -> None:
        if self.means.ndim != 2 or 0 in self.means.shape:
            raise ShapeMismatchError(f"prior means have shape {self.means.shape}: give (K, W) with K, W >= 1")
        if not np.isfinite(self.means).all():
            raise NotFiniteError("prior means hold NaN or infinity: train the checkpoint again")
        end = self.first + self.n_weights
        object.__setattr__(self, "d", self.d or end)
        if self.first < 0 or self.d < end:
            raise ShapeMismatchError(f"the posterior reads columns {self.first} to {end} of contexts with {self.d}")

    @property
    def loss_scale(self) -> LossScale:
        """How a loss becomes the reward that is learned from."""
        return LOSS_SCALES[self.form]

    @property
    def watches_novelty(self) -> bool:
        """True where λ₀ depends on how many contexts are unlike the offline stage's."""
        return self.landmarks is not None and self.hyper.adapt and self.hyper.lambda_novel > 0.0

    @property
    def n_arms(self) -> int:
        """K."""
        return int(self.means.shape[0])

    @property
    def n_weights(self) -> int:
        """W, weights per arm: columns of x that the posterior reads."""
        return int(self.means.shape[1])

    def learned(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The columns that the posterior reads: (B, d) to (B, W), or (d,) to (W,)."""
        return x if self.n_weights == x.shape[-1] else x[..., self.first : self.first + self.n_weights]

    def reading(self, first: int, d: int) -> Prior:
        """The same prior over the columns first … first + W of contexts with d columns."""
        return replace(self, first=first, d=d)

    def offsets(self, x: NDArray[np.float32]) -> Array:
        """o_k(x) for a batch.

        Args:
            x: (B, d) float32 contexts.

        Returns:
            (B, K) float64.
        """
        if self.offset is None:
            return np.full((x.shape[0], self.n_arms), self.constant_offset)
        return np.asarray(self.offset(x), dtype=np.float64)


def paper_prior(bt_embeddings: NDArray[np.floating], hyper: Hyperparameters = PAPER_HYPERPARAMETERS) -> Prior:
    """The paper's prior: mean_k = e_k / ‖e_k‖, Λ₀ = λ₀I (arXiv 2510.02850, online stage).

    Args:
        bt_embeddings: (K, W), the offline stage's Bradley-Terry embedding of each RM; rows are normalised here.
        hyper: the scalars.

    Raises:
        NotFiniteError: an embedding is zero or not finite.
    """
    embeddings = np.asarray(bt_embeddings, dtype=np.float64)
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and (norms > 0).all()):
        raise NotFiniteError("a Bradley-Terry embedding is zero or not finite: train the checkpoint again")
    return Prior(PriorForm.PAPER, embeddings / norms, hyper, constant_offset=0.0)


def calibrated_prior(
    n_arms: int,
    n_weights: int,
    offset: Offset,
    hyper: Hyperparameters = CALIBRATED_HYPERPARAMETERS,
    landmarks: Landmarks | None = None,
) -> Prior:
    """Zero-mean residual on the calibrated probability o_k(x): a draw is N(o_k(x) + xᵀμ_k, v² xᵀΣ_k x).

    Args:
        n_arms: K.
        n_weights: W.
        offset: x (B, d) -> (B, K) probabilities.
        hyper: the scalars.
        landmarks: where the pairs lie that the offsets were learned from.
    """
    means = np.zeros((n_arms, n_weights))
    return Prior(PriorForm.CALIBRATED, means, hyper, offset=offset, landmarks=landmarks)


def no_prior(n_arms: int, n_weights: int, hyper: Hyperparameters = NONE_HYPERPARAMETERS) -> Prior:
    """Nothing known of any arm: zero mean around an even chance (the paper's row "w/o offline").

    Args:
        n_arms: K.
        n_weights: W.
        hyper: the scalars.
    """
    return Prior(PriorForm.NONE, np.zeros((n_arms, n_weights)), hyper, constant_offset=0.5)


def linucb_prior(n_arms: int, n_weights: int) -> Prior:
    """LinUCB's start, A_k = I and b_k = 0, as LASER has it (arXiv 2410.01735); losses are scaled by their quantiles.

    Args:
        n_arms: K.
        n_weights: W.
    """
    return Prior(
        PriorForm.LINUCB,
        np.zeros((n_arms, n_weights)),
        LINUCB_HYPERPARAMETERS,
        constant_offset=0.0,
    )
