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
from router_core.dataset import grouped_folds, load_pairs, pairs_digest, pool_names
from router_core.encoder.base import Backbone
from router_core.encoder.registry import load_backbone
from router_core.offline.train import pair_features, train
from router_core.prior import Prior, PriorForm
from router_core.records import LabelledPair, Signal
from router_core.replay import Table, Trace, merge, replay, report, score_scale, tabulate
from service.settings import Settings
from service.wiring import build_prior

K4 = ("internlm2-1_8b-reward", "GRM-Gemma-2B-rewardmodel-ft", "FsfairX-LLaMA3-RM-v0.1", "RM-Mistral-7B")
"""Chosen after seeing the accuracies, so that a router has room to gain; K9, all of them, stands beside it."""

POOLS: Mapping[str, tuple[str, ...]] = {"K4": K4, "K6": (*K4, "internlm2-7b-reward", "URM-LLaMa-3-8B"), "K9": ()}
"""Empty: every RM of the data."""

POLICIES = (
    "bayesian",
    "bayesian:paper",
    "bayesian:none",
    "offline",
    "laser",
    "random",
    "majority",
    "uwo",
)

DEFAULT_DATA = "../shared/data/rb9_dev.jsonl"


def cross_validate(
    pairs: Sequence[LabelledPair],
    recorded: Table,
    backbone: Backbone,
    features: NDArray[np.float32],
    folds: int,
    seeds: Sequence[int],
) -> dict[str, Trace]:
    """Every instance is met once per seed, in the fold that left it out."""
    names = [*POLICIES, *(f"single:{name}" for name in recorded.pool)]
    parts = []
    for inside, outside in grouped_folds(pairs, folds, np.random.default_rng(0)):
        learned = [pairs[i] for i in inside]
        checkpoint = train(learned, recorded.pool, backbone, features=features[inside])

        def prior(form: str | None, of: Any = checkpoint) -> Prior:
            return build_prior(Settings(), of, len(of.pool), of.d, None if form is None else PriorForm(form))

        traces = replay(
            recorded.rows(outside),
            checkpoint.fuse.apply(features[outside]),
            names,
            priors=prior,
            signal=Signal.PREFERENCE,
            seeds=seeds,
            scale=score_scale(learned, recorded.pool),
        )
        parts.append((outside, traces))
    return merge(parts, len(pairs))


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
            traces = cross_validate(pairs, recorded, backbone, features, options.folds, range(options.seeds))
            figures = report(traces, recorded)
            results[f"{encoder} {name}"] = figures
            _print(f"{name}, encoder {encoder}", figures)
    write_json(
        options.json, {"machine": facts, "digest": pairs_digest(pairs), "folds": options.folds, "results": results}
    )


def _print(title: str, figures: Mapping[str, Any]) -> None:
    def over(name: str, against: str) -> str:
        found = figures["paired"][name].get(against)
        return "{:+.3f} ({:+.3f} … {:+.3f})".format(found["difference"], *found["ci95"]) if found else ""

    shown: list[Sequence[object]] = [
        (
            name,
            f"{row['accuracy']:.3f}",
            f"{np.std(figures['per_seed'][name], ddof=1):.3f}",
            f"{row['calls_per_instance']:g}",
            over(name, "best_single"),
            over(name, "random"),
        )
        for name, row in sorted(figures["policies"].items(), key=lambda item: -item[1]["accuracy"])
    ]
    shown.append(("best RM per subset, in hindsight", f"{figures['best_per_subset']:.3f}", "", "1", "", ""))
    shown.append(("oracle", f"{figures['oracle']:.3f}", "", "1", "", ""))
    table(title, ("policy", "accuracy", "sd of seeds", "calls", "over the best single RM", "over random"), shown)


if __name__ == "__main__":
    main()
