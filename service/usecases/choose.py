"""Encode and draw, off the event loop, together for all requests that wait.

While one batch is in the thread the next one gathers, so that a lone request never waits and a burst becomes one encode
batch and one matrix product. The thread is the only user of the runs' generators.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.policies import Choices, Policy, draw
from router_core.posterior import Posterior
from router_core.records import Instance
from service.telemetry import Telemetry
from service.usecases.runs import Run

MAX_CHOICE_BATCH = 512
"""Instances per pass through the thread; above this, memory grows and nothing gets faster."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was drawn for some instances of one run, against one posterior.

    Attributes:
        x: (B, d) float32.
        offsets: (B, K) float64.
        choices: the draws.
        posterior: the posterior they were drawn from.
        encode_seconds: time of the encode batch they were part of.
        draw_seconds: time of the draw they were part of.
    """

    x: NDArray[np.float32]
    offsets: NDArray[np.float64]
    choices: Choices
    posterior: Posterior
    encode_seconds: float
    draw_seconds: float


@dataclass(slots=True)
class _Waiting:
    run: Run
    policy: Policy
    instances: Sequence[Instance]
    future: asyncio.Future[Chosen]


class Chooser:
    """The batcher. One per process.

    Args:
        executor: one thread.
        telemetry: stage times.
    """

    def __init__(self, executor: Executor, telemetry: Telemetry) -> None:
        self._executor = executor
        self._telemetry = telemetry
        self._waiting: list[_Waiting] = []
        self._running = False

    async def choose(self, run: Run, policy: Policy, instances: Sequence[Instance]) -> Chosen:
        """Contexts and draws for instances of one run.

        Raises:
            RouterCoreError: the encoder or the draw failed.
        """
        future: asyncio.Future[Chosen] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(run, policy, instances, future))
        if not self._running:
            self._start()
        return await future

    def _start(self) -> None:
        size, taken = 0, 0
        for waiting in self._waiting:
            if taken and size + len(waiting.instances) > MAX_CHOICE_BATCH:
                break
            size += len(waiting.instances)
            taken += 1
        batch, self._waiting = self._waiting[:taken], self._waiting[taken:]
        self._running = True
        self._telemetry.choice_batch.observe(size)
        passed = asyncio.get_running_loop().run_in_executor(self._executor, _choose_all, batch)
        passed.add_done_callback(lambda done: self._finish(batch, done))

    def _finish(self, batch: list[_Waiting], done: asyncio.Future[list[Chosen]]) -> None:
        self._running = False
        if self._waiting:
            self._start()
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        if error is not None:
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)
            return
        for waiting, chosen in zip(batch, done.result(), strict=True):
            if not waiting.future.done():
                waiting.future.set_result(chosen)
        stage, first = self._telemetry.stage, done.result()[0]
        stage["encode"].observe(first.encode_seconds)
        stage["draw"].observe(first.draw_seconds)


def _choose_all(batch: list[_Waiting]) -> list[Chosen]:
    """Encode everything at once, then draw per (run, policy). All runs share one template, and so one pool."""
    template = batch[0].run.template
    started = time.perf_counter()
    x = template.encoder.encode([instance for waiting in batch for instance in waiting.instances])
    offsets = template.prior.offsets(x)
    encoded = time.perf_counter()
    pieces: list[tuple[Posterior, Choices]] = []
    position = 0
    while len(pieces) < len(batch):
        first = batch[len(pieces)]
        alike = [first]
        for waiting in batch[len(pieces) + 1 :]:
            if waiting.run is not first.run or waiting.policy is not first.policy:
                break
            alike.append(waiting)
        size = sum(len(waiting.instances) for waiting in alike)
        rows = slice(position, position + size)
        posterior = first.run.posterior
        beliefs = first.policy.beliefs(x[rows], offsets[rows], posterior)
        choices = draw(beliefs, first.run.rng)
        pieces.extend((posterior, part) for part in _split(choices, [len(waiting.instances) for waiting in alike]))
        position += size
    drawn = time.perf_counter()
    out = []
    position = 0
    for waiting, (posterior, choices) in zip(batch, pieces, strict=True):
        rows = slice(position, position + len(waiting.instances))
        out.append(Chosen(x[rows], offsets[rows], choices, posterior, encoded - started, drawn - encoded))
        position = rows.stop
    return out


def _split(choices: Choices, sizes: Sequence[int]) -> list[Choices]:
    if len(sizes) == 1:
        return [choices]
    out = []
    position = 0
    for size in sizes:
        rows = slice(position, position + size)
        out.append(
            Choices(
                choices.ranking[rows],
                choices.draws[rows],
                choices.means[rows],
                choices.sds[rows],
                choices.propensities[rows],
            )
        )
        position += size
    return out
