"""`reward-router manifests`: what a pool file becomes on a cluster, and what it refuses. Names and numbers by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from service.cli import app
from service.cli.manifests import Choices, gateway_pool, replica_urls, service_name, slug, worker
from service.errors import ConfigurationError
from service.pool import ModelEntry, PoolFile, load_pool


def entry(name: str = "rm-a", **fields: Any) -> ModelEntry:
    return ModelEntry(**{"name": name, "model": "org/a"} | fields)


def container(model: ModelEntry, choices: Choices | None = None) -> dict[str, Any]:
    """Return the container of the first replica."""
    (found,) = worker(model, choices or Choices())[0]["spec"]["template"]["spec"]["containers"]
    return dict(found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rm-a", "rm-a"),
        ("Skywork/Qwen3_0.6B", "rm-skywork-qwen3-0-6b"),
        ("2b", "rm-2b"),
        ("x" * 80, "rm-" + "x" * 49),
    ],
)
def test_a_service_is_named_after_its_model_within_the_bounds_of_dns(name: str, expected: str) -> None:
    assert service_name(entry(name)) == expected
    assert len(expected) <= 52


def test_a_slug_never_ends_in_a_dash() -> None:
    assert slug("a" * 48 + "..b") == "a" * 48


def test_every_replica_has_an_address_of_its_own() -> None:
    model = entry(replicas=2)
    assert replica_urls(model) == ["http://rm-a-0.rm-a:8000", "http://rm-a-1.rm-a:8000"]
    assert worker(model, Choices())[0]["spec"]["replicas"] == 2


def test_gateways_are_told_what_concerns_them_and_nothing_of_gpus() -> None:
    pool = PoolFile(
        name="p",
        models=(
            entry(reward_scale=2.0, gpu_share=0.3, gpus=(0,), licence="x", max_model_len=512, served_name="served"),
            ModelEntry(name="elsewhere", urls=("http://gpu:8000",)),
            entry("ids", rendering="tokens", revision="v1"),
            entry("perhaps", rendering="auto", tokenizer="org/b"),
        ),
    )
    assert gateway_pool(pool) == {
        "name": "p",
        "models": [
            {
                "name": "rm-a",
                "urls": ["http://rm-a-0.rm-a:8000"],
                "reward_scale": 2.0,
                "max_model_len": 512,
                "served_name": "served",
            },
            {"name": "elsewhere", "urls": ["http://gpu:8000"]},
            {
                "name": "ids",
                "urls": ["http://rm-ids-0.rm-ids:8000"],
                "rendering": "tokens",
                "model": "org/a",
                "revision": "v1",
            },
            {
                "name": "perhaps",
                "urls": ["http://rm-perhaps-0.rm-perhaps:8000"],
                "rendering": "auto",
                "tokenizer": "org/b",
            },
        ],
    }


def test_a_pod_has_whole_gpus_and_vllms_own_share_of_them() -> None:
    found = container(entry(gpu_share=0.3, tensor_parallel=2))
    assert "--gpu-memory-utilization" not in found["args"]
    assert found["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert found["resources"]["requests"]["nvidia.com/gpu"] == "2"


def test_a_shared_gpu_keeps_the_pool_files_share() -> None:
    found = container(entry(gpu_share=0.3), Choices(gpu_resource="nvidia.com/gpu.shared", shared_gpus=True))
    assert found["args"][found["args"].index("--gpu-memory-utilization") + 1] == "0.3"
    assert found["resources"]["limits"] == {"nvidia.com/gpu.shared": "1"}


def test_the_environment_of_the_pool_file_wins_and_nothing_of_this_machines_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DO_NOT_TRACK", "0")
    found = {v["name"]: v.get("value") for v in container(entry(env={"HF_HOME": "/mine", "A": "1"}))["env"]}
    assert found["DO_NOT_TRACK"] == "1"
    assert (found["HF_HOME"], found["A"]) == ("/mine", "1")


def refused(content: dict[str, Any], tmp_path: Path) -> str:
    """What the command says of a pool file."""
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump(content))
    result = CliRunner().invoke(
        app, ["manifests", "--pool", str(tmp_path / "pool.yaml"), "--out", str(tmp_path / "out")]
    )
    assert result.exit_code != 0
    assert isinstance(result.exception, ConfigurationError)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    return str(result.exception)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"path": "models/a"}, "'a' is not one of the Hugging Face hub.*`urls`"),
        ({"recorded": "a.jsonl"}, "'a' is not one of the Hugging Face hub"),
        ({"model": "org/a", "chat_template": "a.jinja"}, "`chat_template` .*a.jinja is a file of this machine"),
        (
            {"path": "models/a", "urls": ["http://a:1"], "rendering": "auto"},
            "`path` .*models/a is a file of this machine",
        ),
    ],
)
def test_what_a_pod_would_not_have_is_refused_and_nothing_written(
    fields: dict[str, str], words: str, tmp_path: Path
) -> None:
    assert re.search(words, refused({"models": [{"name": "a", **fields}]}, tmp_path))


def test_two_models_of_one_kubernetes_name_are_refused(tmp_path: Path) -> None:
    models = [{"name": name, "model": "org/a"} for name in ("rm.a", "rm_a")]
    assert "share the Kubernetes name 'rm-a'" in refused({"models": models}, tmp_path)


def test_the_written_pool_file_is_one_that_gateways_read(tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_text(
        yaml.safe_dump({"over_long": "refuse", "models": [{"name": "a", "model": "org/a", "replicas": 3}]})
    )
    out = tmp_path / "new" / "out"
    result = CliRunner().invoke(app, ["manifests", "--pool", str(tmp_path / "pool.yaml"), "--out", str(out)])
    assert result.exit_code == 0, result.output
    pool = load_pool(out / "pool.yaml")
    assert pool.over_long.value == "refuse"
    assert [len(model.urls) for model in pool.models] == [3]


def test_a_pool_that_is_served_elsewhere_makes_a_pool_file_and_no_workers(tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"models": [{"name": "a", "urls": ["http://h:1"]}]}))
    out = tmp_path / "out"
    assert (
        CliRunner().invoke(app, ["manifests", "--pool", str(tmp_path / "pool.yaml"), "--out", str(out)]).exit_code == 0
    )
    assert {path.name for path in out.iterdir()} == {"kustomization.yaml", "pool.yaml"}
    assert yaml.safe_load((out / "kustomization.yaml").read_text())["resources"] == []
