"""Does it pay to tune the online stage's scalars by replay on the training pairs? On the other half of the pairs, no.

Six grouped halves: the offline stage is fitted on one, candidates are replayed there (the pairs as the cross-fitting
held them out, and each domain by a fit and a calibration that saw nothing of it), a rule chooses, and the choice is
replayed on the other half in the same two ways. `By seeds` is the rule that `train` had: the mean difference to the
default must exceed its standard error over three seeds on the same pairs. `By groups` asks for more: the differences
are of groups, and the margin is what the largest of so many candidates shows by luck in one case of twenty (a wild
bootstrap: each group's differences with a random sign).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.soundness.recorded import ENCODER, recorded
from loadtests.soundness.report import Options, Report
from loadtests.tables.experiments import K4, domains_of
from loadtests.tables.work import Material, run_all
from router_core.checkpoint import Checkpoint
from router_core.dataset import grouped_split, pool_names
from router_core.intervals import group_index
from router_core.offline.train import TrainConfig, fit
from router_core.policies import BayesianPolicy
from router_core.prior import CALIBRATED_HYPERPARAMETERS, Hyperparameters, Prior, calibrated_prior, paper_prior
from router_core.records import LabelledPair, Signal
from router_core.replay import Table, tabulate
from router_core.replay.passes import Stage, online_pass
from router_core.replay.stream import Scenario, make_plan
from router_core.torch_threads import torch_threads

Array = NDArray[np.float64]

SPLITS = 6
SEEDS, JUDGING_SEEDS = (0, 1, 2), (10, 11, 12, 13)
SMALLEST = 30
"""Pairs of a domain that is streamed by itself."""
REPLICATES = 1000
PAPER = "the paper's form"
CANDIDATES: Mapping[str, Mapping[str, Any]] = {
    "λ₀ = 30": {"lambda0": 30.0},
    "λ₀ = 300": {"lambda0": 300.0},
    "λ_n = 10": {"lambda_novel": 10.0},
    "λ_n = 100": {"lambda_novel": 100.0},
    "v = .1": {"v": 0.1},
    "v = .3": {"v": 0.3},
    "γ = .95": {"gamma": 0.95},
    "σ² = .12": {"sigma2": 0.12},
}
"""One change to the default each; several that change different scalars are taken together."""


@dataclass(frozen=True, slots=True, eq=False)
class Half:
    """A stream: the table, contexts x, offsets (N, K) of a fit that did not see these pairs, and that fit."""

    table: Table
    x: NDArray[np.float32]
    offsets: Array
    checkpoint: Checkpoint


def tuning(options: Options) -> Report:
    """Per pool, split and rule: what is chosen, and what it brings on the other half."""
    material, splits = recorded(options), options.seeds or SPLITS
    pools = {"K4": K4, "K9": pool_names(material.pairs)}
    tasks: dict[tuple[str, int], Callable[[], dict[str, Any]]] = {
        (name, seed): partial(_split, material, pool, seed) for name, pool in pools.items() for seed in range(splits)
    }
    found = run_all(tasks, options.workers)
    rows = [
        (pool, str(seed), rule, ", ".join(part[rule]["chosen"]) or "the default", f"{part[rule]['gain']:+.4f}")
        for (pool, seed), part in found.items()
        for rule in RULES
    ]
    for pool in pools:
        parts = [part for (name, _), part in found.items() if name == pool]
        for rule in RULES:
            moved = sum(bool(part[rule]["chosen"]) for part in parts)
            mean = _mean_and_error([part[rule]["gain"] for part in parts])
            rows.append((pool, "all", rule, f"moved in {moved} of {len(parts)}", mean))
        for title in parts[0]["gains"]:
            rows.append((pool, "all", "always", title, _mean_and_error([part["gains"][title] for part in parts])))
    return Report(
        title=f"tuning the online stage on half of the pairs, judged on the other half, {splits} splits",
        columns=("pool", "split", "rule", "chosen", "held-out gain"),
        rows=tuple(rows),
        notes=(
            "Gain: accuracy on the other half less the default's there, mean of both ways of streaming (± its standard "
            "error over splits, whose halves overlap: read it as too small).",
            "Always: that one change in every split, whatever the training half says.",
        ),
        figures={f"{pool}, split {seed}": part for (pool, seed), part in found.items()},
    )


def _mean_and_error(values: Sequence[float]) -> str:
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{np.mean(values):+.4f} ± {error:.4f}"


def _split(material: Material, pool: Sequence[str], seed: int) -> dict[str, Any]:
    with torch_threads(1):
        inside, outside = grouped_split(material.pairs, 0.5, np.random.default_rng(seed))
        learning, judging = _halves(material, pool, inside, outside, seed)
    learned, judged = (_accuracies(kinds, seeds) for kinds, seeds in ((learning, SEEDS), (judging, JUDGING_SEEDS)))
    found: dict[str, Any] = {}
    for rule, choose in RULES.items():
        chosen = choose(learned, learning)
        changes = {name: value for title in chosen if title != PAPER for name, value in CANDIDATES[title].items()}
        values = judged[PAPER] if PAPER in chosen else _replayed(judging, JUDGING_SEEDS, changes)
        found[rule] = {"chosen": chosen, "gain": _gain(values, judged[""])}
    return {**found, "gains": {title: _gain(judged[title], judged[""]) for title in judged if title}}


def _halves(
    material: Material, pool: Sequence[str], inside: NDArray[np.int64], outside: NDArray[np.int64], seed: int
) -> tuple[list[list[Half]], list[list[Half]]]:
    """Streams of both halves, each as [in distribution], [one per domain that the fit never saw]."""
    z, backbone = material.encoded[ENCODER].features, material.encoded[ENCODER].backbone
    config = TrainConfig(seed=seed)

    def streamed(rows: NDArray[np.int64], checkpoint: Checkpoint, offsets: Array | None = None) -> Half:
        x = checkpoint.fuse.apply(z[rows])
        said = checkpoint.class_probabilities(x) if offsets is None else offsets
        return Half(tabulate(_of(material, rows), pool), x, said, checkpoint)

    whole, held_out = fit(_of(material, inside), pool, backbone, config, z[inside])
    learning = [[streamed(inside, whole, held_out.probabilities)], list[Half]()]
    judging = [[streamed(outside, whole)], list[Half]()]
    domains = np.array([pair.domain for pair in material.pairs])
    for domain in domains_of(material.pairs):
        rows = [half[domains[half] == domain] for half in (inside, outside)]
        if min(map(len, rows)) < SMALLEST:
            continue
        others = inside[domains[inside] != domain]
        checkpoint, _ = fit(_of(material, others), pool, backbone, config, z[others])
        learning[1].append(streamed(rows[0], checkpoint))
        judging[1].append(streamed(rows[1], checkpoint))
    return learning, judging


def _of(material: Material, rows: NDArray[np.int64]) -> list[LabelledPair]:
    return [material.pairs[i] for i in rows.tolist()]


Kinds = Sequence[Sequence[Half]]
Values = list[list[Array]]
"""Per kind and stream (S, N): what seed s earned on pair i."""


def _accuracies(kinds: Kinds, seeds: Sequence[int]) -> dict[str, Values]:
    """One entry per candidate, by its title; "" for the default."""
    found = {title: _replayed(kinds, seeds, changes) for title, changes in {"": {}, **CANDIDATES}.items()}
    return {**found, PAPER: _replayed(kinds, seeds, None)}


def _replayed(kinds: Kinds, seeds: Sequence[int], changes: Mapping[str, Any] | None) -> Values:
    """`bayesian` with these changes to its scalars; None: the paper's form with the paper's."""
    return [[np.stack([_pass(half, changes, seed) for seed in seeds]) for half in halves] for halves in kinds]


def _pass(half: Half, changes: Mapping[str, Any] | None, seed: int) -> Array:
    prior = _prior(half, None if changes is None else replace(CALIBRATED_HYPERPARAMETERS, **changes))
    scenario = Scenario()
    offsets = half.offsets if changes is not None else np.zeros_like(half.offsets)
    stage = Stage(half.table, half.x, offsets, BayesianPolicy(), prior, Signal.PREFERENCE, scenario)
    done = online_pass(stage, make_plan(half.table, scenario, seed), lambda _: None)
    values = np.empty(len(half.table))
    values[done.order] = done.correct
    return values


def _prior(half: Half, hyper: Hyperparameters | None) -> Prior:
    checkpoint, width = half.checkpoint, half.x.shape[1]
    if hyper is None:
        return paper_prior(checkpoint.bt_embeddings).reading(0, width)
    features = checkpoint.fuse.features
    arms, d = half.offsets.shape[1], width - features
    prior = calibrated_prior(arms, d, checkpoint.class_probabilities, hyper, checkpoint.landmarks)
    return prior.reading(features, width)


def _gain(values: Values, default: Values) -> float:
    """Mean accuracy less the default's, each kind of stream weighing the same."""
    return float(
        np.mean(
            [
                np.mean([(a - b).mean() for a, b in zip(*both, strict=True)])
                for both in zip(values, default, strict=True)
                if both[0]
            ]
        )
    )


