"""Pool files become `vllm serve` commands: flags, GPUs, shares, and which vLLM is called."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import app, vllm_serve
from service.cli.launch import plan_workers
from service.cli.up import port_sequence
from service.cli.vllm_serve import (
    check_shares,
    claims_by_gpu,
    find_vllm,
    model_claims,
    placements,
    serve_environment,
    serve_words,
    served_by_vllm,
)
from service.errors import ConfigurationError
from service.pool import ModelEntry, PoolFile, load_pool
from service.scorers.vllm_entry import VllmEntry

READY_POOLS = sorted((Path(__file__).parents[3] / "deploy/models").glob("*.yaml"))


def flags(words: tuple[str, ...]) -> dict[str, str]:
    """The value after each flag."""
    return {words[i]: words[i + 1] for i in range(len(words) - 1) if words[i].startswith("--")}


def entry(**fields: object) -> ModelEntry:
    return ModelEntry.model_validate({"name": "rm", "path": "/models/rm"} | fields)


@pytest.fixture
def fake_vllm(tmp_path: Path) -> str:
    """A program that could be vLLM; it is never run."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    return str(program)


def test_every_field_becomes_its_flag() -> None:
    model = ModelEntry(
        name="rm", model="org/rm", revision="abc", served_name="other", dtype="bfloat16", max_model_len=4096,
        gpu_share=0.3, tensor_parallel=2, chat_template="/x/own.jinja", vllm_args=("--max-num-batched-tokens", "8192"),
    )  # fmt: skip
    words = serve_words(model, "cuda", host="127.0.0.1", port=8101)
    assert words[:2] == ("serve", "org/rm")
    assert flags(words) == {
        "--host": "127.0.0.1", "--port": "8101", "--served-model-name": "other", "--runner": "pooling",
        "--convert": "classify", "--revision": "abc", "--dtype": "bfloat16",
        "--max-model-len": "4096", "--chat-template": "/x/own.jinja",
        "--tensor-parallel-size": "2", "--gpu-memory-utilization": "0.3", "--max-num-batched-tokens": "8192",
    }  # fmt: skip


def test_on_a_cpu_weights_stay_float32_and_no_gpu_is_named() -> None:
    model = entry(gpu_share=0.3, gpus=[1])
    words = serve_words(model, "cpu", host="127.0.0.1", port=1)
    assert flags(words)["--dtype"] == "float32"
    assert "--gpu-memory-utilization" not in words
    assert "--enforce-eager" in words
    environment = serve_environment(model, "cpu", (1,), {})
    assert "CUDA_VISIBLE_DEVICES" not in environment
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "1"


def test_the_environment_of_the_caller_beats_defaults_and_the_pool_file_beats_both() -> None:
    model = entry(env={"DO_NOT_TRACK": "0", "MINE": "1"})
    environment = serve_environment(model, "cuda", (2, 3), {"VLLM_NO_USAGE_STATS": "0"})
    assert "VLLM_NO_USAGE_STATS" not in environment
    assert environment["DO_NOT_TRACK"] == "0"
    assert environment["MINE"] == "1"
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_gpus_count_among_those_that_the_caller_was_given() -> None:
    given = {"CUDA_VISIBLE_DEVICES": "4, GPU-8932f937"}
    assert serve_environment(entry(), "cuda", (1, 0), given)["CUDA_VISIBLE_DEVICES"] == "GPU-8932f937,4"
    with pytest.raises(ConfigurationError, match=r"'rm' is to be on GPU 2, and CUDA_VISIBLE_DEVICES=.* leaves 2"):
        serve_environment(entry(), "cuda", (2,), given)


def test_replicas_are_dealt_out_over_the_gpus() -> None:
    assert placements(entry(gpus=[0, 1], replicas=2)) == [(0,), (1,)]
    assert placements(entry(gpus=[4, 5, 6, 7], replicas=2, tensor_parallel=2)) == [(4, 5), (6, 7)]
    assert placements(entry()) == [(0,)]


