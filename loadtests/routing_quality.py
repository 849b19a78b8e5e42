"""How often the asked RM is right, per policy, on recorded pairs: grouped cross-validation, online within each fold.

    python -m loadtests.routing_quality [DATA] [--encoders static,minilm] [--pools K4,K6,K9] [--json OUT]

For each fold the offline stage learns from the other folds, then every policy meets the fold as a stream with feedback
after each instance. Groups (a prompt, a task) are never split. DATA defaults to the variable RB9_DEV, then to
../shared/data/rb9_dev.jsonl. Differences carry a 95 % interval from a bootstrap over groups.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.report import describe, machine, table, write_json
from router_core.dataset import grouped_folds, load_pairs, pool_names
from router_core.encoder.base import Backbone
from router_core.encoder.registry import load_backbone
from router_core.offline.train import pair_features, train
from router_core.prior import Prior
from router_core.records import LabelledPair, Signal
from router_core.replay import Table, replay, tabulate
from service.settings import Settings
from service.wiring import build_prior

K4 = ("internlm2-1_8b-reward", "GRM-Gemma-2B-rewardmodel-ft", "FsfairX-LLaMA3-RM-v0.1", "RM-Mistral-7B")
"""Chosen after seeing the accuracies, so that a router has room to gain; K9, all of them, stands beside it."""

POOLS: Mapping[str, tuple[str, ...]] = {"K4": K4, "K6": (*K4, "internlm2-7b-reward", "URM-LLaMa-3-8B"), "K9": ()}
"""Empty: every RM of the data."""

POLICIES = ("bayesian", "bayesian:paper", "bayesian:none", "offline", "random", "majority")

BOOTSTRAPS = 2000

DEFAULT_DATA = "../shared/data/rb9_dev.jsonl"


def cross_validate(
    pairs: Sequence[LabelledPair],
    recorded: Table,
    backbone: Backbone,
    features: NDArray[np.float32],
    folds: int,
    seeds: Sequence[int],
) -> dict[str, NDArray[np.float64]]:
    """Was the verdict right: (S, N) per policy, every instance met once per seed in the fold that left it out."""
    correct = {name: np.empty((len(seeds), len(pairs))) for name in POLICIES}
    for inside, outside in grouped_folds(pairs, folds, np.random.default_rng(0)):
        checkpoint = train([pairs[i] for i in inside], recorded.pool, backbone, features=features[inside])
        stream = Table(
            recorded.pool, recorded.verdicts[outside], recorded.labels[outside], recorded.correctness[outside]
        )

        def prior(form: str | None, of: Any = checkpoint) -> Prior:
            settings = Settings.model_validate({"prior": form or "auto"})
            return build_prior(settings, of, len(of.pool), of.d)

        traces = replay(
            stream,
            checkpoint.fuse.apply(features[outside]),
            POLICIES,
            priors=prior,
            signal=Signal.PREFERENCE,
            seeds=seeds,
        )
        for name, trace in traces.items():
            correct[name][:, outside] = trace.correct
    return correct


def grouped_interval(
    difference: NDArray[np.float64], groups: Sequence[str], rng: np.random.Generator
) -> tuple[float, float]:
    """95 % interval of a mean over instances, groups drawn with replacement. difference: (N,)."""
    _, index = np.unique(np.array(groups), return_inverse=True)
    sums, counts = np.bincount(index, difference), np.bincount(index).astype(np.float64)
    drawn = rng.integers(len(sums), size=(BOOTSTRAPS, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def per_subset_best(recorded: Table, pairs: Sequence[LabelledPair]) -> float:
    """Accuracy of the best RM of every subset, chosen in hindsight: what a router of subsets could reach."""
    subsets = np.array([pair.subset for pair in pairs])
    total = 0.0
    for subset in np.unique(subsets):
        total += recorded.correctness[subsets == subset].sum(axis=0).max()
    return float(total / len(pairs))


def judge(
    recorded: Table, pairs: Sequence[LabelledPair], correct: Mapping[str, NDArray[np.float64]]
) -> dict[str, dict[str, Any]]:
    """One row per policy and per single RM, with its paired difference to the best single RM and to random."""
    rng = np.random.default_rng(0)
    groups = [pair.group or pair.id for pair in pairs]
    singles = {f"single:{name}": recorded.correctness[:, k] for k, name in enumerate(recorded.pool)}
    means = {name: values.mean(axis=0) for name, values in correct.items()} | singles
    best = max(singles.values(), key=lambda values: float(values.mean()))
    rows: dict[str, dict[str, Any]] = {}
    for name, values in sorted(means.items(), key=lambda item: -float(item[1].mean())):
        rows[name] = {
            "accuracy": float(values.mean()),
            "ci95": grouped_interval(values, groups, rng),
            "over_best_single": float((values - best).mean()),
            "over_best_single_ci95": grouped_interval(values - best, groups, rng),
            "over_random": float((values - means["random"]).mean()),
            "over_random_ci95": grouped_interval(values - means["random"], groups, rng),
            "calls": len(recorded.pool) if name == "majority" else 1,
            "sd_over_seeds": float(correct[name].mean(axis=1).std(ddof=1)) if name in correct else 0.0,
        }
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.routing_quality", description=__doc__.partition("\n")[0])
    parser.add_argument("data", nargs="?", type=Path, default=Path(os.environ.get("RB9_DEV", DEFAULT_DATA)))
    parser.add_argument("--encoders", default="static,minilm", help="comma-separated [default: static,minilm]")
    parser.add_argument("--pools", default="K4,K6,K9", help="comma-separated [default: K4,K6,K9]")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("--seeds: give at least 2, or there is no spread to report")
    if not options.data.exists():
        parser.error(f"{options.data} does not exist: give a JSONL of recorded pairs (docs/data.md), or set RB9_DEV")
    facts = machine()
    print(describe(facts))
    pairs = load_pairs(options.data)
    print(
        f"{len(pairs)} pairs, {options.folds} grouped folds, {options.seeds} seeds, signal `preference`; each online "
        f"stage sees one fold, about {len(pairs) // options.folds} instances"
    )
    results: dict[str, Any] = {}
    for encoder in options.encoders.split(","):
        backbone = load_backbone(encoder)
        began = time.perf_counter()
        features = pair_features(pairs, backbone)
        print(f"encoder {encoder}: {(time.perf_counter() - began) * 1e3 / len(pairs):.2f} ms a pair")
        for name in options.pools.split(","):
            recorded = tabulate(pairs, POOLS[name] or pool_names(pairs))
            correct = cross_validate(pairs, recorded, backbone, features, options.folds, range(options.seeds))
            rows = judge(recorded, pairs, correct)
            oracle = float(recorded.correctness.max(axis=1).mean())
            subsets = per_subset_best(recorded, pairs)
            results[f"{encoder} {name}"] = {"policies": rows, "oracle": oracle, "best_per_subset": subsets}
            _print(f"{name}, encoder {encoder}", rows, oracle, subsets)
    write_json(options.json, {"machine": facts, "n": len(pairs), "folds": options.folds, "results": results})


def _print(title: str, rows: Mapping[str, Mapping[str, Any]], oracle: float, subsets: float) -> None:
    def interval(row: Mapping[str, Any], key: str) -> str:
        low, high = row[f"{key}_ci95"]
        return f"{row[key]:+.3f} ({low:+.3f} … {high:+.3f})"

    shown: list[Sequence[object]] = [
        (
            name,
            f"{row['accuracy']:.3f}",
            f"{row['sd_over_seeds']:.3f}",
            str(row["calls"]),
            interval(row, "over_best_single"),
            interval(row, "over_random"),
        )
        for name, row in rows.items()
    ]
    shown.append(("best RM per subset, in hindsight", f"{subsets:.3f}", "", "1", "", ""))
    shown.append(("oracle", f"{oracle:.3f}", "", "1", "", ""))
    table(title, ("policy", "accuracy", "sd of seeds", "calls", "over the best single RM", "over random"), shown)


if __name__ == "__main__":
    main()
