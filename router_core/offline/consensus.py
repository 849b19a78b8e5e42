"""What is the right answer, if nobody says? RMs' accuracies and the answers estimated together from agreement.

Dawid & Skene (1979), per kind of text: an RM that agrees with the others where they agree with each other is right
often, so its word weighs more, so the answers are better known. Kinds are clusters of the features; an RM's accuracy on
a kind is shrunk towards its accuracy on all. Compare Weaver (arXiv 2506.18203), which weighs weak verifiers so.

Agreement cannot tell RMs that are right together from RMs that err together. Rows with a label pin their answer, and
show by how much agreement overstates itself (`Consensus.overstated`).

Knows verdicts and features; no networks, no files. Called by `service.cli.train`, `loadtests.consensus`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from router_core.errors import DatasetError
from router_core.records import TIE, LabelledPair

Array = NDArray[np.float64]
Index = NDArray[np.int64]

KINDS = 8
"""Clusters of texts; 6 and 12 gave the same answers within .005 (docs/experiments.md)."""

DIRECTIONS = 8
"""Leading directions of the standardised features that are clustered."""

SHRINKAGE = 20.0
"""Pairs that an RM's accuracy on all kinds counts within one kind."""

PRIOR = (8.0, 2.0)
"""Right and wrong verdicts that every RM is given at first: better than chance, which names the two answers."""

TEMPER = 0.5
"""Factor on the log-odds of an answer: RMs err together, so that each counts as half a witness."""

ITERATIONS = 100
_CHANGE = 1e-6
_FEWEST_LABELS = 10
_ALARM = 1.64
"""One-sided 5 % point of the normal distribution."""


@dataclass(frozen=True, slots=True, eq=False)
class Consensus:
    """What agreement says of N pairs, K RMs and C kinds.

    Attributes:
        answers: (N, n) probability that each response is the best; one-hot where a label was given.
        accuracy: (C, K) estimated.
        kinds: (N,) the kind of each pair.
        labelled: how many rows had a label.
        claimed: mean probability of the estimated answers at the labelled rows, their labels hidden; NaN without any.
        observed: how many of these were right; NaN without any.
    """

    answers: Array
    accuracy: Array
    kinds: Index
    labelled: int
    claimed: float
    observed: float

    @property
    def overstated(self) -> bool:
        """True if the labels show that RMs err together: agreement claims more than is true, beyond the noise."""
        if self.labelled < _FEWEST_LABELS:
            return False
        noise = np.sqrt(max(self.claimed * (1.0 - self.claimed), 0.01) / self.labelled)
        return bool(self.claimed - self.observed > _ALARM * noise)

    def metrics(self) -> dict[str, float]:
        """Return what a checkpoint keeps of it: rows with estimated answers, with labels, and what these said."""
        counts = {"consensus_pairs": float(len(self.answers) - self.labelled), "consensus_labels": float(self.labelled)}
        if not self.labelled:
            return counts
        return {**counts, "consensus_claimed": self.claimed, "consensus_observed": self.observed}

    def labels(self) -> Index:
        """Return the most probable answer of each pair, (N,)."""
        best: Index = self.answers.argmax(axis=1)
        return best


