"""Accuracy against calls and price for every policy: what a budget buys, before it is spent.

Knows fits, votes and recorded answers of every RM; draws no picture (`offline.frontier_plot`). Called by the `frontier`
command. Every pair is judged by a fit that has not seen its group, and every threshold and multiplier is set on the
pairs of that fit.

| row | what it is |
|---|---|
| `single:best` | the RM that is best on the training pairs |
| `offline` | the routed RM |
| `cascade:B` | the routed RM, then others while worth it |
| `random-cascade:B` | the routed RM, then any others, as many on average, by the same votes |
| `judge-when-unsure:B` | the routed RM; where it is least sure, the verdict of the best one (arXiv 2510.20369) |
| `majority:2`, `majority:3`, `majority` | one vote each of the best two or three on the training pairs, of all |
| `uwo`, `stacked` | all RMs |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from router_core.checkpoint import Checkpoint
from router_core.combine import (
    Answers,
    Multipliers,
    Paths,
    Practice,
    Votes,
    follow,
    multiplier_for,
    right_of,
    verdicts_of,
)
from router_core.dataset import pool_matrix
from router_core.encoder.base import Backbone
from router_core.errors import DatasetError
from router_core.intervals import accuracy_interval
from router_core.offline.evaluate import default_head, route
from router_core.offline.train import HeldOut, TrainConfig, fit
from router_core.offline.votes import recorded_answers
from router_core.policies import ScoreScale, UwoPolicy, combined_verdict, majority_verdict
from router_core.records import LabelledPair
from router_core.replay.table import tabulate

Array = NDArray[np.float64]
Fold = tuple[NDArray[np.int64], NDArray[np.int64]]

BUDGETS = (1.2, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Mean price of an instance, in units of the cheapest RM."""


@dataclass(frozen=True, slots=True)
class Point:
    """One policy: mean calls and price per instance, accuracy, its 95 % interval over groups and seeds."""

    policy: str
    calls: float
    price: float
    accuracy: float
    ci95: tuple[float, float]


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """Half of a split: N instances that thresholds are set on, or that policies are judged on.

    Attributes:
        offsets: (N, K) of fits that had not seen them.
        answers: of every arm.
        scores: (N, K, n), NaN where an arm gives none.
        labels: (N,).
        first: (N,) routed arms.
    """

    offsets: Array
    answers: Answers
    scores: Array
    labels: NDArray[np.int64]
    first: NDArray[np.int64]

    @property
    def right(self) -> Array:
        """(N, K): is each arm's verdict right; 1/n for a tie."""
        return right_of(self.answers.verdicts, self.labels[:, None], self.answers.responses[:, None])

    def judged(self, preferred: NDArray[np.int64]) -> Array:
        """(N,): are these verdicts (N,) right."""
        return right_of(preferred, self.labels, self.answers.responses)


@dataclass(frozen=True, slots=True, eq=False)
class Play:
    """What a policy did on the instances of one side: right, calls and price, (N,) each."""

    right: Array
    calls: Array
    price: Array


def frontier(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    splits: Mapping[int, Sequence[Fold]],
    backbone: Backbone,
    features: NDArray[np.float32],
    budgets: Sequence[float] = BUDGETS,
    prices: Array | None = None,
    config: TrainConfig | None = None,
    on_fit: Callable[[], None] = lambda: None,
) -> list[Point]:
    """All points, by rising price.

    Args:
        pairs: each with a verdict of every RM of the pool.
        pool: K names.
        splits: per seed, (inside, outside) indices; the outsides of a seed partition the pairs.
        backbone: of the encoder.
        features: `pair_features(pairs, backbone)`.
        budgets: B of the rows that have one; those above what all RMs cost are left out.
        prices: (K,) at least 1, in units of the cheapest; None: equal.
        config: of the fits.
        on_fit: told after each fit.

    Raises:
        DatasetError: an RM has no verdict on a pair, or the pairs are too few to learn votes from.
    """
    if np.isnan(pool_matrix(pairs, pool)).any():
        raise DatasetError("pairs: every RM of the pool must have judged every one; leave the others out")
    prices = np.ones(len(pool)) if prices is None else prices
    table, answers = tabulate(pairs, pool), recorded_answers(pairs, pool)
    labels, scores = table.labels, table.scores
    plays: dict[str, NDArray[np.float64]] = {}
    for s, (seed, folds) in enumerate(splits.items()):
        for inside, outside in folds:
            known = [pairs[i] for i in inside]
            checkpoint, held_out = fit(known, pool, backbone, _seeded(config, seed), features[inside])
            if checkpoint.votes is None:
                raise DatasetError(f"{len(inside)} pairs are too few to learn votes from: give more, or fewer folds")
            first = _routed(checkpoint, held_out)
            past = Side(held_out.probabilities, answers.rows(inside), scores[inside], labels[inside], first)
            x = checkpoint.fuse.apply(features[outside])
            arms = route(checkpoint, x, default_head(checkpoint))
            offsets = checkpoint.class_probabilities(x)
            future = Side(offsets, answers.rows(outside), scores[outside], labels[outside], arms)
            rng = np.random.default_rng(seed)
            for name, play in plays_of(checkpoint.votes, past, future, budgets, prices, rng).items():
                values = plays.setdefault(name, np.full((3, len(splits), len(pairs)), np.nan))
                values[:, s, outside] = np.stack([play.right, play.calls, play.price])
            on_fit()
    groups = [pair.group for pair in pairs]
    points = [
        Point(name, float(calls.mean()), float(price.mean()), float(right.mean()), accuracy_interval(right, groups))
        for name, (right, calls, price) in plays.items()
        if not np.isnan(right).any()  # A budget that in some fold buys nothing, or more than there is.
    ]
    return by_price(points)


