"""Fits and replays as tasks of worker processes, each with one thread; a fit that several tables need is made once.

Knows `experiments`' values, the offline stage and replay. Tasks carry all that they need, so that the processes share
nothing. Called by the command.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from loadtests.tables.encodings import Encoded
from loadtests.tables.experiments import PAPER, TUNED, Fit, Job, Stream, Variant
from router_core.checkpoint import Checkpoint
from router_core.dataset import pool_matrix
from router_core.encoder.base import Backbone
from router_core.offline.table import Fitter
from router_core.offline.train import TrainConfig, train
from router_core.policies import ScoreScale
from router_core.prior import Prior, PriorForm
from router_core.records import LabelledPair, Signal
from router_core.replay import Pass, Table, Trace, merge, replay, score_scale, tabulate
from router_core.torch_threads import torch_threads
from service.priors import build_prior
from service.settings import read_settings

Array = NDArray[np.float64]
Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")
Tell = Callable[[], None]

BEST_LEARNED = "best single RM, learned"
SUBSETS_LEARNED = "best RM per subset, learned"
BEST_HINDSIGHT = "best single RM, in hindsight"
SUBSETS_HINDSIGHT = "best RM per subset, in hindsight"
DOMAINS_HINDSIGHT = "best RM of each domain, in hindsight"
REFERENCES = (BEST_LEARNED, BEST_HINDSIGHT, SUBSETS_LEARNED, SUBSETS_HINDSIGHT)
"""Rows beside the policies. `Learned`: chosen on the pairs that the offline stage learns from."""


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """The pairs, and per encoder what it made of them."""

    pairs: Sequence[LabelledPair]
    encoded: Mapping[str, Encoded]


@dataclass(frozen=True, slots=True, eq=False)
class Replayed:
    """All streams of a job, stacked: a pair that several of them hold stands there several times, in one group.

    Attributes:
        table: the streams' pairs, stream after stream.
        traces: by policy, and of `REFERENCES`.
    """

    table: Table
    traces: Mapping[str, Trace]


def run_all(tasks: Mapping[Key, Callable[[], Result]], workers: int, tell: Tell = lambda: None) -> dict[Key, Result]:
    """Results by key, in the tasks' order.

    Args:
        tasks: picklable where there are several workers.
        workers: processes; 1: none but this one.
        tell: called after each.
    """
    results: dict[Key, Result] = {}
    if workers == 1:
        for key, task in tasks.items():
            results[key] = task()
            tell()
        return results
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor:
        futures = {executor.submit(task): key for key, task in tasks.items()}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            tell()
    return {key: results[key] for key in tasks}


def fit_tasks(fits: Iterable[Fit], material: Material) -> dict[Fit, Callable[[], Checkpoint]]:
    """One task per different fit, the longest first, so that no worker is left alone with one at the end."""
    different = sorted(dict.fromkeys(fits), key=lambda fit: -len(fit.rows) * len(fit.pool))
    tasks: dict[Fit, Callable[[], Checkpoint]] = {}
    for fit in different:
        rows, encoded = list(fit.rows), material.encoded[fit.encoder]
        pairs = _known(fit, material.pairs)
        tasks[fit] = partial(train, pairs, fit.pool, encoded.backbone, fit.config, encoded.features[rows])
    return tasks


def _known(fit: Fit, pairs: Sequence[LabelledPair]) -> list[LabelledPair]:
    """The fit's pairs; without the verdicts of the RM that joined late, but for those that it was asked about."""
    asked = set(fit.asked)
    return [_without(pairs[i], fit.late) if fit.late and i not in asked else pairs[i] for i in fit.rows]


def _without(pair: LabelledPair, name: str) -> LabelledPair:
    return replace(
        pair,
        verdicts={other: verdict for other, verdict in pair.verdicts.items() if other != name},
        scores={other: scores for other, scores in pair.scores.items() if other != name},
    )


def looked_up(fitted: Mapping[Fit, Checkpoint], material: Material) -> Fitter:
    """`train`, answered from what is fitted already.

    Raises:
        KeyError: a fit that was not planned.
    """
    position = {pair.id: i for i, pair in enumerate(material.pairs)}

    def fit(
        pairs: Sequence[LabelledPair],
        pool: Sequence[str],
        backbone: Backbone,
        config: TrainConfig | None = None,
        features: NDArray[np.float32] | None = None,
    ) -> Checkpoint:
        rows = tuple(position[pair.id] for pair in pairs)
        return fitted[Fit(backbone.spec, tuple(pool), rows, config or TrainConfig())]

    return fit


def replay_tasks(
    jobs: Mapping[str, Job], fitted: Mapping[Fit, Checkpoint], material: Material
) -> dict[tuple[str, int], Callable[[], dict[str, Trace]]]:
    """One task per job and stream."""
    return {
        (key, number): partial(_replay_stream, job, *_prepared(stream, fitted[stream.fit], material))
        for key, job in jobs.items()
        for number, stream in enumerate(job.streams)
    }


def stacked(job: Job, parts: Sequence[Mapping[str, Trace]], material: Material) -> Replayed:
    """The job's streams as one, with the rows that need no replay."""
    rows = [np.array(stream.rows, dtype=np.int64) for stream in job.streams]
    everything = np.concatenate(rows)
    table = tabulate([material.pairs[i] for i in everything.tolist()], job.pool)
    ends = np.cumsum([len(part) for part in rows])
    ranges = [np.arange(end - len(part), end) for part, end in zip(rows, ends, strict=True)]
    traces = merge(list(zip(ranges, parts, strict=True)), len(table))
    arms = {BEST_LEARNED: np.empty(len(table), np.int64), SUBSETS_LEARNED: np.empty(len(table), np.int64)}
    for stream, part in zip(job.streams, ranges, strict=True):
        learned = [material.pairs[i] for i in stream.fit.rows]
        streamed = [material.pairs[i] for i in stream.rows]
        arms[BEST_LEARNED][part] = best_arm(learned, job.pool)
        arms[SUBSETS_LEARNED][part] = best_arm_per_subset(learned, streamed, job.pool)
    arms[BEST_HINDSIGHT] = np.full(len(table), int(table.correctness.mean(axis=0).argmax()))
    arms[SUBSETS_HINDSIGHT] = hindsight_arms(table)
    passes = next(iter(traces.values())).passes
    return Replayed(table, {**traces, **{name: _fixed(table, arms[name], passes) for name in REFERENCES}})


