"""Encode and draw together for all requests that wait: in a thread, or at once where that is the shorter way.

All requests that one turn of the event loop brings become one batch; while a batch is in the thread the next one
gathers. So a lone request never waits and a burst becomes one encode batch and one matrix product. One batch is under
way at a time: it is the only user of the runs' generators. An encoder over a network is awaited before that, each
request for itself (`service.encoders.remote` batches them its own way), and only the draws share a pass.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.policies import AllCalls, Choices, Policy, draw_batch
from router_core.posterior import Posterior
from router_core.prior import Prior
from router_core.records import Instance
from service.encoders.protocol import AwaitedEncoder, Encoded
from service.telemetry import Telemetry
from service.usecases.runs import Current, Run, RunTemplate

MAX_CHOICE_BATCH = 512
"""Instances per pass; above this, memory grows and nothing gets faster."""

INLINE_SECONDS = 0.001
"""A pass expected to be shorter runs on the event loop. Handing work to a thread and back costs about 0.1 ms of CPU,
and under load the thread waits up to `sys.getswitchinterval()`, 5 ms, when it has let go of the interpreter lock."""

TEXT_CHARS_PER_UNIT = 1024
"""Characters that count as much as one instance when passes are compared by size."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was drawn for some instances of one run, against one posterior.

    Attributes:
        x: (B, d) float32.
        offsets: (B, K) float64.
        choices: the draws.
        posterior: the posterior they were drawn from.
        template: of the pool that they were drawn with.
        multiplier: price of a call in units of P(right) that they were drawn at; None where price does not matter.
        encode_seconds: time of the encode batch they were part of.
        draw_seconds: time of the draw they were part of.
    """

    x: NDArray[np.float32]
    offsets: NDArray[np.float64]
    choices: Choices
    posterior: Posterior
    encode_seconds: float
    draw_seconds: float
    template: RunTemplate
    multiplier: float | None = None


@dataclass(slots=True)
class _Waiting:
    run: Run
    current: Current
    policy: Policy
    instances: Sequence[Instance]
    future: asyncio.Future[Chosen]
    encoded: Encoded | None
    """The contexts, where they came over a network."""
    readable: NDArray[np.int64] | None
    """(B, K), responses that each arm can read whole; None where all are short, or the policy asks everybody."""


class PassTimes:
    """What a pass of a given size is expected to take, learned from those that were.

    Sizes are told apart by powers of two. What was never seen is expected to take for ever, so that it goes to the
    thread first: an encoder that calls a server or a large model never holds up the event loop.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def expected(self, units: int) -> float:
        """Seconds of a pass of that size."""
        return self._seconds.get(units.bit_length(), math.inf)

    def observe(self, units: int, seconds: float, *, alone: bool) -> None:
        """Learn from one pass.

        Args:
            units: its size.
            seconds: wall time.
            alone: it ran on the event loop. A time from the thread holds waits for the interpreter lock, so that only a
                short one says much.
        """
        size = units.bit_length()
        known = self._seconds.get(size, seconds)
        self._seconds[size] = known + (seconds - known) * (0.2 if alone or seconds < known else 0.02)


class Chooser:
    """The batcher. One per process.

    Args:
        executor: one thread.
        telemetry: stage times.
        inline_seconds: passes expected to be shorter run on the event loop; 0 for none.
    """

    def __init__(self, executor: Executor, telemetry: Telemetry, *, inline_seconds: float = INLINE_SECONDS) -> None:
        self._executor = executor
        self._telemetry = telemetry
        self._inline_seconds = inline_seconds
        self._times = PassTimes()
        self._waiting: list[_Waiting] = []
        self._scheduled = False
        self._running = False

    async def choose(self, run: Run, policy: Policy, instances: Sequence[Instance]) -> Chosen:
        """Contexts and draws for instances of one run.

        Args:
            run: theirs.
            policy: who draws; of the run's template, as it is now.
            instances: (B,), at least one.

        Raises:
            RouterCoreError: the encoder or the draw failed.
            EncoderUnavailableError: the encoder is elsewhere, and gave no answer.
        """
        loop, current = asyncio.get_running_loop(), run.current
        encoder = current.template.encoder
        encoded = await encoder.encode(instances) if isinstance(encoder, AwaitedEncoder) else None
        readable = None if isinstance(policy, AllCalls) else await current.template.readable(instances)
        future: asyncio.Future[Chosen] = loop.create_future()
        self._waiting.append(_Waiting(run, current, policy, instances, future, encoded, readable))
        if not self._running and not self._scheduled:
            # Not at once: whoever else is ready in this turn of the loop joins the batch.
            self._scheduled = True
            loop.call_soon(self._start, loop)
        return await future

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._scheduled = False
        batch, size = self._take()
        read = sum(_characters(waiting.instances) for waiting in batch if waiting.encoded is None)
        units = _units(size, read)
        self._running = True
        self._telemetry.choice_batch.observe(size)
        began = time.perf_counter()
        if self._times.expected(units) < self._inline_seconds:
            try:
                chosen: list[Chosen] | BaseException = _choose_all(batch)
            except Exception as error:  # noqa: BLE001 - every waiting request is told; nothing is swallowed
                chosen = error
            self._finish(loop, batch, units, began, chosen, alone=True)
            return
        passed = loop.run_in_executor(self._executor, _choose_all, batch)
        passed.add_done_callback(lambda done: self._finish(loop, batch, units, began, _outcome(done), alone=False))

    def _take(self) -> tuple[list[_Waiting], int]:
        """As many of the waiting as one pass may hold, at least one, and how many instances they are."""
        size = count = 0
        for waiting in self._waiting:
            if count and size + len(waiting.instances) > MAX_CHOICE_BATCH:
                break
            size += len(waiting.instances)
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch, size

    def _finish(
        self,
        loop: asyncio.AbstractEventLoop,
        batch: list[_Waiting],
        units: int,
        began: float,
        outcome: list[Chosen] | BaseException,
        *,
        alone: bool,
    ) -> None:
        self._running = False
        self._times.observe(units, time.perf_counter() - began, alone=alone)
        if self._waiting:
            self._scheduled = True
            loop.call_soon(self._start, loop)
        if isinstance(outcome, BaseException):
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(outcome)
            return
        for waiting, chosen in zip(batch, outcome, strict=True):
            if not waiting.future.done():
                waiting.future.set_result(chosen)
        stage, first = self._telemetry.stage, outcome[0]
        # A batch that was encoded here took one time; those that were awaited took each its own.
        for chosen in outcome if batch[0].encoded is not None else outcome[:1]:
            stage["encode"].observe(chosen.encode_seconds)
        stage["draw"].observe(first.draw_seconds)


