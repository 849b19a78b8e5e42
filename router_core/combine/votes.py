"""How much each arm's verdict counts, and the probability that each response is best (docs/math/combination.md).

Knows the learned weights; nothing of how they were fitted (`offline.votes`), of prices or of budgets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from router_core.combine.answers import Answers
from router_core.errors import NotFiniteError, ShapeMismatchError
from router_core.records import TIE

Array = NDArray[np.float64]

FEATURES = 4
"""Per arm: 1, logit of its offset, its margin, and their product."""
_SURE = 1e-4
"""Offsets are kept this far from 0 and 1: the posterior's residual may carry them out of (0, 1)."""
_ALONE = 1e-3
"""Least weight of a single vote: in favour of its response, p_right hardly above chance."""


@dataclass(frozen=True, slots=True, eq=False)
class Votes:
    """Learned weights of K arms.

    With V arms that have a vote, the verdict of arm k adds to its response's log-odds

        w_k = c_k + ln(V)·g_k,   c_k = α_k + β_k ℓ_k + γ_k m_k + δ_k ℓ_k m_k,   g_k the same with weights of its own,

    ℓ_k = logit o_k(x), which is 0 for an arm that guesses, and m_k = ln(1 + 2·margin/deviation_k).
    The second part takes back what arms that err together say twice. With a level ℓ̄, the mean logit of all arms on the
    pairs of the fit, ℓ_k is taken relative to this instance's mean: logit o_k − mean_j logit o_j + ℓ̄. What all arms
    share, how hard the text is, says nothing of whom to believe.

    Attributes:
        weights: (2, 4, K): [c or g][α, β, γ, δ][arm].
        deviations: (K,) positive, root mean square of the arm's margins; 1 where it gives no scores.
        margins: (Q, K), equally likely values of m_k, rising; all 0 for an arm without scores. An unknown margin of an
            arm that had some is taken to be their mean.
        level: (1,), ℓ̄; (0,) where logits are taken as they are.
        known: (K,) False for an arm that has no vote here: it came to the pool later, or was retired. Its logit is
            taken to be the mean of the others'. Empty where all have one.
    """

    weights: Array
    deviations: Array
    margins: Array
    level: Array = field(default_factory=lambda: np.zeros(0))
    known: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        K = len(self.deviations)
        if self.weights.shape != (2, FEATURES, K) or self.margins.ndim != 2 or self.margins.shape[1:] != (K,):
            raise ShapeMismatchError(
                f"votes: weights {self.weights.shape}, margins {self.margins.shape} and deviations "
                f"{self.deviations.shape} must be (2, {FEATURES}, K), (Q, K) and (K,); train again"
            )
        if not all(np.isfinite(array).all() for array in (self.weights, self.margins, self.deviations, self.level)):
            raise NotFiniteError("votes hold NaN or infinity; train again")
        if self.level.ndim != 1 or len(self.level) > 1:
            raise ShapeMismatchError(f"votes: level {self.level.shape} must be (0,) or (1,); train again")
        if not (self.deviations > 0).all():
            raise NotFiniteError(f"votes: deviations {self.deviations.tolist()} must be positive; train again")

    @property
    def n_arms(self) -> int:
        """K."""
        return len(self.deviations)

    def rounded(self) -> Votes:
        """The same numbers as a checkpoint's float32 tensors hold them."""
        weights, deviations, margins, level = (a.astype(np.float32).astype(np.float64) for a in self.arrays)
        return Votes(weights, deviations, margins, level)

    @property
    def arrays(self) -> tuple[Array, Array, Array, Array]:
        """The numbers, in the order of the fields."""
        return self.weights, self.deviations, self.margins, self.level

    def select(self, arms: Sequence[int]) -> Votes:
        """The weights of these arms, in this order: they were fitted on random subsets."""
        index = list(arms)
        return Votes(self.weights[:, :, index], self.deviations[index], self.margins[:, index], self.level)

    def placed(self, rows: Sequence[int | None]) -> Votes:
        """The weights of a pool that has changed: per arm its row here, None for an arm without a vote."""
        if all(row is not None for row in rows):
            return self.select([row for row in rows if row is not None])
        index = [row or 0 for row in rows]
        known = np.array([row is not None for row in rows])
        return Votes(
            np.where(known, self.weights[:, :, index], 0.0),
            np.where(known, self.deviations[index], 1.0),
            np.where(known, self.margins[:, index], 0.0),
            self.level,
            tuple(known.tolist()),
        )

    def strengths(self, offsets: Array, margins: Array) -> tuple[Array, Array]:
        """c_k and g_k of what each arm would say: offsets and margins (B, K) to (B, K) and (B, K)."""
        return self._strengths(offsets, self.scaled(margins))

    def expected_strengths(self, offsets: Array) -> list[tuple[Array, Array]]:
        """`strengths` for each of the Q equally likely margins of an arm that has not answered yet."""
        return [self._strengths(offsets, m[None]) for m in self.margins]

    def scaled(self, margins: Array) -> Array:
        """m_k = ln(1 + 2·margin/deviation_k), the mean where the margin is unknown: (B, K) to (B, K)."""
        known = np.isfinite(margins)
        m = np.log1p(2.0 * np.where(known, margins, 0.0) / self.deviations)
        out: Array = np.where(known, m, self.margins.mean(axis=0))
        return out

    def probabilities(self, offsets: Array, answers: Answers) -> Array:
        """P(response i is best), given the answers so far: softmax of the votes per response.

        Args:
            offsets: (B, K), o_k(x) with the posterior's residual where there is one.
            answers: of any subset of the arms.

        Returns:
            (B, n) float64, n the largest number of responses; rows sum to 1 over their own responses, 0 beyond. Even
            where no arm has a vote.
        """
        constant, growth = self.strengths(offsets, answers.margins)
        return softmax(log_odds(constant, growth, answers), answers.responses)

    def alone(self, arm: int, offsets: Array, margin: float, n: int) -> float:
        """Return the probability that one arm's verdict is right when nobody else was asked.

        The same as `probabilities` with that answer alone, without arrays: every reply holds it.

        Args:
            arm: who answered.
            offsets: (K,), o_k(x).
            margin: of its answer, in its own scores; NaN where it gives none.
            n: number of responses, at least 2.
        """
        if len(self.level):
            logit = float(informed_logits(offsets, self.level, self.known)[arm])
        else:
            p = min(max(float(offsets[arm]), _SURE), 1.0 - _SURE)
            logit = math.log(p) - math.log1p(-p)
        if math.isfinite(margin):
            m = math.log1p(2.0 * margin / float(self.deviations[arm]))
        else:
            m = float(self.margins[:, arm].mean())
        a, b, c, d = self.weights[0, :, arm].tolist()
        weight = max(a + b * logit + (c + d * logit) * m, _ALONE)
        return 1.0 / (1.0 + (n - 1) * math.exp(-weight))

    def _strengths(self, offsets: Array, m: Array) -> tuple[Array, Array]:
        logits = informed_logits(offsets, self.level, self.known)
        w = self.weights[:, :, None, :]
        both = w[:, 0] + w[:, 1] * logits + (w[:, 2] + w[:, 3] * logits) * m
        return both[0], both[1]


