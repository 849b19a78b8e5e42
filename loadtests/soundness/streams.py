"""Simulated runs whose truth is known: what each arm is said to be, and is. Used by experiments on learning.

Contexts are what a checkpoint's fuse makes of texts: normalise([1; z]) with z of eight independent directions. An arm's
reward is 1 with its own probability, whatever the text; its offset is what was said of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.policies import BayesianPolicy, draw
from router_core.posterior import Posterior, fold, start
from router_core.prior import CALIBRATED_HYPERPARAMETERS, Hyperparameters, calibrated_prior
from router_core.records import Event, Feedback, Shadow, Signal

Rows = NDArray[np.float32]

DIM = 9

WINDOW = 100
"""Steps of which more than half must ask an arm until it counts as found."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """A run to simulate.

    Attributes:
        said: (K,) the offsets.
        phases: (steps, true probabilities (K,)), one phase after another.
        hyper: of the calibrated prior.
        shadow: share of the steps at which every arm is asked.
    """

    said: tuple[float, ...]
    phases: tuple[tuple[int, tuple[float, ...]], ...]
    hyper: Hyperparameters = CALIBRATED_HYPERPARAMETERS
    shadow: float = 0.0


def contexts(rng: np.random.Generator, n: int) -> Rows:
    """(n, `DIM`) rows of norm 1 whose first column is the constant."""
    rows = np.concatenate([np.ones((n, 1)), rng.standard_normal((n, DIM - 1))], axis=1)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def asked(run: Simulated, seed: int) -> tuple[NDArray[np.int64], Posterior]:
    """The arm that was asked at every step, and the posterior at the end; feedback comes before the next draw."""
    rng, K = np.random.default_rng(seed), len(run.said)
    truth = np.concatenate([np.tile(true, (steps, 1)) for steps, true in run.phases])
    x, right = contexts(rng, len(truth)), rng.random(truth.shape) < truth
    everybody = rng.random(len(truth)) < run.shadow
    offsets = np.array([run.said])
    state = start(calibrated_prior(K, DIM, lambda rows: np.tile(offsets, (len(rows), 1)), run.hyper))
    policy, arms = BayesianPolicy(), np.empty(len(truth), np.int64)
    for step in range(len(truth)):
        at = slice(step, step + 1)
        arm = arms[step] = int(draw(policy.beliefs(x[at], offsets, state), rng).ranking[0, 0])
        others = [k for k in range(K) if k != arm] if everybody[step] else []
        shadows = tuple(Shadow(k, run.said[k], float(right[step, k])) for k in others)
        feedback, credit = Feedback(Signal.PREFERENCE, 0.0), float(right[step, arm])
        event = Event(arm, x[step].tobytes(), run.said[arm], credit, feedback, shadows=shadows)
        state = fold(state, [event])
    return arms, state


def all_asked(runs: Sequence[Simulated], seeds: int, workers: int) -> list[list[NDArray[np.int64]]]:
    """The asked arms of every run and seed."""
    jobs = [(run, seed) for run in runs for seed in range(seeds)]
    with ProcessPoolExecutor(workers) as executor:
        arms = list(executor.map(_arms, jobs, chunksize=1))
    return [arms[i * seeds : (i + 1) * seeds] for i in range(len(runs))]


def _arms(job: tuple[Simulated, int]) -> NDArray[np.int64]:
    return asked(*job)[0]


def found_after(arms: NDArray[np.int64], arm: int) -> int | None:
    """Steps until more than half of the next `WINDOW` ask the arm; None if that never is.

    >>> found_after(np.repeat([0, 1], 200), 1)
    151
    """
    counts = np.concatenate([[0], np.cumsum(arms == arm)])
    often = np.flatnonzero(counts[WINDOW:] - counts[:-WINDOW] > WINDOW / 2)
    return int(often[0]) if len(often) else None