def by_price(points: Sequence[Point]) -> list[Point]:
    """Rising price, and among equals falling accuracy."""
    return sorted(points, key=lambda point: (round(point.price, 6), -point.accuracy))


def undominated(points: Sequence[Point]) -> list[str]:
    """The policies that no other one beats in accuracy at no higher a price.

    >>> a, b = Point("a", 1, 1.0, 0.9, (0, 1)), Point("b", 2, 2.0, 0.8, (0, 1))
    >>> undominated([a, b])
    ['a']
    """
    best, names = -1.0, []
    for point in sorted(points, key=lambda point: (point.price, -point.accuracy)):
        if point.accuracy > best:
            best = point.accuracy
            names.append(point.policy)
    return names


def _seeded(config: TrainConfig | None, seed: int) -> TrainConfig:
    return replace(config or TrainConfig(), seed=seed)


def _routed(checkpoint: Checkpoint, held_out: HeldOut) -> NDArray[np.int64]:
    """The arms (N,) that routing asks about the training pairs, as the cross-fitting predicted them."""
    scores = held_out.bt_scores if default_head(checkpoint) == "bt" else held_out.probabilities
    return np.asarray(scores.argmax(axis=1))


def plays_of(
    votes: Votes, past: Side, future: Side, budgets: Sequence[float], prices: Array, rng: np.random.Generator
) -> dict[str, Play]:
    """Every row on the instances of `future`; thresholds and multipliers from `past`.

    Args:
        votes: learned.
        past: where they are set.
        future: what is judged.
        budgets: B; those above what all arms cost are left out.
        prices: (K,) in units of the cheapest.
        rng: of the random cascades.
    """
    K, rows = len(prices), np.arange(len(future.labels))
    by_rank = np.argsort(-past.right.mean(axis=0), kind="stable")
    strongest, everyone = int(by_rank[0]), list(range(K))
    plays = {"single:best": _fixed(future.right[:, strongest], [strongest], prices)}
    plays["offline"] = Play(future.right[rows, future.first], np.ones(len(rows)), prices[future.first])
    seen = follow(votes, past.offsets, past.answers, past.first, prices, calls=1)
    to_come = follow(votes, future.offsets, future.answers, future.first, prices, calls=1)
    for budget, cascade in _cascades(votes, past, future, budgets, prices).items():
        plays[f"cascade:{budget:g}"] = cascade
        plays[f"random-cascade:{budget:g}"] = _random_cascade(votes, future, budget, prices, rng)
        escalated = _escalated(seen, to_come, past, future, strongest, budget, prices)
        if escalated is not None:
            plays[f"judge-when-unsure:{budget:g}"] = escalated
    for m in (2, 3):
        if m < K:
            best = by_rank[:m].tolist()
            plays[f"majority:{m}"] = _fixed(_majority(future, best), best, prices)
    plays["majority"] = _fixed(_majority(future, everyone), everyone, prices)
    if not np.isnan(future.scores[:, :, 0]).any():
        plays["uwo"] = _fixed(_uwo(past, future), everyone, prices)
    together = verdicts_of(votes.probabilities(future.offsets, future.answers))
    plays["stacked"] = _fixed(future.judged(together.preferred), everyone, prices)
    return plays


def _fixed(right: Array, arms: Sequence[int], prices: Array) -> Play:
    """A policy that asks the same RMs about every pair."""
    return Play(right, np.full(len(right), float(len(arms))), np.full(len(right), float(prices[list(arms)].sum())))


