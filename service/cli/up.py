"""`reward-router up`: embedded store, workers and gateway as child processes, and one Ctrl-C that ends them all."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from service.cli.processes import ProcessGroup, free_port, interruptible
from service.errors import ConfigurationError
from service.pool import ModelEntry, PoolFile, dump_pool, load_pool
from service.settings import EMBEDDED
from service.stores.embedded import EmbeddedStore

WORKER_SECONDS = 120.0
"""How long a worker may take to load its model."""

GATEWAY_SECONDS = 120.0
"""How long the gateway may take to load its encoder and replay its log."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A running stack.

    Attributes:
        url: the gateway.
        pool: the pool with the workers' addresses.
        processes: the children.
    """

    url: str
    pool: PoolFile
    processes: ProcessGroup


def up(
    pool: Annotated[
        Path | None,
        typer.Option(help="Pool file; RMs without `urls` are started here. (default: the demo pool, made if absent)"),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint. (default: the demo pool's, with the demo pool)")
    ] = None,
    host: Annotated[str, typer.Option(help="Address of the gateway.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the gateway.")] = 8080,
    worker_port: Annotated[int, typer.Option(help="First port of the workers that are started.")] = 8101,
    data_dir: Annotated[Path, typer.Option(help="Where everything that is kept lies.")] = Path(".data"),
    store: Annotated[str, typer.Option(help="redis://, rediss:// or unix:// URL, or `embedded`.")] = EMBEDDED,
    run: Annotated[
        str | None,
        typer.Option(help="Name of the default run. (default: default; with the demo pool, one a checkpoint)"),
    ] = None,
) -> None:
    """Start everything: store, one worker per reward model, gateway. Ctrl-C ends all; what was learned is kept.

    Settings of the gateway are environment variables REWARD_ROUTER_…; docs/settings.md lists them.
    """
    interruptible()
    console = Console()
    if pool is None:
        from service.cli.demo import demo_run, ensure_demo_pool

        pool, checkpoint = ensure_demo_pool(data_dir, console, checkpoint)
        run = run or demo_run(checkpoint)
    with running_stack(
        load_pool(pool), checkpoint, data_dir=data_dir, host=host, port=port, worker_port=worker_port, store_url=store,
        console=console, run=run,
    ) as stack:  # fmt: skip
        console.print(
            f"\nserving on [bold]{stack.url}[/]   API: {stack.url}/docs   metrics: {stack.url}/metrics\n\n"
            f"  curl -s {stack.url}/reward -H 'content-type: application/json' \\\n"
            '    -d \'{"prompt": "What is 7 + 5?", "responses": ["12", "13"]}\'\n\nCtrl-C ends everything.',
            highlight=False,
        )
        wait_for_signal(stack.processes)
    console.print("stopped; what was learned is kept in", str(data_dir))


@contextmanager
def running_stack(
    pool: PoolFile,
    checkpoint: Path | None,
    *,
    data_dir: Path,
    host: str,
    port: int,
    worker_port: int,
    store_url: str,
    console: Console,
    run: str | None = None,
) -> Iterator[Stack]:
    """Store, workers and gateway for the length of the block.

    Args:
        pool: RMs without `urls` are started from their `path` or `recorded`.
        checkpoint: directory, or None.
        data_dir: for the store, the logs and the resolved pool file.
        host: address of the gateway.
        port: wanted port of the gateway; another one if it is taken.
        worker_port: first wanted port of the workers.
        store_url: `embedded`, or the URL of a running server.
        console: where progress is shown.
        run: name of the default run.

    Raises:
        ConfigurationError: something did not start; with the end of its log.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    embedded = EmbeddedStore(data_dir / "store") if store_url == EMBEDDED else None
    try:
        if embedded is not None:
            with console.status("store"):
                store_url = embedded.start()
            console.print(
                "store     ready (Valkey, append-only file in", str(data_dir / "store") + ")", highlight=False
            )
        with ProcessGroup(data_dir / "logs") as processes:
            resolved = _start_workers(pool, processes, worker_port, console)
            pool_file = data_dir / "pool.yaml"
            dump_pool(resolved, pool_file)
            arguments = [
                "serve",
                "--pool",
                str(pool_file),
                "--host",
                host,
                "--port",
                str(gateway_port := free_port(port)),
            ]
            if checkpoint is not None:
                arguments += ["--checkpoint", str(checkpoint)]
            processes.start(
                "gateway",
                arguments,
                {"REWARD_ROUTER_STORE_URL": store_url, **({"REWARD_ROUTER_RUN": run} if run else {})},
            )
            url = f"http://127.0.0.1:{gateway_port}"
            with console.status("gateway"):
                processes.wait_until_ready(f"{url}/readyz", "gateway", GATEWAY_SECONDS, lambda: None)
            console.print(f"gateway   ready on {url}", highlight=False)
            yield Stack(url, resolved, processes)
    finally:
        if embedded is not None:
            embedded.stop()


def wait_for_signal(processes: ProcessGroup) -> None:
    """Return on SIGINT or SIGTERM.

    Raises:
        ConfigurationError: a child left before that.
    """
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not stop.wait(0.5):
            processes.check()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_workers(pool: PoolFile, processes: ProcessGroup, first_port: int, console: Console) -> PoolFile:
    """Start a worker for each RM without `urls`; recorded RMs of one file share one process."""
    taken: set[int] = set()

    def next_port() -> int:
        port = first_port
        while port in taken:
            port += 1
        port = free_port(port)
        taken.add(port)
        return port

    urls: dict[str, str] = {}
    names: dict[str, str] = {}
    waiting = [model for model in pool.models if not model.urls]
    for model in waiting:
        if model.path is None and model.recorded is None:
            raise ConfigurationError(
                f"model {model.name!r} has no `urls`, `path` or `recorded` in the pool file: give one"
            )
        if model.path is not None:
            port = next_port()
            names[model.name] = f"worker-{model.name}"
            processes.start(
                names[model.name],
                ["worker", "--model", str(model.path), "--name", model.served_name or model.name, "--port", str(port)],
                {"OMP_NUM_THREADS": "1"},
            )
            urls[model.name] = f"http://127.0.0.1:{port}"
    for recorded in dict.fromkeys(model.recorded for model in waiting if model.recorded is not None):
        group = [model for model in waiting if model.recorded == recorded]
        port = next_port()
        arguments = ["worker", "--recorded", str(recorded), "--port", str(port)]
        for model in group:
            arguments += ["--model", model.served_name or model.name]
            urls[model.name] = f"http://127.0.0.1:{port}"
            names[model.name] = f"worker-recorded-{port}"
        processes.start(f"worker-recorded-{port}", arguments)
    for model in waiting:
        with console.status(f"worker {model.name}"):
            processes.wait_until_ready(f"{urls[model.name]}/health", names[model.name], WORKER_SECONDS, lambda: None)
        console.print(f"worker    ready: {model.name} on {urls[model.name]}", highlight=False)
    return PoolFile(name=pool.name, models=tuple(_placed(model, urls) for model in pool.models))


def _placed(model: ModelEntry, urls: dict[str, str]) -> ModelEntry:
    return model if model.urls else model.model_copy(update={"urls": (urls[model.name],)})
