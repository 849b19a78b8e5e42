"""A real vLLM as the encoder: the contexts of the gateway are those of transformers, within a stated tolerance."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs reward-router[train]")

import torch
import transformers

from router_core.demo.domains import generate_stream
from router_core.encoder.export import export
from router_core.encoder.fuse import Fuse, PairEncoder
from router_core.encoder.torch import TorchBackbone
from service.encoders.load import RemoteOptions, load_remote_encoder
from tests.vllm.conftest import MAX_LENGTH, RM, OneServer

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
"""Difference of a unit-norm context, by Euclidean distance, both sides in float32."""


@pytest.fixture(scope="session")
def encoder(demo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TorchBackbone, Path]:
    """A small random Llama with the demo's tokenizer, exported as `reward-router encoder export` does it."""
    folder = tmp_path_factory.mktemp("encoder")
    source = folder / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_models / RM / name, source / name)
    config = transformers.AutoConfig.from_pretrained(demo_models / RM)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        transformers.LlamaForCausalLM(config).save_pretrained(source)
    backbone = TorchBackbone.load(source, f"torch:{source}", max_tokens=MAX_LENGTH)
    export(backbone, folder / "exported")
    return backbone, folder / "exported"


async def test_contexts_over_vllm_are_transformers_own(
    one_server: OneServer, encoder: tuple[TorchBackbone, Path]
) -> None:
    backbone, directory = encoder
    server = one_server.serve(directory, "embed")
    remote = load_remote_encoder(f"vllm:{server.url}", None, directory, RemoteOptions(60.0, 5.0, None, 0))
    instances = [pair.instance for pair in generate_stream(24, np.random.default_rng(5))]
    try:
        await remote.start()
        assert remote.servers()[0].problem is None
        assert remote.available
        found = (await remote.encode(instances)).x
    finally:
        await remote.close()
    expected = PairEncoder(backbone, Fuse.identity(backbone.dim)).encode(instances)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected, axis=1).max() < TOLERANCE
    # Contexts that are all the same would agree as well.
    assert np.linalg.norm(expected - expected[0], axis=1).max() > 100 * TOLERANCE
