"""Starting workers: real child processes that behave as vLLM's do when they start, answer, hang or fail."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from service.cli.encoder_launch import EncoderPlan, encoder_start
from service.cli.launch import LARGEST_CPU_BYTES, WorkerStart, plan_workers, snapshot, start_workers
from service.cli.processes import ProcessGroup
from service.cli.supervise import Supervisor
from service.cli.up import port_sequence
from service.errors import ConfigurationError
from service.pool import ModelEntry, PoolFile
from tests.conftest import ValkeyProcess, free_port

SERVER = """#!/usr/bin/env python3
import http.server, os, sys, time
words = sys.argv[1:]
name = words[words.index("--served-model-name") + 1]
port = int(words[words.index("--port") + 1])
log = open("{folder}/events", "a")
def say(what):
    log.write(f"{{time.monotonic()}} {{name}} {{what}} {{os.environ.get('CUDA_VISIBLE_DEVICES')}}\\n")
    log.flush()
say("started")
time.sleep(0.5)
if name == "broken":
    print("INFO 11-23 loading weights")
    print("(EngineCore pid=1) ERROR 11-23 [core.py:1] torch.OutOfMemoryError: CUDA out of memory", flush=True)
    for number in range(40):
        print(f"  File x.py, line {{number}}")
    sys.exit("RuntimeError: Engine core initialization failed. See root cause above.")
if name == "hanging":
    print("\\x1b[36mstill downloading\\x1b[0m", flush=True)
    time.sleep(60)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass
server = http.server.HTTPServer(("127.0.0.1", port), Handler)
say("ready")
server.serve_forever()
"""


@pytest.fixture
def vllm(tmp_path: Path) -> tuple[str, ...]:
    """A program that takes vLLM's flags and writes down when it started and was ready."""
    program = tmp_path / "vllm"
    program.write_text(SERVER.format(folder=tmp_path))
    program.chmod(0o755)
    return (str(program),)


@pytest.fixture(autouse=True)
def _all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where nobody was given some of the GPUs only."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def out() -> Console:
    return Console(file=io.StringIO(), width=200)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def pool_of(vllm: tuple[str, ...], *models: ModelEntry) -> PoolFile:
    return PoolFile(vllm_command=vllm, models=models)


def events(folder: Path) -> dict[tuple[str, str], list[float]]:
    """(name, what) -> when."""
    found: dict[tuple[str, str], list[float]] = {}
    for line in (folder / "events").read_text().splitlines():
        when, name, what, _ = line.split()
        found.setdefault((name, what), []).append(float(when))
    return found


def test_on_one_gpu_each_waits_for_the_one_before_and_gpus_do_not_wait_for_each_other(
    tmp_path: Path, vllm: tuple[str, ...], out: Console
) -> None:
    rm = Path("/models/rm")
    pool = pool_of(
        vllm,
        ModelEntry(name="a", path=rm, gpu_share=0.3, gpus=(0, 1), replicas=2),
        ModelEntry(name="b", path=rm, gpu_share=0.3, gpus=(0,)),
        ModelEntry(name="c", path=rm, gpu_share=0.3, gpus=(1,)),
    )
    with ProcessGroup(tmp_path / "logs") as processes:
        urls = start_workers(plan_workers(pool, port_sequence(free_port())), processes, out)
    when = events(tmp_path)
    assert [len(urls[name]) for name in ("a", "b", "c")] == [2, 1, 1]
    assert len({url for each in urls.values() for url in each}) == 4
    # Each GPU has a chain a -> b or a -> c, and the two replicas of a started before either was ready.
    assert max(when["a", "started"]) < min(when["a", "ready"])
    assert when["b", "started"][0] > min(when["a", "ready"])
    assert when["c", "started"][0] > min(when["a", "ready"])
    lines = (tmp_path / "events").read_text()
    assert {line.split()[3] for line in lines.splitlines() if line.split()[1] == "a"} == {"0", "1"}
    assert "ready: b on http://127.0.0.1:" in text(out)
    assert "(vLLM GPU 0," in text(out)