def _majority(side: Side, arms: Sequence[int]) -> Array:
    """One vote each of these arms: right (N,)."""
    verdicts = side.answers.verdicts[:, list(arms)].tolist()
    said = [majority_verdict(row, n) for row, n in zip(verdicts, side.answers.responses.tolist(), strict=True)]
    return side.judged(np.array(said, dtype=np.int64))


def _uwo(past: Side, future: Side) -> Array:
    """Uncertainty-weighted scores on the scale that the past shows: right (N,)."""
    policy, seen = UwoPolicy(), past.scores.transpose(1, 0, 2).reshape(past.scores.shape[1], -1)
    deviation = np.nanstd(seen, axis=1)
    scale = ScoreScale(np.nanmean(seen, axis=1), np.where(deviation > 0, deviation, 1.0))
    numbers = future.answers.responses.tolist()
    said = [combined_verdict(policy, future.scores[i, :, :n], scale) for i, n in enumerate(numbers)]
    return future.judged(np.array(said, dtype=np.int64))


def _cascades(votes: Votes, past: Side, future: Side, budgets: Sequence[float], prices: Array) -> dict[float, Play]:
    """`cascade:B` by B. With equal prices it begins with the routed arm, else with what is worth its price."""
    rows, found = np.arange(len(future.labels)), {}
    wanted = [budget for budget in budgets if 1.0 < budget < prices.sum()]
    if (prices == prices[0]).all():
        seen = follow(votes, past.offsets, past.answers, past.first, prices)
        to_come = follow(votes, future.offsets, future.answers, future.first, prices)
        for budget in wanted:
            ends = to_come.ends(multiplier_for(seen, budget))
            right = future.judged(to_come.preferred[rows, ends])
            found[budget] = Play(right, (ends + 1).astype(np.float64), to_come.spent[rows, ends])
        return found
    multipliers = Multipliers.practised(votes, Practice(past.offsets, past.answers), prices)
    for budget in wanted:
        played = Practice(future.offsets, future.answers).play(votes, prices, multipliers.at(budget))
        right = future.judged(played.preferred[:, -1])
        found[budget] = Play(right, (played.arms >= 0).sum(axis=1).astype(np.float64), played.spent[:, -1])
    return found


def _random_cascade(votes: Votes, future: Side, budget: float, prices: Array, rng: np.random.Generator) -> Play:
    """After the routed RM any others, in a random order, until the budget is spent; the last one by chance."""
    N, K = future.offsets.shape
    rows = np.arange(N)
    order = rng.random((N, K))
    order[rows, future.first] = -1.0
    ranking = order.argsort(axis=1)
    spent = prices[ranking].cumsum(axis=1)
    before = np.concatenate([np.zeros((N, 1)), spent[:, :-1]], axis=1)
    # Whole calls up to the budget, and the one that crosses it in so many cases that the mean is the budget.
    share = np.clip((budget - before) / prices[ranking], 0.0, 1.0)
    taken = share >= rng.random((N, 1))
    taken[:, 0] = True
    asked = np.zeros((N, K), dtype=bool)
    np.put_along_axis(asked, ranking, taken, axis=1)
    verdicts = verdicts_of(votes.probabilities(future.offsets, future.answers.only(asked)))
    calls, price = asked.sum(axis=1).astype(np.float64), np.asarray(asked @ prices, dtype=np.float64)
    return Play(future.judged(verdicts.preferred), calls, price)


def _escalated(
    seen: Paths, to_come: Paths, past: Side, future: Side, strongest: int, budget: float, prices: Array
) -> Play | None:
    """The strongest RM's verdict where p_right of the routed one is below a threshold that keeps to the budget."""
    other = past.first != strongest
    costs = np.where(other, prices[strongest], 0.0)
    doubt = 1.0 - seen.right[:, 0]
    order = np.argsort(-doubt, kind="stable")
    total = float(prices[past.first].mean()) + np.cumsum(costs[order]) / len(order)
    within = int((total <= budget).sum())
    if within in (0, len(order)):
        return None  # The budget buys no escalation, or more than all.
    threshold = doubt[order[within]]
    asked = (1.0 - to_come.right[:, 0] > threshold) & (future.first != strongest)
    arms = np.where(asked, strongest, future.first)
    verdicts = future.answers.verdicts[np.arange(len(arms)), arms]
    price: Array = prices[future.first] + np.where(asked, prices[strongest], 0.0)
    return Play(future.judged(verdicts), np.where(asked, 2.0, 1.0).astype(np.float64), price)
