"""The request that `up` prints has been made, and its text is one that the scorers know."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import yaml

from service.cli.first_request import EXAMPLE, example_of, ready_lines
from service.cli.key_option import KEY_VARIABLE
from service.pool import ModelEntry, PoolFile, load_pool
from tests.support.arms import ScriptedArm
from tests.support.live import live_gateway
from tests.support.processes import MODELS, write_recorded_pairs

POOL = PoolFile(models=(ModelEntry(name="rm-a", urls=("http://127.0.0.1:1",)),))


def printed(url: str, folder: Path, key: str | None = None) -> list[str]:
    """What `up` would print."""
    return asyncio.run(ready_lines(url, POOL, folder, key))


def test_the_printed_command_works_with_a_key(valkey_url: str, tmp_path: Path) -> None:
    with live_gateway(valkey_url, api_keys=("secret",)) as gateway:
        lines = printed(gateway.url, tmp_path, "secret")
        assert "secret" not in "\n".join(lines)
        command = "\n".join(line for line in lines if line.startswith("  ") and "export" not in line)
        done = subprocess.run(
            ["bash", "-c", command],
            env={KEY_VARIABLE: "secret", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
    assert json.loads(done.stdout)["rewards"]
    assert lines[0].endswith(": 0 events learned, signal preference")
    assert lines[1] == "3 of 3 scorers can be asked"
    assert lines[-1].startswith("its answer: model rm-")


def test_a_missing_key_is_said_and_ends_nothing(valkey_url: str, tmp_path: Path) -> None:
    with live_gateway(valkey_url, api_keys=("secret",)) as gateway:
        for key, words in ((None, "none is given"), ("wrong", "the one given is not enough")):
            (line,) = printed(gateway.url, tmp_path, key)
            assert words in line
            assert KEY_VARIABLE in line


def test_no_command_is_printed_where_it_failed(valkey_url: str, tmp_path: Path) -> None:
    with live_gateway(valkey_url, arms=[ScriptedArm("rm-a")], api_keys=("secret",)) as gateway:
        gateway.arms[0].available = False
        lines = printed(gateway.url, tmp_path, "secret")
    assert not [line for line in lines if "curl" in line]
    assert "a first request got no reward" in lines[-1]


def test_recorded_models_are_asked_about_recorded_texts(tmp_path: Path) -> None:
    pairs = write_recorded_pairs(tmp_path / "pairs.jsonl", 5)
    models = [{"name": model, "recorded": "pairs.jsonl"} for model in MODELS]
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"models": models}))
    assert example_of(load_pool(tmp_path / "pool.yaml"))["prompt"] in {pair.instance.prompt for pair in pairs}
    assert example_of(POOL) == EXAMPLE
