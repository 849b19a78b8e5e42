"""Bounds of connections on a real socket: large headers, slow requests, many connections of one address, HEAD.

Deadlines are tested with small ones, and only for what a slow machine cannot turn around: that a request which is never
completed is refused some time.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from service.handlers import connection as handlers_connection
from service.handlers.connection import MAX_HEAD_BYTES, MAX_HEADERS
from tests.support import live
from tests.support.gateway import WAIT_SECONDS, pair
from tests.support.live import LiveGateway, live_gateway
from tests.support.processes import fetch

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

NEVER = 3600.0
"""Seconds; a deadline that no test sees."""

BODY = json.dumps(pair()).encode()


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back on a raw connection before the server closed it."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """Code of the error."""
        return str(json.loads(self.body)["error"]["code"])


@contextmanager
def connected(gateway: LiveGateway) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port_of(gateway)), timeout=WAIT_SECONDS) as connection:
        yield connection


def port_of(gateway: LiveGateway) -> int:
    return int(gateway.url.rpartition(":")[2])


def read_to_end(connection: socket.socket) -> list[Answer]:
    """All answers until the server closes the connection, which it must within the time."""
    data = b""
    while chunk := connection.recv(1 << 16):
        data += chunk
    answers = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        length = int(headers["content-length"])
        answers.append(Answer(int(status.split()[1]), headers, data[:length]))
        data = data[length:]
    return answers


def post(*headers: str, body: bytes = BODY, path: str = "/reward", length: int | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: gateway", "Content-Type: application/json", *headers]
    lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def send_on(connection: socket.socket) -> None:
    """Send more and more, for as long as tests wait."""
    for _ in range(int(WAIT_SECONDS / 0.02)):
        connection.sendall(b"more")
        threading.Event().wait(0.02)


def refusals(gateway: LiveGateway, code: str) -> float:
    with closing(http.client.HTTPConnection("127.0.0.1", port_of(gateway), timeout=WAIT_SECONDS)) as client:
        client.request("GET", "/metrics")
        text = client.getresponse().read().decode()
    found = re.search(rf'^reward_router_refused_connections_total{{code="{code}"}} (\S+)$', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.fixture(scope="module")
def gateway(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    """No deadline. It needs a key, so that an answer without one shows what was looked at first."""
    with live_gateway(valkey_server.url, api_keys=("right",), read_timeout_seconds=NEVER) as opened:
        yield opened


@pytest.fixture(scope="module")
def hasty(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    """A short deadline: only requests that come in one piece are sure to be answered."""
    with live_gateway(valkey_server.url, read_timeout_seconds=0.3) as opened:
        yield opened


# Size of headers -----------------------------------------------------------------------------------------------------

LONG = b"a" * MAX_HEAD_BYTES
TOO_LARGE: dict[str, bytes] = {
    "one long value": b"GET /healthz HTTP/1.1\r\nX-Long: " + LONG + b"\r\n\r\n",
    "a value without end": b"GET /healthz HTTP/1.1\r\nX-Long: " + LONG * 8,
    "a name without end": b"GET /healthz HTTP/1.1\r\nX-" + LONG * 8,
    "spaces without end": b"GET /healthz HTTP/1.1\r\nX-Long:" + b" " * len(LONG) * 8,
    "a long address": b"GET /healthz?" + LONG + b" HTTP/1.1\r\nHost: gateway\r\n\r\n",
    "an address without end": b"GET /healthz?" + LONG * 8,
    "many headers": b"GET /healthz HTTP/1.1\r\n" + b"X-A: b\r\n" * (MAX_HEADERS + 1) + b"\r\n",
    "many headers of some size": b"GET /healthz HTTP/1.1\r\n" + (b"X-A: " + b"b" * 400 + b"\r\n") * 50,
    "empty lines without end": b"\r\n" * len(LONG) * 4,
    "many trailers": post("X-API-Key: right").replace(
        b"Content-Length: ", b"Transfer-Encoding: chunked\r\nX-Not-Length: "
    )[: -len(BODY)]
    + b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
    + b"X-A: b\r\n" * (MAX_HEADERS + 1),
    "trailers": post("X-API-Key: right").replace(b"Content-Length: ", b"Transfer-Encoding: chunked\r\nX-Not-Length: ")[
        : -len(BODY)
    ]
    + b"%x\r\n%b\r\n0\r\nX-Long: " % (len(BODY), BODY)
    + LONG * 8,
}


@pytest.mark.parametrize("request_bytes", TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_headers_beyond_the_bound_are_431_and_end_the_connection(gateway: LiveGateway, request_bytes: bytes) -> None:
    before = refusals(gateway, "headers_too_large")
    with connected(gateway) as connection:
        connection.sendall(request_bytes)
        (answer,) = read_to_end(connection)
    assert (answer.status, answer.code) == (431, "headers_too_large")
    assert answer.headers["connection"] == "close"
    assert str(MAX_HEAD_BYTES) in answer.body.decode()
    assert refusals(gateway, "headers_too_large") == before + 1


def test_headers_are_refused_while_they_are_read(gateway: LiveGateway) -> None:
    """The answer comes although the client has neither ended its header nor stopped to send."""
    with connected(gateway) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nX-Long: ")
        sent = 0
        connection.setblocking(False)
        while True:
            try:
                got = connection.recv(12)
                break
            except BlockingIOError:
                pass
            with suppress(BlockingIOError):
                sent += connection.send(b"a" * 1024)
            assert sent < 64 << 20
    assert got == b"HTTP/1.1 431"


def test_headers_at_the_bound_pass(gateway: LiveGateway) -> None:
    address, names = "/healthz", [f"X-{index:03}" for index in range(MAX_HEADERS)]
    rest = MAX_HEAD_BYTES - len(address) - sum(map(len, names))
    each, over = divmod(rest, MAX_HEADERS)
    lines = [f"{name}: {'v' * (each + (over if name == names[0] else 0))}" for name in names]
    with connected(gateway) as connection:
        connection.sendall(f"GET {address} HTTP/1.0\r\n".encode())
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n")
        (answer,) = read_to_end(connection)
    assert answer.status == 200


def test_requests_on_one_connection_are_bounded_one_by_one(gateway: LiveGateway) -> None:
    filler = "X-Filler: " + "f" * (MAX_HEAD_BYTES // 2)
    with connected(gateway) as connection:
        for _ in range(4):
            connection.sendall(post(filler, "X-API-Key: right"))
            assert connection.recv(12) == b"HTTP/1.1 200"
            while not connection.recv(1 << 16).endswith(b"}"):
                pass
        connection.sendall(post(filler, "Connection: close", "X-API-Key: right"))
        assert read_to_end(connection)[0].status == 200


def test_what_is_not_http_is_told_so_in_the_words_of_every_error(gateway: LiveGateway) -> None:
    with connected(gateway) as connection:
        connection.sendall(b"\x16\x03\x01 this is TLS\r\n\r\n")
        (answer,) = read_to_end(connection)
    assert (answer.status, answer.code, answer.headers["content-type"]) == (400, "bad_request", "application/json")


def test_garbage_behind_a_request_does_not_land_in_its_reply(gateway: LiveGateway) -> None:
    with connected(gateway) as connection:
        connection.sendall(post("X-API-Key: right") + b"\x00garbage\r\n\r\n")
        # One after the other if the machine reads them apart; else the connection ends.
        assert [answer.status for answer in read_to_end(connection)] in ([], [200, 400])


# Time ----------------------------------------------------------------------------------------------------------------

SLOW: dict[str, bytes] = {
    "half an address": b"GET /heal",
    "half of the headers": b"GET /healthz HTTP/1.1\r\nHost: gate",
    "headers without a body": post(body=b"", length=10),
    "half a body": post(body=BODY[:20], length=len(BODY)),
    "half a body for an operators' path": post(body=b"{", length=5, path="/posterior/x"),
    "a chunked body without end": b"POST /reward HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
}


@pytest.mark.parametrize("request_bytes", SLOW.values(), ids=SLOW.keys())
def test_a_request_that_does_not_end_is_408_and_ends_the_connection(hasty: LiveGateway, request_bytes: bytes) -> None:
    with connected(hasty) as connection:
        connection.sendall(request_bytes)
        (answer,) = read_to_end(connection)
    if b"posterior" in request_bytes:
        # Answered without its body, of which nobody had asked; the connection ends all the same.
        assert answer.status == 404
        return
    assert (answer.status, answer.code) == (408, "read_timeout")
    assert "read_timeout_seconds" in answer.body.decode()
    assert answer.headers["connection"] == "close"


def test_a_trickle_does_not_put_the_deadline_off(hasty: LiveGateway) -> None:
    with connected(hasty) as connection:
        connection.sendall(post(body=b"{", length=1_000_000))
        pause = threading.Event()
        connection.setblocking(False)
        for _ in range(int(WAIT_SECONDS / 0.02)):
            with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                connection.send(b" ")
            with suppress(BlockingIOError):
                got = connection.recv(12)
                break
            pause.wait(0.02)
    assert got == b"HTTP/1.1 408"


def test_a_request_in_pieces_is_answered(gateway: LiveGateway) -> None:
    whole = post("Connection: close", "X-API-Key: right")
    pause = threading.Event()
    with connected(gateway) as connection:
        for start in range(0, len(whole), 16):
            connection.sendall(whole[start : start + 16])
            pause.wait(0.001)
        (answer,) = read_to_end(connection)
    assert answer.status == 200


def test_a_connection_lives_on_after_a_request_that_took_several_reads(hasty: LiveGateway) -> None:
    """Its deadline ended with it."""
    pause = threading.Event()
    for _ in range(20):
        with connected(hasty) as connection:
            connection.sendall(post()[:-5])
            pause.wait(0.05)
            connection.sendall(post()[-5:])
            if connection.recv(12) == b"HTTP/1.1 408":
                # The machine was so slow that the time was over.
                continue
            while not connection.recv(1 << 16).endswith(b"}"):
                pass
            pause.wait(0.6)
            connection.sendall(post("Connection: close"))
            (answer,) = read_to_end(connection)
        assert answer.status == 200
        return
    raise AssertionError("no request was read within its time")


def test_places_are_for_requests_whose_body_is_there(valkey_server: ValkeyProcess) -> None:
    with live_gateway(valkey_server.url, max_in_flight=1, read_timeout_seconds=NEVER) as gateway, ExitStack() as held:
        slow = [held.enter_context(connected(gateway)) for _ in range(5)]
        for connection in slow:
            connection.sendall(post("Expect: 100-continue", "Connection: close", body=b"", length=len(BODY)))
            # Told by the application when it begins to read the body.
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100")
            connection.sendall(BODY[:10])
        with connected(gateway) as other:
            other.sendall(post("Connection: close"))
            (answer,) = read_to_end(other)
        assert answer.status == 200
        for connection in slow:
            connection.sendall(BODY[10:])
            assert read_to_end(connection)[0].status == 200


def test_a_connection_on_which_nothing_comes_is_closed(
    valkey_server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = live.server_options
    monkeypatch.setattr(live, "server_options", lambda *given: {**usual(*given), "timeout_keep_alive": 0.05})
    with live_gateway(valkey_server.url) as gateway, connected(gateway) as connection:
        assert read_to_end(connection) == []


def test_a_refused_connection_is_closed_though_the_client_stays(
    gateway: LiveGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers_connection, "LINGER_SECONDS", 0.05)
    with connected(gateway) as connection:
        connection.sendall(TOO_LARGE["one long value"])
        (answer,) = read_to_end(connection)
        assert answer.status == 431
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_on(connection)


# Connections of one address ------------------------------------------------------------------------------------------


def test_connections_of_one_address_are_bounded_where_that_is_set(valkey_server: ValkeyProcess) -> None:
    with live_gateway(valkey_server.url, max_connections_per_address=3) as gateway:
        with ExitStack() as held:
            for _ in range(3):
                connection = held.enter_context(connected(gateway))
                connection.sendall(post())
                while not connection.recv(1 << 16).endswith(b"}"):
                    pass
            with connected(gateway) as fourth:
                (answer,) = read_to_end(fourth)
            assert (answer.status, answer.code) == (429, "too_many_connections")
            assert answer.headers["retry-after"] == "1"
            assert "max_connections_per_address" in answer.body.decode()
        pause = threading.Event()
        for _ in range(int(WAIT_SECONDS / 0.02)):
            if fetch(f"{gateway.url}/healthz")[0] == 200:
                break
            pause.wait(0.02)
        else:
            raise AssertionError("the places of closed connections stay taken")


# HEAD ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/docs", "/reward", "/nothing"])
def test_head_is_answered_as_get_without_the_body(hasty: LiveGateway, path: str) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", port_of(hasty), timeout=WAIT_SECONDS)) as client:
        client.request("GET", path)
        got = client.getresponse()
        body = got.read()
        client.request("HEAD", path)
        head = client.getresponse()
        assert head.status == got.status
        assert int(head.headers["content-length"]) > 0
        if path != "/metrics":
            assert int(head.headers["content-length"]) == len(body)
        assert head.read() == b""
        # The connection is where it should be: nothing of an answer is left in it.
        client.request("GET", "/healthz")
        assert json.loads(client.getresponse().read())["status"] == "live"
