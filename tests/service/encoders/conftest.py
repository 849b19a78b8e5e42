"""An exported tiny transformer, the server that stands for vLLM, and what the gateway builds of both."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from router_core.encoder.export import export
from router_core.encoder.torch import TorchBackbone
from service.workers.embedding import EmbeddingApp, EmbeddingBackend
from tests.service.workers.worker_servers import RunningWorker
from tests.support.transformers_dirs import save_transformer

Serve = Callable[[Any], str]


@dataclass(frozen=True, slots=True)
class Exported:
    """A tiny transformer with a chat template, and its exported directory."""

    backbone: TorchBackbone
    directory: Path

    def app(self) -> EmbeddingApp:
        """A server of it, in vLLM's words."""
        return EmbeddingApp(EmbeddingBackend(self.backbone, "encoder"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Exported once."""
    folder = tmp_path_factory.mktemp("encoder")
    source = save_transformer(folder / "source", "llama", chat=True)
    backbone = TorchBackbone.load(source, f"torch:{source}")
    export(backbone, folder / "exported")
    return Exported(backbone, folder / "exported")


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