def _outcome(done: asyncio.Future[list[Chosen]]) -> list[Chosen] | BaseException:
    if done.cancelled():
        return asyncio.CancelledError()
    return done.exception() or done.result()


def _units(instances: int, characters: int) -> int:
    """The size of a pass, as `PassTimes` compares them."""
    return instances + characters // TEXT_CHARS_PER_UNIT


def _characters(instances: Sequence[Instance]) -> int:
    return sum(len(instance.prompt) + sum(map(len, instance.responses)) for instance in instances)


def _choose_all(batch: list[_Waiting]) -> list[Chosen]:
    """Encode everything at once, then draw per (run, policy), or per request where the policy draws once for a request.

    Each run's posterior is read once: the learner may replace it, and the pool with it. A request that has met one pool
    stays with it.
    """
    started = time.perf_counter()
    x = _contexts(batch)
    latest = {id(waiting.run): waiting.run.current for waiting in batch}
    currents = [
        found if (found := latest[id(waiting.run)]).template is waiting.current.template else waiting.current
        for waiting in batch
    ]
    offsets = _offsets([current.posterior.prior for current in currents], batch, x)
    encoded = time.perf_counter()
    pieces: list[tuple[Current, Choices, float | None]] = []
    position = 0
    while len(pieces) < len(batch):
        first, current = batch[len(pieces)], currents[len(pieces)]
        alike = [first]
        for waiting, its in zip(batch[len(pieces) + 1 :], currents[len(pieces) + 1 :], strict=True):
            if its is not current or waiting.policy is not first.policy or first.policy.one_arm_per_batch:
                break
            alike.append(waiting)
        size = sum(len(waiting.instances) for waiting in alike)
        rows = slice(position, position + size)
        multiplier = first.run.multiplier(first.policy)
        barred = current.template.barred([instance for waiting in alike for instance in waiting.instances])
        policy = first.policy.at(multiplier)
        choices = draw_batch(
            policy, x[rows], _rows(offsets, rows), current.posterior, first.run.rng, barred, _readable(alike)
        )
        parts = _split(choices, [len(waiting.instances) for waiting in alike])
        pieces.extend((current, part, multiplier) for part in parts)
        position += size
    drawn = time.perf_counter()
    out = []
    position = 0
    for waiting, (current, choices, multiplier) in zip(batch, pieces, strict=True):
        rows = slice(position, position + len(waiting.instances))
        encode_seconds = encoded - started if waiting.encoded is None else waiting.encoded.seconds
        own = _rows(offsets, rows)
        seconds = (encode_seconds, drawn - encoded)
        out.append(Chosen(x[rows], own, choices, current.posterior, *seconds, current.template, multiplier))
        position = rows.stop
    return out


def _readable(alike: Sequence[_Waiting]) -> NDArray[np.int64] | None:
    """(B, K) of all of them; None where all are short. Where one is not, nothing is known of those that were short."""
    if all(waiting.readable is None for waiting in alike):
        return None
    width = next(waiting.readable.shape[1] for waiting in alike if waiting.readable is not None)
    parts = [
        np.repeat([[len(one.responses)] for one in waiting.instances], width, axis=1)
        if waiting.readable is None
        else waiting.readable
        for waiting in alike
    ]
    return np.concatenate(parts)


def _contexts(batch: Sequence[_Waiting]) -> NDArray[np.float32]:
    """x (B, d): encoded here in one call, or as it came over the network."""
    encoder = batch[0].run.template.encoder
    if isinstance(encoder, AwaitedEncoder):
        parts = [waiting.encoded.x for waiting in batch if waiting.encoded is not None]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
    return encoder.encode([instance for waiting in batch for instance in waiting.instances])


def _offsets(
    priors: Sequence[Prior], batch: Sequence[_Waiting], x: NDArray[np.float32]
) -> NDArray[np.float64] | list[NDArray[np.float64]]:
    """o(x) (B, K): one call where all runs have the same prior, the usual case; else a row (K,) for each instance."""
    if all(prior is priors[0] for prior in priors):
        return priors[0].offsets(x)
    out: list[NDArray[np.float64]] = []
    position = 0
    for prior, waiting in zip(priors, batch, strict=True):
        rows = slice(position, position + len(waiting.instances))
        out.extend(prior.offsets(x[rows]))
        position = rows.stop
    return out


def _rows(offsets: NDArray[np.float64] | list[NDArray[np.float64]], rows: slice) -> NDArray[np.float64]:
    """Rows of `_offsets`, which are of one pool."""
    return np.stack(offsets[rows]) if isinstance(offsets, list) else offsets[rows]


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
                choices.floors[rows],
            )
        )
        position += size
    return out
