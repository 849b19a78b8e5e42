"""A client that calls an ASGI application in process, lifespan included. Knows no application of ours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LIFESPAN_SECONDS = 30.0
"""Longest wait for the application to start or to stop."""


@dataclass(frozen=True, slots=True)
class Response:
    """One answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of a refusal; the shape of its body is checked on the way."""
        assert self.status >= 400, self.body
        assert self.headers["content-type"] == "application/json"
        assert set(self.json) == {"error"}
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"code", "message", "details"}, error
        assert isinstance(error["code"], str)
        assert error["code"]
        assert isinstance(error["message"], str)
        assert error["message"]
        assert isinstance(error["details"], dict)
        return error


class AsgiClient:
    """Requests to an application whose lifespan runs; see `running`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | Sequence[bytes] = b"",
        *,
        headers: Mapping[str, str] | None = None,
        disconnect: bool = False,
        last_chunk: asyncio.Event | None = None,
    ) -> Response:
        """One request.

        Args:
            method: HTTP method.
            path: path, with the query if any.
            body: the body, or its chunks.
            headers: more headers.
            disconnect: the caller goes away where its last chunk should come.
            last_chunk: the last chunk comes when this is set; None for at once.
        """
        route, _, query = path.partition("?")
        chunks = [body] if isinstance(body, bytes) else list(body)
        incoming: list[Message] = [
            {"type": "http.request", "body": chunk, "more_body": disconnect or index + 1 < len(chunks)}
            for index, chunk in enumerate(chunks)
        ]
        sent: list[Message] = []
        forever = asyncio.Event()

        async def receive() -> Message:
            if len(incoming) == 1 and last_chunk is not None:
                await last_chunk.wait()
            if incoming:
                return incoming.pop(0)
            if not disconnect:
                await forever.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": method,
            "path": route,
            "raw_path": route.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        await self._app(scope, receive, send)
        if disconnect and not sent:
            return Response(499, {}, b"")
        return Response(
            sent[0]["status"],
            {name.decode(): value.decode() for name, value in sent[0].get("headers", [])},
            b"".join(message.get("body", b"") for message in sent[1:]),
        )

    async def get(self, path: str, **headers: str) -> Response:
        """GET."""
        return await self.request("GET", path, headers=headers)

    async def post(self, path: str, document: object, **headers: str) -> Response:
        """POST a JSON document."""
        return await self.request("POST", path, json.dumps(document).encode(), headers=headers)

    async def ok(self, path: str, document: object) -> Any:
        """POST what must be answered 200; returns the document."""
        response = await self.post(path, document)
        assert response.status == 200, response.body
        return response.json


@asynccontextmanager
async def running(app: ASGIApp) -> AsyncIterator[AsgiClient]:
    """The application between `lifespan.startup` and `lifespan.shutdown`."""
    incoming: asyncio.Queue[Message] = asyncio.Queue()
    outgoing: asyncio.Queue[Message] = asyncio.Queue()
    scope: Scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    task = asyncio.ensure_future(app(scope, incoming.get, outgoing.put))

    async def turn(kind: str) -> None:
        await incoming.put({"type": f"lifespan.{kind}"})
        async with asyncio.timeout(LIFESPAN_SECONDS):
            answer = await outgoing.get()
        assert answer["type"] == f"lifespan.{kind}.complete", answer

    await turn("startup")
    try:
        yield AsgiClient(app)
    finally:
        await turn("shutdown")
        await task


async def lifespan(receive: Receive, send: Send) -> None:
    """Say that an application without a start and an end has started and ended."""
    for event in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{event}.complete"})
