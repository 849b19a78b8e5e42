"""How good is a routing? Accuracy of the asked RM beside single RMs, random, majority and oracle, with intervals.

Knows correctness matrices and checkpoints; trains only through `offline.train`. Called by the command line and tests.
A router is right on a pair if the RM it asks is right; a tie of w responses counts 1/w.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from router_core.checkpoint import Checkpoint
from router_core.dataset import grouped_folds, pool_matrix
from router_core.encoder.base import Backbone
from router_core.errors import DatasetError
from router_core.intervals import wilson_bounds
from router_core.offline.calibrate import expected_calibration_error, negative_log_likelihood
from router_core.offline.train import TrainConfig, pair_features, train
from router_core.policies import ScoreScale, UwoPolicy, vote_shares
from router_core.prior import PriorForm
from router_core.records import LabelledPair, chance_of, leaders_of

Head = Literal["bt", "cls"]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Mean correctness over n pairs with its 95 % Wilson interval; n may be an effective number and fractional."""

    value: float
    low: float
    high: float
    n: float


@dataclass(frozen=True, slots=True, eq=False)
class RoutingReport:
    """Accuracies by system name: each RM, `random`, `majority`, `oracle`, `router_bt`, `router_cls`; and calibration.

    `chosen_right[head]` (N,) holds the routers' correctness per pair, averaged over the seeds of a cross-validation.
    """

    pool: tuple[str, ...]
    accuracies: Mapping[str, Accuracy]
    negative_log_likelihood: float
    expected_calibration_error: float
    chosen_right: Mapping[str, NDArray[np.float64]]

    @property
    def best_single(self) -> str:
        """Name of the most accurate RM, in hindsight."""
        return max(self.pool, key=lambda name: self.accuracies[name].value)


def wilson(successes: float, n: float) -> Accuracy:
    """A proportion with Wilson's 95 % interval (`intervals.wilson_bounds`).

    `successes` may be fractional, as ties count one half. With n = 0 nothing is known: NaN and (0, 1).

    >>> round(wilson(8, 10).low, 3), round(wilson(8, 10).high, 3)
    (0.49, 0.943)
    """
    if n == 0:
        return Accuracy(math.nan, 0.0, 1.0, 0.0)
    p = successes / n
    return Accuracy(p, *wilson_bounds(p, n), n)


def majority_correctness(pairs: Sequence[LabelledPair], pool: Sequence[str]) -> NDArray[np.float64]:
    """Is the majority of the asked RMs right? (N,) in [0, 1]; w responses with most votes count 1/w each."""
    right = np.empty(len(pairs))
    for i, pair in enumerate(pairs):
        votes = [pair.verdicts[name] for name in pool if name in pair.verdicts]
        n = len(pair.instance.responses)
        right[i] = chance_of(leaders_of(vote_shares(votes, n)) if votes else range(n), pair.label)
    return right


def uwo_correctness(pairs: Sequence[LabelledPair], pool: Sequence[str], scale: ScoreScale) -> NDArray[np.float64]:
    """Is UWO of the asked RMs right? (N,) in [0, 1]; see `policies.uwo`. A pair without any RM counts as a tie.

    Args:
        scale: of the pool's scores, from other pairs than these.
    """
    policy, right = UwoPolicy(), np.empty(len(pairs))
    for i, pair in enumerate(pairs):
        arms = [k for k, name in enumerate(pool) if name in pair.scores]
        rewards = np.array([pair.scores[pool[k]] for k in arms])
        preference = policy.preference(rewards, scale.rows(arms)).tolist() if arms else []
        right[i] = chance_of(leaders_of(preference) if arms else range(len(pair.instance.responses)), pair.label)
    return right


def default_head(checkpoint: Checkpoint) -> Head:
    """The head that the checkpoint's prior ranks by: Bradley-Terry for the form `paper`, and where the classification
    head learned nothing (λ_cls = 0) and so would always name one RM.
    """
    paper = checkpoint.prior_form is PriorForm.PAPER
    return "bt" if paper or not checkpoint.cls_weight.any() else "cls"


