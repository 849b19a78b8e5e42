"""An exported tiny transformer, the server that stands for vLLM, and what the gateway builds of both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from router_core.encoder.export import export
from router_core.encoder.torch import TorchBackbone
from service.workers.embedding import EmbeddingApp, EmbeddingBackend
from tests.support.transformers_dirs import save_transformer


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
