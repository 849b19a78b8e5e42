"""The HTTP client against real sockets: framing, keep-alive, retry, bounds, deadlines, queueing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import pytest
import uvloop

from service.scorers.transport.http import (
    ConnectError,
    ConnectionDroppedError,
    DeadlineError,
    HttpPool,
    HttpProtocolError,
    ResponseTooLargeError,
)
from tests.service.scorers.worker_servers import RawServer, read_request, soon, until

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Counting:
    """Answers every request with OK and counts connections; `per_connection` answers, then it hangs up."""

    def __init__(self, per_connection: int = 1_000_000, *, swallow_next: bool = False) -> None:
        self.connections = 0
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.per_connection = per_connection
        self.swallow_next = swallow_next

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        for _ in range(self.per_connection):
            head, body = await read_request(reader)
            self.heads.append(head)
            self.bodies.append(body)
            writer.write(OK)
        if self.swallow_next:
            await read_request(reader)


async def test_a_connection_is_reused_and_the_request_is_framed(raw_server: RawServer) -> None:
    handler = Counting()
    async with raw_server(handler) as url:
        pool = HttpPool(url + "/base/", api_key="secret")
        for _ in range(3):
            response = await pool.request(
                "POST", "/classify", b'{"a":1}', deadline=soon(), headers={"X-Request-Id": "r-1"}
            )
            assert (response.status, response.body) == (200, b"ok")
        await pool.close()
    assert handler.connections == 1
    assert handler.bodies == [b'{"a":1}'] * 3
    head = handler.heads[0].decode()
    assert head.startswith("POST /base/classify HTTP/1.1\r\n")
    for line in ("Authorization: Bearer secret", "X-Request-Id: r-1", "Content-Length: 7", "Host: " + url[7:]):
        assert line + "\r\n" in head


async def test_a_kept_alive_connection_that_was_dropped_is_retried_once_on_a_new_one(raw_server: RawServer) -> None:
    handler = Counting(per_connection=1, swallow_next=True)
    async with raw_server(handler) as url:
        pool = HttpPool(url)
        for _ in range(3):
            assert (await pool.request("GET", "/health", deadline=soon())).status == 200
        await pool.close()
    assert handler.connections == 3


async def test_a_connection_that_the_peer_closed_while_idle_is_not_used(raw_server: RawServer) -> None:
    handler = Counting(per_connection=1)
    async with raw_server(handler) as url:
        pool = HttpPool(url)
        await pool.request("GET", "/", deadline=soon())
        await until(lambda: not pool.open_connections)
        assert (await pool.request("GET", "/", deadline=soon())).status == 200
        await pool.close()
    assert handler.connections == 2


async def test_a_new_connection_that_drops_is_not_retried(raw_server: RawServer) -> None:
    seen = 0

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        seen += 1
        await read_request(reader)

    async with raw_server(hang_up) as url:
        pool = HttpPool(url)
        with pytest.raises(ConnectionDroppedError) as caught:
            await pool.request("POST", "/", b"{}", deadline=soon())
        await pool.close()
    assert not caught.value.started
    assert seen == 1


async def test_a_drop_in_the_middle_of_the_answer_is_not_retried(raw_server: RawServer) -> None:
    answers = iter([OK, b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"])
    seen = 0

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        for answer in answers:
            await read_request(reader)
            seen += 1
            writer.write(answer)

    async with raw_server(cut) as url:
        pool = HttpPool(url)
        await pool.request("GET", "/", deadline=soon())
        with pytest.raises(ConnectionDroppedError) as caught:
            await pool.request("GET", "/", deadline=soon())
        await pool.close()
    assert caught.value.started
    assert seen == 2


async def test_a_connection_idle_for_longer_than_the_limit_is_closed(raw_server: RawServer) -> None:
    handler = Counting()
    async with raw_server(handler) as url:
        pool = HttpPool(url, idle_seconds=0.03)
        await pool.request("GET", "/", deadline=soon())
        await until(lambda: not pool.open_connections)
        await pool.request("GET", "/", deadline=soon())
        await pool.close()
    assert handler.connections == 2


async def test_zero_idle_time_means_a_connection_per_request(raw_server: RawServer) -> None:
    handler = Counting()
    async with raw_server(handler) as url:
        pool = HttpPool(url, idle_seconds=0)
        for _ in range(3):
            await pool.request("GET", "/", deadline=soon())
        assert pool.open_connections == 0
        await pool.close()
    assert handler.connections == 3


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", 200, b"abcde"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Created\r\nContent-Length: 1\r\n\r\nx", 201, b"x"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end", 200, b"until the end"),
        (b"HTTP/1.0 200 OK\r\n\r\nold", 200, b"old"),
    ],
)
async def test_framings(raw_server: RawServer, answer: bytes, status: int, body: bytes) -> None:
    async def dribble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for start in range(0, len(answer), 7):
            writer.write(answer[start : start + 7])
            await writer.drain()
            await asyncio.sleep(0)

    async with raw_server(dribble) as url:
        pool = HttpPool(url)
        response = await pool.request("GET", "/", deadline=soon())
        await pool.close()
    assert (response.status, response.body) == (status, body)


async def test_connection_close_is_obeyed(raw_server: RawServer) -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")
        await reader.read()

    async with raw_server(close) as url:
        pool = HttpPool(url)
        await pool.request("GET", "/", deadline=soon())
        assert pool.open_connections == 0
        await pool.close()


async def test_a_second_answer_to_one_request_is_never_taken_for_the_next(raw_server: RawServer) -> None:
    async def talk_too_much(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")

    async with raw_server(talk_too_much) as url:
        pool = HttpPool(url)
        bodies = [(await pool.request("GET", "/", deadline=soon())).body for _ in range(3)]
        await pool.close()
    assert bodies == [b"ok"] * 3


async def test_bytes_that_are_not_http_are_a_protocol_error(raw_server: RawServer) -> None:
    async def garble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")
        await reader.read()

    async with raw_server(garble) as url:
        pool = HttpPool(url)
        with pytest.raises(HttpProtocolError):
            await pool.request("GET", "/", deadline=soon())
        assert pool.open_connections == 0
        await pool.close()


async def test_an_answer_over_the_bound_is_refused(raw_server: RawServer) -> None:
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"1000\r\n" + b"x" * 4096 + b"\r\n")
            await writer.drain()

    async with raw_server(flood) as url:
        pool = HttpPool(url, max_response_bytes=10_000)
        with pytest.raises(ResponseTooLargeError):
            await pool.request("GET", "/", deadline=soon())
        await pool.close()


async def test_the_deadline_holds_for_a_silent_peer_and_the_connection_is_not_reused(raw_server: RawServer) -> None:
    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with raw_server(silence) as url:
        pool = HttpPool(url)
        with pytest.raises(DeadlineError) as caught:
            await pool.request("GET", "/", deadline=soon(0.05))
        assert caught.value.peer_seconds > 0
        assert pool.open_connections == 0
        with pytest.raises(DeadlineError) as late:
            await pool.request("GET", "/", deadline=soon(-1))
        assert late.value.peer_seconds == 0
        await pool.close()


async def test_requests_beyond_the_connection_limit_wait_in_order(raw_server: RawServer) -> None:
    order: list[bytes] = []
    open_now = most = 0

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        try:
            while True:
                _, body = await read_request(reader)
                order.append(body)
                await asyncio.sleep(0.002)
                writer.write(OK)
        finally:
            open_now -= 1

    async with raw_server(slow) as url:
        pool = HttpPool(url, max_connections=1)
        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(pool.request("POST", "/", b"%d" % number, deadline=soon()))
        assert order == [b"%d" % number for number in range(20)]
        assert most == 1
        await pool.close()


async def test_a_request_that_expires_or_is_cancelled_in_the_queue_leaks_no_connection(raw_server: RawServer) -> None:
    release = asyncio.Event()

    async def gated(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            await release.wait()
            writer.write(OK)

    async with raw_server(gated) as url:
        pool = HttpPool(url, max_connections=1)
        first = asyncio.create_task(pool.request("GET", "/1", deadline=soon()))
        await asyncio.sleep(0)
        cancelled = asyncio.create_task(pool.request("GET", "/2", deadline=soon()))
        with pytest.raises(DeadlineError) as caught:
            await pool.request("GET", "/3", deadline=soon(0.02))
        assert caught.value.peer_seconds == 0
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        release.set()
        assert (await first).status == 200
        assert pool.open_connections == 1
        for _ in range(3):
            assert (await pool.request("GET", "/4", deadline=soon())).status == 200
        await pool.close()
        assert pool.open_connections == 0


async def test_cancelling_a_request_in_flight_closes_its_connection(raw_server: RawServer) -> None:
    arrived, gone = asyncio.Event(), asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        arrived.set()
        try:
            await reader.read()
        finally:
            gone.set()

    async with raw_server(wait) as url:
        pool = HttpPool(url)
        task = asyncio.create_task(pool.request("GET", "/", deadline=soon()))
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(5):
            await gone.wait()
        assert pool.open_connections == 0
        await pool.close()


async def test_one_hundred_requests_at_once_stay_within_the_limit_and_all_succeed(raw_server: RawServer) -> None:
    handler = Counting()
    async with raw_server(handler) as url:
        pool = HttpPool(url, max_connections=7)
        responses = await asyncio.gather(
            *(pool.request("POST", "/", b"%d" % number, deadline=soon()) for number in range(100))
        )
        await pool.close()
    assert [response.status for response in responses] == [200] * 100
    assert sorted(handler.bodies) == sorted(b"%d" % number for number in range(100))
    assert handler.connections <= 7


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_refused_connection_says_so(refused_url: str, host: str) -> None:
    pool = HttpPool(refused_url.replace("127.0.0.1", host))
    with pytest.raises(ConnectError) as caught:
        await pool.request("GET", "/", deadline=soon())
    assert caught.value.refused
    assert pool.open_connections == 0
    await pool.close()


async def test_giving_up_fails_what_is_in_flight_and_queued(raw_server: RawServer) -> None:
    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with raw_server(silence) as url:
        pool = HttpPool(url, max_connections=1)
        tasks = [asyncio.create_task(pool.request("GET", "/", deadline=soon(60))) for _ in range(3)]
        await until(lambda: pool.busy_connections)
        pool.abort_in_flight("test")
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ConnectionDroppedError, ConnectError, ConnectError]
        assert pool.open_connections == 0
        await pool.close()


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://host", "http://", "http://u:p@host", "http://host/?q=1"])
def test_a_url_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        HttpPool(url)


async def test_header_injection_is_refused(refused_url: str) -> None:
    with pytest.raises(ValueError, match="api_key"):
        HttpPool(refused_url, api_key="a\r\nX: y")
    pool = HttpPool(refused_url)
    with pytest.raises(ValueError, match="X-Request-Id"):
        await pool.request("GET", "/", deadline=soon(), headers={"X-Request-Id": "a\r\nX: y"})
    await pool.close()


ON_UVLOOP = [
    test_a_connection_is_reused_and_the_request_is_framed,
    test_a_kept_alive_connection_that_was_dropped_is_retried_once_on_a_new_one,
    test_a_connection_that_the_peer_closed_while_idle_is_not_used,
    test_a_new_connection_that_drops_is_not_retried,
    test_a_drop_in_the_middle_of_the_answer_is_not_retried,
    test_a_connection_idle_for_longer_than_the_limit_is_closed,
    test_connection_close_is_obeyed,
    test_a_second_answer_to_one_request_is_never_taken_for_the_next,
    test_bytes_that_are_not_http_are_a_protocol_error,
    test_an_answer_over_the_bound_is_refused,
    test_the_deadline_holds_for_a_silent_peer_and_the_connection_is_not_reused,
    test_requests_beyond_the_connection_limit_wait_in_order,
    test_a_request_that_expires_or_is_cancelled_in_the_queue_leaks_no_connection,
    test_cancelling_a_request_in_flight_closes_its_connection,
    test_one_hundred_requests_at_once_stay_within_the_limit_and_all_succeed,
    test_giving_up_fails_what_is_in_flight_and_queued,
]


@pytest.mark.parametrize("scenario", ON_UVLOOP)
def test_the_same_holds_on_uvloop(
    scenario: Callable[[RawServer], Coroutine[None, None, None]], raw_server: RawServer
) -> None:
    """The service runs on uvloop where there is one; its transports are not asyncio's."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario(raw_server))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_refusal_is_recognised_on_uvloop(refused_url: str, host: str) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test_a_refused_connection_says_so(refused_url, host))
