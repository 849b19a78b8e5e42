"""A load generator that is not the bottleneck: prebuilt request bytes over kept-alive sockets, no HTTP library.

Knows just enough HTTP to find the end of a reply with a Content-Length. Called by `loadtests.gateway`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import cast


class LoadError(Exception):
    """A reply was not 200, or a connection ended early."""


def request_bytes(path: str, body: bytes) -> bytes:
    """A POST of JSON."""
    return b"POST %b HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        path.encode(), len(body), body,
    )  # fmt: skip


class _Caller(asyncio.Protocol):
    """One connection: sends the next request when the last one is answered."""

    def __init__(self, shared: _Load) -> None:
        self._shared = shared
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._needed = 0
        self._began = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def _send(self) -> None:
        message = self._shared.next()
        assert self._transport is not None
        if message is None:
            if not self.done.done():
                self.done.set_result(None)
            self._transport.close()
            return
        self._began = time.perf_counter()
        self._transport.write(message)

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        if not self._needed:
            head = self._buffer.find(b"\r\n\r\n")
            if head < 0:
                return
            mark = self._buffer.lower().find(b"content-length: ", 0, head)
            self._needed = head + 4 + int(self._buffer[mark + 16 : self._buffer.find(b"\r\n", mark)])
        if len(self._buffer) < self._needed:
            return
        self._shared.seconds.append(time.perf_counter() - self._began)
        if not self._buffer.startswith(b"HTTP/1.1 200"):
            self._fail(self._buffer[:500].decode("utf-8", "replace"))
            return
        self._shared.last = self._buffer
        if self._shared.keep is not None:
            self._shared.keep.append(self._buffer)
        self._buffer, self._needed = b"", 0
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(LoadError(f"the connection ended early: {exc}"))

    def _fail(self, text: str) -> None:
        if not self.done.done():
            self.done.set_exception(LoadError(text))
        assert self._transport is not None
        self._transport.close()


class _Load:
    """What the connections of one load share."""

    def __init__(self, messages: Sequence[bytes], count: int, keep: list[bytes] | None) -> None:
        self._messages = messages
        self._count = count
        self._sent = 0
        self.keep = keep
        self.seconds: list[float] = []
        self.last = b""

    def next(self) -> bytes | None:
        """The next request, or None when all were sent."""
        if self._sent == self._count:
            return None
        message = self._messages[self._sent % len(self._messages)]
        self._sent += 1
        return message


async def load(
    port: int, messages: Sequence[bytes], *, count: int, concurrency: int, keep: list[bytes] | None = None
) -> tuple[list[float], float]:
    """Send `count` requests, `concurrency` at a time.

    Args:
        port: on loopback.
        messages: prebuilt requests, sent in turn.
        count: how many.
        concurrency: connections.
        keep: filled with the replies, where given.

    Returns:
        Seconds of each request, and wall seconds of all.

    Raises:
        LoadError: a reply was not 200.
    """
    shared = _Load(messages, count, keep)
    loop = asyncio.get_running_loop()
    callers = []
    began = time.perf_counter()
    for _ in range(concurrency):
        _, caller = await loop.create_connection(lambda: _Caller(shared), "127.0.0.1", port)
        callers.append(caller)
    await asyncio.gather(*(caller.done for caller in callers))
    return shared.seconds, time.perf_counter() - began
