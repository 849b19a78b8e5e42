"""Do the off-policy intervals hold the truth as often as they say? Logs replayed from recorded pairs, truth known.

    python -m loadtests.ope_coverage [DATA] [--logs 300] [--sizes 300,1000,3000] [--only TEXT] [--json OUT]

One half of the pairs (groups are never split) teaches the offsets, the other half is the population. Each log is a
stream drawn from the population with replacement, routed by a logging policy that learns as it goes; all logs of one
policy advance in step, as one batch. The truth of a target policy is its mean correctness over the population. In some
logs one RM cannot read the longest third of the pairs, and the next-best draw answers in its place; those are also read
as if an RM that failed had been away, which is what not to do. DATA defaults to the variable RB9_DEV, then to
../shared/data/rb9_dev.jsonl.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
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
    among_available,
    doubly_robust,
    ips,
    one_reward_per_row,
    safe_interval,
    sequential_ridge,
    snips,
    softmax_policy,
    with_shadows,
)
from router_core.policies import floor_draws, floors_of
from router_core.prior import (
    CALIBRATED_HYPERPARAMETERS,
    NONE_HYPERPARAMETERS,
    PAPER_HYPERPARAMETERS,
    Hyperparameters,
)
from router_core.propensity import choice_propensities
from router_core.records import Instance

Array = NDArray[np.float64]

K4 = ("internlm2-1_8b-reward", "GRM-Gemma-2B-rewardmodel-ft", "FsfairX-LLaMA3-RM-v0.1", "RM-Mistral-7B")

DIM = 16
"""Length of the contexts: principal directions of the encoder's features."""

RIDGE = 5.0
"""Penalty of the offsets that the first half teaches."""

SHORT_OF_SIGHT = "FsfairX-LLaMA3-RM-v0.1"
"""The RM that fails where one does: the best of the pool. Of another pool, the first one."""

TOO_LONG = 1 / 3
"""Share of the pairs that it cannot read: the longest."""

DEFAULT_DATA = "../shared/data/rb9_dev.jsonl"

RARE = 1e-9
"""Probability below which an arm counts as never drawn first; what follows it is then what is left."""

ESTIMATORS = ("ips", "snips", "dr_uniform", "dr", "safe")


@dataclass(frozen=True, slots=True)
class Population:
    """What instances are drawn from.

    Attributes:
        pool: K names.
        x: (M, d) float32 unit-norm contexts.
        correctness: (M, K).
        offsets: (M, K), learned from other pairs.
        too_long: (M, K) bool, what an RM fails on when it is asked, in the logs in which one does; None: nothing.
    """

    pool: tuple[str, ...]
    x: NDArray[np.float32]
    correctness: Array
    offsets: Array
    too_long: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Logger:
    """A logging policy: Thompson sampling with these scalars around an offset; None: uniform."""

    name: str
    hyper: Hyperparameters | None
    informed: bool = False
    shadow: float = 0.0
    """Share of the instances whose other RMs are asked too."""
    failing: bool = False
    """True if an RM fails on what is too long for it, and the next-best draw answers."""
    masked: bool = False
    """True if the log is read as if an RM that failed had been known to be away: biased, to show how much."""


@dataclass(frozen=True, slots=True)
class Streams:
    """Logs of n instances each; K arms.

    Attributes:
        index: (logs, n), which instance.
        first: (logs, n), the arm that was asked first.
        arm: (logs, n), the arm that answered.
        propensities: (logs, n, K), of being asked first.
        left: (logs, n, K), of answering, among the arms that do not fail on the instance.
        following: (logs, n), expected correctness of what answers where the arm that fails there was asked first.
    """

    index: NDArray[np.int64]
    first: NDArray[np.int64]
    arm: NDArray[np.int64]
    propensities: Array
    left: Array
    following: Array


