"""Fixtures of the workers' tests: real servers on free ports, ended with the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from tests.service.scorers.worker_servers import RawServer


@pytest.fixture
def raw_server() -> RawServer:
    """A TCP server in the test's loop whose handler speaks bytes; an async context that yields the URL."""

    @asynccontextmanager
    async def start(handler: Callable[..., Awaitable[None]]) -> AsyncIterator[str]:
        writers: list[asyncio.StreamWriter] = []

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            try:
                await handler(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for writer in writers:
                writer.transport.abort()
            await asyncio.sleep(0.01)

    return start
