"""Fixtures of tests that need real HTTP servers: on free ports, ended with the test."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.service.scorers.worker_servers import RunningWorker, Serve


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
def refused_url() -> str:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
