"""Do the off-policy intervals hold the truth as often as they say? Logs replayed from recorded pairs, truth known.

    python -m loadtests.ope_coverage [DATA] [--logs 300] [--sizes 300,1000,3000] [--json OUT]

One half of the pairs (groups are never split) teaches the offsets, the other half is the population. Each log is a
stream drawn from the population with replacement, routed by a logging policy that learns as it goes; all logs of one
policy advance in step, as one batch. The truth of a target policy is its mean correctness over the population. DATA
defaults to the variable RB9_DEV, then to ../shared/data/rb9_dev.jsonl.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.report import describe, machine, table, use_one_blas_thread, write_json
from router_core.dataset import grouped_folds, load_pairs, pool_matrix
from router_core.encoder.fuse import Fuse, PairEncoder
from router_core.encoder.registry import load_backbone
from router_core.ope import (
    MAX_LOST,
    PROPENSITY_FLOOR,
    Estimate,
    LoggedData,
    NoSupportError,
    doubly_robust,
    ips,
    one_reward_per_row,
    safe_interval,
    sequential_ridge,
    snips,
    softmax_policy,
    with_shadows,
)
from router_core.prior import (
    CALIBRATED_HYPERPARAMETERS,
    NONE_HYPERPARAMETERS,
    PAPER_HYPERPARAMETERS,
    Hyperparameters,
)
from router_core.propensity import argmax_propensities

Array = NDArray[np.float64]

K4 = ("internlm2-1_8b-reward", "GRM-Gemma-2B-rewardmodel-ft", "FsfairX-LLaMA3-RM-v0.1", "RM-Mistral-7B")

DIM = 16
"""Length of the contexts: principal directions of the encoder's features."""

RIDGE = 5.0
"""Penalty of the offsets that the first half teaches."""

DEFAULT_DATA = "../shared/data/rb9_dev.jsonl"

ESTIMATORS = ("ips", "snips", "dr_uniform", "dr", "safe")


@dataclass(frozen=True, slots=True)
class Population:
    """What instances are drawn from.

    Attributes:
        pool: K names.
        x: (M, d) float32 unit-norm contexts.
        correctness: (M, K).
        offsets: (M, K), learned from other pairs.
    """

    pool: tuple[str, ...]
    x: NDArray[np.float32]
    correctness: Array
    offsets: Array


@dataclass(frozen=True, slots=True)
class Logger:
    """A logging policy: Thompson sampling with these scalars around an offset; None: uniform."""

    name: str
    hyper: Hyperparameters | None
    informed: bool = False
    shadow: float = 0.0
    """Share of the instances whose other RMs are asked too."""


LOGGERS = (
    Logger("random", None),
    Logger("bayesian:none", NONE_HYPERPARAMETERS),
    Logger("bayesian, exploring as the paper", PAPER_HYPERPARAMETERS),
    Logger("bayesian:calibrated", CALIBRATED_HYPERPARAMETERS, informed=True),
    Logger("bayesian:calibrated, 5 % shadowed", CALIBRATED_HYPERPARAMETERS, informed=True, shadow=0.05),
)


def build_population(path: Path, pool: Sequence[str], encoder: str) -> Population:
    """Pairs, contexts and offsets."""
    pairs = load_pairs(path)
    correctness = pool_matrix(pairs, pool)
    if not np.isfinite(correctness).all():
        raise SystemExit(f"{path}: a pair lacks the verdict of an RM of the pool {', '.join(pool)}; leave it out")
    backbone = load_backbone(encoder)
    raw = PairEncoder(backbone, Fuse.identity(backbone.dim)).encode([pair.instance for pair in pairs])
    _, _, directions = np.linalg.svd(raw - raw.mean(axis=0), full_matrices=False)
    x = ((raw - raw.mean(axis=0)) @ directions[:DIM].T).astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    [(inside, outside), _] = grouped_folds(pairs, 2, np.random.default_rng(0))
    means = correctness[inside].mean(axis=0)
    gram = x[inside].T @ x[inside] + RIDGE * np.eye(DIM)
    slopes = np.linalg.solve(gram, x[inside].T @ (correctness[inside] - means))
    offsets = np.clip(means + x[outside] @ slopes, 0.02, 0.98)
    return Population(tuple(pool), x[outside].astype(np.float32), correctness[outside], offsets)