def _by_seeds(values: Mapping[str, Values], _: Kinds) -> list[str]:
    """Per scalar the candidate whose gain exceeds its standard error over the seeds by most."""
    leads = {}
    for title in values:
        if title:
            per_seed = [_gain(_seed(values[title], s), _seed(values[""], s)) for s in range(len(SEEDS))]
            leads[title] = float(np.mean(per_seed) - np.std(per_seed, ddof=1) / len(per_seed) ** 0.5)
    return _best_per_scalar(leads)


def _seed(values: Values, s: int) -> Values:
    return [[part[s : s + 1] for part in kind] for kind in values]


def _by_groups(values: Mapping[str, Values], kinds: Kinds) -> list[str]:
    """Per scalar the candidate whose gain exceeds what the largest of all would show by luck of the groups."""
    titles = [title for title in values if title]
    groups = group_index([group for halves in kinds for half in halves for group in half.table.groups])
    weights = np.concatenate(
        [
            np.full(len(half.table), 1.0 / (len(kinds) * len(halves) * len(half.table)))
            for halves in kinds
            for half in halves
        ]
    )
    default = _per_pair(values[""])
    per_group = np.array([np.bincount(groups, weights * (_per_pair(values[title]) - default)) for title in titles])
    rng = np.random.default_rng(0)
    signs = rng.choice((-1.0, 1.0), size=(REPLICATES, per_group.shape[1]))
    deviations = np.sqrt(np.square(per_group).sum(axis=1)) + 1e-12
    largest = (signs @ (per_group / deviations[:, None]).T).max(axis=1)
    margin = float(np.quantile(largest, 0.95))
    return _best_per_scalar(dict(zip(titles, (per_group.sum(axis=1) - margin * deviations).tolist(), strict=True)))


def _per_pair(values: Values) -> Array:
    """Means over the seeds, all streams one after the other."""
    return np.concatenate([part.mean(axis=0) for kind in values for part in kind])


def _best_per_scalar(leads: Mapping[str, float]) -> list[str]:
    best: dict[str, str] = {}
    for title, lead in leads.items():
        scalar = "form" if title == PAPER else next(iter(CANDIDATES[title]))
        if lead > max(0.0, leads.get(best.get(scalar, ""), 0.0)):
            best[scalar] = title
    return [PAPER] if "form" in best else list(best.values())


RULES: Mapping[str, Callable[[Mapping[str, Values], Kinds], list[str]]] = {
    "by seeds": _by_seeds,
    "by groups": _by_groups,
}
