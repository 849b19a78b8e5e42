"""Bounds of a connection, before any application sees its request: size of the headers, time, connections per address.

uvicorn's parser hands on a header only when all of it is there, joins its parts as they come (64 MB take seconds of the
event loop), and waits for a request without end. Knows no route and no key; `service.cli.serve` hands the protocol to
uvicorn. Refusals have the same body as the application's errors.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from service.errors import (
    BadRequestError,
    HeadersTooLargeError,
    ReadTimeoutError,
    ServiceError,
    TooManyConnectionsError,
)
from service.handlers.corked import CorkedProtocol
from service.handlers.errors import error_reply, headers_of
from service.handlers.headers import SECURITY_HEADERS

MAX_HEAD_BYTES = 16 << 10
"""Request line and headers together, trailers included."""

MAX_HEADERS = 100

LINGER_SECONDS = 2.0
"""How long what a refused client still sends is thrown away: closing at once would reset the connection, and most
clients would never see the answer."""

Refused = Callable[[str], None]
"""Told the code of a refusal."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """See `Settings`.

    Attributes:
        read_timeout_seconds: from a request's first byte to its last.
        max_per_address: connections of one client address; 0 for any number.
    """

    read_timeout_seconds: float
    max_per_address: int


def gateway_protocol(limits: ConnectionLimits, refused: Refused) -> type[asyncio.Protocol]:
    """What uvicorn's `http` takes: makes the protocol of each connection of one server."""
    made = partial(GatewayProtocol, limits=limits, open_by_address=Counter(), refused=refused)
    return cast(type[asyncio.Protocol], made)


class GatewayProtocol(CorkedProtocol):
    """`CorkedProtocol` that bounds what a connection may take.

    Args:
        config: uvicorn's.
        server_state: uvicorn's.
        app_state: uvicorn's.
        limits: the bounds.
        open_by_address: connections by client address, shared by those of one server.
        refused: told of each refusal.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: ConnectionLimits,
        open_by_address: Counter[str],
        refused: Refused,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._open_by_address = open_by_address
        self._refused = refused
        # Under which the connection is counted.
        self._address: str | None = None
        self._closing = False
        # Of the request that is being read.
        self._reading = False
        self._has_head = False
        self._head_bytes = 0
        self._header_count = 0
        # Bytes that came since the parser last handed something on, but for the rest of the piece it was in.
        self._withheld_bytes = 0
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to serve a connection, or refuse it where its address has too many."""
        super().connection_made(transport)
        # uvicorn waits for the first request without end.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        if self.client is None:
            return
        address, most = self.client[0], self._limits.max_per_address
        if not most or self._open_by_address[address] < most:
            self._address = address
            self._open_by_address[address] += 1
        else:
            self._refuse(
                TooManyConnectionsError(
                    f"{address} has {most} connections open (max_connections_per_address): use them again, or "
                    "close some",
                    retry_after_seconds=1,
                )
            )

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._end_deadline()
        self._unset_keepalive_if_required()
        if self._address is not None:
            self._open_by_address[self._address] -= 1
            if not self._open_by_address[self._address]:
                del self._open_by_address[self._address]
            self._address = None
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Begin to end: a reply is finished, a stream, which has no end of its own, is cut. Called by uvicorn."""
        super().shutdown()
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """Parse what came. A request that is not whole by then has a deadline; small ones never get a timer."""
        if len(data) <= MAX_HEAD_BYTES:
            self._parse(data)
        else:
            for start in range(0, len(data), MAX_HEAD_BYTES):
                self._parse(data[start : start + MAX_HEAD_BYTES])
        if self._reading and self._deadline is None and not self._closing:
            self._deadline = self.loop.call_later(self._limits.read_timeout_seconds, self._time_is_over)

    def _parse(self, data: bytes) -> None:
        if self._closing:
            return
        self._withheld_bytes += len(data)
        super().data_received(data)
        if self._withheld_bytes > MAX_HEAD_BYTES and not self._closing:
            self._refuse(_too_large())

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._reading, self._has_head = True, False
        self._head_bytes = self._header_count = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a part of the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer."""
        self._header_count += 1
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the application."""
        self._has_head = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._withheld_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._reading = self._has_head = False
        self._withheld_bytes = 0
        self._end_deadline()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser could not go on with; called by uvicorn."""
        if self._head_bytes > MAX_HEAD_BYTES or self._header_count > MAX_HEADERS:
            self._refuse(_too_large())
        else:
            self._refuse(BadRequestError(f"{msg} Send a request of HTTP/1.1."))

    def _count(self, size: int) -> None:
        self._withheld_bytes = 0
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES or self._header_count > MAX_HEADERS:
            # Ends the parsing: uvicorn calls `send_400_response` then.
            raise _too_large()

    def _time_is_over(self) -> None:
        self._deadline = None
        if not self._reading or self._closing:
            return
        if self.pipeline:
            # Nothing is read until the requests before this one are answered.
            self._deadline = self.loop.call_later(self._limits.read_timeout_seconds, self._time_is_over)
            return
        seconds = self._limits.read_timeout_seconds
        self._refuse(ReadTimeoutError(f"the request was not whole after {seconds:g} s (read_timeout_seconds)"))

    def _end_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, error: ServiceError) -> None:
        """Answer if nothing else is being answered, and close."""
        self._closing = True
        self._end_deadline()
        self._unset_keepalive_if_required()
        self._refused(error.code)
        if not self._may_answer():
            self.transport.close()
            return
        if self._has_head:
            # The application waits for the rest of this request's body.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write(_response(error))
        if not self.transport.can_write_eof():
            self.transport.close()
            return
        self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _may_answer(self) -> bool:
        """True if no reply is under way that the refusal would land in, and this request has had none."""
        if self.transport.is_closing():
            return False
        if self._has_head:
            return not self.pipeline and not self.cycle.response_started
        return self.cycle is None or self.cycle.response_complete


def _too_large() -> HeadersTooLargeError:
    return HeadersTooLargeError(
        f"request line and headers are larger than {MAX_HEAD_BYTES} bytes, or more than {MAX_HEADERS}: send fewer",
        details={"max_bytes": MAX_HEAD_BYTES, "max_headers": MAX_HEADERS},
    )


def _response(error: ServiceError) -> bytes:
    body = msgspec.json.encode(error_reply(error))
    headers = {
        "content-type": "application/json",
        **{name.decode(): value.decode() for name, value in SECURITY_HEADERS},
        **headers_of(error),
        "content-length": str(len(body)),
        "connection": "close",
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return STATUS_LINE[error.status] + lines.encode() + b"\r\n" + body