def estimate(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    features: NDArray[np.floating],
    rng: np.random.Generator,
    labelled: NDArray[np.bool_] | None = None,
) -> Consensus:
    """Estimate answers and accuracies by expectation maximisation.

    E: P(i) ∝ Π_k (a_k or (1 − a_k)/(n − 1)), the first where RM k prefers i; a tie says nothing. M: a_kc = (right + s
    a_k)/(pairs + s), a_k the same over all kinds under `PRIOR`, s = `SHRINKAGE`. The answers returned are P^τ, τ =
    `TEMPER`; tempered on the way, little agreement would fade to none.

    Args:
        pairs: their labels are read only where `labelled` says so.
        pool: K names.
        features: (N, p), of `offline.train.pair_features`.
        rng: places the first centres of the kinds.
        labelled: (N,) rows whose label is gold; None: none.

    Raises:
        DatasetError: fewer than three RMs, or a pair that none was asked about.
    """
    if len(pool) < 3:
        raise DatasetError(f"consensus of {len(pool)} RMs: agreement tells nothing of fewer than three; label pairs")
    known = np.zeros(len(pairs), dtype=bool) if labelled is None else labelled
    sizes = np.array([len(pair.instance.responses) for pair in pairs], dtype=np.int64)
    votes = _votes(pairs, pool, int(sizes.max()))
    labels = np.array([pair.label for pair in pairs])
    kinds = cluster(features, min(KINDS, max(1, len(pairs) // 50)), rng)
    blind, _ = _maximise(votes, sizes, kinds, np.zeros_like(known), labels)
    if known.any():
        answers, accuracy = _maximise(votes, sizes, kinds, known, labels)
        claimed = float(blind[known].max(axis=1).mean())
        observed = float((blind[known].argmax(axis=1) == labels[known]).mean())
        return Consensus(answers, accuracy, kinds, int(known.sum()), claimed, observed)
    answers, accuracy = _maximise(votes, sizes, kinds, known, labels)
    return Consensus(answers, accuracy, kinds, 0, np.nan, np.nan)


def with_answers(pairs: Sequence[LabelledPair], consensus: Consensus) -> list[LabelledPair]:
    """Return the pairs with the most probable answers as labels."""
    return [replace(pair, label=int(label)) for pair, label in zip(pairs, consensus.labels(), strict=True)]


def cluster(features: NDArray[np.floating], count: int, rng: np.random.Generator) -> Index:
    """Return the kind of each text, (N,): k-means on the whitened leading directions of standardised features.

    Args:
        features: (N, p).
        count: kinds at most.
        rng: chooses the first centres, each far from the others (k-means++).
    """
    z = np.asarray(features, dtype=np.float64)
    z = (z - z.mean(axis=0)) / (z.std(axis=0) + 1e-6)
    u, s, _ = np.linalg.svd(z, full_matrices=False)
    rank = min(DIRECTIONS, int((s > 1e-6 * s.max()).sum()) if len(s) else 0)
    points = u[:, :rank] * np.sqrt(len(z))
    centres = points[rng.permutation(len(points))[:1]]
    while len(centres) < count:
        nearest = _squared(points, centres).min(axis=1)
        if nearest.sum() <= 0.0:
            break
        centres = np.vstack([centres, points[rng.choice(len(points), p=nearest / nearest.sum())]])
    kinds = _squared(points, centres).argmin(axis=1)
    for _ in range(ITERATIONS):
        centres = np.array(
            [points[kinds == j].mean(axis=0) if (kinds == j).any() else c for j, c in enumerate(centres)]
        )
        moved = _squared(points, centres).argmin(axis=1)
        if (moved == kinds).all():
            break
        kinds = moved
    return np.asarray(kinds, dtype=np.int64)


def _squared(points: Array, centres: Array) -> Array:
    """Squared distances, (N, C)."""
    distances: Array = np.square(points[:, None] - centres[None]).sum(axis=2)
    return distances


def _votes(pairs: Sequence[LabelledPair], pool: Sequence[str], most: int) -> NDArray[np.bool_]:
    """(N, K, n): True where the RM prefers the response; all False for a tie, and where it was not asked."""
    votes = np.zeros((len(pairs), len(pool), most), dtype=bool)
    for i, pair in enumerate(pairs):
        if not any(name in pair.verdicts for name in pool):
            raise DatasetError(f"pair {pair.id!r}: no RM of the pool was asked about it; leave it out, or label it")
        for k, name in enumerate(pool):
            verdict = pair.verdicts.get(name, TIE)
            if verdict != TIE:
                votes[i, k, verdict] = True
    return votes


def _maximise(
    votes: NDArray[np.bool_], sizes: Index, kinds: Index, known: NDArray[np.bool_], labels: Index
) -> tuple[Array, Array]:
    """Return (N, n) answers and (C, K) accuracies at the end of the iterations."""
    spoke, said = votes.any(axis=2), votes.astype(np.float64)
    real = np.arange(votes.shape[2]) < sizes[:, None]
    of_kind = np.eye(int(kinds.max()) + 1)[kinds].T
    gold = np.eye(votes.shape[2])[np.where(known, labels, 0)]
    answers = np.where(real, 0.05 + said.sum(axis=1), 0.0)
    answers /= answers.sum(axis=1, keepdims=True)
    logits, accuracy = np.zeros(real.shape), np.empty(0)
    for _ in range(ITERATIONS):
        answers = np.where(known[:, None], gold, answers)
        right = np.einsum("nkr,nr->nk", said, answers)
        overall = (right.sum(axis=0) + PRIOR[0]) / (spoke.sum(axis=0) + sum(PRIOR))
        accuracy = (of_kind @ right + SHRINKAGE * overall) / (of_kind @ spoke + SHRINKAGE)
        a = accuracy[kinds]
        odds = np.where(spoke, np.log(a * np.maximum(sizes - 1, 1)[:, None] / (1.0 - a)), 0.0)
        logits = np.where(real, np.einsum("nk,nkr->nr", odds, said), -np.inf)
        new = _softmax(logits)
        change = float(np.abs(new - answers)[~known].max(initial=0.0))
        answers = new
        if change < _CHANGE:
            break
    return np.where(known[:, None], gold, _softmax(TEMPER * logits)), accuracy


def _softmax(logits: Array) -> Array:
    """Probabilities of each row."""
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: Array = raised / raised.sum(axis=1, keepdims=True)
    return probabilities
