"""The paper's Table 2 for any labelled pairs: every single RM, the ensembles, and our offline routers with ablations.

Knows which rows there are, on which pairs each is judged and what it was trained on; the arithmetic of one row is in
`offline.evaluate`, the figures that are made of the rows in `offline.figures`. Called by the `evaluate` command.

| row | what it is | RM calls |
|---|---|---|
| `single:NAME` | one RM for everything | 1 |
| `random` | expectation of an even choice among the RMs | 1 |
| `majority`, `uwo` | all RMs together; no `uwo` where an RM gave verdicts without scores | K |
| `stacked` | all RMs together, by the learned votes of the fit `offline` | K |
| `cascade:B` | the RM that `offline` asks, then others where they are worth it | B on average |
| `offline` | our router with the defaults: the prior's favourite, no feedback | 1 |
| `offline:bt`, `offline:cls` | the same fit, routed by one head | 1 |
| `offline:no-cls` | fitted without the classification loss, routed by the Bradley-Terry head | 1 |
| `offline@ENCODER` | the defaults on another backbone | 1 |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from router_core.checkpoint import Checkpoint
from router_core.combine import COMBINED
from router_core.dataset import grouped_folds, judgeable, pool_matrix
from router_core.encoder.base import Backbone
from router_core.errors import DatasetError, UnknownPolicyError
from router_core.offline.combined import combined_outcomes
from router_core.offline.evaluate import Head, default_head, majority_correctness, route, uwo_correctness
from router_core.offline.train import TrainConfig, train
from router_core.offline.votes import recorded_answers
from router_core.policies import ScoreScale
from router_core.records import LabelledPair
from router_core.replay.table import Table, score_scale, tabulate

Array = NDArray[np.float64]
Features = Mapping[str, NDArray[np.float32]]
"""Per encoder, `pair_features` of all pairs: (N, 2 * dim)."""
Fitter = Callable[
    [Sequence[LabelledPair], Sequence[str], Backbone, TrainConfig | None, NDArray[np.float32] | None], Checkpoint
]
"""`offline.train.train`, or a look-up of what it gave before: pairs, pool, backbone, config, features."""

OFFLINE = "offline"


@dataclass(frozen=True, slots=True)
class Router:
    """One router's row: the encoder's spec, how it is fitted, and the head that routes (None: the fit's own choice)."""

    name: str
    encoder: str
    config: TrainConfig
    head: Head | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """Indices of the pairs that a fit learns from, and of those that it is judged on; no pair is in both."""

    inside: NDArray[np.int64]
    outside: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """Every row on the same pairs.

    Attributes:
        table: the N judged pairs as arrays.
        rows: by name, (S, N): what seed s earned on pair i; S = 1 where nothing is fitted.
        calls: RM calls per instance, by name.
        asked: by router, (K,) the share of the judged pairs for which it asks each RM.
        said: (S, N, K) probability that each RM is right, by the fits of the row `offline`.
        chosen: (S, N) the arm that `offline` asks.
        left_out: pairs that were not judged because an RM of the pool was not asked about them.
        price: per instance, by name, in units of the cheapest RM; that of `calls` where nothing else is given.
    """

    table: Table
    rows: Mapping[str, Array]
    calls: Mapping[str, float]
    asked: Mapping[str, Array] = field(default_factory=dict)
    said: Array | None = None
    chosen: NDArray[np.int64] | None = None
    left_out: int = 0
    price: Mapping[str, float] = field(default_factory=dict)

    def only(self, policies: Sequence[str]) -> Judged:
        """These rows, in the table's own order; all of them where none are named.

        Raises:
            UnknownPolicyError: a named row does not exist.
        """
        unknown = [name for name in policies if name not in self.rows]
        if unknown:
            raise UnknownPolicyError(f"policies: there is no row {unknown}; the rows are {', '.join(self.rows)}")
        if not policies:
            return self
        rows = {name: values for name, values in self.rows.items() if name in policies}
        return replace(
            self,
            rows=rows,
            calls={name: self.calls[name] for name in rows},
            price={name: self.price[name] for name in rows},
            asked={name: shares for name, shares in self.asked.items() if name in rows},
        )


def routers(encoders: Sequence[str], config: TrainConfig, *, ablations: bool = True) -> list[Router]:
    """The routers' rows: `offline` on the first encoder, its ablations, `offline@ENCODER` on the others.

    With `config.lambda_cls = 0` there is no head to compare with, so there are no ablations.
    """
    first, *others = encoders
    rows = [Router(OFFLINE, first, config)]
    if ablations and config.lambda_cls > 0:
        rows += [Router(f"{OFFLINE}:{head}", first, config, head) for head in ("bt", "cls")]
        rows.append(Router(f"{OFFLINE}:no-cls", first, replace(config, lambda_cls=0.0)))
    return rows + [Router(f"{OFFLINE}@{encoder}", encoder, config) for encoder in others]


def fits(rows: Sequence[Router]) -> list[tuple[str, TrainConfig]]:
    """What must be fitted for these rows, each once: rows that differ in the head alone share a fit."""
    return list(dict.fromkeys((row.encoder, row.config) for row in rows))


def held_out_split(n_train: int, n_test: int) -> Split:
    """The split of `[*train, *test]`."""
    everything = np.arange(n_train + n_test, dtype=np.int64)
    return Split(everything[:n_train], everything[n_train:])


def fold_splits(pairs: Sequence[LabelledPair], n_folds: int, seed: int) -> list[Split]:
    """Grouped K-fold; a seed deals the folds."""
    return [Split(*fold) for fold in grouped_folds(pairs, n_folds, np.random.default_rng(seed))]


def judge_fitted(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    splits: Mapping[int, Sequence[Split]],
    rows: Sequence[Router],
    backbones: Mapping[str, Backbone],
    features: Features,
    on_fit: Callable[[], None] = lambda: None,
    fit: Fitter = train,
    combined: Sequence[str] = COMBINED,
    prices: Array | None = None,
) -> Judged:
    """Fit every router inside each split, judge it outside.

    Args:
        pairs: all pairs, learned from and judged.
        pool: K names.
        splits: per seed; the outsides of one seed partition the same judged pairs for every seed.
        rows: see `routers`.
        backbones: by encoder spec.
        features: of all pairs, by encoder spec.
        on_fit: told after each fit; there are `len(fits(rows))` per split.
        fit: makes the checkpoints.
        combined: `stacked`, `cascade:B`; played by the fit of the row `offline`, with multipliers from its own pairs.
        prices: (K,) in units of the cheapest; None: equal.

    Raises:
        DatasetError: an RM of the pool was asked about no pair, too few groups, or no judged pair has all RMs.
    """
    correctness = pool_matrix(pairs, pool)
    judged = np.sort(np.concatenate([split.outside for split in next(iter(splits.values()))]))
    right = {row.name: np.full((len(splits), len(pairs)), np.nan) for row in rows}
    right["uwo"] = np.full((len(splits), len(pairs)), np.nan)
    asked = {row.name: np.zeros(len(pool)) for row in rows}
    complete, answered = judgeable(pairs, pool), ~np.isnan(correctness)
    together = _Together(combined, len(splits), pairs, pool, prices)
    for s, (seed, parts) in enumerate(splits.items()):
        for part in parts:
            inside, outside = [pairs[i] for i in part.inside], part.outside[complete[part.outside]]
            right["uwo"][s, outside] = uwo_correctness([pairs[i] for i in outside], pool, score_scale(inside, pool))
            for encoder, config in fits(rows):
                z = features[encoder]
                checkpoint = fit(inside, pool, backbones[encoder], replace(config, seed=seed), z[part.inside])
                x = checkpoint.fuse.apply(z[outside])
                for row in rows:
                    if (row.encoder, row.config) == (encoder, config):
                        arms = route(checkpoint, x, row.head or default_head(checkpoint), answered[outside])
                        right[row.name][s, outside] = correctness[outside, arms]
                        asked[row.name] += np.bincount(arms, minlength=len(pool))
                    if row.name == OFFLINE and (row.encoder, row.config) == (encoder, config):
                        together.play(s, checkpoint, x, outside, arms)
                on_fit()
    return _assemble(pairs, pool, judged, right, asked, together)


def judge_checkpoint(
    checkpoint: Checkpoint,
    pairs: Sequence[LabelledPair],
    features: NDArray[np.float32],
    scale: ScoreScale | None = None,
    combined: Sequence[str] = COMBINED,
    prices: Array | None = None,
) -> Judged:
    """A trained checkpoint on pairs that it has not seen.

    Args:
        features: `pair_features(pairs, backbone)` with the checkpoint's encoder.
        scale: of the RMs' scores, for `uwo`; None: that of these pairs.
        combined: `stacked`, `cascade:B`; those that the checkpoint cannot play are left out.
        prices: (K,) in units of the cheapest; None: equal.

    Raises:
        DatasetError: an RM of the checkpoint's pool was asked about no pair, or no pair has all RMs.
    """
    pool = checkpoint.pool
    correctness = pool_matrix(pairs, pool)
    rows = np.flatnonzero(judgeable(pairs, pool))
    x = checkpoint.fuse.apply(features[rows])
    heads: dict[str, Head] = {OFFLINE: default_head(checkpoint)}
    if checkpoint.cls_weight.any():
        heads |= {f"{OFFLINE}:bt": "bt", f"{OFFLINE}:cls": "cls"}
    right = {name: np.full((1, len(pairs)), np.nan) for name in ("uwo", *heads)}
    right["uwo"][0, rows] = uwo_correctness([pairs[i] for i in rows.tolist()], pool, scale or score_scale(pairs, pool))
    asked = {}
    together = _Together(combined, 1, pairs, pool, prices)
    for name, head in heads.items():
        arms = route(checkpoint, x, head, ~np.isnan(correctness[rows]))
        if name == OFFLINE:
            together.play(0, checkpoint, x, rows, arms)
        right[name][0, rows] = correctness[rows, arms]
        asked[name] = np.bincount(arms, minlength=len(pool)).astype(np.float64)
    return _assemble(pairs, pool, np.arange(len(pairs)), right, asked, together)


class _Together:
    """What the fits of the row `offline` say, and the policies that combine answers by them, filled split by split."""

    def __init__(
        self,
        names: Sequence[str],
        seeds: int,
        pairs: Sequence[LabelledPair],
        pool: Sequence[str],
        prices: Array | None,
    ) -> None:
        self._names, self.prices = tuple(names), np.ones(len(pool)) if prices is None else prices
        self._answers = recorded_answers(pairs, pool)
        self._labels = np.array([pair.label for pair in pairs], dtype=np.int64)
        self._right = {name: np.full((seeds, len(pairs)), np.nan) for name in names}
        self._calls = {name: np.full((seeds, len(pairs)), np.nan) for name in names}
        self._price = {name: np.full((seeds, len(pairs)), np.nan) for name in names}
        self._said = np.full((seeds, len(pairs), len(pool)), np.nan)
        self._chosen = np.zeros((seeds, len(pairs)), np.int64)

    @property
    def said(self) -> Array:
        """Probabilities that the fits of the row `offline` gave, (S, N, K)."""
        return self._said

    @property
    def chosen(self) -> NDArray[np.int64]:
        """What that row asked, (S, N)."""
        return self._chosen

    def play(
        self,
        seed: int,
        checkpoint: Checkpoint,
        x: NDArray[np.float32],
        rows: NDArray[np.int64],
        first: NDArray[np.int64],
    ) -> None:
        """Judge the pairs `rows`, whose contexts are x and whose routed arms are `first`."""
        answers, offsets = self._answers.rows(rows), checkpoint.class_probabilities(x)
        labels = self._labels[rows]
        self._said[seed, rows], self._chosen[seed, rows] = offsets, first
        played = combined_outcomes(self._names, checkpoint, offsets, answers, labels, first, self.prices)
        for name, outcome in played.items():
            self._right[name][seed, rows], self._calls[name][seed, rows] = outcome.right, outcome.calls
            self._price[name][seed, rows] = outcome.price

    def rows(self, kept: NDArray[np.int64]) -> dict[str, Array]:
        """Right (S, N') by name on these pairs; without a policy that could not be played on all of them."""
        chosen = {name: values[:, kept] for name, values in self._right.items()}
        return {name: values for name, values in chosen.items() if not np.isnan(values).any()}

    def calls(self, name: str, kept: NDArray[np.int64]) -> float:
        """Mean calls per instance."""
        return float(self._calls[name][:, kept].mean())

    def price(self, name: str, kept: NDArray[np.int64]) -> float:
        """Mean price of an instance."""
        return float(self._price[name][:, kept].mean())


def _assemble(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    judged: NDArray[np.int64],
    right: Mapping[str, Array],
    asked: Mapping[str, Array],
    together: _Together,
) -> Judged:
    """The judged pairs that every RM was asked about, the rows that need no fit added; fixed order of rows.

    A row is NaN where its RM abstains; the routers do not ask one that does.
    """
    kept = judged[judgeable(pairs, pool)[judged]]
    if not len(kept):
        raise DatasetError(
            f"pool {list(pool)}: none of the {len(judged)} judged pairs has a verdict of every one of these RMs; "
            "leave some out of the pool, or record what is missing (reward-router label)"
        )
    chosen = [pairs[i] for i in kept]
    table = tabulate(chosen, pool)
    rows = {f"single:{name}": table.correctness[None, :, k] for k, name in enumerate(pool)}
    rows["random"] = np.nanmean(table.correctness, axis=1)[None]
    rows["majority"] = majority_correctness(chosen, pool)[None]
    routed = {name: values[:, kept] for name, values in right.items()}
    uwo = _without_copies(routed.pop("uwo"))
    answered = table.answered
    if not (np.isnan(table.scores).all(axis=2) & answered).any():
        rows["uwo"] = uwo
    joint, K = together.rows(kept), float(answered.sum(axis=1).mean())
    calls = {name: K if name in ("majority", "uwo") else 1.0 for name in (*rows, *routed)}
    shares = {name: counts / max(counts.sum(), 1.0) for name, counts in asked.items()}
    costs = together.prices
    price = {f"single:{name}": float(costs[k]) for k, name in enumerate(pool)} | {"random": float(costs.mean())}
    price |= {name: float((answered @ costs).mean()) for name in ("majority", "uwo")}
    price |= {name: float(share @ costs) for name, share in shares.items()}
    return Judged(
        table=table,
        rows={**rows, **joint, **routed},
        calls=calls | {name: together.calls(name, kept) for name in joint},
        asked=shares,
        said=together.said[:, kept],
        chosen=together.chosen[:, kept],
        left_out=len(judged) - len(kept),
        price=price | {name: together.price(name, kept) for name in joint},
    )


def _without_copies(values: Array) -> Array:
    """(S, N) to (1, N) where the seeds change nothing."""
    return values[:1] if np.array_equal(values, np.broadcast_to(values[0], values.shape), equal_nan=True) else values
