"""Fit the learned votes: ridge on random subsets of the arms, offsets held out, temperature from held-out groups.

Knows offsets, answers and labels; nothing of networks or encoders. Called by `offline.train` with what the
cross-fitting held out. The model is in `combine.votes`, its mathematics in docs/math/combination.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from router_core.combine.answers import Answers, margins_of
from router_core.combine.cascade import Multipliers, Practice
from router_core.combine.votes import FEATURES, Votes, informed_logits, log_odds, logits_of, voters_log
from router_core.intervals import group_index
from router_core.records import TIE, LabelledPair

Array = NDArray[np.float64]

RIDGE = 10.0
"""Ridge on each arm's deviation from what all arms share, per pair; 3 to 60 were compared in docs/experiments.md."""
SHARED_RIDGE = (1.0, 5.0)
"""Ridges on what all arms share: on c, and on the part that grows with ln V."""
SUBSETS = 8
"""Random subsets per pair."""
FOLDS = 4
"""Folds by groups that the temperature is chosen on."""
QUANTILES = (1 / 6, 1 / 2, 5 / 6)
"""Quantiles that stand for an arm's margins: three equally likely ones."""
PRACTICE = 1024
"""Pairs at most that a checkpoint keeps to find multipliers for other pools and prices."""
_FEWEST = 40
"""Pairs without which nothing is fitted."""
_NEWTON_STEPS = 40
_NOTHING = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """Pairs to fit to: offsets (N, K) of models that had not seen a pair's group, answers, labels (N,), groups."""

    offsets: Array
    answers: Answers
    labels: NDArray[np.int64]
    groups: Sequence[str]

    def rows(self, index: NDArray[np.int64]) -> Judged:
        """These pairs."""
        return Judged(
            self.offsets[index], self.answers.rows(index), self.labels[index], [self.groups[i] for i in index]
        )


def recorded_answers(pairs: Sequence[LabelledPair], pool: Sequence[str]) -> Answers:
    """What the RMs of the pool said of each pair; RMs that were not asked have not answered."""
    most = max((len(pair.instance.responses) for pair in pairs), default=1)
    scores = np.full((len(pairs), len(pool), most), np.nan)
    for i, pair in enumerate(pairs):
        for k, name in enumerate(pool):
            if name in pair.scores:
                scores[i, k, : len(pair.scores[name])] = pair.scores[name]
    shape = (len(pairs), len(pool))
    verdicts = [[pair.verdicts.get(name, TIE) for name in pool] for pair in pairs]
    return Answers(
        np.array(verdicts, dtype=np.int64).reshape(shape),
        np.array([[name in pair.verdicts for name in pool] for pair in pairs], dtype=bool).reshape(shape),
        margins_of(scores),
        np.array([len(pair.instance.responses) for pair in pairs], dtype=np.int64),
    )


def fit_votes(data: Judged, rng: np.random.Generator) -> tuple[Votes, Multipliers, Practice] | None:
    """The votes, the multiplier for each budget, and pairs to find others on; from pairs whose offsets are held out.

    1. Per pair `SUBSETS` subsets of the RMs that answered: half of them the first by offset, as a cascade asks, half of
       them any; their numbers are even from 1 to K.
    2. Ridge: minimise Σ −log P(label) + ½ Σ ridge·(weight − start)², averaged over a pair's subsets. Each of the eight
       weights is one that all arms share plus the arm's own deviation; the start is β = 1, the rest 0: arms that are
       as good as their offsets say and err independently.
    3. Temperature: the factor on all weights at which pairs of groups outside the fit are most probable.

    Args:
        data: held-out pairs.
        rng: draws subsets and folds.

    Returns:
        None with fewer than 40 pairs that any RM had a verdict about, or groups too few to hold any out.
    """
    useful = np.flatnonzero(data.answers.votes.any(axis=1) & (data.answers.responses > 1))
    data = data.rows(useful)
    index = group_index(data.groups)
    if len(useful) < _FEWEST or len(set(index)) < FOLDS:
        return None
    deviations = _deviations(data.answers)
    level = np.array([logits_of(data.offsets).mean()])
    blank = Votes(np.zeros((2, FEATURES, data.offsets.shape[1])), deviations, np.zeros((1, len(deviations))), level)
    blank = replace(blank, margins=_typical(data.answers, blank))
    subsets = _subsets(data, rng)
    weights = _fit(blank, data, subsets)
    fold = (rng.permutation(int(index.max()) + 1) % FOLDS)[index]
    held_out, most = [], int(data.answers.responses.max())
    for f in range(FOLDS):
        inside, outside = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
        part = replace(blank, weights=_fit(blank, data.rows(inside), subsets[:, inside], start=weights))
        held_out += [_leads(part, data.rows(outside), asked, most) for asked in subsets[:, outside]]
    votes = replace(blank, weights=weights * _temperature(np.concatenate(held_out)))
    practice = Practice(data.offsets, data.answers)
    multipliers = Multipliers.practised(votes, practice, np.ones(votes.n_arms))
    kept = np.sort(rng.permutation(len(useful))[:PRACTICE])
    return votes, multipliers, Practice(data.offsets[kept], data.answers.rows(kept))


