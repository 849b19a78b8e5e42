"""The scalars of the online prior, fitted to what the cross-fitting held out: noise by likelihood, the rest by replay.

Knows contexts, held-out probabilities and correctness; nothing of how they were fitted. Called by `offline.train`.

Each candidate is replayed as the policy `bayesian` over two kinds of streams: the held-out pairs as they are, and one
stream per domain whose offsets come from a fit that never saw that domain. The first asks for trust in the offline
stage, the others for distrust; a candidate is judged by the mean over both kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_core.novelty import Landmarks
from router_core.policies import BayesianPolicy
from router_core.prior import (
    CALIBRATED_HYPERPARAMETERS,
    PAPER_HYPERPARAMETERS,
    Hyperparameters,
    Prior,
    PriorForm,
    calibrated_prior,
    paper_prior,
)
from router_core.records import Signal
from router_core.replay.passes import Stage, online_pass
from router_core.replay.stream import Scenario, make_plan
from router_core.replay.table import Table

Array = NDArray[np.float64]

STARTS = (30.0, 100.0, 300.0)
"""Candidates for λ₀, from which it adapts."""
SCALES = (0.1, 0.2, 0.3)
"""Candidates for v."""
DISCOUNTS = (1.0, 0.95)
"""Candidates for γ."""
NOVEL = (10.0, 30.0, 100.0)
"""Candidates for λ_n, the precision on texts unlike those learned from."""
SEEDS = (0, 1, 2)
"""Of the streams' orders and of the draws: the same for every candidate."""
MAX_STREAM = 600
"""Pairs of a stream at most; what tells candidates apart happens in the first hundreds."""
SIGMA2_BOUNDS = (0.02, 0.25)
"""Of σ²; the variance of a reward in [0, 1] is 1/4 at most."""


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """Pairs to replay: the table, contexts x (N, dim), of which the posterior reads d from `first` on, offsets (N, K)
    of a fit that did not see them, and where the pairs of that fit lie.
    """

    name: str
    table: Table
    x: NDArray[np.float32]
    offsets: Array
    first: int
    d: int
    landmarks: Landmarks | None = None


def residual_variance(probabilities: Array, correctness: Array) -> float:
    """σ² = mean (y − o)² over the asked (pair, RM): the maximum-likelihood variance of a Gaussian residual, bounded."""
    asked = ~np.isnan(correctness)
    if not asked.any():
        return CALIBRATED_HYPERPARAMETERS.sigma2
    return float(np.clip(np.square(correctness[asked] - probabilities[asked]).mean(), *SIGMA2_BOUNDS))


def fit_hyperparameters(sigma2: float, streams: Sequence[Stream]) -> tuple[Hyperparameters, dict[str, float]]:
    """λ₀, λ_n, v and γ by replay, one after the other (γ last), each kept at its default unless another value is
    clearly better.

    Clearly: by more than the standard error of the paired difference over streams and seeds. Replays are noisy, and the
    defaults were measured on more data than most users have.

    Args:
        sigma2: of `residual_variance`.
        streams: the first one in distribution, the others shifted; none leaves everything at its default.

    Returns:
        The scalars, and the accuracy of the chosen ones on each stream by name.
    """
    best = replace(CALIBRATED_HYPERPARAMETERS, sigma2=sigma2)
    if not streams:
        return best, {}
    known = {best: _accuracies(best, streams)}
    scalars = (("lambda0", STARTS), ("lambda_novel", NOVEL), ("v", SCALES), ("gamma", DISCOUNTS))
    for name, values in scalars:
        candidates = [_with(best, name, value) for value in values]
        for candidate in candidates:
            if candidate not in known:
                known[candidate] = _accuracies(candidate, streams)
        best = max(candidates, key=lambda candidate: (_lead(known[candidate], known[best]), candidate == best))
    return best, dict(zip((stream.name for stream in streams), known[best].mean(axis=1).tolist(), strict=True))


def choose_form(
    hyper: Hyperparameters, embeddings: NDArray[np.floating], streams: Sequence[Stream]
) -> tuple[PriorForm, dict[str, float]]:
    """The prior form that earns more on the same streams; `calibrated` unless `paper` is clearly better.

    Args:
        hyper: the scalars of the calibrated form; the paper's form has the paper's.
        embeddings: (K, d) unit-norm Bradley-Terry embeddings. They were fitted on pairs of the streams, which favours
            `paper`.
        streams: as for `fit_hyperparameters`.

    Returns:
        The form, and the accuracy of `paper` on each stream by name; empty without streams.
    """
    if not streams:
        return PriorForm.CALIBRATED, {}
    paper = paper_prior(embeddings, PAPER_HYPERPARAMETERS)
    earned = np.array([[_replayed(paper.reading(0, s.x.shape[1]), s, seed) for seed in SEEDS] for s in streams])
    form = PriorForm.PAPER if _lead(earned, _accuracies(hyper, streams)) > 0 else PriorForm.CALIBRATED
    return form, dict(zip((stream.name for stream in streams), earned.mean(axis=1).tolist(), strict=True))


def _with(hyper: Hyperparameters, name: str, value: float) -> Hyperparameters:
    changed: dict[str, Any] = {name: value}
    return replace(hyper, **changed)


def _lead(candidate: Array, standing: Array) -> float:
    """Mean paired difference over seeds and kinds of streams less its standard error; 0 for the standing one itself."""
    kinds = [slice(0, 1), slice(1, None)] if len(candidate) > 1 else [slice(0, 1)]
    differences = np.stack([(candidate[kind] - standing[kind]).mean(axis=0) for kind in kinds]).mean(axis=0)
    return float(differences.mean() - differences.std(ddof=1) / len(differences) ** 0.5)


def _accuracies(hyper: Hyperparameters, streams: Sequence[Stream]) -> Array:
    """(streams, seeds): how often the policy `bayesian` with these scalars asked an RM that was right."""
    return np.array([[_replayed(_calibrated(hyper, stream), stream, seed) for seed in SEEDS] for stream in streams])


def _calibrated(hyper: Hyperparameters, stream: Stream) -> Prior:
    K = stream.offsets.shape[1]
    prior = calibrated_prior(K, stream.d, lambda x: stream.offsets, hyper, stream.landmarks)
    return prior.reading(stream.first, stream.x.shape[1])


def _replayed(prior: Prior, stream: Stream, seed: int) -> float:
    scenario = Scenario()
    stage = Stage(stream.table, stream.x, stream.offsets, BayesianPolicy(), prior, Signal.PREFERENCE, scenario)
    return float(online_pass(stage, make_plan(stream.table, scenario, seed), lambda _: None).correct.mean())
