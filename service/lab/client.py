"""The commands' own client of a running gateway."""

from __future__ import annotations

import asyncio
import json
from types import TracebackType
from typing import Any, Self

from service.errors import ServiceError
from service.scorers.transport.http import HttpError, HttpPool

TIMEOUT_SECONDS = 30.0
"""Longest wait for one answer; above the gateway's own deadline."""


class GatewayError(ServiceError):
    """The gateway did not answer, or answered with an error.

    Attributes:
        answered: the status of the answer; 0 where there was none.
    """

    code = "gateway"
    answered = 0


class GatewayClient:
    """JSON over kept-alive connections.

    Args:
        url: origin of the gateway.
        api_key: sent as a bearer token.
        connections: requests at once.
    """

    def __init__(self, url: str, *, api_key: str | None = None, connections: int = 16) -> None:
        try:
            self._pool = HttpPool(url, api_key=api_key, max_connections=connections)
        except ValueError as error:
            raise GatewayError(f"--url {url!r}: {error}") from error
        self._url = url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.close()

    async def get(self, path: str) -> Any:
        """GET a JSON document."""
        return await self._ask("GET", path, b"")

    async def post(self, path: str, body: object) -> Any:
        """POST a JSON document and read the answer."""
        return await self._ask("POST", path, json.dumps(body).encode())

    async def text(self, path: str) -> str:
        """GET a text, for example /metrics."""
        return (await self._raw("GET", path, b"")).decode()

    async def _ask(self, method: str, path: str, body: bytes) -> Any:
        return json.loads(await self._raw(method, path, body))

    async def _raw(self, method: str, path: str, body: bytes) -> bytes:
        deadline = asyncio.get_running_loop().time() + TIMEOUT_SECONDS
        try:
            response = await self._pool.request(method, path, body, deadline=deadline)
        except HttpError as failure:
            raise GatewayError(f"no answer from {self._url}{path}: {failure}; is the gateway running?") from failure
        if response.status != 200:
            error = GatewayError(f"{self._url}{path} answered {response.status}: {_message(response.body)}")
            error.answered = response.status
            raise error
        return response.body


def _message(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        return f"{error['code']}: {error['message']}"
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")
