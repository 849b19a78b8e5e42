"""A lean pooled HTTP/1.1 client for one origin: the gateway's hot path to a reward-model worker.

    HttpError
    ├── ConnectError            no connection: refused, unresolved, TLS failed, too slow, pool closed
    ├── ConnectionDroppedError  the peer closed, or we gave the connection up, before the response was whole
    ├── DeadlineError           the caller's deadline passed, waiting for a connection or for the response
    ├── ResponseTooLargeError   more bytes than the bound
    └── HttpProtocolError       the bytes are not HTTP/1.1

Knows sockets, HTTP framing and keep-alive; knows nothing of JSON, reward models, breakers or retries elsewhere.
`replica` beside it calls it. Every request may be sent twice (see `HttpPool.request`), so callers must only send
idempotent ones; scoring is.
"""

from __future__ import annotations

import asyncio
import errno
import re
import ssl
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Final, cast
from urllib.parse import urlsplit

import httptools

IDLE_SECONDS: Final = 4.0
"""Longest time a connection waits for its next request, in seconds. vLLM's server closes idle connections after 5."""

MAX_CONNECTIONS: Final = 64
"""Connections to one origin; further requests queue."""

CONNECT_TIMEOUT_SECONDS: Final = 2.0
"""Time for TCP and TLS, in seconds: a host that swallows packets must not use up the caller's deadline."""

MAX_RESPONSE_BYTES: Final = 8 * 1024 * 1024
"""Largest response, head and framing included. A `/classify` answer needs about 80 bytes per item."""


class HttpError(Exception):
    """Base of every error of this module."""


class ConnectError(HttpError):
    """No connection could be made. `refused` says that the host is up and nothing listens on the port; `dropped` that
    the request had been sent before, on a connection that ended."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused
        self.dropped = False


class ConnectionDroppedError(HttpError):
    """The connection ended before the response was whole. `started`: at least one response byte had come."""

    def __init__(self, message: str, *, started: bool) -> None:
        super().__init__(message)
        self.started = started


class DeadlineError(HttpError):
    """The deadline passed. `peer_seconds`: the part of the time that the peer had; 0 when nothing was sent."""

    def __init__(self, message: str, *, peer_seconds: float) -> None:
        super().__init__(message)
        self.peer_seconds = peer_seconds


class ResponseTooLargeError(HttpError):
    """The response is larger than `max_response_bytes`."""


class HttpProtocolError(HttpError):
    """The peer's bytes are not an HTTP/1.1 response."""


@dataclass(frozen=True, slots=True)
class Response:
    """A whole response. The only header that is kept is Retry-After, in seconds."""

    status: int
    body: bytes
    retry_after_seconds: float | None = None