def test_the_encoder_takes_its_turn_among_the_models_of_its_gpu(
    tmp_path: Path, vllm: tuple[str, ...], out: Console
) -> None:
    rm = Path("/models/rm")
    pool = pool_of(
        vllm,
        ModelEntry(name="a", path=rm, gpu_share=0.3, gpus=(0,)),
        ModelEntry(name="b", path=rm, gpu_share=0.3, gpus=(1,)),
    )
    ports = port_sequence(free_port())
    plan = EncoderPlan(Path("checkpoint"), Path("encoder"), vllm, "cuda", 0.1, gpu=0)
    workers = plan_workers(pool, ports, others=plan.claims)
    encoder = encoder_start(plan.directory, ports(), vllm=vllm, gpu_share=plan.share, gpus=(plan.gpu,), max_tokens=64)
    with ProcessGroup(tmp_path / "logs") as processes:
        urls = start_workers([*workers, encoder], processes, out)
        assert [child.gpus for child in processes.children if child.name == "encoder"] == [(0,)]
    when = events(tmp_path)
    assert when["encoder", "started"][0] > when["a", "ready"][0]
    assert when["b", "started"][0] < when["a", "ready"][0]
    assert set(urls) == {"a", "b"}, "the encoder is no model"
    assert "ready: encoder on http://127.0.0.1:" in text(out)


def test_a_worker_that_fails_is_shown_with_the_cause_and_the_last_lines(
    tmp_path: Path, vllm: tuple[str, ...], out: Console
) -> None:
    pool = pool_of(vllm, ModelEntry(name="broken", path=Path("/m"), gpu_share=0.3))
    with ProcessGroup(tmp_path / "logs") as processes, pytest.raises(ConfigurationError) as raised:
        start_workers(plan_workers(pool, port_sequence(free_port())), processes, out)
    sentence = str(raised.value)
    assert "worker-broken left with status 1" in sentence
    assert str(tmp_path / "logs/worker-broken.log") in sentence
    assert "first error: (EngineCore pid=1) ERROR 11-23 [core.py:1] torch.OutOfMemoryError: CUDA out" in sentence
    assert sentence.rstrip().endswith("See root cause above.")


def test_the_brackets_of_a_log_survive_the_way_to_the_operator(
    tmp_path: Path, vllm: tuple[str, ...], valkey_server: ValkeyProcess
) -> None:
    (tmp_path / "pool.yaml").write_text(f"{{vllm_command: {vllm[0]}, models: [{{name: broken, path: m}}]}}")
    words = ["up", "--pool", "pool.yaml", "--data-dir", "data", "--port", "0", "--store", valkey_server.url]
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "ERROR 11-23 [core.py:1] torch.OutOfMemoryError: CUDA out of memory" in done.stderr