def test_shares_that_do_not_fit_on_a_gpu_are_one_sentence_with_the_sum() -> None:
    crowd = [entry(name="a", gpu_share=0.5, gpus=[0, 1], replicas=2), entry(name="b", gpu_share=0.46, gpus=[1])]
    with pytest.raises(ConfigurationError, match=r"GPU 1: .* sum to 0\.96, more than 0\.95 \(a 0\.5, b 0\.46\)"):
        check_shares(crowd)
    check_shares([entry(name="a", gpu_share=0.5), entry(name="b", gpu_share=0.45)])
    check_shares([entry(gpu_share=0.98)])


def test_a_model_without_a_share_counts_as_a_whole_gpu() -> None:
    with pytest.raises(ConfigurationError, match=r"1\.00"):
        check_shares([entry(name="a"), entry(name="b", gpu_share=0.1)])


@pytest.mark.parametrize("path", READY_POOLS, ids=lambda path: path.stem)
def test_ready_pools_fit_on_their_gpus_and_name_every_licence(
    path: Path, fake_vllm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    pool = load_pool(path).model_copy(update={"vllm_command": (fake_vllm,)})
    # A judge with a `path` and a rule have workers of ours.
    models = [model for model in pool.models if isinstance(model, VllmEntry) and (pool.name != "demo" or model.dtype)]
    assert all(model.licence and model.max_model_len and model.dtype and model.gpu_share for model in models)
    starts = plan_workers(pool.model_copy(update={"device": "cuda"}), port_sequence(0))
    assert [start.kind for start in starts].count("vLLM") == sum(model.replicas for model in models)
    assert len(starts) - len(pool.models) == sum(model.replicas - 1 for model in models)
    if pool.name != "demo":
        assert all(model.revision for model in models)
        used = {gpu for start in starts for gpu in start.gpus}
        assert used == set(range(int(pool.name.split("-")[1].partition("x")[0])))


PUBLISHED = [path for path in READY_POOLS if path.stem != "demo"]

ROW = re.compile(
    r"#.* (?P<name>[\w.-]+) +[\d.]+ GB +(?P<weights>[\d.]+) GiB +(?P<kv>[\d* ]+) B = +(?P<kib>\d+) KiB +"
    r"(?P<share>[.\d]+) = +(?P<gib>[\d.]+) GiB +(?P<left>[\d.]+) GiB = +(?P<tokens>\d+)k tokens"
)
"""One RM in the comment on top of a ready pool."""


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_the_arithmetic_on_top_of_a_ready_pool_is_that_of_its_entries_and_right(path: Path) -> None:
    text = path.read_text("utf-8")
    memory = float(re.search(r"[Cc]ounted on ([\d.]+) GiB", text)[1])  # type: ignore[index]
    working = float(re.search(r"([\d.]+) GiB of working\s+(?:# )?memory", text)[1])  # type: ignore[index]
    rows = {row["name"]: row for row in ROW.finditer(text)}
    pool = load_pool(path)
    assert set(rows) == {model.name for model in pool.models}
    for model in pool.models:
        row = rows[model.name]
        share, weights, left = float(row["share"]), float(row["weights"]), float(row["left"])
        assert share == model.gpu_share, model.name
        assert math.prod(map(int, row["kv"].split("*"))) == 1024 * int(row["kib"]), model.name
        assert share * memory == pytest.approx(float(row["gib"]), abs=0.06), model.name
        assert share * memory - weights - working == pytest.approx(left, abs=0.5 if left >= 10 else 0.06), model.name
        tokens = left * 1024**2 / int(row["kib"])
        # Rounded down, from a `left` of more digits than are shown.
        assert int(row["tokens"]) * 1000 == pytest.approx(tokens, abs=1000, rel=0.05), model.name
        assert model.max_model_len is not None
        assert tokens > model.max_model_len, f"{model.name}: one text must fit"
    sums = [float(one) for one in re.findall(r"# +sum +(\.\d+)", text)]
    taken = {round(sum(claim.share for claim in one), 4) for one in claims_by_gpu(model_claims(pool.models)).values()}
    assert set(sums) == taken
    assert f"reward-router pin --pool deploy/models/{path.name}" in text
    assert "Chat template: every model's own" in text
    assert all(model.rendering == "auto" and model.chat_template == "plain" for model in pool.reward_models)


def test_the_pool_files_command_is_relative_to_the_file(tmp_path: Path, fake_vllm: str) -> None:
    (tmp_path / "pool.yaml").write_text("vllm_command: bin/vllm --flag\nmodels: [{name: rm, path: rm}]\n")
    pool = load_pool(tmp_path / "pool.yaml")
    assert find_vllm(pool.vllm_command) == (fake_vllm, "--flag")


def test_a_command_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigurationError, match="/nowhere/vllm"):
        find_vllm(("/nowhere/vllm",))


