"""Do the off-policy intervals of cascades and of `stacked` hold the truth as often as they say?

    python -m loadtests.ope_sequences [DATA] [--logs 300] [--sizes 300,1000,3000] [--json OUT]

The population is that of `loadtests.ope_coverage`. Each log is a stream drawn from it with replacement, asked by a
cascade, or by routing, whose beliefs stand still; the truth of a target is its exact mean correctness over the
population, all sequences counted. Votes are Bayes' rule with the offsets, so that nothing is fitted to the population.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from loadtests.ope_coverage import DEFAULT_DATA, K4, Population, Tally, build_population
from loadtests.report import use_one_blas_thread, write_json
from router_core.combine import Answers, Combination, Votes
from router_core.ope import NoSupportError, SequenceLog, Sequencer, evaluate_sequences
from router_core.ope.sequences import reached, whole
from router_core.propensity import argmax_propensities

Array = NDArray[np.float64]

ESTIMATORS = ("ips", "snips", "dr", "safe")

TARGETS = {"cascade, small budget": 0.03, "cascade, middle": 0.01, "cascade, large": 0.003, "stacked": 0.0}
"""Multiplier of each target; `stacked` asks everyone."""

SD = 0.05
"""Standard deviation of the targets' draws."""


@dataclass(frozen=True, slots=True)
class Logger:
    """A logging policy: the multiplier of its cascade, the standard deviation of its draws, and the share shadowed."""

    name: str
    multiplier: float
    sd: float
    shadow: float = 0.0


LOGGERS = (
    Logger("cascade, middle", 0.01, 0.15),
    Logger("cascade, middle, 5 % shadowed", 0.01, 0.15, 0.05),
    Logger("one call, 5 % shadowed", np.inf, 0.15, 0.05),
    Logger("cascade, large", 0.003, 0.3),
)


def main() -> None:
    """Measure all and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=os.environ.get("RB9_DEV", DEFAULT_DATA), type=Path)
    parser.add_argument("--logs", type=int, default=300)
    parser.add_argument("--sizes", default="300,1000,3000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    use_one_blas_thread()
    population = build_population(arguments.data, K4, "static")
    sizes = [int(size) for size in arguments.sizes.split(",")]
    found = {logger.name: measure(population, logger, arguments.logs, sizes, arguments.seed) for logger in LOGGERS}
    if arguments.json is not None:
        write_json(arguments.json, found)
    Console().print(_shown(found))


def measure(
    population: Population, logger: Logger, logs: int, sizes: Sequence[int], seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return size -> target -> estimator -> figures."""
    world = World(population)
    truths = {name: world.value(world.policy(multiplier, SD, name)) for name, multiplier in TARGETS.items()}
    tallies = {(n, name, how): Tally(truths[name]) for n in sizes for name in TARGETS for how in ESTIMATORS}
    rng = np.random.default_rng(seed)
    for _ in range(logs):
        index = rng.integers(len(population.x), size=max(sizes))
        everything = world.log(logger, index, rng)
        for n in sizes:
            log = beginning(everything, n)
            for name, multiplier in TARGETS.items():
                target = world.policy(multiplier, SD, name).rows(index[:n])
                try:
                    value = evaluate_sequences(log, target)
                except NoSupportError:
                    for how in ESTIMATORS:
                        tallies[n, name, how].add(None)
                    continue
                for how in ("ips", "snips", "dr"):
                    tallies[n, name, how].add(value.estimates[how])
                tallies[n, name, "safe"].add(value.safe95)
    return {str(n): {name: {how: tallies[n, name, how].row() for how in ESTIMATORS} for name in TARGETS} for n in sizes}


class World:
    """The population with answers: labels are 0, and an arm that is right prefers response 0."""

    def __init__(self, population: Population) -> None:
        M, K = population.correctness.shape
        self.offsets = population.offsets
        verdicts = np.where(population.correctness == 0.5, -1, 1 - population.correctness).astype(np.int64)
        self.answers = Answers(verdicts, np.ones((M, K), np.bool_), np.full((M, K), np.nan), np.full(M, 2))
        weights = np.zeros((2, 4, K))
        weights[0, 1] = 1.0
        self.combination = Combination(Votes(weights, np.ones(K), np.zeros((1, K))))

    def policy(self, multiplier: float, sd: float, name: str = "") -> Sequencer:
        """Return a policy at the whole population."""
        first = argmax_propensities(self.offsets, np.full(self.offsets.shape, sd))
        multipliers = np.full(len(first), multiplier)
        return Sequencer(self.combination, self.offsets, first, multipliers, everyone=name == "stacked")

    def value(self, target: Sequencer) -> float:
        """Return the target's exact mean correctness: all sequences, each with its probability."""
        M, K = self.offsets.shape
        there, total = np.ones((M, K), np.bool_), np.zeros(M)
        lengths = [K] if target.everyone else range(1, K + 1)
        orders = [order for length in lengths for order in itertools.permutations(range(K), length)]
        for order in orders[:1] if target.everyone else orders:
            arms = np.full((M, K), -1, dtype=np.int64)
            arms[:, : len(order)] = order
            right = np.select([target.verdicts(arms, self.answers) == v for v in (0, -1)], [1.0, 0.5], 0.0)
            total += whole(target.actions(arms, self.answers, there), arms) * right
        return float(total.mean())

    def log(self, logger: Logger, index: NDArray[np.int64], rng: np.random.Generator) -> SequenceLog:
        """Return what the logging policy leaves of these instances."""
        policy, answers = self.policy(logger.multiplier, logger.sd).rows(index), self.answers.rows(index)
        there = np.ones(answers.verdicts.shape, np.bool_)
        arms = policy.sample(answers, there, rng)
        along = reached(policy.actions(arms, answers, there), arms)
        before = np.concatenate([np.ones((len(along), 1)), along[:, :-1]], axis=1)
        chances = np.where(arms >= 0, along / np.maximum(before, 1e-12), 1.0)
        complete = rng.random(len(index)) < logger.shadow
        asked = (arms[:, :, None] == np.arange(arms.shape[1])).any(axis=1)
        known = answers.only(asked | complete[:, None])
        labels = np.zeros(len(index), np.int64)
        return SequenceLog(known, labels, arms, chances, there, complete, np.zeros(len(index)), policy)


def beginning(log: SequenceLog, n: int) -> SequenceLog:
    """Return the first n decisions, the share of complete ones estimated from them."""
    rows, logger = np.arange(n), log.logger
    complete = log.complete[:n]
    return SequenceLog(
        log.answers.rows(rows), log.labels[:n], log.arms[:n], log.chances[:n], log.there[:n], complete,
        np.full(n, complete.mean()), None if logger is None else logger.rows(rows),
    )  # fmt: skip


def _shown(found: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> Table:
    table = Table(title="coverage of 95 % intervals; RMSE of dr; width of dr / safe")
    for column in ("logged by", "n", "target", "truth", "refused", *ESTIMATORS, "RMSE", "widths"):
        table.add_column(column, justify="left" if column in ("logged by", "target") else "right")
    for logger, by_size in found.items():
        for n, by_target in by_size.items():
            for name, row in by_target.items():
                told = row["dr"]
                covered = [_three(row[how]["coverage"]) for how in ESTIMATORS]
                widths = "–" if told["coverage"] is None else f"{told['width']:.2f} / {row['safe']['width']:.2f}"
                error = "–" if told["coverage"] is None else f"{told['rmse']:.3f}"
                refused = f"{told['refused']:.2f}"
                table.add_row(logger, n, name, f"{told['truth']:.3f}", refused, *covered, error, widths)
    return table


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