def _deviations(answers: Answers) -> Array:
    """Root mean square of each arm's margins, 1 where there are none."""
    known = np.isfinite(answers.margins)
    squares = np.square(np.where(known, answers.margins, 0.0)).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return np.where(squares > 0.0, np.sqrt(squares), 1.0)


def _typical(answers: Answers, votes: Votes) -> Array:
    """`QUANTILES` of each arm's m_k, (Q, K); 0 where it has no margins."""
    m = np.where(np.isfinite(answers.margins), votes.scaled(answers.margins), np.nan)
    columns = [column[np.isfinite(column)] for column in m.T]
    return np.stack([np.quantile(c, QUANTILES) if len(c) else np.zeros(len(QUANTILES)) for c in columns], axis=1)


def _subsets(data: Judged, rng: np.random.Generator) -> NDArray[np.bool_]:
    """(R, N, K): which arms are asked."""
    N, K = data.offsets.shape
    masks = []
    for r in range(SUBSETS):
        key = data.offsets if r % 2 == 0 else rng.random((N, K))
        rank = np.where(data.answers.answered, -key, np.inf).argsort(axis=1, kind="stable").argsort(axis=1)
        masks.append(rank < rng.integers(1, K + 1, size=(N, 1)))
    return np.stack(masks)


def _design(votes: Votes, data: Judged, asked: NDArray[np.bool_]) -> Array:
    """(N, n − 1, 8(K + 1)): features of each other response less those of the label; 0 beyond a pair's own responses.

    A feature belongs to the response that the arm prefers; the last of each K + 1 columns is the sum over the arms.
    """
    answers = data.answers.only(asked)
    voted = answers.votes
    logits, m = informed_logits(data.offsets, votes.level), votes.scaled(answers.margins)
    features = np.stack([np.ones_like(logits), logits, m, m * logits], axis=1) * voted[:, None, :]
    features = np.concatenate([features, voters_log(voted.sum(axis=1))[:, None, None] * features], axis=1)
    features = np.concatenate([features, features.sum(axis=2, keepdims=True)], axis=2)
    # One column per response; the shared columns are sums over the arms that prefer it.
    n = int(answers.responses.max())
    prefers = answers.verdicts[:, None, :] == np.arange(n)[None, :, None]
    own = features[:, None, :, :-1] * prefers[:, :, None, :]
    per_response = np.concatenate([own, own.sum(axis=3, keepdims=True)], axis=3).reshape(len(data.labels), n, -1)
    others = (data.labels[:, None] + np.arange(1, n)) % n
    rows = np.arange(len(data.labels))[:, None]
    inside = (others < answers.responses[:, None])[:, :, None]
    difference: Array = (per_response[rows, others] - per_response[rows, data.labels[:, None]]) * inside
    return difference