def test_a_worker_that_takes_too_long_is_ended_and_shown(
    tmp_path: Path, vllm: tuple[str, ...], out: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.cli.launch.VLLM_SECONDS", 3.0)
    monkeypatch.setattr("service.cli.launch.REPORT_SECONDS", -1.0)
    pool = pool_of(vllm, ModelEntry(name="hanging", path=Path("/m"), gpu_share=0.3))
    with ProcessGroup(tmp_path / "logs") as processes:
        with pytest.raises(ConfigurationError, match="worker-hanging is not ready after 3 s"):
            start_workers(plan_workers(pool, port_sequence(free_port())), processes, out)
        (child,) = processes.children
    assert child.process.poll() is not None
    assert "workers: 0 of 1 ready\n  worker-hanging 0 s: " in text(out)


def test_the_last_line_is_shown_without_colours_and_without_empty_lines(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as processes:
        child = processes.run("it", ["/bin/sh", "-c", r"printf 'first\n\033[36mstill downloading\033[0m\n\n'"])
        child.process.wait()
        assert child.last_line() == "still downloading"
        silent = processes.run("silent", ["/bin/true"])
        silent.process.wait()
        assert silent.last_line() == ""


def test_what_a_dead_server_leaves_behind_is_ended_too(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    # The shell's child is a shell until it has become `sleep`.
    became = "until [ \"$(tr -d '\\0' < /proc/$!/cmdline)\" = sleep300 ]; do sleep 0.01; done"
    script = f"sleep 300 & echo $! > {pids}; {became}; exit 3"
    with ProcessGroup(tmp_path / "logs") as processes:
        child = processes.run("server", ["/bin/sh", "-c", script])
        assert child.process.wait(20) == 3
        engine = Path(f"/proc/{pids.read_text().strip()}/cmdline")
        assert "sleep" in engine.read_text()
    deadline = time.monotonic() + 60
    # A zombie's command line is empty.
    while engine.exists() and engine.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_that_leaves_is_started_again_ever_more_slowly(tmp_path: Path, out: Console) -> None:
    now = 0.0
    with ProcessGroup(tmp_path) as processes:
        steady = processes.run("steady", ["/bin/sleep", "300"])
        failing = processes.run("failing", ["/bin/sh", "-c", "echo life; exit 3"])
        supervisor = Supervisor([steady, failing], out, clock=lambda: now)
        for life, pause in enumerate([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0], 1):
            failing.process.wait()
            supervisor.tick()
            assert f"is started again in {pause:g} s" in text(out)
            now += 0.9 * pause
            supervisor.tick()
            assert failing.log.read_text() == "life\n" * life
            now += 0.2 * pause
            supervisor.tick()
        failing.process.wait()
        assert failing.log.read_text() == "life\n" * 9
        assert steady.process.poll() is None
        # As long as this it had lived: not the sequel of earlier failures.
        now += 1000.0
        supervisor.tick()
        assert text(out).rstrip().splitlines()[-10].startswith("failing left with status 3, is started again in 1 s")
        # The gateway is not a worker: when it leaves, all ends.
        processes.check(without=supervisor.workers)
        with pytest.raises(ConfigurationError, match="failing left with status 3"):
            processes.check()


def test_on_one_gpu_workers_are_started_again_in_turn(tmp_path: Path, out: Console) -> None:
    now = 0.0
    port = free_port()
    with ProcessGroup(tmp_path) as processes:
        # Each dies at once; in its second life `a` answers when it is told to.
        script = f"if [ -e {{0}} ]; then while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; {{1}}; fi; touch {{0}}"
        serve = f"exec {sys.executable} -m http.server {port} --bind 127.0.0.1 -d {tmp_path}"
        a = processes.run("a", ["/bin/sh", "-c", script.format(tmp_path / "a1", serve)])
        b = processes.run("b", ["/bin/sh", "-c", script.format(tmp_path / "b1", "sleep 300")])
        c = processes.run("c", ["/bin/sh", "-c", script.format(tmp_path / "c1", "sleep 300")])
        a.gpus, a.health, b.gpus, c.gpus = (0,), f"http://127.0.0.1:{port}/", (0, 1), (2,)
        supervisor = Supervisor([a, b, c], out, clock=lambda: now)
        first = [child.process for child in (a, b, c)]
        for process in first:
            process.wait()
        supervisor.tick()
        now += 1.5
        supervisor.tick()
        assert [child.process is not before for child, before in zip((a, b, c), first, strict=True)] == [
            True, False, True,
        ]  # fmt: skip
        (tmp_path / "go").touch()
        deadline = time.monotonic() + 30
        while b.process is first[1]:
            assert time.monotonic() < deadline
            supervisor.tick()
            time.sleep(0.05)
        assert a.process.poll() is None


def test_the_log_of_a_worker_is_found_by_a_name_that_is_a_file_name(vllm: tuple[str, ...]) -> None:
    model = ModelEntry(name="org/rm 1", path=Path("/m"), replicas=2, gpus=(0, 1))
    starts = plan_workers(pool_of(vllm, model), port_sequence(0))
    assert [start.name for start in starts] == ["worker-org_rm_1-0", "worker-org_rm_1-1"]
    assert all(start.models == ("org/rm 1",) for start in starts)


def test_recorded_models_of_one_file_share_a_process_and_urls_start_none() -> None:
    pool = PoolFile(
        models=(
            ModelEntry(name="a", recorded=Path("/p.jsonl")),
            ModelEntry(name="b", urls=("http://127.0.0.1:1",)),
            ModelEntry(name="c", recorded=Path("/p.jsonl"), served_name="see"),
        )
    )
    (start,) = plan_workers(pool, port_sequence(0))
    assert start.models == ("a", "c")
    assert start.command[-4:] == ("--model", "a", "--model", "see")


def test_a_model_that_nobody_serves_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'rm' has no `urls`, `path`, `model` or `recorded`"):
        plan_workers(PoolFile(models=(ModelEntry(name="rm"),)), port_sequence(0))


def test_a_template_that_the_cpu_worker_would_ignore_is_refused(vllm: tuple[str, ...]) -> None:
    model = ModelEntry(name="rm", path=Path("/m"), chat_template="/own.jinja")
    with pytest.raises(ConfigurationError, match=r"'rm': the CPU worker knows .* not /own.jinja: use `rendering"):
        plan_workers(PoolFile(worker="cpu", models=(model,)), port_sequence(0))
    (start,) = plan_workers(pool_of(vllm, model), port_sequence(0))
    assert start.command[start.command.index("--chat-template") + 1] == "/own.jinja"
    in_gateway = model.model_copy(update={"rendering": "template"})
    assert len(plan_workers(PoolFile(worker="cpu", models=(in_gateway,)), port_sequence(0))) == 1


def hub_cache(folder: Path) -> Path:
    """The hub's cache with one model in it, as the hub's own client lays it out."""
    cached = folder / "hub" / "models--org--rm"
    directory = cached / "snapshots" / "abc"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    return directory


def test_without_vllm_a_model_of_the_hub_is_served_by_the_cpu_worker_from_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs reward-router[train]")
    directory = hub_cache(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pool = PoolFile(worker="cpu", models=(ModelEntry(name="rm", model="org/rm", revision="main", replicas=2),))
    ask: Callable[[ModelEntry], Path] = snapshot
    starts = plan_workers(pool, port_sequence(0), local=lambda model: ask(model))
    assert [start.kind for start in starts] == ["CPU worker"] * 2
    assert all(str(directory) in start.command for start in starts)
    with pytest.raises(ConfigurationError, match="'rm': org/other cannot be had from the hub"):
        snapshot(ModelEntry(name="rm", model="org/other"))


def test_a_command_can_be_pasted_into_a_shell() -> None:
    start = WorkerStart("w", ("rm",), ("vllm", "serve", "a b"), {"A": "x y"}, "http://127.0.0.1:1", "vLLM")
    assert start.shell() == "A='x y' vllm serve 'a b'"


def test_ports_are_never_given_twice() -> None:
    next_port = port_sequence(free_port())
    began = time.monotonic()
    ports = [next_port() for _ in range(20)]
    assert len(set(ports)) == 20, time.monotonic() - began


def test_a_rule_is_started_as_a_worker_with_its_bounds() -> None:
    rules = {"kind": "rule", "processes": 2, "rule_seconds": 0.5, "memory_mb": 256}
    pool = PoolFile.model_validate(
        {
            "models": [
                {"name": "my rule", "builtin": "length", "options": {"max": 5}, **rules},
                {"name": "far", "kind": "rule", "urls": ["http://127.0.0.1:1"]},
                {"name": "other", "kind": "http", "urls": ["http://127.0.0.1:2"]},
            ]
        }
    )
    (start,) = plan_workers(pool, port_sequence(0))
    assert (start.name, start.models, start.kind) == ("worker-my_rule", ("my rule",), "rule")
    words = "worker --rule length --name my rule --port"
    assert " ".join(start.command).partition(words)[1] == words
    bounds = ("--processes", "2", "--rule-seconds", "0.5", "--memory-mb", "256", "--options", '{"max": 5}')
    assert start.command[-len(bounds) :] == bounds


def test_a_large_model_without_vllm_is_refused_and_a_middling_one_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.cli.launch.find_vllm", lambda _: None)
    for size, told in ((1 << 20, None), (1 << 30, "1.1 GB of weights"), (16 << 30, "17.2 GB of weights")):
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.truncate(size)
        pool = PoolFile(models=(ModelEntry(name="rm", path=tmp_path),))
        if size > LARGEST_CPU_BYTES:
            with pytest.raises(ConfigurationError, match=f"'rm' has {told} and vLLM is not installed here"):
                plan_workers(pool, port_sequence(0))
            pool = pool.model_copy(update={"worker": "cpu"})
            told = None
        (start,) = plan_workers(pool, port_sequence(0))
        assert (start.note is None) == (told is None)
        assert told is None or told in str(start.note)
