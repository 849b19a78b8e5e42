"""The `loss` signal and the calibrated prior: does it forget what is right, and does it find out what is wrong?

`slope`: a perfect prior of two arms, each better on half of the contexts, and losses that depend on nothing. What is
learned must not depend on the offset: the slope of the posterior's residual xᵀμ on o, over contexts and arms, is 0 for
a rule that leaves offsets alone and −1 for one that levels them all.

The other rows replay recorded pairs with simulated losses (`router_core.replay.loss`): grouped folds, and one domain
left out of the offline stage. `says nothing`: the losses do not depend on who was right.

`clip(ō + z/4)` is the rule until now: ō the moving average of the asked arms' offsets, and bounds at 0 and 1. The
others are o + z/4 − f.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loadtests.soundness.report import Options, Report
from loadtests.tables.experiments import K4, Variant
from loadtests.tables.work import priors_of
from router_core import feedback as rules
from router_core.dataset import grouped_folds, load_pairs, pool_names
from router_core.encoder.registry import load_backbone
from router_core.feedback import LOSS_EMA_RATE, LOSS_FORGETTING, SignalAccumulator
from router_core.offline.train import TrainConfig, pair_features, train
from router_core.policies import BayesianPolicy, draw
from router_core.posterior import fold, start
from router_core.prior import CALIBRATED_LOSS_HYPERPARAMETERS, calibrated_prior
from router_core.records import Event, Feedback, LabelledPair, Signal
from router_core.replay import Scenario, replay
from router_core.replay.loss import SimulatedLoss
from router_core.replay.table import tabulate
from router_core.torch_threads import torch_threads

Array = NDArray[np.float64]
Index = NDArray[np.int64]

BEFORE = "clip(ō + z/4)"
RULES: Mapping[str, float | None] = {BEFORE: None, **{f"f = {f:g}": f for f in (0.0, LOSS_FORGETTING, 0.06)}}
"""Rows' names and f; None: the rule until now."""

STEPS, SEEDS, FOLDS = 2000, 4, 5


def losses(options: Options) -> Report:
    """The slope, and accuracies per rule."""
    seeds = options.seeds or SEEDS
    found: dict[str, dict[str, float]] = {"slope": {rule: _slope(rule, 4 * seeds) for rule in RULES}}
    tasks = [
        partial(_replayed, options.data, pool, where, seeds)
        for pool in ("K4", "K9")
        for where in ("folds", *_domains(load_pairs(options.data)))
    ]
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as executor:
        for rows in executor.map(_call, tasks):
            found |= rows
    columns = list(RULES)
    shown = [
        (name, *(f"{row[rule]:+.2f}" if name == "slope" else f"{row[rule]:.3f}" for rule in columns))
        for name, row in found.items()
    ]
    return Report(
        title=f"what losses do to the calibrated prior, {seeds} seeds",
        columns=("", *columns),
        rows=tuple(shown),
        notes=(f"Promise: slope 0; folds not below the rule until now. f = {LOSS_FORGETTING:g} is in use.",),
        figures=found,
    )


def _call(task: Callable[[], dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return task()


def _domains(pairs: Sequence[LabelledPair]) -> list[str]:
    return list(dict.fromkeys(pair.domain for pair in pairs))


@contextmanager
def _rule(name: str) -> Iterator[None]:
    """Play by this rule inside the block."""
    kept, forgetting = SignalAccumulator._pooled_reward, rules.LOSS_FORGETTING
    f = RULES[name]
    rules.LOSS_FORGETTING = 0.0 if f is None else f
    expected = [0.0]

    def clipped(self: SignalAccumulator, loss: float, offset: float) -> float | None:
        n = float(self._pooled[0])
        rate = max(LOSS_EMA_RATE, 1.0 / (n + 1))
        expected[0] = offset if n == 0 else (1 - rate) * expected[0] + rate * offset
        reward = kept(self, loss, offset)
        return None if reward is None else min(max(reward - offset + expected[0], 0.0), 1.0)

    try:
        if f is None:
            SignalAccumulator._pooled_reward = clipped  # type: ignore[method-assign]
        yield
    finally:
        SignalAccumulator._pooled_reward = kept  # type: ignore[method-assign]
        rules.LOSS_FORGETTING = forgetting


def _slope(rule: str, seeds: int) -> float:
    """Mean over seeds of the slope of the residual on the offset, after `STEPS` losses that depend on nothing."""
    return float(np.mean([_residual_slope(rule, np.random.default_rng(seed)) for seed in range(seeds)]))


def _residual_slope(rule: str, rng: np.random.Generator) -> float:
    x = np.concatenate([np.ones((STEPS, 1)), rng.standard_normal((STEPS, 1)).clip(-2, 2)], axis=1).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)

    def offsets(rows: NDArray[np.float32]) -> Array:
        return 0.75 + 0.2 * np.stack([rows[:, 1], -rows[:, 1]], axis=1).astype(np.float64)

    state, policy = start(calibrated_prior(2, 2, offsets, CALIBRATED_LOSS_HYPERPARAMETERS)), BayesianPolicy()
    o = offsets(x)
    with _rule(rule):
        for i in range(STEPS):
            arm = int(draw(policy.beliefs(x[i : i + 1], o[i : i + 1], state), rng).ranking[0, 0])
            feedback = Feedback(Signal.LOSS, float(rng.exponential()))
            state = fold(state, [Event(arm, x[i].tobytes(), float(o[i, arm]), None, feedback)])
    residual = x.astype(np.float64) @ state.means.T
    centred = o - o.mean()
    return float((centred * residual).sum() / np.square(centred).sum())


def _replayed(data: Path, pool_name: str, where: str, seeds: int) -> dict[str, dict[str, float]]:
    """Accuracy of `bayesian` per rule, with losses that tell right from wrong and with such that do not."""
    pairs, backbone = load_pairs(data), load_backbone("static")
    pool = K4 if pool_name == "K4" else pool_names(pairs)
    z = pair_features(pairs, backbone)
    right: dict[str, dict[str, list[Array]]] = {}
    for inside, outside in _splits(pairs, where):
        with torch_threads(1):
            checkpoint = train([pairs[i] for i in inside], pool, backbone, TrainConfig(), z[inside])
        table, x = tabulate([pairs[i] for i in outside], pool), checkpoint.fuse.apply(z[outside])
        for separation, name in ((1.0, ""), (0.0, ", says nothing")):
            row = right.setdefault(f"{pool_name}, {where}{name}", {rule: [] for rule in RULES})
            for rule in RULES:
                with _rule(rule):
                    traces = replay(
                        table,
                        x,
                        ["bayesian"],
                        priors=priors_of(checkpoint, Variant(), Signal.LOSS),
                        signal=Signal.LOSS,
                        seeds=range(seeds),
                        scenario=Scenario(loss=SimulatedLoss(separation=separation)),
                    )
                row[rule].append(traces["bayesian"].correct.mean(axis=0))
    return {
        name: {rule: float(np.concatenate(parts).mean()) for rule, parts in row.items()} for name, row in right.items()
    }


def _splits(pairs: Sequence[LabelledPair], where: str) -> list[tuple[Index, Index]]:
    """Grouped folds; or everything but one domain, and that domain. No group is on both sides."""
    if where == "folds":
        return grouped_folds(pairs, FOLDS, np.random.default_rng(0))
    streamed = np.flatnonzero([pair.domain == where for pair in pairs])
    groups = {pairs[i].group for i in streamed}
    return [(np.flatnonzero([pair.domain != where and pair.group not in groups for pair in pairs]), streamed)]
