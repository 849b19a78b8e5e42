"""The typed client, blocking and asynchronous: rewards and feedback, in batches, with retries under a deadline.

Drives the exchanges of `exchange` with httpx2, and nothing else. Safe to share between threads; safe to use after a
fork and to pickle, because connections are opened on first use in each process (and event loop). The helpers for
trainers share it; it can as well be used alone:

    with RouterClient(url="http://router:8080", run="my-run") as router:
        [result] = router.reward_many(items_of(["What is 7 + 5?"], [["12", "13"]]))
        if result.ok:
            router.feedback(Feedback(decision_id=result.decision_id, preferred=0))
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar
from weakref import WeakKeyDictionary

import httpx2 as httpx

from service.trainers.calls import Calls
from service.trainers.conversation import Said
from service.trainers.exchange import Answer, Broken, Exchange, Send, Sleep
from service.trainers.options import ClientOptions
from service.trainers.values import Accepted, Feedback, FeedbackResult, RewardItem, RewardResult, Scored

CONNECT_SECONDS = 5.0
"""Longest wait for a connection; a host that is up accepts one in milliseconds."""

T = TypeVar("T")


class RouterClient(Calls):
    """Blocking client.

    Args:
        options: see `ClientOptions`; or its fields by name.
        transport: instead of the network, for tests.
    """

    def __init__(
        self, options: ClientOptions | None = None, *, transport: httpx.BaseTransport | None = None, **fields: Any
    ) -> None:
        super().__init__(options, **fields)
        self._transport = transport
        self._opened: dict[int, httpx.Client] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close this process's connections. The client may be used again afterwards."""
        client = self._opened.pop(os.getpid(), None)
        if client is not None:
            client.close()

    def reward(self, prompt: Said, responses: Sequence[Said], *, deadline_seconds: float | None = None) -> Scored:
        """Return the rewards of one prompt's responses, all by one reward model.

        Args:
            prompt: a text, or the messages of a chat.
            responses: at least one.
            deadline_seconds: instead of the options'.

        Raises:
            RouterUnavailableError: none could be had before the deadline.
            RouterRefusedError: a final refusal.
        """
        return self._run(self._one_reward(RewardItem(prompt, tuple(responses)), self._patience(deadline_seconds)))

    def reward_many(self, items: Sequence[RewardItem], *, deadline_seconds: float | None = None) -> list[RewardResult]:
        """The rewards of many instances.

        Returns:
            `Scored`, or `Missing` where no reward could be had before the deadline; in order.

        Raises:
            RouterRefusedError: the gateway refused everything for good: a wrong key, run or policy.
        """
        return self._all(self._reward_exchanges(items, self._patience(deadline_seconds)))

    def feedback(self, item: Feedback, *, deadline_seconds: float | None = None) -> Accepted:
        """Give one feedback.

        Raises:
            RouterUnavailableError: it was not acknowledged before the deadline; sending it again is safe.
            RouterRefusedError: unknown (404), expired (410), another value was given before (409), a wrong field (422).
        """
        return self._run(self._one_feedback(item, self._patience(deadline_seconds)))

    def feedback_many(
        self, items: Sequence[Feedback], *, deadline_seconds: float | None = None
    ) -> list[FeedbackResult]:
        """Give many feedbacks.

        Returns:
            `Accepted`, or `Declined` with the reason; in order.

        Raises:
            RouterUnavailableError: a part was not acknowledged before the deadline; sending all again is safe.
            RouterRefusedError: the gateway refused everything for good.
        """
        return self._all(self._feedback_exchanges(items, self._patience(deadline_seconds)))

    def posterior(self, run: str | None = None, *, deadline_seconds: float | None = None) -> dict[str, Any]:
        """What the run has learned: version, digest, and what is known of each reward model.

        Raises:
            RouterUnavailableError: see `reward`.
            RouterRefusedError: no such run.
        """
        return self._run(self._posterior(run, self._patience(deadline_seconds)))

    def _client(self) -> httpx.Client:
        """This process's; a fork opens its own, and leaves its parent's alone."""
        pid = os.getpid()
        found = self._opened.get(pid)
        if found is None:
            fresh = httpx.Client(**self._http(self._transport))
            found = self._opened.setdefault(pid, fresh)
            if found is not fresh:
                fresh.close()
        return found

    def _run(self, exchange: Exchange[T]) -> T:
        client = self._client()
        try:
            effect = next(exchange)
            while True:
                if isinstance(effect, Sleep):
                    time.sleep(effect.seconds)
                    effect = exchange.send(None)
                else:
                    effect = exchange.send(self._heard(effect, self._send(client, effect)))
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _send(self, client: httpx.Client, send: Send) -> Answer | Broken:
        method = "GET" if send.body is None else "POST"
        try:
            response = client.request(method, send.path, content=send.body, timeout=_timeout(send))
        except httpx.TransportError as error:
            return Broken(_reason(error, self.options.url))
        return _answer(response)

    def _all(self, exchanges: Sequence[Exchange[list[T]]]) -> list[T]:
        """In order. Threads live no longer than the call, so that a fork never meets them."""
        if len(exchanges) <= 1:
            return [result for exchange in exchanges for result in self._run(exchange)]
        with ThreadPoolExecutor(min(len(exchanges), self.options.connections)) as threads:
            return [result for results in threads.map(self._run, exchanges) for result in results]