LOGGERS = (
    Logger("random", None),
    Logger("bayesian:none", NONE_HYPERPARAMETERS),
    Logger("bayesian, exploring as the paper", PAPER_HYPERPARAMETERS),
    Logger("bayesian:calibrated", CALIBRATED_HYPERPARAMETERS, informed=True),
    Logger("bayesian:calibrated, 5 % shadowed", CALIBRATED_HYPERPARAMETERS, informed=True, shadow=0.05),
    Logger("random, one RM fails", None, failing=True),
    Logger("random, one RM fails, masked", None, failing=True, masked=True),
    Logger("bayesian as the paper, one RM fails", PAPER_HYPERPARAMETERS, failing=True),
    Logger("bayesian as the paper, one RM fails, masked", PAPER_HYPERPARAMETERS, failing=True, masked=True),
    Logger(
        "bayesian:calibrated, 5 % shadowed, one RM fails",
        CALIBRATED_HYPERPARAMETERS,
        informed=True,
        shadow=0.05,
        failing=True,
    ),
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
    characters = np.array([_characters(pairs[i].instance) for i in outside])
    too_long = np.zeros((len(outside), len(pool)), np.bool_)
    fails = pool.index(SHORT_OF_SIGHT) if SHORT_OF_SIGHT in pool else 0
    too_long[:, fails] = characters > np.quantile(characters, 1.0 - TOO_LONG)
    return Population(tuple(pool), x[outside].astype(np.float32), correctness[outside], offsets, too_long)


def _characters(instance: Instance) -> int:
    """What an RM has to read of an instance at once."""
    return len(instance.prompt) + max(len(response) for response in instance.responses)


def make_logs(population: Population, logger: Logger, logs: int, n: int, rng: np.random.Generator) -> Streams:
    """Streams of n instances.

    The update is `router_core.posterior`'s, one event at a time: Σ −= gg'/(σ² + x'g) with g = Σx, μ += g·residual/(…).
    The arm that answered learns.
    """
    k, d = len(population.pool), population.x.shape[1]
    index = rng.integers(len(population.x), size=(logs, n))
    fails = np.zeros(population.correctness.shape, np.bool_)
    if logger.failing and population.too_long is not None:
        fails = population.too_long
    if logger.hyper is None:
        return _evenly(population, index, fails, rng)
    hyper = logger.hyper
    out = Streams(*np.zeros((3, logs, n), np.int64), *np.zeros((2, logs, n, k)), np.zeros((logs, n)))
    out.index[:] = index
    mean = np.zeros((logs, k, d))
    covariance = np.broadcast_to(np.eye(d) / hyper.lambda0, (logs, k, d, d)).copy()
    every, events = np.arange(logs), np.zeros((logs, k))
    for t in range(n):
        x = population.x[index[:, t]].astype(np.float64)
        offsets = population.offsets[index[:, t]] if logger.informed else np.full((logs, k), 0.5)
        gains = np.einsum("rkij,rj->rki", covariance, x)
        variance = np.einsum("rki,ri->rk", gains, x)
        means, sds = offsets + np.einsum("rki,ri->rk", mean, x), hyper.v * np.sqrt(np.maximum(variance, 0.0))
        draws = means + sds * rng.standard_normal((logs, k))
        floors = floors_of(means, events, hyper.floor)
        if hyper.floor:
            rows, keys = floor_draws(floors, rng.random((logs, 1 + k)))
            draws[rows] = keys
        drawn = _record(out, t, population.correctness[index[:, t]], fails[index[:, t]], draws, means, sds, floors)
        events[every, drawn] += 1.0
        gain, scale = gains[every, drawn], hyper.sigma2 + variance[every, drawn]
        residual = population.correctness[index[:, t], drawn] - means[every, drawn]
        mean[every, drawn] += gain * (residual / scale)[:, None]
        covariance[every, drawn] -= gain[:, :, None] * gain[:, None, :] / scale[:, None, None]
    return out


def _evenly(
    population: Population, index: NDArray[np.int64], fails: NDArray[np.bool_], rng: np.random.Generator
) -> Streams:
    """Streams of a policy that draws arms evenly, and falls back evenly."""
    k = len(population.pool)
    first = rng.integers(k, size=index.shape)
    broken = fails[index]
    arm = first
    if fails.any():
        others = np.where(broken, -np.inf, rng.random(broken.shape)).argmax(axis=2)
        arm = np.where(np.take_along_axis(broken, first[:, :, None], axis=2)[:, :, 0], others, first)
    left = ~broken / (~broken).sum(axis=2, keepdims=True)
    following = np.where(broken.any(axis=2), (left * population.correctness[index]).sum(axis=2), 0.0)
    return Streams(index, first, arm, np.full(broken.shape, 1.0 / k), left, following)


def _record(
    out: Streams,
    t: int,
    correctness: Array,
    fails: NDArray[np.bool_],
    draws: Array,
    means: Array,
    sds: Array,
    floors: Array,
) -> NDArray[np.int64]:
    """Put step t into the streams; the arms that answered (logs,). The others are (logs, K).

    What follows a first arm f that fails: P(j next | f first) = (P(j largest without f) − P(j largest))/P(f largest).
    """
    out.first[:, t] = draws.argmax(axis=1)
    out.arm[:, t] = np.where(fails, -np.inf, draws).argmax(axis=1)
    first = out.propensities[:, t] = choice_propensities(means, sds, floors)
    out.left[:, t] = first
    rows = np.flatnonzero(fails.any(axis=1))
    if rows.size:
        left = out.left[rows, t] = choice_propensities(np.where(fails, -np.inf, means)[rows], sds[rows], floors[rows])
        gained = np.where(fails[rows], 0.0, np.maximum(left - first[rows], 0.0))
        total = gained.sum(axis=1, keepdims=True)
        after = np.where(total > RARE, gained / np.maximum(total, RARE), left)
        out.following[rows, t] = (after * correctness[rows]).sum(axis=1)
    return out.arm[:, t]


def targets(population: Population, available: NDArray[np.bool_] | None = None) -> dict[str, Array]:
    """Probabilities (M, K) of every target policy over the population, among the available arms (M, K)."""
    m, k = population.offsets.shape
    there = np.ones((m, k), np.bool_) if available is None else available
    eye = np.eye(k)
    out = {
        f"single:{name}": among_available(np.tile(eye[arm], (m, 1)), there) for arm, name in enumerate(population.pool)
    }
    out["random"] = among_available(np.full((m, k), 1.0 / k), there)
    out["offline"] = eye[np.where(there, population.offsets, -np.inf).argmax(axis=1)]
    out["softmax:0.1"] = softmax_policy(population.offsets, 0.1, there)
    return out


def truth(population: Population, streams: Streams, pi: Array, failing: bool) -> float:
    """Value of a target pi (M, K): mean correctness over the population of whom it asks, or of what follows a failure.

    What follows depends on what the logging policy believed then: the mean over all logs and steps.
    """
    value = float((pi * population.correctness).sum(axis=1).mean())
    if not failing or population.too_long is None:
        return value
    lost = np.where(population.too_long, pi, 0.0)
    where = streams.index
    instead = lost.sum(axis=1)[where] * streams.following - (lost * population.correctness).sum(axis=1)[where]
    return value + float(instead.mean())


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
    streams = make_logs(population, logger, logs, longest, np.random.default_rng(seed))
    wanted = targets(population)
    truths = {
        (n, name): truth(population, _beginnings(streams, n), pi, logger.failing)
        for n in sizes
        for name, pi in wanted.items()
    }
    tallies = {(n, name, how): Tally(truths[n, name]) for n in sizes for name in wanted for how in ESTIMATORS}
    # What each target would ask where the RM that failed counts as away.
    rest = targets(population, None if population.too_long is None else ~population.too_long)
    coins = np.random.default_rng(seed + 1)
    for row in range(logs):
        shadowed = coins.random(longest) < logger.shadow
        data = _logged(population, streams, row, shadowed, logger)
        q = sequential_ridge(data)
        index, partial = streams.index[row], ~data.available.all(axis=1, keepdims=True)
        for name, pi in wanted.items():
            asked = np.where(partial, rest[name][index], pi[index])
            for n in sizes:
                for how, found in evaluate(data.rows(slice(n)), asked[:n], q[:n], floor, max_lost).items():
                    tallies[n, name, how].add(found)
    return {str(n): {name: {how: tallies[n, name, how].row() for how in ESTIMATORS} for name in wanted} for n in sizes}


def _beginnings(streams: Streams, n: int) -> Streams:
    """The first n steps of every log."""
    return Streams(*(getattr(streams, part.name)[:, :n] for part in fields(streams)))


def _logged(
    population: Population, streams: Streams, row: int, shadowed: NDArray[np.bool_], logger: Logger
) -> LoggedData:
    """One log, as an evaluation would find it: the shadow rate is estimated, not told. `shadowed` is (n,)."""
    index, first, answered = streams.index[row], streams.first[row], streams.arm[row]
    fell = first != answered
    correctness = population.correctness[index]
    outcome = correctness[np.arange(len(index)), answered]
    action = answered if logger.masked else first
    available = np.ones(correctness.shape, np.bool_)
    if logger.masked:
        available[fell, first[fell]] = False
    rewards = one_reward_per_row(action, outcome, len(population.pool))
    told = correctness.copy()
    if logger.failing and population.too_long is not None:
        # An RM that fails in the shadow stands for what answered.
        told = np.where(population.too_long[index], outcome[:, None], correctness)
    rewards[shadowed] = np.where(available, told, np.nan)[shadowed]
    propensities = np.where(fell[:, None] & logger.masked, streams.left[row], streams.propensities[row])
    seen = with_shadows(propensities, action, available, rewards)
    return LoggedData(population.pool, population.x[index], action, seen, available, rewards)


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
    parser.add_argument("--only", default="", help="logging policies whose name holds this, like `one RM fails`")
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
    for logger in (logger for logger in LOGGERS if options.only in logger.name):
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