def route(
    checkpoint: Checkpoint, x: NDArray[np.float32], head: Head, answered: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """The arm with the highest prior score for each context: (B, d) to (B,); the first of equals.

    Args:
        answered: (B, K), the arms that apply; None: all.
    """
    scores = checkpoint.bt_scores(x) if head == "bt" else checkpoint.class_probabilities(x)
    if answered is not None:
        scores = np.where(answered, scores, -np.inf)
    return np.asarray(scores.argmax(axis=1), dtype=np.int64)


def baselines(pairs: Sequence[LabelledPair], pool: Sequence[str]) -> dict[str, Accuracy]:
    """Accuracy of each RM, of a random one, of the majority and of the oracle (right if any RM is).

    A single RM is judged on the pairs that it was asked about; the others on all pairs with any RM.
    """
    correctness = pool_matrix(pairs, pool)
    asked = ~np.isnan(correctness)
    rows = asked.any(axis=1)
    table = {name: wilson(float(np.nansum(correctness[:, k])), int(asked[:, k].sum())) for k, name in enumerate(pool)}
    known, n = correctness[rows], int(rows.sum())
    table["random"] = wilson(float(np.nanmean(known, axis=1).sum()), n)
    table["majority"] = wilson(float(majority_correctness(pairs, pool)[rows].sum()), n)
    table["oracle"] = wilson(float(np.nanmax(known, axis=1).sum()), n)
    return table


def evaluate(checkpoint: Checkpoint, pairs: Sequence[LabelledPair], features: NDArray[np.float32]) -> RoutingReport:
    """Judge a checkpoint on pairs that it has not seen.

    Args:
        features: `pair_features(pairs, backbone)`, (N, 2 * dim), with the checkpoint's encoder.

    Raises:
        DatasetError: an RM of the checkpoint's pool has no verdict on a pair (the router might choose it).
    """
    correctness = _complete(pairs, checkpoint.pool)
    x = checkpoint.fuse.apply(features)
    rows = np.arange(len(pairs))
    chosen = {head: correctness[rows, route(checkpoint, x, head)] for head in ("bt", "cls")}
    return _report(pairs, checkpoint.pool, correctness, chosen, checkpoint.class_probabilities(x))


def cross_validate(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    backbone: Backbone,
    config: TrainConfig | None = None,
    n_folds: int = 5,
    seeds: Sequence[int] = (0,),
    features: NDArray[np.float32] | None = None,
) -> RoutingReport:
    """Grouped K-fold: every pair is routed by a checkpoint trained without its group, calibration included.

    Each seed deals the folds anew; figures are means over the seeds, with the interval for N pairs (not N times seeds).

    Raises:
        DatasetError: an RM of the pool has no verdict on a pair, or there are too few groups.
    """
    config = config or TrainConfig()
    correctness = _complete(pairs, pool)
    z = pair_features(pairs, backbone) if features is None else features
    chosen = {head: np.zeros(len(pairs)) for head in ("bt", "cls")}
    probabilities = np.zeros((len(seeds), *correctness.shape))
    for s, seed in enumerate(seeds):
        for inside, outside in grouped_folds(pairs, n_folds, np.random.default_rng(seed)):
            checkpoint = train(
                [pairs[i] for i in inside], pool, backbone, replace(config, seed=seed), features=z[inside]
            )
            x = checkpoint.fuse.apply(z[outside])
            probabilities[s, outside] = checkpoint.class_probabilities(x)
            for head, right in chosen.items():
                right[outside] += correctness[outside, route(checkpoint, x, head)] / len(seeds)  # type: ignore[arg-type]
    return _report(pairs, pool, correctness, chosen, probabilities)


def _complete(pairs: Sequence[LabelledPair], pool: Sequence[str]) -> NDArray[np.float64]:
    correctness = pool_matrix(pairs, pool)
    missing = np.argwhere(np.isnan(correctness))
    if len(missing):
        pair, arm = missing[0]
        raise DatasetError(
            f"pair {pairs[pair].id!r}: RM {pool[arm]!r} was not asked, so routing to it cannot be judged; "
            f"leave out the {len(set(missing[:, 0]))} incomplete pairs or record their scores"
        )
    return correctness


def _report(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    correctness: NDArray[np.float64],
    chosen: Mapping[str, NDArray[np.float64]],
    probabilities: NDArray[np.float64],
) -> RoutingReport:
    table = baselines(pairs, pool)
    for head, right in chosen.items():
        table[f"router_{head}"] = wilson(float(right.sum()), len(right))
    outcomes = np.broadcast_to(correctness, probabilities.shape)
    return RoutingReport(
        pool=tuple(pool),
        accuracies=table,
        negative_log_likelihood=negative_log_likelihood(probabilities, outcomes),
        expected_calibration_error=expected_calibration_error(probabilities, outcomes),
        chosen_right=dict(chosen),
    )
