"""Neural Thompson sampling: a small network predicts each arm's reward, its gradient says how unsure it is.

Zhang, Zhou, Li & Gu 2021, "Neural Thompson Sampling", arXiv 2010.00827, Algorithm 1, with the diagonal of U as in their
experiments. Departures: one network with K outputs in the place of one per arm's block of the context; the network
predicts what is left beside the offset; a few steps of Adam on a batch of what is known after each feedback, in the
place of training to convergence. Called by `learners`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

HIDDEN = 32
RIDGE = 1.0
"""λ: of the weights around where they started, and of U at the start."""
EXPLORATION = 0.03
"""ν; of 0 to .1 the best on K4 and S6."""
STEPS, BATCH, RATE = 4, 64, 3e-3


class NeuralThompson:
    """f_k(x) = w_kᵀ relu(Wx̃), x̃ = (x, 1); a draw is N(o_k + f_k(x), ν²·λ Σ g²/(U m)), g the gradient of f_k."""

    calls = 1

    def __init__(self, n_weights: int, n_arms: int, rng: np.random.Generator) -> None:
        """Start with f = 0: the output layer's two halves cancel each other (section 3 of the paper).

        Args:
            n_weights: columns of a context that it reads.
            n_arms: K.
            rng: of the start, the draws and the batches.
        """
        self._rng = rng
        half = HIDDEN // 2
        first = rng.standard_normal((half, n_weights + 1)) * (2.0 / (n_weights + 1)) ** 0.5
        last = rng.standard_normal((n_arms, half)) / HIDDEN**0.5
        self._weights = [np.vstack([first, first]), np.hstack([last, -last])]
        self._start = [weight.copy() for weight in self._weights]
        self._moments = [(np.zeros_like(weight), np.zeros_like(weight)) for weight in self._weights]
        # U: of the first layer per arm, since an arm's gradient passes through its own output weights.
        self._precision = [np.full((n_arms, HIDDEN, n_weights + 1), RIDGE), np.full((n_arms, HIDDEN), RIDGE)]
        self._updates = 0
        self._contexts: list[Array] = []
        self._arms: list[int] = []
        self._targets: list[float] = []

    def choose(self, x: Array, offsets: Array) -> tuple[int, ...]:
        """Return the arm with the largest draw."""
        outer, inner, hidden = self._gradients(np.append(x, 1.0))
        means = offsets + self._weights[1] @ hidden
        variances = (inner**2 / self._precision[0]).sum(axis=(1, 2)) + (outer**2 / self._precision[1]).sum(axis=1)
        draws = means + EXPLORATION * np.sqrt(RIDGE * variances / HIDDEN) * self._rng.standard_normal(len(means))
        return (int(draws.argmax()),)

    def learn(self, x: Array, offsets: Array, arms: tuple[int, ...], rewards: Array) -> None:
        """Add the gradient to U, and take `STEPS` steps towards what is known."""
        arm, context = arms[0], np.append(x, 1.0)
        outer, inner, _ = self._gradients(context)
        self._precision[0][arm] += inner[arm] ** 2 / HIDDEN
        self._precision[1][arm] += outer**2 / HIDDEN
        self._contexts.append(context)
        self._arms.append(arm)
        self._targets.append(float(rewards[0] - offsets[arm]))
        for _ in range(STEPS):
            self._step(self._rng.integers(0, len(self._arms), size=min(BATCH, len(self._arms))))

    def _gradients(self, context: Array) -> tuple[Array, Array, Array]:
        """Gradients of every f_k by the output weights (m,) and by the first layer (K, m, W + 1); hidden units (m,)."""
        before = self._weights[0] @ context
        hidden: Array = np.maximum(before, 0.0)
        inner = (self._weights[1] * (before > 0))[:, :, None] * context
        return hidden, inner, hidden

    def _step(self, rows: NDArray[np.int64]) -> None:
        """One step of Adam on the squared error plus the ridge."""
        contexts = np.array([self._contexts[i] for i in rows])
        arms, targets = np.array(self._arms)[rows], np.array(self._targets)[rows]
        first, last = self._weights
        before = contexts @ first.T
        hidden = np.maximum(before, 0.0)
        residual = (np.einsum("bm,bm->b", hidden, last[arms]) - targets) / len(rows)
        by_last = np.zeros_like(last)
        np.add.at(by_last, arms, residual[:, None] * hidden)
        by_first = ((residual[:, None] * last[arms]) * (before > 0)).T @ contexts
        self._updates += 1
        spring = RIDGE / max(len(self._arms), 1)
        for i, gradient in enumerate((by_first, by_last)):
            gradient = gradient + spring * (self._weights[i] - self._start[i]) / HIDDEN
            mean, square = self._moments[i]
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            scaled = mean / (1 - 0.9**self._updates)
            self._weights[i] -= RATE * scaled / (np.sqrt(square / (1 - 0.999**self._updates)) + 1e-8)