@dataclass(frozen=True, slots=True, eq=False)
class Verdicts:
    """What probabilities come to.

    Attributes:
        preferred: (B,) int64, the most probable response; TIE where the best two are equal.
        right: (B,) float64, `p_right`: the probability that the preferred response is the best one; on a tie, that of
            each of the best two.
    """

    preferred: NDArray[np.int64]
    right: Array


def verdicts_of(probabilities: Array) -> Verdicts:
    """The preferred response of each row (B, n), and the probability that it is right.

    >>> verdicts_of(np.array([[0.25, 0.75], [0.5, 0.5]])).preferred.tolist()
    [1, -1]
    """
    best = probabilities.max(axis=1)
    tied = (probabilities == best[:, None]).sum(axis=1) > 1
    return Verdicts(np.where(tied, TIE, probabilities.argmax(axis=1)), best)


def logits_of(offsets: Array) -> Array:
    """Return logit o, (…, K)."""
    p = np.clip(offsets, _SURE, 1.0 - _SURE)
    logits: Array = np.log(p) - np.log1p(-p)
    return logits


def informed_logits(offsets: Array, level: Array, known: Sequence[bool] = ()) -> Array:
    """ℓ: what a verdict says about one response against each other one, (…, K); see `Votes`.

    An arm that is barred from an instance (−inf) says nothing of how hard it is: its logit is the mean of the others'.
    """
    logits = logits_of(offsets)
    told = ~np.isneginf(offsets)
    if known and any(known):
        told &= np.array(known)
    if not told.all():
        mean = logits.mean(axis=-1, keepdims=True, where=told | ~told.any(axis=-1, keepdims=True))
        logits = np.where(told, logits, mean)
    return logits - logits.mean(axis=-1, keepdims=True) + level[0] if len(level) else logits


def voters_log(voters: NDArray[np.integer]) -> Array:
    """ln V, 0 without a vote."""
    logarithms: Array = np.log(np.maximum(voters, 1).astype(np.float64))
    return logarithms


def log_odds(constant: Array, growth: Array, answers: Answers) -> Array:
    """Σ of w_k over the arms that prefer each response: (B, K) and (B, K) to (B, n), n the largest number.

    A vote alone counts `_ALONE` at least: what a single arm prefers is never turned round, so one call is routing.
    """
    votes = answers.votes
    voters = votes.sum(axis=1)
    w = constant + voters_log(voters)[:, None] * growth
    w = np.where(votes, np.where(voters[:, None] == 1, np.maximum(w, _ALONE), w), 0.0)
    n = int(answers.responses.max(initial=1))
    return per_response(w, answers.verdicts, n)


def per_response(values: Array, verdicts: NDArray[np.int64], n: int) -> Array:
    """Values (B, K) summed per preferred response: (B, n)."""
    return np.stack([np.where(verdicts == i, values, 0.0).sum(axis=1) for i in range(n)], axis=1)


def softmax(utilities: Array, responses: NDArray[np.int64]) -> Array:
    """exp(u_i)/Σ exp(u_j) over each instance's own responses: (B, …, n), responses (B,); 0 beyond."""
    own = np.arange(utilities.shape[-1]) < responses.reshape(-1, *[1] * (utilities.ndim - 1))
    shifted = np.where(own, utilities, -np.inf)
    weights = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    out: Array = weights / weights.sum(axis=-1, keepdims=True)
    return out
