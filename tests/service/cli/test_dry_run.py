"""`--dry-run`: each check is a line, and one that fails hides no other."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import app
from service.stores.embedded import EmbeddedStore
from tests.service.scorers.worker_servers import ScriptedWorker, Serve

POOL = """
models:
  - {{name: away, urls: ['http://127.0.0.1:9']}}
  - {{name: there, urls: ['{url}']}}
  - {{name: lost, path: no/where}}
  - {{kind: rule, name: own, file: 'rules.py:check'}}
  - {{kind: rule, name: sums, builtin: math}}
"""


@pytest.mark.parametrize("command", ["up", "serve"])
def test_every_fault_has_its_line_and_nothing_starts(command: str, tmp_path: Path, serve: Serve) -> None:
    (tmp_path / "pool.yaml").write_text(POOL.format(url=serve(ScriptedWorker("there"))))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = ["--pool", tmp_path / "pool.yaml", "--data-dir", tmp_path / "data", "--port", taken.getsockname()[1]]
        done = CliRunner().invoke(app, [command, *map(str, words), "--dry-run", "--checkpoint", str(tmp_path / "none")])
    assert done.exit_code == 1
    lines = [line for line in done.output.splitlines() if line.startswith("# ")]
    failed = [line for line in lines if line.startswith("# FAILS")]
    remedies = {
        "up": (
            "none: the directory does not exist",
            "end it, or give",
            "away: http",
            "lost: ",
            "rules.py: no such file",
        ),
        "serve": ("none: the directory does not exist", "end it, or give", "away: http", "name its servers"),
    }[command]
    for words in remedies:
        assert any(words in line for line in failed), (words, lines)
    assert any(line.startswith("# ok     there:") for line in lines)
    assert lines[-1].endswith("checks passed; nothing was started")
    assert not (tmp_path / "data").exists()


def test_a_dry_run_of_what_is_well_leaves_with_zero(tmp_path: Path, serve: Serve) -> None:
    (tmp_path / "pool.yaml").write_text(f"models: [{{name: there, urls: ['{serve(ScriptedWorker('there'))}']}}]")
    words = ["--pool", str(tmp_path / "pool.yaml"), "--data-dir", str(tmp_path / "data"), "--port", "0"]
    for command in ("up", "serve"):
        done = CliRunner().invoke(app, [command, *words, "--dry-run"])
        assert (done.exit_code, "FAILS" in done.output) == (0, False), done.output


POOL_OF_ONE = "models: [{name: sums, kind: rule, builtin: math}]"


def test_a_dry_run_names_who_has_the_store(tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_text(POOL_OF_ONE)
    words = ["up", "--pool", str(tmp_path / "pool.yaml"), "--data-dir", str(tmp_path / "data"), "--port", "0"]
    with EmbeddedStore(tmp_path / "data" / "store"):
        done = CliRunner().invoke(app, [*words, "--dry-run"])
    assert f"process {os.getpid()} has its store" in done.output
    assert done.exit_code == 1


def test_a_dry_run_misses_the_keys_of_an_open_address(tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_text(POOL_OF_ONE)
    words = ["up", "--pool", str(tmp_path / "pool.yaml"), "--data-dir", str(tmp_path / "data"), "--port", "0"]
    done = CliRunner().invoke(app, [*words, "--host", "0.0.0.0", "--dry-run"])
    assert "REWARD_ROUTER_KEYS_FILE" in done.output
    assert done.exit_code == 1


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_a_port_that_is_none_is_a_sentence(port: str, tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_text(POOL_OF_ONE)
    words = ["up", "--pool", str(tmp_path / "pool.yaml"), "--data-dir", str(tmp_path / "data"), "--port", port]
    done = CliRunner().invoke(app, [*words, "--dry-run"])
    assert "a port is a number from 0 (any) to 65535" in done.output
    assert done.exit_code == 1
