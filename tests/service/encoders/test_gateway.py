"""The gateway with its encoder over HTTP: the same decisions as with the encoder inside, readiness, and refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from router_core.checkpoint import Checkpoint, file_digests
from router_core.encoder.fuse import Fuse
from router_core.encoder.registry import load_backbone, load_checkpoint_backbone, split_spec
from router_core.encoder.torch import TorchBackbone
from router_core.errors import EncoderError
from service.app import create_app
from service.cli import encoder as command
from service.encoders.client import EncoderConfig, StateClient
from service.encoders.load import parse_servers
from service.errors import ConfigurationError
from service.pool import ModelEntry, PoolFile
from service.settings import Settings
from tests.conftest import ValkeyProcess
from tests.service.encoders.conftest import Exported
from tests.service.scorers.worker_servers import Serve
from tests.support.arms import ScriptedArm
from tests.support.asgi import AsgiClient, running
from tests.support.gateway import fresh_run, pair, read_decision, until

ARMS = ("rm-a", "rm-b", "rm-c")
CONTEXT_TOLERANCE = 1e-5
"""Difference of x between the two ways; see docs/encoders.md."""


def checkpoint_of(spec: str, folder: Path, **fields: Any) -> Path:
    """A checkpoint over that encoder, with random heads."""
    dim = load_backbone(spec, root=fields.get("directory")).dim
    fuse = Fuse.identity(dim, 8)
    rng = np.random.default_rng(0)
    heads = rng.standard_normal((2, len(ARMS), 8)).astype(np.float32)
    ones, zeros = np.ones(len(ARMS), np.float32), np.zeros(len(ARMS), np.float32)
    Checkpoint(
        ARMS,
        spec,
        fuse,
        heads[0] / np.linalg.norm(heads[0], axis=1, keepdims=True),
        heads[1],
        zeros,
        ones,
        zeros,
        **fields,
    ).save(folder)
    return folder


@asynccontextmanager
async def gateway(server: ValkeyProcess, **settings: Any) -> AsyncIterator[AsgiClient]:
    """The application with its encoder as settings say."""
    arms = [ScriptedArm(name) for name in ARMS]
    chosen = Settings(
        **{"store_url": server.url, "run": fresh_run(), "seed": 0, "health_interval_seconds": 0.05, **settings}
    )
    pool = PoolFile(models=tuple(ModelEntry(name=arm.name) for arm in arms))
    async with running(create_app(chosen, pool, arms=arms)) as client:
        yield client


async def ready(client: AsgiClient) -> None:
    """Wait for /readyz."""

    async def is_ready() -> bool:
        return (await client.get("/readyz")).status == 200

    await until(is_ready, "ready")


async def test_the_same_checkpoint_decides_the_same_with_its_transformer_served(
    exported: Exported, serve: Serve, valkey_server: ValkeyProcess, tmp_path: Path
) -> None:
    spec = f"surface+torch:{exported.directory}"
    folder = checkpoint_of(spec, tmp_path / "checkpoint")
    command.export(out=tmp_path / "served", checkpoint=folder, encoder=None)
    seen = []
    for encoder in ("static", f"vllm:{serve(exported.app())}"):
        run = fresh_run()
        async with gateway(valkey_server, checkpoint=folder, encoder=encoder, policy="offline", run=run) as client:
            await ready(client)
            replies = await asyncio.gather(*(client.ok("/reward", pair(i)) for i in range(20)))
            stored = [read_decision(valkey_server.url, run, reply["decision_id"]) for reply in replies]
            seen.append(
                (
                    [reply["model"] for reply in replies],
                    np.array([np.frombuffer(one.x, "<f4") for one in stored if one]),
                )
            )
    (models, x), (models_served, x_served) = seen
    assert models == models_served
    assert x.shape == (20, 8)
    np.testing.assert_allclose(x_served, x, rtol=0, atol=CONTEXT_TOLERANCE)


async def test_a_run_goes_on_when_its_encoder_moves_to_a_server(
    exported: Exported, serve: Serve, valkey_server: ValkeyProcess
) -> None:
    run = fresh_run()
    places = (
        {"encoder": exported.backbone.spec},
        {"encoder": f"vllm:{serve(exported.app())}", "encoder_reading": exported.directory},
    )
    for version, place in enumerate(places, 1):
        async with gateway(valkey_server, run=run, **place) as client:
            await ready(client)
            reply = await client.ok("/reward", pair(version))
            await client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})

            async def learned(client: AsgiClient = client, version: int = version) -> bool:
                return bool((await client.get("/posterior")).json["version"] == version)

            await until(learned, f"{version} events")


async def test_readiness_and_rewards_wait_for_the_encoder_and_say_why(
    exported: Exported, refused_url: str, valkey_server: ValkeyProcess
) -> None:
    async with gateway(valkey_server, encoder=f"vllm:{refused_url}", encoder_reading=exported.directory) as client:

        async def told() -> bool:
            answer = await client.get("/readyz")
            return answer.status == 503 and "encoder's servers cannot be asked" in answer.error["message"]

        await until(told, "readiness names the encoder")
        port = refused_url.rpartition(":")[2]
        assert port not in (await client.get("/readyz")).body.decode(), "no address for callers without a key"
        answer = await client.post("/reward", pair())
        assert port not in answer.body.decode()
        assert (answer.status, answer.error["code"]) == (503, "encoder_unavailable")
        assert answer.headers["retry-after"] == "1"
        metrics = (await client.get("/metrics")).body.decode()
        assert f'reward_router_encoder_up{{url="{refused_url}"}} 0.0' in metrics


async def test_metrics_count_the_texts_of_micro_batches(
    exported: Exported, serve: Serve, valkey_server: ValkeyProcess
) -> None:
    url = serve(exported.app())
    async with gateway(valkey_server, encoder=f"vllm:{url}", encoder_reading=exported.directory) as client:
        await ready(client)
        await client.ok("/reward/batch", {"items": [pair(i) for i in range(5)]})
        metrics = (await client.get("/metrics")).body.decode()
    assert "reward_router_encoder_texts_sum 10.0" in metrics
    assert 'reward_router_stage_seconds_count{stage="encode"} 1.0' in metrics
    assert f'reward_router_encoder_up{{url="{url}"}} 1.0' in metrics


def test_an_export_of_another_encoder_is_refused(exported: Exported, tmp_path: Path) -> None:
    folder = checkpoint_of(f"torch:{exported.directory}", tmp_path / "checkpoint")
    with pytest.raises(ConfigurationError, match="has no folder 'reading'"):
        _build(checkpoint=folder)
    with pytest.raises(ConfigurationError, match="the exported directory is of encoder"):
        _build(checkpoint=folder, encoder_reading=exported.directory)
    with pytest.raises(ConfigurationError, match="set encoder_reading"):
        _build()
    with pytest.raises(ConfigurationError, match="names no transformer"):
        _build(checkpoint=checkpoint_of("surface", tmp_path / "surface"), encoder_reading=exported.directory)


def test_an_export_of_another_fine_tuning_is_refused(exported: Exported, tmp_path: Path) -> None:
    folders = []
    for seed in (1, 2):
        source = tmp_path / f"source{seed}"
        backbone = TorchBackbone.load(exported.directory, "checkpoint:backbone")
        with torch.no_grad():
            backbone.model.embed_tokens.weight[7] += seed  # type: ignore[index, operator, union-attr]
        backbone.save(source / "backbone")
        files = file_digests(source, "backbone")
        fields = {"encoder_files": files, "directory": source}
        folders.append(checkpoint_of("checkpoint:backbone", tmp_path / f"checkpoint{seed}", **fields))
    command.export(out=tmp_path / "out1", checkpoint=folders[0], encoder=None)
    _build(checkpoint=folders[0])
    _build(checkpoint=folders[0], encoder_reading=tmp_path / "out1")
    with pytest.raises(ConfigurationError, match="of another fine-tuning of it"):
        _build(checkpoint=folders[1], encoder_reading=tmp_path / "out1")
    loaded = Checkpoint.load(folders[0])
    own = load_checkpoint_backbone(loaded)
    served = TorchBackbone.load(tmp_path / "out1", "torch:x")
    np.testing.assert_array_equal(own.embed([("a", "b")]), served.embed([("a", "b")]))


def test_only_a_spec_with_one_transformer_can_be_split() -> None:
    assert split_spec("static+smollm2-135m@bf16") == (("surface", "relation", "words"), "smollm2-135m@bf16", ())
    assert split_spec("minilm+surface") == ((), "minilm", ("surface",))
    with pytest.raises(EncoderError, match="names several"):
        split_spec("minilm+smollm2-135m")
    with pytest.raises(EncoderError, match="names no transformer"):
        split_spec("static")


def test_servers_are_urls_with_commas_and_a_model_behind_a_hash() -> None:
    assert parse_servers("vllm:http://a:1") == (("http://a:1",), None)
    with pytest.raises(ConfigurationError, match="names no server"):
        parse_servers("vllm:")
    with pytest.raises(ConfigurationError, match="is not http"):
        StateClient(EncoderConfig(urls=("a:1",), dim=4))
    with pytest.raises(ConfigurationError, match="each once"):
        EncoderConfig(urls=("http://a:1", "http://a:1"), dim=4)


def _build(**settings: Any) -> None:
    pool = PoolFile(models=tuple(ModelEntry(name=name) for name in ARMS))
    chosen = Settings(**{"encoder": "vllm:http://127.0.0.1:9", "store_url": "redis://127.0.0.1:9", **settings})
    create_app(chosen, pool, arms=[ScriptedArm(name) for name in ARMS])
