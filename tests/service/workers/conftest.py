"""Fixtures of the workers' tests: real servers on free ports, ended with the test."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.service.workers.worker_servers import RawServer, RunningWorker, Serve


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serve an ASGI app until the test ends; returns its URL."""
    workers: list[RunningWorker] = []

    def start(app: Any) -> str:
        workers.append(RunningWorker(app))
        return workers[-1].url

    yield start
    for worker in workers:
        worker.stop()
    for worker in workers:
        worker.join()


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


@pytest.fixture
def refused_url() -> str:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
