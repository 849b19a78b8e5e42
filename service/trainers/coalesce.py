"""Singles that trainers ask for one by one, collected for a moment and sent together.

verl asks for each sample in a call of its own, thousands at once in one event loop; a request each would cost more than
the rewards. Each sample stays an instance of one response, so that the gateway's memory of (run, prompt) decides which
reward model scores the prompt's other samples, whichever process they are in. Knows the asynchronous client; called by
`verl`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from service.trainers.client import AsyncRouterClient
from service.trainers.values import RewardItem, RewardResult

WINDOW_SECONDS = 0.005
"""How long the first of a batch waits for company: little beside an RM's tens of milliseconds."""


@dataclass(slots=True)
class _Waiting:
    """What one event loop has collected."""

    items: list[RewardItem] = field(default_factory=list)
    futures: list[asyncio.Future[RewardResult]] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None


class Coalescer:
    """Sends what is asked within a few milliseconds as one call of the client.

    Args:
        client: who asks.
        window_seconds: how long the first waits.
        max_items: as many are sent at once without waiting any longer.
    """

    def __init__(
        self, client: AsyncRouterClient, *, window_seconds: float = WINDOW_SECONDS, max_items: int | None = None
    ) -> None:
        self._client = client
        self._window = window_seconds
        self._max_items = max_items if max_items is not None else client.options.max_items
        # Each event loop waits for itself: threads may share this, and a loop that is gone takes its items along.
        self._waiting: WeakKeyDictionary[asyncio.AbstractEventLoop, _Waiting] = WeakKeyDictionary()
        self._sending: set[asyncio.Task[list[RewardResult]]] = set()

    async def reward(self, item: RewardItem) -> RewardResult:
        """The result of one instance.

        Raises:
            RouterRefusedError: the gateway refused everything for good.
        """
        loop = asyncio.get_running_loop()
        waiting = self._waiting.setdefault(loop, _Waiting())
        future: asyncio.Future[RewardResult] = loop.create_future()
        waiting.items.append(item)
        waiting.futures.append(future)
        if len(waiting.items) >= self._max_items:
            self._send(loop)
        elif waiting.timer is None:
            waiting.timer = loop.call_later(self._window, self._send, loop)
        return await future

    async def close(self) -> None:
        """Close the client's connections of this event loop."""
        await self._client.close()

    def _send(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting = self._waiting.pop(loop)
        if waiting.timer is not None:
            waiting.timer.cancel()
        task = asyncio.ensure_future(self._client.reward_many(waiting.items))
        self._sending.add(task)
        task.add_done_callback(lambda done: self._settle(done, waiting.futures))

    def _settle(self, done: asyncio.Task[list[RewardResult]], futures: Sequence[asyncio.Future[RewardResult]]) -> None:
        """Every waiter gets its result, or the error that all of them share; those who left are passed over."""
        self._sending.discard(done)
        error = None if done.cancelled() else done.exception()
        for index, future in enumerate(futures):
            if future.done():
                continue
            if done.cancelled():
                future.cancel()
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(done.result()[index])