def best_arm(learned: Sequence[LabelledPair], pool: Sequence[str]) -> int:
    """The most accurate RM on these pairs; the first of equals."""
    return int(np.nanmean(pool_matrix(learned, pool), axis=0).argmax())


def best_arm_per_subset(
    learned: Sequence[LabelledPair], judged: Sequence[LabelledPair], pool: Sequence[str]
) -> NDArray[np.int64]:
    """For each judged pair the RM that is most accurate on its subset among the learned ones: (len(judged),).

    What a router earns that is told every pair's subset, but nothing of the judged pairs' verdicts. Of a subset that
    was not learned from, nothing is known: the best RM of all learned pairs.
    """
    correctness = pool_matrix(learned, pool)
    names = np.array([pair.part for pair in learned])
    overall = best_arm(learned, pool)
    best: dict[str, int] = {}
    for name in np.unique(names).tolist():
        rows = correctness[names == name]
        # An RM without a verdict on this subset is not chosen.
        means = np.where(
            np.isnan(rows).all(axis=0), -1.0, np.nansum(rows, axis=0) / np.maximum((~np.isnan(rows)).sum(axis=0), 1)
        )
        best[name] = int(means.argmax())
    return np.array([best.get(pair.part, overall) for pair in judged], dtype=np.int64)


def hindsight_arms(table: Table) -> NDArray[np.int64]:
    """The most accurate RM of each pair's subset on these very pairs: (N,)."""
    names = np.array(table.subsets)
    arms = np.empty(len(table), np.int64)
    for name in np.unique(names).tolist():
        rows = names == name
        arms[rows] = int(table.correctness[rows].mean(axis=0).argmax())
    return arms


def priors_of(
    checkpoint: Checkpoint,
    variant: Variant,
    signal: Signal,
    paper: Sequence[tuple[str, Any]] = (),
    joining: bool = False,
) -> Callable[[str | None], Prior]:
    """The prior of a form as the service makes it for that signal; the default one changed as the variant says.

    Args:
        paper: fields of `Hyperparameters` that the form `paper` gets in the place of the published ones.
        joining: one more arm, of which nothing is known: its offsets are the others' mean.
    """

    settings = read_settings(prior="auto", signal=signal)

    def prior(form: str | None) -> Prior:
        named = None if form is None else PriorForm(form)
        K = len(checkpoint.pool)
        built = build_prior(settings, checkpoint, K, checkpoint.d, named)
        if form is not None:
            published = named is not PriorForm.PAPER or not paper
            return built if published else replace(built, hyper=replace(built.hyper, **dict(paper)))
        changed = replace(built, hyper=replace(built.hyper, **dict(variant.hyper)))
        if joining:
            return _joined(changed)
        if not variant.features:
            return changed
        return replace(changed, means=np.zeros((K, checkpoint.fuse.learned)), first=0, d=checkpoint.d)

    return prior


def _joined(prior: Prior) -> Prior:
    """The prior with one more arm, as good as the others are on average."""

    def offset(x: NDArray[np.float32]) -> Array:
        known = prior.offsets(x)
        return np.hstack([known, known.mean(axis=1, keepdims=True)])

    return replace(prior, means=np.zeros((prior.n_arms + 1, prior.n_weights)), offset=offset)


def _prepared(
    stream: Stream, checkpoint: Checkpoint, material: Material
) -> tuple[Table, NDArray[np.float32], Checkpoint, ScoreScale]:
    rows, pool = list(stream.rows), stream.pool
    table = tabulate([material.pairs[i] for i in rows], pool)
    x = checkpoint.fuse.apply(material.encoded[stream.fit.encoder].features[rows])
    scale = checkpoint.scores or score_scale([material.pairs[i] for i in stream.fit.rows], stream.fit.pool)
    return table, x, checkpoint, scale


def _replay_stream(
    job: Job, table: Table, x: NDArray[np.float32], checkpoint: Checkpoint, scale: ScoreScale
) -> dict[str, Trace]:
    def played(policies: Sequence[str], paper: Sequence[tuple[str, Any]] = ()) -> dict[str, Trace]:
        joining = len(table.pool) > len(checkpoint.pool)
        return replay(
            table,
            x,
            policies,
            priors=priors_of(checkpoint, job.variant, job.signal, paper, joining),
            signal=job.signal,
            seeds=job.seeds,
            scenario=job.scenario,
            scale=scale,
            combination=None if joining else checkpoint.combination,
        )

    with torch_threads(1):
        traces = played([name for name in job.policies if name not in TUNED])
        traces |= {name: played([PAPER], TUNED[name])[PAPER] for name in job.policies if name in TUNED}
    return {name: traces[name] for name in job.policies}


def _fixed(table: Table, arms: NDArray[np.int64], passes: Sequence[Pass]) -> Trace:
    """Known arms, asked once each, along the same passes as the policies."""
    correct = table.correctness[np.arange(len(table)), arms]
    along = [Pass(part.seed, part.order, correct[part.order], arms[part.order]) for part in passes]
    return Trace(tuple(along), len(table), 1.0)
