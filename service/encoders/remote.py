"""`RemoteEncoder`: texts are read and contexts are fused here, the transformer's states come from its servers.

Gathers requests into micro-batches. Each goes through three stages of its own (read in a thread, ask the server, fuse
in a thread), and up to `lanes` of them are under way at once: a batch waits for no stage of another, a lone request is
sent at once, and under load what waits for a lane becomes one larger request. `service.gateway` builds it, the chooser
awaits it. Knows no runs and no posteriors.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from router_core.encoder.split import SplitEncoder
from router_core.errors import RouterCoreError
from router_core.records import Instance
from service.encoders.client import StateClient
from service.encoders.protocol import AwaitedEncoder, Encoded, EncoderInputError, ServerStatus
from service.scorers.health import ReplicaMonitor
from service.scorers.requests import SuspectError
from service.scorers.transport.breaker import BreakerState
from service.scorers.transport.replica import Request

Rows = NDArray[np.float32] | Sequence[NDArray[np.float32] | EncoderInputError]
"""Per instance its context (d,), or why it has none."""

LANES: Final = 8
"""Micro-batches under way at once for each server."""


@dataclass(slots=True)
class _Waiting:
    instances: Sequence[Instance]
    future: asyncio.Future[NDArray[np.float32]]

    @property
    def texts(self) -> int:
        """Texts that the server is asked about."""
        return sum(len(instance.responses) for instance in self.instances)


class RemoteEncoder(AwaitedEncoder):
    """See the module. Not thread-safe; one event loop.

    Args:
        split: the halves that are computed here.
        client: where the states come from; closed by `close`.
        monitor: of the client's servers; None in tests that need none.
        observe_batch: told the number of texts of each micro-batch.
        lanes: micro-batches under way at once.
    """

    def __init__(
        self,
        split: SplitEncoder,
        client: StateClient,
        monitor: ReplicaMonitor | None,
        *,
        observe_batch: Callable[[int], None] = lambda _: None,
        lanes: int | None = None,
    ) -> None:
        self._split = split
        self._client = client
        self._monitor = monitor
        self._observe_batch = observe_batch
        self._free = lanes or LANES * len(client.replicas)
        self._waiting: deque[_Waiting] = deque()
        self._scheduled = False
        self._tasks: set[asyncio.Task[None]] = set()
        # One thread: a tokenizer takes one caller at a time, and two would only fight for the interpreter.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="encode")

    @property
    def spec(self) -> str:
        return self._split.spec

    @property
    def d(self) -> int:
        return self._split.d

    @property
    def available(self) -> bool:
        return self._client.available

    def servers(self) -> list[ServerStatus]:
        snapshots = [replica.snapshot() for replica in self._client.replicas]
        return [ServerStatus(one.url, one.state is BreakerState.CLOSED, one.problem) for one in snapshots]

    def intercept(self, wrap: Callable[[str, Request], Request]) -> None:
        for replica in self._client.replicas:
            replica.intercept(wrap)

    async def start(self) -> None:
        if self._monitor is not None:
            await self._monitor.check_all()
            self._monitor.start()

    async def close(self) -> None:
        if self._monitor is not None:
            await self._monitor.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()
        self._executor.shutdown(wait=True)

    async def encode(self, instances: Sequence[Instance]) -> Encoded:
        loop = asyncio.get_running_loop()
        began = loop.time()
        future: asyncio.Future[NDArray[np.float32]] = loop.create_future()
        self._waiting.append(_Waiting(instances, future))
        if self._free and not self._scheduled:
            # Not at once: whoever else is ready in this turn of the loop joins the batch.
            self._scheduled = True
            loop.call_soon(self._dispatch)
        return Encoded(await future, loop.time() - began)

    def _dispatch(self) -> None:
        """Give what waits to the free lanes."""
        self._scheduled = False
        while self._free and (batch := self._take()):
            self._free -= 1
            task = asyncio.get_running_loop().create_task(self._run(batch))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._free += 1
        if self._waiting and not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _take(self) -> list[_Waiting]:
        """As many of the waiting as one request to a server holds, at least one; who gave up is passed over."""
        limit = self._client.config.texts_per_request
        taken: list[_Waiting] = []
        texts = 0
        while self._waiting:
            first = self._waiting[0]
            if first.future.done():
                self._waiting.popleft()
                continue
            if taken and texts + first.texts > limit:
                break
            taken.append(self._waiting.popleft())
            texts += first.texts
        return taken

    async def _run(self, batch: list[_Waiting]) -> None:
        """One micro-batch through its stages; every waiting request is told what came of it."""
        instances = [one for waiting in batch for one in waiting.instances]
        try:
            rows = await self._rows(instances)
        except asyncio.CancelledError:
            for waiting in batch:
                waiting.future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - every waiting request is told; nothing is swallowed
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)
            return
        position = 0
        for waiting in batch:
            part = rows[position : position + len(waiting.instances)]
            position += len(waiting.instances)
            if waiting.future.done():
                continue
            errors = {place: row for place, row in enumerate(part) if isinstance(row, EncoderInputError)}
            if errors:
                told = EncoderInputError(next(iter(errors.values())).message)
                told.places = frozenset(errors)
                waiting.future.set_exception(told)
            else:
                waiting.future.set_result(np.asarray(part))

    async def _rows(self, instances: Sequence[Instance]) -> Rows:
        """The context of each instance, or its error. A part that fails is divided until the culprits stand alone."""
        alone = len(instances) == 1
        try:
            return await self._encoded(instances, alone=alone)
        except EncoderInputError as error:
            return [error]
        except RouterCoreError as error:
            if alone:
                return [EncoderInputError(str(error))]
            sizes = 2
        except SuspectError as error:
            # Each half of what ended one server would end another.
            sizes = len(instances) if error.crashed else 2
        step = -(-len(instances) // sizes)
        rows: list[NDArray[np.float32] | EncoderInputError] = []
        for start in range(0, len(instances), step):
            rows.extend(await self._rows(instances[start : start + step]))
        return rows

    async def _encoded(self, instances: Sequence[Instance], *, alone: bool) -> NDArray[np.float32]:
        """x (B, d) of the instances."""
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._executor, self._split.prepare, instances)
        self._observe_batch(len(prepared.ids))
        deadline = loop.time() + self._client.config.timeout_seconds
        try:
            states = await self._client.states(prepared.ids, deadline=deadline, alone=alone)
        except SuspectError as error:
            if error.crashed:
                ids = iter(prepared.ids)
                for instance in instances:
                    self._client.doubt([next(ids) for _ in instance.responses])
            raise
        return await loop.run_in_executor(self._executor, self._split.finish, prepared, states)
