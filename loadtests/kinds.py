"""What do verdicts of other RMs teach about texts? Pools of RMs that the kinds of texts were learned without.

    python -m loadtests.kinds FILE --ship router_core/offline/kinds-static.npz
    python -m loadtests.kinds FILE [--others 60] [--pool 6] [--pools 3] [--names A,B] [--verdicts 32,64] [--folds 3]

FILE holds pairs with the verdicts of many RMs, rb85_dev.jsonl say. `--others` of them, drawn by a seed, are asked about
every training pair; a pool is drawn from the rest and is asked about only so many. The row `pool` is fitted to the
pool's verdicts alone, `kinds` to them with the kinds of texts that the others' verdicts on the training pairs teach
(what the shipped kinds are, fitted inside the folds), and `others` has the other RMs' columns beside them; `single` is
the RM that was best on the verdicts. All are judged on the same held-out groups. `--names` fixes the pool; the others
are drawn from the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router_core.dataset import grouped_folds, load_pairs, pool_matrix, pool_names
from router_core.encoder.registry import load_backbone
from router_core.offline.evaluate import default_head, route
from router_core.offline.members import kinds_of
from router_core.offline.shipped import write_kinds
from router_core.offline.train import TrainConfig, pair_features, train
from router_core.records import LabelledPair

Index = NDArray[np.int64]

ROWS = ("pool", "kinds", "others")


def seen(pair: LabelledPair, names: Sequence[str]) -> LabelledPair:
    """The pair with the verdicts of these RMs alone."""
    kept = set(names)
    verdicts = {name: verdict for name, verdict in pair.verdicts.items() if name in kept}
    return replace(pair, verdicts=verdicts, scores={name: pair.scores[name] for name in pair.scores if name in kept})


def training_pairs(
    pairs: Sequence[LabelledPair], inside: Index, asked: Index, pool: Sequence[str], others: Sequence[str]
) -> list[LabelledPair]:
    """The pairs `inside` with the others' verdicts, and the pool's on those that it was asked about."""
    about = set(asked.tolist())
    return [seen(pairs[i], [*others, *pool] if i in about else others) for i in inside.tolist()]


def main() -> None:
    """Print a row per number of verdicts: accuracies over all pools and folds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--others", type=int, default=60)
    parser.add_argument("--pool", type=int, default=6)
    parser.add_argument("--pools", type=int, default=3)
    parser.add_argument("--names", default="")
    parser.add_argument("--verdicts", default="32,64,128")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--ship", type=Path, metavar="OUT", help="no measuring: write the kinds of all RMs and pairs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pairs = load_pairs(options.file)
    names, backbone = pool_names(pairs), load_backbone("static")
    z = pair_features(pairs, backbone)
    if options.ship is not None:
        write_kinds(options.ship, kinds_of(z, backbone.blocks, pool_matrix(pairs, names), TrainConfig()), backbone)
        return
    sizes = [int(size) for size in options.verdicts.split(",")]
    rows = ("single", *(row.strip() for row in options.rows.split(",")))
    right = {(size, row): list[float]() for size in sizes for row in rows}
    for number in range(options.pools):
        rng = np.random.default_rng([options.seed, number])
        fixed = [name for name in options.names.split(",") if name]
        shuffled = [names[i] for i in rng.permutation(len(names)) if names[i] not in fixed]
        others, pool = shuffled[: options.others], fixed or shuffled[options.others :][: options.pool]
        correctness, config = pool_matrix(pairs, pool), TrainConfig(seed=number)
        for inside, outside in grouped_folds(pairs, options.folds, rng):
            known = pool_matrix([pairs[i] for i in inside], others)
            kinds = {"kinds": kinds_of(z[inside], backbone.blocks, known, config)}
            for size in sizes:
                asked = np.sort(rng.permutation(inside)[:size])
                best = int(correctness[asked].mean(axis=0).argmax())
                right[size, "single"] += correctness[outside, best].tolist()
                for row in rows[1:]:
                    taught = inside if row == "others" else asked
                    seen_pairs = training_pairs(pairs, taught, asked, pool, others if row == "others" else [])
                    checkpoint = train(seen_pairs, pool, backbone, config, z[taught], kinds.get(row))
                    arms = route(checkpoint, checkpoint.fuse.apply(z[outside]), default_head(checkpoint))
                    right[size, row] += correctness[outside, arms].tolist()
    print(f"{options.pools} times a pool of {len(pool)} RMs, beside {len(others)} others; accuracy")
    print("verdicts  " + "  ".join(f"{row:>6}" for row in rows) + "  … − pool (standard error)")
    for size in sizes:
        gains = []
        for row in rows[2:]:
            gain = np.array(right[size, row]) - np.array(right[size, rows[1]])
            gains.append(f"{row} {gain.mean():+.3f} ({gain.std() / len(gain) ** 0.5:.3f})")
        means = "  ".join(f"{np.mean(right[size, row]):6.3f}" for row in rows)
        print(f"{size:8d}  {means}  {', '.join(gains)}", flush=True)


if __name__ == "__main__":
    main()