def make_logs(
    population: Population, logger: Logger, logs: int, n: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
    """Streams of n instances: which instance (logs, n), which arm (logs, n), propensities (logs, n, K).

    The update is `router_core.posterior`'s, one event at a time: Σ −= gg'/(σ² + x'g) with g = Σx, μ += g·residual/(…).
    """
    k, d = len(population.pool), population.x.shape[1]
    index = rng.integers(len(population.x), size=(logs, n))
    if logger.hyper is None:
        return index, rng.integers(k, size=(logs, n)), np.full((logs, n, k), 1.0 / k)
    hyper = logger.hyper
    arm, propensities = np.empty((logs, n), np.int64), np.empty((logs, n, k))
    mean = np.zeros((logs, k, d))
    covariance = np.broadcast_to(np.eye(d) / hyper.lambda0, (logs, k, d, d)).copy()
    every = np.arange(logs)
    for t in range(n):
        x = population.x[index[:, t]].astype(np.float64)
        offsets = population.offsets[index[:, t]] if logger.informed else np.full((logs, k), 0.5)
        gains = np.einsum("rkij,rj->rki", covariance, x)
        variance = np.einsum("rki,ri->rk", gains, x)
        means, sds = offsets + np.einsum("rki,ri->rk", mean, x), hyper.v * np.sqrt(np.maximum(variance, 0.0))
        drawn = (means + sds * rng.standard_normal((logs, k))).argmax(axis=1)
        arm[:, t], propensities[:, t] = drawn, argmax_propensities(means, sds)
        gain, scale = gains[every, drawn], hyper.sigma2 + variance[every, drawn]
        residual = population.correctness[index[:, t], drawn] - means[every, drawn]
        mean[every, drawn] += gain * (residual / scale)[:, None]
        covariance[every, drawn] -= gain[:, :, None] * gain[:, None, :] / scale[:, None, None]
    return index, arm, propensities


def targets(population: Population) -> dict[str, Array]:
    """Probabilities (M, K) of every target policy over the population."""
    m, k = population.offsets.shape
    eye, everywhere = np.eye(k), np.ones((m, k), np.bool_)
    out = {f"single:{name}": np.broadcast_to(eye[arm], (m, k)) for arm, name in enumerate(population.pool)}
    out["random"] = np.full((m, k), 1.0 / k)
    out["offline"] = eye[population.offsets.argmax(axis=1)]
    out["softmax:0.1"] = softmax_policy(population.offsets, 0.1, everywhere)
    return out


def evaluate(
    data: LoggedData, pi: Array, q: Array, floor: float, max_lost: float
) -> dict[str, Estimate | tuple[float, float] | None]:
    """Every estimator on one log; None where the log was refused."""
    out: dict[str, Estimate | tuple[float, float] | None] = {"safe": safe_interval(data, pi, floor=floor)}
    for name in ("ips", "snips", "dr_uniform", "dr"):
        try:
            if name == "ips":
                out[name] = ips(data, pi, floor=floor, max_lost=max_lost)
            elif name == "snips":
                out[name] = snips(data, pi, floor=floor, max_lost=max_lost)
            else:
                out[name] = doubly_robust(data, pi, q, stabilise=name == "dr", floor=floor, max_lost=max_lost)
        except NoSupportError:
            out[name] = None
    return out


class Tally:
    """What one (logging policy, n, target, estimator) has given over all logs."""

    def __init__(self, truth: float) -> None:
        self.truth = truth
        self.values: list[float] = []
        self.intervals: list[tuple[float, float]] = []
        self.ess: list[float] = []
        self.refused = 0

    def add(self, found: Estimate | tuple[float, float] | None) -> None:
        """One log's estimate."""
        if found is None:
            self.refused += 1
        elif isinstance(found, Estimate):
            self.values.append(found.value)
            self.intervals.append(found.ci95)
            self.ess.append(found.ess)
        else:
            self.values.append(0.5 * sum(found))
            self.intervals.append(found)

    def row(self) -> dict[str, float | None]:
        """Figures over the logs that were not refused; None where all were."""
        made = len(self.values)
        if not made:
            return {"truth": self.truth, "refused": 1.0, "coverage": None}
        values, (low, high) = np.array(self.values), np.array(self.intervals).T
        return {
            "truth": self.truth,
            "refused": self.refused / (made + self.refused),
            "bias": float(values.mean() - self.truth),
            "rmse": float(np.sqrt(np.square(values - self.truth).mean())),
            "width": float((high - low).mean()),
            "coverage": float(((low <= self.truth) & (self.truth <= high)).mean()),
            "ess": float(np.mean(self.ess)) if self.ess else None,
            "logs": made,
        }


def measure(
    population: Population, logger: Logger, logs: int, sizes: Sequence[int], seed: int, floor: float, max_lost: float
) -> dict[str, Any]:
    """size -> target -> estimator -> figures. Shorter logs are the beginnings of the longest."""
    longest = max(sizes)
    index, arm, propensities = make_logs(population, logger, logs, longest, np.random.default_rng(seed))
    wanted = targets(population)
    truths = {name: float((pi * population.correctness).sum(axis=1).mean()) for name, pi in wanted.items()}
    tallies = {(n, name, how): Tally(truths[name]) for n in sizes for name in wanted for how in ESTIMATORS}
    coins = np.random.default_rng(seed + 1)
    for row in range(logs):
        shadowed = coins.random(longest) < logger.shadow
        data = _logged(population, index[row], arm[row], propensities[row], shadowed)
        q = sequential_ridge(data)
        for n in sizes:
            part = data.rows(slice(n))
            for name, pi in wanted.items():
                for how, found in evaluate(part, pi[index[row, :n]], q[:n], floor, max_lost).items():
                    tallies[n, name, how].add(found)
    return {str(n): {name: {how: tallies[n, name, how].row() for how in ESTIMATORS} for name in wanted} for n in sizes}


def _logged(
    population: Population,
    index: NDArray[np.int64],
    arm: NDArray[np.int64],
    propensities: Array,
    shadowed: NDArray[np.bool_],
) -> LoggedData:
    """One log, as an evaluation would find it: the shadow rate is estimated, not told. All arguments (n, …)."""
    correctness = population.correctness[index]
    rewards = one_reward_per_row(arm, correctness[np.arange(len(arm)), arm], len(population.pool))
    rewards[shadowed] = correctness[shadowed]
    everywhere = np.ones(rewards.shape, np.bool_)
    seen = with_shadows(propensities, arm, everywhere, rewards)
    return LoggedData(population.pool, population.x[index], arm, seen, everywhere, rewards)


def summarise(figures: Mapping[str, Any]) -> dict[str, Any]:
    """size -> estimator -> over the targets and logs that were not refused: mean figures and the lowest coverage."""
    out: dict[str, Any] = {}
    for n, by_target in figures.items():
        out[n] = {}
        for how in ESTIMATORS:
            rows = [row[how] for row in by_target.values() if row[how]["coverage"] is not None]
            share = np.array([row["logs"] for row in rows], dtype=np.float64)
            refused = float(np.mean([row[how]["refused"] for row in by_target.values()]))
            out[n][how] = {"targets": len(rows), "refused": refused}
            if rows:
                for key in ("rmse", "width", "coverage"):
                    out[n][how][key] = float(np.average([row[key] for row in rows], weights=share))
                out[n][how]["worst_bias"] = max((row["bias"] for row in rows), key=abs)
                out[n][how]["lowest_coverage"] = min(row["coverage"] for row in rows)
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.ope_coverage", description=__doc__.partition("\n")[0])
    parser.add_argument("data", nargs="?", type=Path, default=Path(os.environ.get("RB9_DEV", DEFAULT_DATA)))
    parser.add_argument("--pool", default=",".join(K4), help="comma-separated [default: the pool K4]")
    parser.add_argument("--encoder", default="static")
    parser.add_argument("--logs", type=int, default=300, help="logs per logging policy [default: 300]")
    parser.add_argument("--sizes", default="300,1000,3000", help="lengths of the logs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--floor", type=float, default=PROPENSITY_FLOOR, help="propensity that counts as support")
    parser.add_argument("--max-lost", type=float, default=MAX_LOST, help="1: never refuse for lack of support")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if not options.data.exists():
        parser.error(f"{options.data} does not exist: give a JSONL of recorded pairs (docs/data.md), or set RB9_DEV")
    use_one_blas_thread()
    facts = machine()
    print(describe(facts))
    population = build_population(options.data, options.pool.split(","), options.encoder)
    sizes = [int(size) for size in options.sizes.split(",")]
    print(f"population of {len(population.x)} pairs, d = {DIM}, {options.logs} logs per logging policy")
    results = {}
    for logger in LOGGERS:
        began = time.perf_counter()
        figures = measure(population, logger, options.logs, sizes, options.seed, options.floor, options.max_lost)
        results[logger.name] = {"targets": figures, "summary": summarise(figures)}
        _print(logger.name, figures, results[logger.name]["summary"])
        print(f"{time.perf_counter() - began:.0f} s")
    write_json(
        options.json,
        {
            "machine": facts,
            "population": len(population.x),
            "pool": population.pool,
            "logs": options.logs,
            "seed": options.seed,
            "floor": options.floor,
            "max_lost": options.max_lost,
            "results": results,
        },
    )


def _print(name: str, figures: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    rows: list[Sequence[object]] = []
    for n, by_target in figures.items():
        for target, by_estimator in by_target.items():
            refused = by_estimator["ips"]["refused"]
            ess = by_estimator["ips"].get("ess")
            cells = [_cell(by_estimator[how]) for how in ESTIMATORS]
            shown = "" if ess is None else f"{ess:.0f}"
            truth = f"{by_estimator['ips']['truth']:.3f}"
            rows.append((target, n, truth, shown, f"{refused:.2f}", *cells))
    table(
        f"logged by {name}: coverage of the 95 % interval (its width; RMSE of the value)",
        ("target", "n", "truth", "ESS", "refused", *ESTIMATORS),
        rows,
    )
    shown_summary: list[Sequence[object]] = []
    for n, by_estimator in summary.items():
        for how, row in by_estimator.items():
            figures_of = [
                f"{row[key]:{form}}" if key in row else "–"
                for key, form in (
                    ("worst_bias", "+.4f"),
                    ("rmse", ".4f"),
                    ("width", ".3f"),
                    ("coverage", ".3f"),
                    ("lowest_coverage", ".3f"),
                )
            ]
            shown_summary.append((how, n, f"{row['refused']:.2f}", *figures_of))
    columns = ("estimator", "n", "refused", "worst bias", "RMSE", "width", "coverage", "lowest")
    table(f"logged by {name}: over the targets", columns, shown_summary)


def _cell(row: Mapping[str, float | None]) -> str:
    if row["coverage"] is None:
        return "–"
    return f"{row['coverage']:.3f} ({row['width']:.3f}; {row['rmse']:.3f})"


if __name__ == "__main__":
    main()
