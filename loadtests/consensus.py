"""How far does an offline stage come that has seen no label? One call on hidden pairs, beside what labels would give.

`python -m loadtests.consensus rb9_dev.jsonl --pool A,B,C …` prints, for grouped folds: the best single RM chosen with
the training folds' labels, majority, the offline stage trained on labels, and on agreement alone, with none or a few
labels shown; and what these say of agreement. The judged folds' labels are hidden from all.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router_core.dataset import grouped_folds, load_pairs, pool_matrix, pool_names
from router_core.encoder.base import Backbone
from router_core.encoder.registry import load_backbone
from router_core.offline.consensus import estimate, with_answers
from router_core.offline.evaluate import majority_correctness
from router_core.offline.train import pair_features, train
from router_core.records import LabelledPair

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Bench:
    """Everything the folds share: pairs, pool, encoder, features (N, p)."""

    pairs: list[LabelledPair]
    pool: tuple[str, ...]
    backbone: Backbone
    features: NDArray[np.float32]

    def routed(
        self, inside: Index, outside: Index, labels: Sequence[LabelledPair], answers: NDArray[np.float64] | None
    ) -> NDArray[np.int64]:
        """Train on these labels of `inside`; return the RM that is asked about each pair of `outside`."""
        checkpoint = train(labels, self.pool, self.backbone, features=self.features[inside], answers=answers)
        x = checkpoint.fuse.apply(self.features[outside])
        return np.asarray(checkpoint.class_probabilities(x).argmax(axis=1), dtype=np.int64)


def rows_of(bench: Bench, inside: Index, outside: Index, shown: Sequence[int], seed: int) -> dict[str, list[float]]:
    """Return correctness by row of one fold; rows that end in `overstated` hold one number."""
    learned = [bench.pairs[i] for i in inside]
    judged = pool_matrix([bench.pairs[i] for i in outside], bench.pool)
    rows = np.arange(len(outside))
    single = int(np.nanmean(pool_matrix(learned, bench.pool), axis=0).argmax())
    earned = {
        "best single, chosen with labels": judged[:, single].tolist(),
        "majority, all calls": majority_correctness([bench.pairs[i] for i in outside], bench.pool).tolist(),
        "trained on labels": judged[rows, bench.routed(inside, outside, learned, None)].tolist(),
    }
    truth = np.array([pair.label for pair in learned])
    for count in shown:
        rng = np.random.default_rng(seed)
        known = np.isin(np.arange(len(inside)), rng.permutation(len(inside))[:count])
        found = estimate(learned, bench.pool, bench.features[inside], rng, known)
        name, answers = f"consensus, {count} labels", with_answers(learned, found)
        chosen = bench.routed(inside, outside, answers, found.answers)
        earned[name] = judged[rows, chosen].tolist()
        earned[f"{name}: estimated answers"] = (found.labels() == truth).astype(float).tolist()
        earned[f"{name}: claimed"] = found.answers.max(axis=1).tolist()
        earned[f"{name}: said to be overstated"] = [float(found.overstated)]
    return earned


def main() -> None:
    """Read the arguments, and print one line per row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--pool", default="", help="RMs, comma-separated (default: all of the data)")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--deals", type=int, default=2, help="how often the folds are dealt")
    parser.add_argument("--labelled", default="0,50", help="numbers of training rows whose labels are shown")
    given = parser.parse_args()
    began = time.perf_counter()
    pairs = load_pairs(given.data)
    pool = tuple(name for name in given.pool.split(",") if name) or pool_names(pairs)
    # Only what the pool says: other RMs' verdicts in the file would teach the kinds of texts.
    pairs = [replace(pair, verdicts={name: pair.verdicts[name] for name in pool}) for pair in pairs]
    backbone = load_backbone("static", None)
    bench = Bench(pairs, pool, backbone, pair_features(pairs, backbone))
    shown = [int(count) for count in given.labelled.split(",")]
    earned: dict[str, list[float]] = {}
    for deal in range(given.deals):
        for inside, outside in grouped_folds(pairs, given.folds, np.random.default_rng(deal)):
            for name, values in rows_of(bench, inside, outside, shown, deal).items():
                earned.setdefault(name, []).extend(values)
    for name, values in earned.items():
        print(f"{name:44} {np.mean(values):.3f}")
    seconds = time.perf_counter() - began
    print(f"{len(pairs)} pairs, {len(pool)} RMs, {given.folds} folds x {given.deals} deals, {seconds:.0f} s")


if __name__ == "__main__":
    main()
