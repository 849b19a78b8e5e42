"""A real vLLM as the encoder's server: the states and contexts of transformers, and what the probe says of it."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs reward-router[train]")

from router_core.encoder.export import REFERENCE_TEXTS, export
from router_core.encoder.fuse import Fuse, PairEncoder
from router_core.encoder.registry import _locate
from router_core.encoder.split import SplitEncoder
from router_core.encoder.torch import TorchBackbone
from router_core.errors import EncoderError
from router_core.records import Instance
from service.encoders.client import EncoderConfig, StateClient
from service.encoders.health import EncoderChecks
from service.encoders.probe import relative_error
from service.encoders.reading import Reading
from service.encoders.remote import RemoteEncoder
from service.scorers.health import HealthPolicy, ReplicaMonitor
from tests.support.transformers_dirs import save_transformer
from tests.vllm.conftest import MAX_LENGTH, OneServer, VllmServer

STATE_TOLERANCE = 1e-4
"""|state - transformers' state| / |transformers' state|, both in float32 on a CPU."""
CONTEXT_TOLERANCE = 1e-4
"""Difference of each coordinate of x, a vector of length 1."""

LONG = "The lighthouse kept watch over a quiet bay, and nobody knew for how long. " * 30
INSTANCES = [
    *(Instance(prompt, (response, response + " Or not?")) for prompt, response in REFERENCE_TEXTS if prompt),
    Instance("One response only.", ("Yes.",)),
    Instance("Longer than the encoder reads.", (LONG, "Short.", "")),
]


@dataclass(frozen=True, slots=True)
class Served:
    """An exported transformer and the vLLM that serves it."""

    backbone: TorchBackbone
    directory: Path
    server: VllmServer


@pytest.fixture(scope="module")
def served(one_server: OneServer, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """SmolLM2-135M-Instruct where its package is installed, else a tiny Llama."""
    folder = tmp_path_factory.mktemp("encoder")
    try:
        directory, gguf, _ = _locate("smollm2-135m", None)
        backbone = TorchBackbone.load(directory, "smollm2-135m", gguf_file=gguf, max_tokens=MAX_LENGTH)
    except EncoderError:
        source = save_transformer(folder / "source", "llama", chat=True, positions=MAX_LENGTH, hidden_size=64)
        backbone = TorchBackbone.load(source, "torch:tiny", max_tokens=MAX_LENGTH)
    export(backbone, folder / "exported")
    return Served(backbone, folder / "exported", one_server.serve(folder / "exported", "embed"))


@asynccontextmanager
async def encoder_over(url: str, directory: Path) -> AsyncIterator[RemoteEncoder]:
    """The gateway's encoder over that server, probed."""
    reading = Reading.load(directory)
    client = StateClient(EncoderConfig(urls=(url,), dim=reading.dim, timeout_seconds=120.0))
    monitor = ReplicaMonitor([EncoderChecks(client, reading)], HealthPolicy(60.0, 120.0), np.random.default_rng(0))
    encoder = RemoteEncoder(SplitEncoder((), reading, (), Fuse.identity(reading.dim)), client, monitor)
    await encoder.start()
    try:
        yield encoder
    finally:
        await encoder.close()


def ask(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    """POST /v1/embeddings."""
    request = urllib.request.Request(
        f"{url}/v1/embeddings", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


async def test_states_and_contexts_are_those_of_transformers(served: Served) -> None:
    expected = PairEncoder(served.backbone, Fuse.identity(served.backbone.dim)).encode(INSTANCES)
    async with encoder_over(served.server.url, served.directory) as encoder:
        assert encoder.servers()[0].problem is None
        assert encoder.available
        client = encoder._client
        references = Reading.load(served.directory).references
        states = await client.states(references.ids, deadline=asyncio.get_running_loop().time() + 120)
        together = await encoder.encode(INSTANCES)
        alone = await asyncio.gather(*(encoder.encode([instance]) for instance in INSTANCES))
    worst = float(relative_error(states, references.states).max())
    apart = float(np.abs(together.x - expected).max())
    assert worst <= STATE_TOLERANCE
    assert apart <= CONTEXT_TOLERANCE
    np.testing.assert_allclose(np.concatenate([one.x for one in alone]), expected, rtol=0, atol=CONTEXT_TOLERANCE)


def test_without_the_flag_vllm_gives_what_the_export_says_and_text_is_not_cut(served: Served) -> None:
    ids = Reading.load(served.directory).references.ids[0]
    status, raw = ask(served.server.url, {"input": [ids], "use_activation": False})
    assert status == 200
    status, unit = ask(served.server.url, {"input": [ids], "use_activation": True})
    assert status == 200
    status, default = ask(served.server.url, {"input": [ids]})
    vectors = [np.array(answer["data"][0]["embedding"]) for answer in (raw, unit, default)]
    assert np.linalg.norm(vectors[1]) == pytest.approx(1.0, abs=1e-3)
    assert np.linalg.norm(vectors[0]) > 1.5
    # modules.json names no normalisation, so that even a server that ignores the flag gives raw states.
    np.testing.assert_allclose(vectors[2], vectors[0], rtol=1e-4, atol=1e-4)
    status, refused = ask(served.server.url, {"input": [[1] * (MAX_LENGTH + 1)]})
    assert status == 400
    assert "error" in refused


async def test_a_vllm_of_another_transformer_is_refused_with_a_sentence(served: Served, tmp_path: Path) -> None:
    source = save_transformer(tmp_path / "source", "llama", chat=True)
    export(TorchBackbone.load(source, "torch:other"), tmp_path / "other")
    async with encoder_over(served.server.url, tmp_path / "other") as encoder:
        assert not encoder.available
        assert "another model is served there" in (encoder.servers()[0].problem or "")


async def test_a_vllm_with_too_short_a_context_is_refused_with_a_sentence(served: Served, tmp_path: Path) -> None:
    facts = json.loads((served.directory / "reward_router.json").read_text())
    for file in served.directory.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "reward_router.json").write_text(json.dumps({**facts, "max_tokens": 4 * MAX_LENGTH}))
    async with encoder_over(served.server.url, tmp_path) as encoder:
        assert not encoder.available
        assert f"takes at most {MAX_LENGTH} tokens" in (encoder.servers()[0].problem or "")