class HttpPool:
    """Keep-alive connections to one origin, the most recently used first.

    Not thread-safe: all calls come from one event loop. Construction needs no running loop.

    Args:
        url: `http://host:port[/base]` or `https://…`; the base path precedes every request path.
        max_connections: open connections at most; further requests wait in order of arrival until their deadline.
        idle_seconds: a connection idle for longer is closed and never reused; 0 closes after every response.
        connect_timeout_seconds: bound on TCP and TLS set-up.
        max_response_bytes: bound on one response.
        api_key: sent as `Authorization: Bearer …`.
        ssl_context: for https; the system's default trust when None.

    Raises:
        ValueError: the URL or the key cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        max_connections: int = MAX_CONNECTIONS,
        idle_seconds: float = IDLE_SECONDS,
        connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        api_key: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            shown = re.sub(r"//.*@", "//…@", url, flags=re.DOTALL)
            raise ValueError(f"worker URL {shown!r} is not http(s)://host[:port][/base]")
        if parts.username is not None:
            raise ValueError("worker URLs hold no credentials; give the API key separately")
        if api_key is not None and not _is_header_value(api_key):
            raise ValueError("api_key holds characters that an HTTP header cannot carry")
        if max_connections < 1:
            raise ValueError(f"max_connections is {max_connections}; it must be at least 1")
        self.url = url.rstrip("/")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._ssl = (ssl_context or ssl.create_default_context()) if parts.scheme == "https" else None
        self._base = parts.path.rstrip("/")
        self._limit = max_connections
        self._idle_seconds = idle_seconds
        self._connect_timeout = connect_timeout_seconds
        self._max_response_bytes = max_response_bytes
        host = parts.netloc.encode("ascii")
        key = b"Authorization: Bearer " + api_key.encode("ascii") + b"\r\n" if api_key is not None else b""
        self._common = b" HTTP/1.1\r\nHost: " + host + b"\r\n" + key
        self._heads: dict[tuple[str, str], bytes] = {}
        self._open = 0
        self._idle: list[_Connection] = []
        self._active: set[_Connection] = set()
        self._queue: deque[asyncio.Future[_Connection | None]] = deque()
        self._reaper: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def open_connections(self) -> int:
        """Connections that are open or being made."""
        return self._open

    @property
    def busy_connections(self) -> int:
        """Connections with a request in flight."""
        return len(self._active)

    async def request(
        self, method: str, path: str, body: bytes = b"", *, deadline: float, headers: Mapping[str, str] | None = None
    ) -> Response:
        """Send one idempotent request and return the whole response, whatever its status.

        A kept-alive connection that ends before the first response byte was most likely closed by the peer's idle
        timer while the request was under way; then, and only then, the request is sent once more on another one.

        Args:
            method: `GET` or `POST`; `HEAD` is not supported.
            path: begins with `/`; the origin's base path is put before it.
            body: JSON bytes; empty for none.
            deadline: absolute `loop.time()` in seconds, waiting for a connection and the retry included.
            headers: sent beside those of every request.

        Raises:
            HttpError: see the module's tree.
            ValueError: a header cannot be sent.
        """
        message = self._message(method, path, body, headers)
        loop = asyncio.get_running_loop()
        if deadline <= loop.time():
            raise DeadlineError(f"{self.url}: the deadline had passed before the request was sent", peer_seconds=0.0)
        connection = self._take_idle(loop.time()) or await self._acquire(loop, deadline)
        kept_alive = connection.used
        try:
            return await self._exchange(loop, connection, message, deadline)
        except ConnectionDroppedError as error:
            if not kept_alive or error.started:
                raise
        # The peer has closed one idle connection, so its siblings of the same age are suspect too.
        self._close_idle()
        try:
            connection = await self._acquire(loop, deadline)
        except ConnectError as error:
            error.dropped = True
            raise
        return await self._exchange(loop, connection, message, deadline)

    def abort_in_flight(self, reason: str) -> None:
        """Fail every request in flight or queued now, so that callers resend elsewhere; close idle connections."""
        self._close_idle()
        for connection in tuple(self._active):
            connection.fail(ConnectionDroppedError(f"{self.url}: given up: {reason}", started=True))
        while self._queue:
            waiter = self._queue.popleft()
            if not waiter.done():
                waiter.set_exception(ConnectError(f"{self.url}: given up while queued: {reason}"))

    async def close(self) -> None:
        """Close all connections; requests in flight fail. Returns when the transports have been told."""
        self._closed = True
        self.abort_in_flight("the pool was closed")
        if self._reaper is not None:
            self._reaper.cancel()
            self._reaper = None
        # Transports report their end in the next loop iterations; leaving before would leak them.
        for _ in range(2):
            await asyncio.sleep(0)

    def _message(self, method: str, path: str, body: bytes, headers: Mapping[str, str] | None) -> bytes:
        head = self._heads.get((method, path))
        if head is None:
            head = f"{method} {self._base}{path}".encode("ascii") + self._common
            self._heads[(method, path)] = head
        if headers:
            for name, value in headers.items():
                if not _is_header_value(value):
                    raise ValueError(f"the value of {name} holds characters that an HTTP header cannot carry")
                head += f"{name}: {value}\r\n".encode("ascii")
        if not body and method == "GET":
            return head + b"\r\n"
        return b"%bContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (head, len(body), body)

    async def _exchange(
        self, loop: asyncio.AbstractEventLoop, connection: _Connection, message: bytes, deadline: float
    ) -> Response:
        waiter: asyncio.Future[Response] = loop.create_future()
        self._active.add(connection)
        timer = loop.call_at(deadline, connection.expire, deadline - loop.time())
        try:
            connection.send(message, waiter)
            return await waiter
        finally:
            timer.cancel()
            self._active.discard(connection)
            self._release(loop, connection)

    def _take_idle(self, now: float) -> _Connection | None:
        idle = self._idle
        while idle:
            connection = idle.pop()
            if now - connection.idle_since < self._idle_seconds and not connection.closing:
                connection.idle = False
                return connection
            self._drop(connection)
        return None

    async def _acquire(self, loop: asyncio.AbstractEventLoop, deadline: float) -> _Connection:
        if self._closed:
            raise ConnectError(f"{self.url}: the pool is closed")
        if self._open < self._limit:
            self._open += 1
            return await self._connect(loop, deadline)
        waiter: asyncio.Future[_Connection | None] = loop.create_future()
        self._queue.append(waiter)
        timer = loop.call_at(deadline, _expire_queued, waiter, self.url)
        try:
            connection = await waiter
        except BaseException:
            with suppress(ValueError):
                self._queue.remove(waiter)
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                # Cancelled after a connection had been handed over: it must not be lost.
                self._hand_back(loop, waiter.result())
            raise
        finally:
            timer.cancel()
        if connection is not None and not connection.closing:
            return connection
        return await self._connect(loop, deadline)

    async def _connect(self, loop: asyncio.AbstractEventLoop, deadline: float) -> _Connection:
        """Open a connection in a slot that the caller already holds; the slot is freed when that fails."""
        began = loop.time()
        until = min(deadline, began + self._connect_timeout)
        try:
            async with asyncio.timeout_at(until):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self, self._max_response_bytes), self._host, self._port, ssl=self._ssl
                )
        except TimeoutError as error:
            self._free_slot()
            if until == deadline:
                message = f"{self.url}: the deadline passed while connecting"
                raise DeadlineError(message, peer_seconds=max(deadline - began, 0.0)) from error
            raise ConnectError(f"{self.url}: no connection within {self._connect_timeout} s") from error
        except OSError as error:
            self._free_slot()
            raise ConnectError(f"{self.url}: {error}", refused=_is_refusal(error)) from error
        except BaseException:
            self._free_slot()
            raise
        if self._closed:
            self._drop(connection)
            raise ConnectError(f"{self.url}: the pool is closed")
        return connection

    def _release(self, loop: asyncio.AbstractEventLoop, connection: _Connection) -> None:
        if not connection.reusable or self._closed or self._idle_seconds <= 0:
            self._drop(connection)
        else:
            self._hand_back(loop, connection)

    def _hand_back(self, loop: asyncio.AbstractEventLoop, connection: _Connection | None) -> None:
        if connection is not None and connection.closing:
            connection = None
        while self._queue:
            waiter = self._queue.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return
        if connection is None:
            self._open -= 1
            return
        connection.idle = True
        connection.idle_since = loop.time()
        self._idle.append(connection)
        if self._reaper is None:
            self._reaper = loop.call_later(self._idle_seconds, self._reap, loop)

    def _reap(self, loop: asyncio.AbstractEventLoop) -> None:
        self._reaper = None
        now = loop.time()
        expired = [c for c in self._idle if now - c.idle_since >= self._idle_seconds]
        self._idle = [c for c in self._idle if now - c.idle_since < self._idle_seconds]
        for connection in expired:
            self._drop(connection)
        if self._idle:
            wait = self._idle_seconds - (now - self._idle[0].idle_since)
            self._reaper = loop.call_later(wait, self._reap, loop)

    def _close_idle(self) -> None:
        idle, self._idle = self._idle, []
        for connection in idle:
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        connection.idle = False
        connection.abort()
        self._free_slot()

    def _free_slot(self) -> None:
        while self._queue:
            waiter = self._queue.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._open -= 1

    def forget_idle(self, connection: _Connection) -> None:
        """The peer closed an idle connection."""
        with suppress(ValueError):
            self._idle.remove(connection)
            self._drop(connection)


class _Connection(asyncio.Protocol):
    """One connection with at most one request in flight. Its pool alone decides where it belongs."""

    __slots__ = (
        "_body",
        "_complete",
        "_delimited",
        "_head_done",
        "_limit",
        "_parser",
        "_pool",
        "_received",
        "_retry_after",
        "_transport",
        "_waiter",
        "idle",
        "idle_since",
        "reusable",
        "used",
    )

    def __init__(self, pool: HttpPool, max_response_bytes: int) -> None:
        self._pool = pool
        self._limit = max_response_bytes
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Response] | None = None
        self._received = 0
        self._body: bytes | bytearray = b""
        self._delimited = False
        self._head_done = False
        self._retry_after: float | None = None
        self._complete = True
        self.idle = False
        self.idle_since = 0.0
        self.reusable = False
        self.used = False

    @property
    def closing(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def send(self, message: bytes, waiter: asyncio.Future[Response]) -> None:
        self._waiter = waiter
        self._received = 0
        self._body = b""
        self._delimited = False
        self._head_done = False
        self._retry_after = None
        self._complete = False
        self.reusable = False
        self.used = True
        if self._transport is None or self._transport.is_closing():
            self.fail(ConnectionDroppedError(f"{self._pool.url}: closed by the peer", started=False))
        else:
            self._transport.write(message)

    def fail(self, error: HttpError) -> None:
        self.reusable = False
        self.abort()
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)

    def expire(self, peer_seconds: float) -> None:
        self.fail(DeadlineError(f"{self._pool.url}: no answer before the deadline", peer_seconds=peer_seconds))

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._waiter is None:
            # Bytes that nobody asked for: whatever follows could be taken for the next request's answer.
            self.reusable = False
            self.abort()
            return
        self._received += len(data)
        if self._received > self._limit:
            self.fail(ResponseTooLargeError(f"{self._pool.url}: the answer is longer than {self._limit} bytes"))
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._complete:
                self.reusable = False
                self.abort()
            else:
                self.fail(HttpProtocolError(f"{self._pool.url}: not an HTTP/1.1 response: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.reusable = False
        if self.idle:
            self._pool.forget_idle(self)
        elif self._waiter is not None:
            if exc is None and self._head_done and not self._delimited:
                self._finish(keep=False)
            else:
                message = f"{self._pool.url}: closed by the peer"
                self.fail(ConnectionDroppedError(message, started=self._received > 0))

    def on_message_begin(self) -> None:
        if self._complete:
            # A second response to one request; the pool must not reuse this connection.
            self.reusable = False
            self.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        size = len(name)
        if (size == 14 and name.lower() == b"content-length") or (size == 17 and name.lower() == b"transfer-encoding"):
            self._delimited = True
        elif size == 11 and name.lower() == b"retry-after":
            self._retry_after = _retry_after(value)

    def on_headers_complete(self) -> None:
        self._head_done = True

    def on_body(self, body: bytes) -> None:
        if not self._body:
            self._body = body
        else:
            if not isinstance(self._body, bytearray):
                self._body = bytearray(self._body)
            self._body += body

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:
            # An interim answer (100, 103): the final one follows on the same exchange.
            self._delimited = self._head_done = False
            return
        self._finish(keep=self._parser.should_keep_alive())

    def _finish(self, *, keep: bool) -> None:
        if self._complete:
            return
        self._complete = True
        self.reusable = keep
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(Response(self._parser.get_status_code(), bytes(self._body), self._retry_after))


def _expire_queued(waiter: asyncio.Future[_Connection | None], url: str) -> None:
    if not waiter.done():
        waiter.set_exception(
            DeadlineError(f"{url}: the deadline passed in the queue for a connection", peer_seconds=0.0)
        )


def _retry_after(value: bytes) -> float | None:
    """Seconds of a Retry-After header, a number or a date; None where it is neither."""
    text = value.decode("latin-1").strip()
    if text.isdigit():
        return float(text[:9])
    try:
        until = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (until - datetime.now(until.tzinfo)).total_seconds())


def _is_header_value(text: str) -> bool:
    return text.isascii() and text.isprintable() and bool(text)


def _is_refusal(error: OSError) -> bool:
    """Also when several addresses were tried: asyncio then joins the messages into one OSError without errno."""
    return isinstance(error, ConnectionRefusedError) or f"[Errno {errno.ECONNREFUSED}]" in str(error)