def _fit(votes: Votes, data: Judged, subsets: NDArray[np.bool_], start: Array | None = None) -> Array:
    """Ridge-penalised maximum likelihood by damped Newton steps: (2, 4, K)."""
    K = data.offsets.shape[1]
    design = np.concatenate([_design(votes, data, asked) for asked in subsets])
    absent = np.tile(_absent(data), (len(subsets), 1))
    ridge = np.full((2, FEATURES, K + 1), RIDGE)
    ridge[:, :, K] = np.array(SHARED_RIDGE)[:, None]
    prior = np.zeros_like(ridge)
    prior[0, 1, K] = 1.0
    first = prior.copy()
    if start is not None:
        first[:, :, :K] = start - prior[:, :, K:]
    flat = _newton(design, absent, 1.0 / len(subsets), ridge.ravel(), prior.ravel(), first.ravel())
    fitted = flat.reshape(ridge.shape)
    weights: Array = fitted[:, :, :K] + fitted[:, :, K:]
    return weights


def _absent(data: Judged) -> NDArray[np.bool_]:
    """(N, n − 1): other responses that a pair does not have, in the order of `_design`."""
    n = int(data.answers.responses.max())
    others = (data.labels[:, None] + np.arange(1, n)) % n
    return np.asarray(others >= data.answers.responses[:, None])


def _newton(X: Array, absent: NDArray[np.bool_], weight: float, ridge: Array, prior: Array, start: Array) -> Array:
    """argmin_b weight·Σ log(1 + Σ_i exp(X_i b)) + ½ (b − prior)ᵀ diag(ridge) (b − prior), X (N, n − 1, p)."""

    def objective(b: Array) -> float:
        z = np.where(absent, -np.inf, X @ b)
        losses = np.logaddexp.reduce(np.concatenate([np.zeros((len(z), 1)), z], axis=1), axis=1)
        return float(weight * losses.sum() + 0.5 * (ridge * np.square(b - prior)).sum())

    b, now = start, objective(start)
    for _ in range(_NEWTON_STEPS):
        p = _others(X @ b, absent)
        mean = np.einsum("ni,nip->np", p, X)
        gradient = weight * mean.sum(axis=0) + ridge * (b - prior)
        scaled = (np.sqrt(p)[:, :, None] * X).reshape(-1, X.shape[2])
        hessian = weight * (scaled.T @ scaled - mean.T @ mean) + np.diag(ridge)
        step = np.linalg.solve(hessian, gradient)
        length, slope = 1.0, float(gradient @ step)
        while length > _NOTHING and objective(b - length * step) > now - 1e-4 * length * slope:
            length /= 2.0
        b = b - length * step
        before, now = now, objective(b)
        if before - now < 1e-7 * max(abs(before), 1.0):
            break
    return b


def _others(z: Array, absent: NDArray[np.bool_]) -> Array:
    """exp(z_i)/(1 + Σ exp(z_j)), 0 for absent responses."""
    z = np.where(absent, -np.inf, z)
    top = np.maximum(z.max(axis=1, keepdims=True), 0.0)
    weights = np.exp(z - top)
    out: Array = weights / (np.exp(-top) + weights.sum(axis=1, keepdims=True))
    return out


def _leads(votes: Votes, data: Judged, asked: NDArray[np.bool_], n: int) -> Array:
    """Log-odds of each other response against the label, (N, n − 1); −inf for responses that a pair does not have."""
    answers = data.answers.only(asked)
    constant, growth = votes.strengths(data.offsets, answers.margins)
    odds = log_odds(constant, growth, answers)
    odds = np.concatenate([odds, np.zeros((len(odds), n - odds.shape[1]))], axis=1)
    others = (data.labels[:, None] + np.arange(1, n)) % n
    rows = np.arange(len(others))[:, None]
    leads: Array = np.where(
        others < answers.responses[:, None], odds[rows, others] - odds[rows, data.labels[:, None]], -np.inf
    )
    return leads


def _temperature(leads: Array) -> float:
    """argmin_t Σ log(1 + Σ_i exp(t·lead_i)) over a grid from ½ to 2: leads (N, n − 1)."""
    grid = np.geomspace(0.5, 2.0, 81)
    zero = np.zeros((len(leads), 1))
    losses = [float(np.logaddexp.reduce(np.concatenate([zero, t * leads], axis=1), axis=1).sum()) for t in grid]
    return float(grid[int(np.argmin(losses))])