def test_the_running_python_is_asked_before_the_path(monkeypatch: pytest.MonkeyPatch, fake_vllm: str) -> None:
    monkeypatch.setenv("PATH", str(Path(fake_vllm).parent))
    monkeypatch.setattr(vllm_serve, "find_spec", lambda name: None)
    assert find_vllm() == (fake_vllm,)
    monkeypatch.setattr(vllm_serve, "find_spec", lambda name: name)
    assert find_vllm() == (sys.executable, "-m", "vllm.entrypoints.cli.main")
    monkeypatch.setattr(vllm_serve, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_vllm() is None


def test_the_worker_is_the_models_then_the_pools_then_what_is_installed() -> None:
    pool = PoolFile(models=(entry(),))
    assert served_by_vllm(entry(), pool, ("vllm",))
    assert not served_by_vllm(entry(), pool, None)
    assert not served_by_vllm(entry(worker="cpu"), pool, ("vllm",))
    assert not served_by_vllm(entry(), pool.model_copy(update={"worker": "cpu"}), ("vllm",))
    assert served_by_vllm(entry(worker="vllm"), pool.model_copy(update={"worker": "cpu"}), ("vllm",))
    with pytest.raises(ConfigurationError, match="not installed"):
        served_by_vllm(entry(worker="vllm"), pool, None)


def dry_run(pool: Path, *words: str) -> list[str]:
    """Commands and shares that `up --dry-run` prints; a pool whose paths are not there fails its checks."""
    done = CliRunner().invoke(app, ["up", "--pool", str(pool), "--dry-run", *words])
    lines = done.stdout.splitlines()
    assert lines[-2:-1] == ["# ok     what is to be started can be"], done.output
    return [line for line in lines[:-1] if not line.startswith(("# ok", "# FAILS"))]


def test_a_dry_run_prints_one_command_a_replica_and_starts_nothing(
    fake_vllm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    printed = dry_run(READY_POOLS[1].parent / "4x80gb.yaml", "--vllm-command", f"{fake_vllm} --verbose")
    lines, shares = printed[:12], printed[12:]
    assert shares[0] == "# GPU 0: skywork-llama3.1-8b 0.46 + grm-llama3.1-8b 0.46 = 0.92 of its memory, at most 0.95"
    assert [line[: len("# GPU 0")] for line in shares] == [f"# GPU {gpu}" for gpu in range(4)]
    assert all(f" {fake_vllm} --verbose serve " in line for line in lines)
    assert "CUDA_VISIBLE_DEVICES=1 " in lines[1]
    assert len({line.split("--port ")[1].split()[0] for line in lines}) == 12


def test_the_command_line_beats_the_pool_file_and_its_models(tmp_path: Path, fake_vllm: str) -> None:
    (tmp_path / "pool.yaml").write_text(
        f"{{vllm_command: {fake_vllm}, models: [{{name: a, path: a, worker: vllm}}, {{name: b, model: org/b}}]}}"
    )
    on_cpu = dry_run(tmp_path / "pool.yaml", "--device", "cpu")
    assert all("--enforce-eager" in line and "CUDA_VISIBLE_DEVICES" not in line for line in on_cpu)
    ours = dry_run(tmp_path / "pool.yaml", "--worker", "cpu")
    assert [line.split("--model ")[1].split()[0] for line in ours] == [str(tmp_path / "a"), "org/b"]
    assert all("-m service.cli worker" in line for line in ours)
