"""One gateway process: what it refuses to start with, and how it leaves."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.conftest import free_port
from tests.support.processes import MODELS, Caller, Services, write_recorded_pairs

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

pytestmark = pytest.mark.slow


async def test_a_gateway_that_is_told_to_stop_answers_what_it_has_taken(
    tmp_path: Path, own_valkey_server: ValkeyProcess
) -> None:
    pytest.importorskip("wordllama", reason="needs reward-router[embedded]")
    pairs = write_recorded_pairs(tmp_path / "pairs.jsonl", 8)
    with Services(tmp_path) as services:
        worker = services.worker(tmp_path / "pairs.jsonl", "--delay-ms", "700")
        worker.wait_until_ready()
        gateway = services.gateway("gateway", worker, own_valkey_server.url, log_level="warning")
        gateway.wait_until_ready()
        caller = Caller(gateway.url)
        bodies = [{"prompt": pair.instance.prompt, "responses": pair.instance.responses} for pair in pairs]
        requests = [asyncio.create_task(caller.post("/reward", body)) for body in bodies]
        await asyncio.sleep(0.3)
        assert gateway.process is not None
        gateway.process.send_signal(signal.SIGTERM)
        for status, reply in await asyncio.gather(*requests):
            assert status == 200, reply
            assert reply["recorded"] is True
        await asyncio.to_thread(gateway.process.wait, 20)
        assert (await caller.post("/reward", bodies[0]))[0] == 0
        await caller.close()


@pytest.mark.parametrize(
    ("words", "environment", "names"),
    [
        (["--pool", "absent.yaml"], {}, "absent.yaml"),
        (["--pool", "pool.yaml", "--policy", "nonsense"], {}, "nonsense"),
        (["--pool", "pool.yaml", "--signal", "nonsense"], {}, "signal"),
        (["--pool", "pool.yaml", "--prior", "calibrated"], {}, "checkpoint"),
        (["--pool", "pool.yaml", "--checkpoint", "absent"], {}, "absent"),
        (["--pool", "pool.yaml", "--host", "0.0.0.0"], {}, "API key"),
        (["--pool", "pool.yaml", "--store", "http://127.0.0.1:1"], {}, "store"),
        (["--pool", "pool.yaml"], {"REWARD_ROUTER_REFRESH_EVENTS": "100"}, "refresh_events"),
        (["--pool", "pool.yaml"], {"REWARD_ROUTER_ENCODER": "nonsense"}, "nonsense"),
        (["--pool", "pool.yaml"], {"REWARD_ROUTER_API_KEYS": "not-json"}, "lists are JSON"),
        (["--pool", "nourls.yaml"], {}, "urls"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_sentence_and_status_2(
    tmp_path: Path, words: list[str], environment: dict[str, str], names: str
) -> None:
    models = [{"name": model, "urls": [f"http://127.0.0.1:{free_port()}"]} for model in MODELS]
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"models": models}))
    (tmp_path / "nourls.yaml").write_text(yaml.safe_dump({"models": [{"name": "rm"}]}))
    base = {"REWARD_ROUTER_STORE_URL": "redis://127.0.0.1:1/0", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", "serve", *words, "--port", str(free_port())],
        cwd=tmp_path,
        env={**os.environ, **base, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert names in done.stderr
    assert "Traceback" not in done.stderr
