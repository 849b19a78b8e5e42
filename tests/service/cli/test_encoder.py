"""`reward-router encoder` and `up --encoder served`: words, files, and a stack with an encoder of its own."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("torch")

from router_core.checkpoint import Checkpoint
from router_core.encoder.fuse import Fuse
from router_core.encoder.registry import load_backbone
from router_core.errors import EncoderError
from service.cli import app
from service.cli.encoder_launch import encoder_start, ensure_exported, plan_encoder
from service.cli.up import running_stack
from service.encoders.reading import Reading
from service.errors import ConfigurationError
from service.pool import ModelEntry, PoolFile
from tests.conftest import free_port
from tests.support.processes import MODELS, Caller, fetch, write_recorded_pairs
from tests.support.transformers_dirs import save_transformer

runner = CliRunner()


def save_checkpoint(folder: Path, spec: str) -> Path:
    """An untrained checkpoint of the recorded pool over that encoder."""
    fuse = Fuse.identity(load_backbone(spec).dim, 8)
    K = len(MODELS)
    rng = np.random.default_rng(0)
    embeddings, weights = rng.standard_normal((2, K, 8)).astype(np.float32)
    ones, zeros = np.ones(K, np.float32), np.zeros(K, np.float32)
    Checkpoint(MODELS, spec, fuse, embeddings, weights, zeros, ones, zeros).save(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Over surface counts and a tiny transformer."""
    source = save_transformer(tmp_path / "source", "llama", chat=True)
    return save_checkpoint(tmp_path / "checkpoint", f"surface+torch:{source}")


def test_export_says_how_to_serve_what_it_wrote(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = runner.invoke(app, ["encoder", "export", "--checkpoint", str(checkpoint), "--out", str(out)])
    assert done.exit_code == 0, done.output
    command = f"vllm serve {out} --runner pooling --convert embed --dtype float32 --max-model-len 64"
    command += " --host 127.0.0.1 --port 8100"
    assert command in done.output
    assert f"--encoder vllm:http://127.0.0.1:8100 --checkpoint {checkpoint}" in done.output
    own, reading = Reading.load(out), Reading.load(checkpoint / "reading")
    np.testing.assert_array_equal(own.references.states, reading.references.states)
    assert list(out.glob("*.safetensors"))
    assert not list((checkpoint / "reading").glob("*.safetensors"))
    Checkpoint.load(checkpoint)


def test_no_file_beside_the_weights_is_taken_for_weights(checkpoint: Path, tmp_path: Path) -> None:
    """vLLM loads every *.safetensors of a directory that has no index."""
    runner.invoke(app, ["encoder", "export", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")])
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "give either --checkpoint DIR or --encoder NAME"),
        (["--encoder", "static"], "names no transformer"),
        (["--encoder", "minilm+smollm2-135m"], "names several"),
        (["--encoder", "torch:/nowhere"], "does not exist"),
    ],
)
def test_export_refuses_what_is_no_transformer(words: list[str], error: str, tmp_path: Path) -> None:
    done = runner.invoke(app, ["encoder", "export", "--out", str(tmp_path / "out"), *words])
    assert isinstance(done.exception, ConfigurationError | EncoderError)
    assert error in str(done.exception)


def test_an_export_is_made_once_and_again_for_another_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert ensure_exported(checkpoint, out)
    assert not ensure_exported(checkpoint, out)
    source = save_transformer(tmp_path / "other", "llama", chat=True, seed=1)
    other = save_checkpoint(tmp_path / "checkpoint-2", f"torch:{source}")
    assert ensure_exported(other, out)
    assert Reading.load(out).spec == f"torch:{source}"
    assert ensure_exported(checkpoint, out)