class AsyncRouterClient(Calls):
    """Asynchronous client: the methods of `RouterClient`, awaited.

    Args:
        options: see `ClientOptions`; or its fields by name.
        transport: makes one instead of the network, for tests.
    """

    def __init__(
        self,
        options: ClientOptions | None = None,
        *,
        transport: Callable[[], httpx.AsyncBaseTransport] | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(options, **fields)
        self._transport = transport
        self._opened: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[int, httpx.AsyncClient]] = WeakKeyDictionary()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections of this event loop. The client may be used again afterwards."""
        pid, client = self._opened.pop(asyncio.get_running_loop(), (0, None))
        if client is not None and pid == os.getpid():
            await client.aclose()

    async def reward(self, prompt: Said, responses: Sequence[Said], *, deadline_seconds: float | None = None) -> Scored:
        item = RewardItem(prompt, tuple(responses))
        return await self._run(self._one_reward(item, self._patience(deadline_seconds)))

    async def reward_many(
        self, items: Sequence[RewardItem], *, deadline_seconds: float | None = None
    ) -> list[RewardResult]:
        return await self._all(self._reward_exchanges(items, self._patience(deadline_seconds)))

    async def feedback(self, item: Feedback, *, deadline_seconds: float | None = None) -> Accepted:
        return await self._run(self._one_feedback(item, self._patience(deadline_seconds)))

    async def feedback_many(
        self, items: Sequence[Feedback], *, deadline_seconds: float | None = None
    ) -> list[FeedbackResult]:
        return await self._all(self._feedback_exchanges(items, self._patience(deadline_seconds)))

    async def posterior(self, run: str | None = None, *, deadline_seconds: float | None = None) -> dict[str, Any]:
        return await self._run(self._posterior(run, self._patience(deadline_seconds)))

    def _client(self) -> httpx.AsyncClient:
        """This event loop's, in this process: connections of another loop or of a parent cannot be used."""
        loop, pid = asyncio.get_running_loop(), os.getpid()
        owner, client = self._opened.get(loop, (0, None))
        if client is None or owner != pid:
            client = httpx.AsyncClient(**self._http(None if self._transport is None else self._transport()))
            self._opened[loop] = (pid, client)
        return client

    async def _run(self, exchange: Exchange[T]) -> T:
        client = self._client()
        try:
            effect = next(exchange)
            while True:
                if isinstance(effect, Sleep):
                    await asyncio.sleep(effect.seconds)
                    effect = exchange.send(None)
                else:
                    effect = exchange.send(self._heard(effect, await self._send(client, effect)))
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _send(self, client: httpx.AsyncClient, send: Send) -> Answer | Broken:
        method = "GET" if send.body is None else "POST"
        try:
            async with asyncio.timeout(send.timeout_seconds):
                response = await client.request(method, send.path, content=send.body, timeout=_timeout(send))
        except (httpx.TransportError, TimeoutError) as error:
            return Broken(_reason(error, self.options.url))
        return _answer(response)

    async def _all(self, exchanges: Sequence[Exchange[list[T]]]) -> list[T]:
        tasks = [asyncio.ensure_future(self._run(exchange)) for exchange in exchanges]
        try:
            return [result for results in await asyncio.gather(*tasks) for result in results]
        finally:
            for task in tasks:
                task.cancel()


def _answer(response: httpx.Response) -> Answer:
    return Answer(response.status_code, response.content, response.headers.get("retry-after"))


def _timeout(send: Send) -> httpx.Timeout:
    return httpx.Timeout(send.timeout_seconds, connect=min(send.timeout_seconds, CONNECT_SECONDS))


def _reason(error: Exception, url: str) -> str:
    return f"{type(error).__name__} at {url}{f': {error}' if str(error) else ''}"
