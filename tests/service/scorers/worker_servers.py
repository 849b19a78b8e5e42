"""Real servers for the workers' tests: ASGI workers on uvicorn in threads, and words of the protocol."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import uvicorn
from starlette.requests import Request

from service.scorers.rm.render import plain
from service.scorers.wire import PROBE_PROMPT, PROBE_RESPONSE
from service.workers.server import worker_config
from tests.support.asgi import lifespan

Json = dict[str, Any]
Serve = Callable[[Any], str]
RawServer = Callable[
    [Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]], AbstractAsyncContextManager[str]
]


class ScriptedWorker:
    """An ASGI worker whose answers are scripted. It keeps what it was asked.

    `answer` maps the request's JSON to (status, body); a body that is not bytes is sent as JSON. `delay` seconds pass
    before each answer. By default every item's reward is the length of its response or text.
    """

    def __init__(self, name: str = "rm") -> None:
        self.name = name
        self.requests: list[Json] = []
        self.headers: list[dict[str, str]] = []
        self.delay = 0.0
        self.answer: Callable[[Json], tuple[int, Any]] = self.lengths
        self.in_flight = 0
        self.most_in_flight = 0

    @property
    def questions(self) -> list[Json]:
        """What it was asked apart from the probe conversation."""
        return [request for request in self.requests if not is_probe(request)]

    def lengths(self, request: Json) -> tuple[int, Any]:
        texts = request["input"] if "input" in request else [request["messages"][-1]["content"]]
        return 200, reply([float(len(text)) for text in texts])

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        body = await Request(scope, receive).body()
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        if scope["path"].endswith("/v1/models"):
            status, answer = 200, {"object": "list", "data": [{"id": self.name, "object": "model"}]}
        else:
            request = json.loads(body)
            self.requests.append(request)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                await asyncio.sleep(self.delay)
            finally:
                self.in_flight -= 1
            status, answer = self.answer(request)
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})


def texts_of(request: Json) -> list[str]:
    """The texts, or the answers of the conversation, of a request."""
    return request["input"] if "input" in request else [request["messages"][-1]["content"]]


def is_probe(request: Json) -> bool:
    """Return True if it asks about the probe conversation and nothing else."""
    texts = texts_of(request)
    return len(texts) == 1 and texts[0] in (
        PROBE_RESPONSE,
        plain([("user", PROBE_PROMPT), ("assistant", PROBE_RESPONSE)]),
    )


def reply(rewards: list[float], *, classes: int = 1) -> Json:
    data = [
        {"index": index, "label": "LABEL_0", "probs": [reward] * classes, "num_classes": classes}
        for index, reward in enumerate(rewards)
    ]
    return {"id": "classify-1", "object": "list", "created": 1, "model": "rm", "data": data, "usage": {}}


def error(message: str, status: int, *, kind: str = "BadRequestError", param: str | None = None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


class QuickServer(uvicorn.Server):
    """uvicorn, but it looks every 10 ms rather than every 100 whether it shall end."""

    async def main_loop(self) -> None:
        while not self.should_exit:  # noqa: ASYNC110 - set from another thread
            await asyncio.sleep(0.01)


class RunningWorker:
    """An app on a free or a given port, in a thread of its own, from construction until `stop` and `join`."""

    def __init__(self, app: Any, port: int = 0) -> None:
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._server = QuickServer(worker_config(app, host="127.0.0.1", port=0, log_level="critical"))
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the worker did not start"
            self._thread.join(0.005)

    def stop(self, *, force: bool = True) -> None:
        """Begin to end; with `force` requests in flight are cut off and the application is not told."""
        self._server.should_exit = True
        self._server.force_exit = force

    def join(self) -> None:
        """Return when it has ended and the port refuses."""
        self._thread.join(10)
        self._listener.close()


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """(head, body) of one request."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return head, await reader.readexactly(length)


class Mortal:
    """A worker that ends when a request holds the killer: its port closes and all its connections break.

    Args:
        killer: words of JSON.
        answer: of other requests.
    """

    def __init__(self, killer: str, answer: Callable[[Json], Json]) -> None:
        self._killer = killer.encode()
        self._answer = answer
        self.lives = 0
        self.asked: list[Json] = []
        self.hold: asyncio.Event | None = None
        """Answers wait for it; an order to die does not."""
        self._port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def alive(self) -> bool:
        return self._server is not None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        self.lives += 1

    def end(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                _, body = await read_request(reader)
                self.asked.append(json.loads(body))
                if self._killer in body:
                    self.end()
                    return
                if self.hold is not None:
                    await self.hold.wait()
                content = json.dumps(self._answer(self.asked[-1])).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


def soon(seconds: float = 5.0) -> float:
    """A deadline."""
    return asyncio.get_running_loop().time() + seconds


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Return when the condition holds; fail the test when it never does."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions are states of the code under test, which has no events
            await asyncio.sleep(0.002)


# IMPORT
