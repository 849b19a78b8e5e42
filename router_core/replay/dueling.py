"""A contextual dueling bandit: two arms are asked, and only which of them was right where the other was wrong teaches.

Li, Zhao & Gu 2024, "Feel-Good Thompson Sampling for Contextual Dueling Bandits", arXiv 2404.06013, Algorithm 1
(FGTS.CDB), sampled by Langevin steps as in their experiments. Arm k's utility is u_k(x) = logit o_k(x) + θ_kᵀx̃,
x̃ = (x, 1); two chains of θ, one per asked arm. Departures: a duel that nobody wins (both right, or both wrong) teaches
nothing; the ridge 1 stands for the prior. Called by `learners`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RIDGE = 1.0
FEEL_GOOD = 0.1
"""μ, weight of the feel-good term: how well the best arm does against the other chain's."""
STEPS = 5
RATE = 0.02
TEMPERATURE = 0.1
"""Of the Langevin noise; 1 samples the posterior, less explores less."""


class DuelingBandit:
    """Chain j samples exp(−Σ_s log(1 + e^{−(u_won − u_lost)}) + μ Σ_s (max_k u_k − u_lost) − ‖θ‖²/2).

    It asks its best arm.
    """

    calls = 2

    def __init__(self, n_weights: int, n_arms: int, rng: np.random.Generator) -> None:
        """Start each chain at a draw of the prior, N(0, temperature/ridge).

        Args:
            n_weights: columns of a context that it reads.
            n_arms: K.
            rng: of the Langevin noise.
        """
        self._rng = rng
        self._theta = rng.standard_normal((2, n_arms, n_weights + 1)) * (TEMPERATURE / RIDGE) ** 0.5
        self._contexts: list[Array] = []
        self._offsets: list[Array] = []
        self._duels: list[tuple[int, ...]] = []

    def choose(self, x: Array, offsets: Array) -> tuple[int, ...]:
        """Return each chain's best arm; the same arm twice where they agree."""
        utilities = _logit(offsets) + self._theta @ np.append(x, 1.0)
        return int(utilities[0].argmax()), int(utilities[1].argmax())

    def learn(self, x: Array, offsets: Array, arms: tuple[int, ...], rewards: Array) -> None:
        """Add the duel if somebody won it, and move both chains."""
        if rewards[0] != rewards[1]:
            self._duels.append(arms if rewards[0] > rewards[1] else arms[::-1])
            self._contexts.append(np.append(x, 1.0))
            self._offsets.append(_logit(offsets))
        if not self._duels:
            return
        contexts, known, duels = np.array(self._contexts), np.array(self._offsets), np.array(self._duels)
        for _ in range(STEPS):
            for chain in range(2):
                self._langevin(chain, contexts, known, duels)

    def _langevin(self, chain: int, contexts: Array, known: Array, duels: NDArray[np.int64]) -> None:
        """θ += ½ε·∇ log posterior + √(ε·temperature)·noise, ε shrinking with the number of duels."""
        theta, rows = self._theta[chain], np.arange(len(duels))
        utilities = known + contexts @ theta.T
        winner, loser = duels[:, 0], duels[:, 1]
        lost = 1.0 / (1.0 + np.exp(np.clip(utilities[rows, winner] - utilities[rows, loser], -30.0, 30.0)))
        weights = np.zeros_like(utilities)
        np.add.at(weights, (rows, winner), lost)
        np.add.at(weights, (rows, loser), -lost)
        np.add.at(weights, (rows, utilities.argmax(axis=1)), FEEL_GOOD)
        np.add.at(weights, (rows, loser), -FEEL_GOOD)
        gradient = weights.T @ contexts - RIDGE * theta
        rate = RATE / (1.0 + len(duels) / 100.0)
        noise = self._rng.standard_normal(theta.shape)
        self._theta[chain] = theta + 0.5 * rate * gradient + np.sqrt(rate * TEMPERATURE) * noise


def _logit(p: Array) -> Array:
    clipped = np.clip(p, 0.01, 0.99)
    odds: Array = np.log(clipped / (1.0 - clipped))
    return odds