def test_vllm_is_started_as_an_embedding_server_and_without_it_our_own(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ensure_exported(checkpoint, out)
    gpu = encoder_start(out, 8100, vllm=("/bin/vllm",), gpu_share=0.1, gpus=(1,), dtype="bfloat16")
    words = f"/bin/vllm serve {out} --host 127.0.0.1 --port 8100 --served-model-name encoder --runner pooling"
    words += " --convert embed --dtype bfloat16 --max-model-len 64 --gpu-memory-utilization 0.1"
    assert " ".join(gpu.command) == words
    assert gpu.environment["CUDA_VISIBLE_DEVICES"] == "1"
    cpu = encoder_start(out, 8100, vllm=("/bin/vllm",), device="cpu", gpu_share=0.1)
    assert cpu.command[-1] == "--enforce-eager"
    assert "--gpu-memory-utilization" not in cpu.command
    own = encoder_start(out, 8100, vllm=None)
    assert own.command[2:6] == ("service.cli", "encoder", "serve", str(out))
    assert own.kind == "CPU encoder"


def test_up_without_a_checkpoint_has_no_transformer_to_serve(tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_text("models: [{name: a, urls: ['http://127.0.0.1:9']}]")
    words = ["up", "--pool", str(tmp_path / "pool.yaml"), "--encoder", "served", "--data-dir", str(tmp_path / "data")]
    done = runner.invoke(app, words)
    assert isinstance(done.exception, ConfigurationError)
    assert "give --checkpoint" in str(done.exception)
    assert not (tmp_path / "data").exists()


def fake_vllm(folder: Path) -> str:
    """A program that could be vLLM; it is never run."""
    program = folder / "vllm"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    return str(program)


def planned(folder: Path, checkpoint: Path, share: float, *words: str) -> Result:
    """`up --encoder served --dry-run` of a pool with one RM on each of two GPUs, vLLM for all."""
    models = [{"name": name, "path": "m", "gpu_share": share, "gpus": [gpu]} for gpu, name in enumerate(MODELS[:2])]
    (folder / "pool.yaml").write_text(yaml.safe_dump({"models": models, "vllm_command": fake_vllm(folder)}))
    (folder / "m").mkdir(exist_ok=True)
    (folder / "m" / "config.json").write_text("{}")
    given = ["--pool", str(folder / "pool.yaml"), "--checkpoint", str(checkpoint), "--data-dir", str(folder / "data")]
    return runner.invoke(app, ["up", *given, "--encoder", "served", "--dry-run", *words])


def shown(done: Result) -> list[str]:
    """Return the lines before the checks."""
    lines = done.output.splitlines()
    return [line for line in lines if not line.startswith(("# ok", "# FAILS")) and "checks passed" not in line]


def test_the_encoder_counts_among_those_that_share_a_gpu(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    refused = planned(tmp_path, checkpoint, 0.9)
    assert refused.exit_code == 1
    assert (
        f"GPU 0: the shares of its memory sum to 1.00, more than 0.95 ({MODELS[0]} 0.9, encoder 0.1): lower "
        "`gpu_share`, or spread the models with `gpus`, or give the encoder a smaller share or another GPU "
        "(--encoder-share, --encoder-gpu)"
    ) in refused.output
    assert not (tmp_path / "data").exists(), "refused before anything is exported"
    for words in (("--encoder-gpu", "2"), ("--encoder-share", "0.05"), ("--device", "cpu"), ("--worker", "cpu")):
        done = planned(tmp_path, checkpoint, 0.9, *words)
        assert done.exit_code == 0, (words, done.output)


def test_a_dry_run_shows_the_encoder_its_export_and_who_shares_each_gpu(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    words = ("--encoder-gpu", "1", "--encoder-share", "0.2")
    export, _, second, encoder, *comments = shown(planned(tmp_path, checkpoint, 0.5, *words))
    folder = tmp_path / "data" / "encoder"
    assert export.endswith(f"encoder export --checkpoint {checkpoint} --out {folder}")
    assert "CUDA_VISIBLE_DEVICES=1 " in second
    assert "CUDA_VISIBLE_DEVICES=1 " in encoder
    assert f" serve {folder} " in encoder
    assert encoder.endswith("--max-model-len 64 --gpu-memory-utilization 0.2")
    assert comments == [
        f"# GPU 0: {MODELS[0]} 0.5 of its memory",
        f"# GPU 1: {MODELS[1]} 0.5 + encoder 0.2 = 0.7 of its memory, at most 0.95",
    ]
    assert not folder.exists(), "a dry run writes nothing"
    ensure_exported(checkpoint, folder)
    again = shown(planned(tmp_path, checkpoint, 0.5, *words))
    assert not any(" encoder export " in line for line in again)
    assert len(again) == 5
    assert not any(
        "# GPU" in line for line in planned(tmp_path, checkpoint, 0.5, "--worker", "cpu").output.splitlines()
    )


@pytest.mark.slow  # starts three processes, one of them with torch: 20 s on a free machine
def test_up_serves_the_checkpoints_transformer_in_a_process_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    pairs = write_recorded_pairs(tmp_path / "pairs.jsonl", 8)
    models = tuple(ModelEntry(name=name, recorded=tmp_path / "pairs.jsonl") for name in MODELS)
    pool = PoolFile(models=models, worker="cpu")
    encoder = plan_encoder(pool, checkpoint, tmp_path / "encoder")

    async def route(url: str) -> list[tuple[int, dict[str, object]]]:
        caller = Caller(url)
        bodies = [{"prompt": p.instance.prompt, "responses": p.instance.responses} for p in pairs]
        answers = [await caller.post("/reward", body) for body in bodies]
        await caller.close()
        return answers

    with running_stack(
        pool, checkpoint, data_dir=tmp_path / "data", host="127.0.0.1", port=free_port(),
        worker_port=free_port(), store_url="embedded", console=Console(quiet=True), encoder=encoder,
    ) as stack:  # fmt: skip
        answers = asyncio.run(route(stack.url))
        assert [status for status, _ in answers] == [200] * len(pairs), answers
        server = next(child for child in stack.processes.children if child.name == "encoder")
        assert server.process.poll() is None
        assert server in stack.workers, "it is started again when it leaves"
        assert fetch(f"{stack.url}/readyz")[0] == 200
        server.process.kill()
        server.process.wait()
        status, document = asyncio.run(route(stack.url))[0]
        assert (status, document["error"]["code"]) == (503, "encoder_unavailable"), json.dumps(document)  # type: ignore[index]
