"""What is measured on the pairs with the verdicts of 85 published RMs: pools, number of RMs, labelled pairs, joins.

Knows `experiments`' values, `offline` and `online`; reads no file. Called by the command.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.tables.experiments import ALL, FIELD_POOLS, FIELD_ROWS, OURS, Fit, Job, Plan, Size, Stream, Variant
from loadtests.tables.offline import TableTwo, offline_figures
from loadtests.tables.online import domain_figures, stream_figures
from loadtests.tables.work import Material, Replayed, priors_of
from router_core.checkpoint import Checkpoint
from router_core.dataset import pool_matrix, pool_names
from router_core.policies import draw_batch, make_policy
from router_core.posterior import fold, start
from router_core.records import Event, Feedback, LabelledPair, Signal

FIELD_SIZE = Size(folds=3, dealings=2, shifts=2, labelled=(32, 64, 128, 256, 512, 960), streamed=1 / 3, seeds=2)
"""Three folds and not five: there is more data, and all 85 take a minute a fit. S6 alone is dealt twice."""
COUNTS = (4, 8, 16, 32)
"""Numbers of RMs beside all of them."""
VERDICTS = (0, 16, 64)
"""Of the RM that joins."""
SHORT = ("offline", OURS, "bayesian:none", "random", "majority")
COMBINED = ("cascade:2",)
DRAWS = 200
"""Draws that are timed."""
WARM_EVENTS = 256
"""Events that are folded before: a posterior that has learned has arms of different width, which take longer."""


class Field:
    """Tables, streams and jobs over the pairs of the 85 RMs."""

    def __init__(self, pairs: Sequence[LabelledPair], encoders: Sequence[str], size: Size) -> None:
        self.pairs, self.size, self.names = pairs, size, pool_names(pairs)
        once = replace(size, dealings=1)
        self._plan, self._once = Plan(pairs, encoders[0], size), Plan(pairs, encoders[0], once)
        self.pools = {name: pool for name, pool in FIELD_POOLS.items() if set(pool) <= set(self.names)}
        self.tables = {
            name: TableTwo(pairs, pool, encoders, size) if name == "S6" else TableTwo(pairs, pool, encoders[:1], once)
            for name, pool in self.pools.items()
        }
        self.counts = {str(len(pool)): pool for pool in self._nested()}
        self.by_count = {
            count: TableTwo(pairs, pool, encoders[:1], once, ablations=False) for count, pool in self.counts.items()
        }
        self.jobs: dict[Any, Job] = {
            **{("online", name): self._online(name, pool) for name, pool in self.pools.items()},
            **{("counts", count): self._counted(count, pool) for count, pool in self.counts.items()},
            **{
                ("transfer", name): self._transfer(name, self.pools[name])
                for name in ("S6", "T6")
                if name in self.pools
            },
            **{("labels", number): job for number, job in self._labels().items()},
            **{("joins", row): job for row, job in self._joins().items()},
        }

    def figures(
        self, fitted: Mapping[Fit, Checkpoint], replayed: Mapping[Any, Replayed], material: Material
    ) -> dict[str, Any]:
        """The document's part `field`."""
        by_count = {count: offline_figures(table.judged(fitted, material)) for count, table in self.by_count.items()}
        return {
            "offline": {name: offline_figures(table.judged(fitted, material)) for name, table in self.tables.items()}
            | {ALL: by_count[str(len(self.names))]},
            "online": {name: stream_figures(replayed["online", name]) for name in self.pools},
            "counts": {
                count: {
                    "offline": by_count[count],
                    "online": stream_figures(replayed["counts", count]),
                    "draw_milliseconds": 1000 * self._draw_seconds(pool, fitted, material),
                }
                for count, pool in self.counts.items()
            },
            "transfer": {key: domain_figures(replayed[part, key]) for part, key in self.jobs if part == "transfer"},
            "labels": {key: stream_figures(replayed[part, key]) for part, key in self.jobs if part == "labels"},
            "joins": {key: stream_figures(replayed[part, key]) for part, key in self.jobs if part == "joins"},
            "pools": {name: list(pool) for name, pool in self.pools.items()},
            "folds": self.size.folds,
            "dealings": self.size.dealings,
            "seeds": self.size.seeds,
        }

    def _nested(self) -> list[tuple[str, ...]]:
        """Pools drawn by a seed, each part of the next; the last holds all RMs."""
        drawn = [self.names[i] for i in np.random.default_rng(0).permutation(len(self.names))]
        counts = [count for count in COUNTS if count < len(drawn)]
        return [*(tuple(drawn[:count]) for count in counts), tuple(self.names)]

    def _online(self, name: str, pool: Sequence[str]) -> Job:
        rows, plan = (FIELD_ROWS, self._once) if name != "S6" else ((*FIELD_ROWS, *COMBINED), self._plan)
        return Job(f"{name}, in distribution", plan.in_distribution(pool), rows, self._seeds)

    def _counted(self, count: str, pool: Sequence[str]) -> Job:
        return Job(f"{count} RMs", self._once.in_distribution(pool), SHORT, self._seeds[:1])

    def _transfer(self, name: str, pool: Sequence[str]) -> Job:
        return Job(f"{name}, a domain never seen", self._plan.without_a_domain(pool), FIELD_ROWS, self._seeds)

    def _labels(self) -> dict[str, Job]:
        pool = self.pools.get("S6", next(iter(self.counts.values())))
        return {
            str(number): Job(f"S6, {number} labelled pairs", streams, SHORT, self._seeds)
            for number, streams in self._plan.few_labels(pool).items()
        }

    def _joins(self) -> dict[str, Job]:
        """By the number of verdicts of the RM that joins: each RM of S6 joins the five others once, on one fold."""
        pool = self.pools.get("S6", ())
        folds = self._once.folds(pool, self.size.folds, 0) if pool else ()
        if not folds:
            return {}
        streams: dict[str, list[Stream]] = {**{str(count): [] for count in VERDICTS}, "all": []}
        for number, late in enumerate(pool):
            stream = folds[number % len(folds)]
            others = tuple(name for name in pool if name != late)
            five = replace(stream.fit, pool=others, late=late)
            streams["0"].append(replace(stream, fit=five, joining=late))
            rows = np.random.default_rng(number).permutation(stream.fit.rows).tolist()
            for count in VERDICTS[1:]:
                fit = replace(five, pool=(*others, late), asked=tuple(sorted(rows[:count])))
                streams[str(count)].append(replace(stream, fit=fit))
            streams["all"].append(replace(stream, fit=replace(stream.fit, pool=(*others, late))))
        return {
            row: Job(f"joins with {row}", tuple(found), ("offline", OURS), self._seeds)
            for row, found in streams.items()
        }

    @property
    def _seeds(self) -> tuple[int, ...]:
        return tuple(range(self.size.seeds))

    def _draw_seconds(self, pool: Sequence[str], fitted: Mapping[Fit, Checkpoint], material: Material) -> float:
        """Median time to draw for one instance, propensities included, after `WARM_EVENTS` events."""
        stream = self._once.in_distribution(pool)[0]
        checkpoint, rows = fitted[stream.fit], list(stream.rows)[:WARM_EVENTS]
        x = checkpoint.fuse.apply(material.encoded[stream.fit.encoder].features[rows])
        pairs = [material.pairs[i] for i in rows]
        correctness, rng = pool_matrix(pairs, pool), np.random.default_rng(0)
        prior = priors_of(checkpoint, Variant(), Signal.PREFERENCE)(None)
        offsets, state = prior.offsets(x), start(prior)
        arms = rng.integers(0, len(pool), size=len(rows)).tolist()
        state = fold(state, [_event(i, arm, x, offsets, correctness, pairs[i].label) for i, arm in enumerate(arms)])
        policy = make_policy(OURS, pool)
        return _median_seconds(lambda at: draw_batch(policy, x[at], offsets[at], state, rng), len(rows))


def _event(
    i: int,
    arm: int,
    x: NDArray[np.float32],
    offsets: NDArray[np.float64],
    correctness: NDArray[np.float64],
    label: int,
) -> Event:
    feedback = Feedback(Signal.PREFERENCE, float(label))
    return Event(arm, x[i].tobytes(), float(offsets[i, arm]), float(correctness[i, arm]), feedback, str(i))


def _median_seconds(action: Callable[[slice], object], n: int) -> float:
    times = []
    for number in range(DRAWS):
        at = slice(number % n, number % n + 1)
        began = time.perf_counter()
        action(at)
        times.append(time.perf_counter() - began)
    return statistics.median(times)
