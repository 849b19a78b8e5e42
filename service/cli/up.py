"""`reward-router up`: embedded store, workers and gateway as child processes, and one Ctrl-C that ends them all."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from service.cli.dry_run import (
    REMOTE_ENCODER,
    Check,
    directory_check,
    encoder_check,
    fit_check,
    port_check,
    scorer_checks,
    tell,
    tried,
)
from service.cli.encoder_launch import ENCODER_SHARE, SERVED, EncoderPlan, ensure_exported, plan_encoder
from service.cli.first_request import ready_lines
from service.cli.key_option import KEY_VARIABLE
from service.cli.launch import WORKER_SECONDS, WorkerStart, plan_workers, shares_of, start_workers
from service.cli.pin import warn_moving
from service.cli.preflight import Preflight, check_start
from service.cli.processes import USUAL_PORT, Child, ProcessGroup, free_port, gateway_port, interruptible
from service.cli.store_option import STORE_VARIABLE, store_option
from service.cli.supervise import Supervisor
from service.cli.url_option import noted_url
from service.cli.vllm_serve import share_lines
from service.pool import ModelEntry, PoolFile, dump_pool, load_pool
from service.settings import EMBEDDED, read_settings, store_directory
from service.stores.embedded import EmbeddedStore

__all__ = ["WORKER_SECONDS", "Stack", "running_stack", "up", "wait_for_signal"]

GATEWAY_SECONDS = 120.0
"""How long the gateway may take to load its encoder and replay its log."""


class WorkerKind(StrEnum):
    """What serves the reward models that `up` starts."""

    AUTO = "auto"
    VLLM = "vllm"
    CPU = "cpu"


class Device(StrEnum):
    """Where vLLM runs."""

    CUDA = "cuda"
    CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Stack:
    """A running stack.

    Attributes:
        url: the gateway.
        pool: the pool with the workers' addresses.
        processes: the children.
        workers: those of them that serve reward models or the encoder.
        run: name of the default run.
    """

    url: str
    pool: PoolFile
    processes: ProcessGroup
    workers: tuple[Child, ...]
    run: str


def up(
    pool: Annotated[
        Path | None,
        typer.Option(help="Pool file; RMs without `urls` are started here. (default: the demo pool, made if absent)"),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint. (default: the demo pool's, with the demo pool)")
    ] = None,
    host: Annotated[str, typer.Option(help="Address of the gateway.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port of the gateway; 0 for any. (default: 8080, or another where it is taken)")
    ] = None,
    worker_port: Annotated[int, typer.Option(help="First port of the workers that are started.")] = 8101,
    data_dir: Annotated[Path, typer.Option(help="Where everything that is kept lies.")] = Path(".data"),
    store: Annotated[str, store_option()] = EMBEDDED,
    run: Annotated[
        str | None,
        typer.Option(help="Name of the default run. (default: default; with the demo pool, one a checkpoint)"),
    ] = None,
    signal: Annotated[
        str | None, typer.Option(help="Kind of feedback: preference, reward or loss. (default: preference)")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="vllm:URL of a running server, or `served`: the checkpoint's transformer in a process of its own. "
            "(default: inside the gateway)"
        ),
    ] = None,
    encoder_gpu: Annotated[int, typer.Option(min=0, help="With `--encoder served` and vLLM: its GPU.")] = 0,
    encoder_share: Annotated[
        float, typer.Option(min=0.001, max=1, help="With `--encoder served` and vLLM: of that GPU's memory.")
    ] = ENCODER_SHARE,
    worker: Annotated[
        WorkerKind | None,
        typer.Option(help="vllm, cpu, or auto: vLLM where it is installed. (default: the pool file's; auto)"),
    ] = None,
    device: Annotated[
        Device | None, typer.Option(help="Where vLLM runs: cuda or cpu. (default: the pool file's; cuda)")
    ] = None,
    vllm_command: Annotated[
        str | None,
        typer.Option(help="The `vllm` of another environment. (default: the pool file's; the one found here)"),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the commands, who shares each GPU, and a line a check (port, paths, servers, checkpoint, run); "
            "start nothing. Exit status 1 where a check fails.",
        ),
    ] = False,
) -> None:
    """Start everything: store, workers for each reward model, gateway. Ctrl-C ends all; what was learned is kept.

    Reward models without `urls` are served by vLLM where it is installed, else by a small CPU worker (docs/models.md).
    Settings of the gateway are environment variables REWARD_ROUTER_…; docs/settings.md lists them.
    """
    interruptible()
    console = Console()
    given = pool
    if pool is None:
        from service.cli.demo import demo_run, ensure_demo_pool

        pool, checkpoint = ensure_demo_pool(data_dir, console, checkpoint)
        run = run or demo_run(checkpoint)
    wanted = _overridden(load_pool(pool), worker, device, vllm_command)

    def checked() -> Preflight:
        return check_start(
            wanted, checkpoint, run, signal=signal, store_url=store, data_dir=data_dir, host=host,
            encoder=None if encoder == SERVED else encoder,
        )  # fmt: skip

    def planned() -> EncoderPlan | None:
        if encoder != SERVED:
            return None
        return plan_encoder(wanted, checkpoint, data_dir / "encoder", share=encoder_share, gpu=encoder_gpu)

    warn_moving(wanted, given)
    if dry_run:
        own = [port_check(port, host, moves=True), directory_check(data_dir, free=store == EMBEDDED)]
        if encoder is not None and encoder.startswith(REMOTE_ENCODER):
            own.append(encoder_check(encoder))
        _show_dry(wanted, checked, planned, own, port_sequence(worker_port))
        return
    preflight = checked()
    settings = preflight.settings
    served = planned()
    chosen, warning = gateway_port(port, host)
    if warning is not None:
        console.print(f"[yellow]warning[/]   {warning}", highlight=False, soft_wrap=True)
    with running_stack(
        wanted, checkpoint, data_dir=data_dir, host=host, port=chosen, worker_port=worker_port, store_url=store,
        console=console, run=settings.run, signal=signal, encoder=served or encoder, check=preflight.check_store,
    ) as stack:  # fmt: skip
        key = os.environ.get(KEY_VARIABLE) or next(iter(settings.api_keys), None)
        for line in asyncio.run(ready_lines(stack.url, stack.pool, data_dir, key)):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if warning is not None:
            console.print(_moved_words(stack, data_dir), style="yellow", highlight=False, markup=False, soft_wrap=True)
        console.print(
            f"\nserving on [bold]{stack.url}[/]\n"
            f"API: {stack.url}/docs   metrics: {stack.url}/metrics\n"
            f"pool with the scorers' addresses: {data_dir / 'pool.yaml'}\n\n"
            "Ctrl-C ends everything.",
            highlight=False,
            soft_wrap=True,
        )
        wait_for_signal(stack.processes, Supervisor(stack.workers, console))
    console.print("stopped; what was learned is kept in", str(data_dir))


def _moved_words(stack: Stack, data_dir: Path) -> str:
    """Return what to do where the gateway has another port than everybody expects."""
    found = "" if data_dir == read_settings().data_dir else f" --url {stack.url}"
    return (
        f"\nNOT on the usual port {USUAL_PORT}, where something else listens. For other shells:\n"
        f"  export REWARD_ROUTER_CLIENT_URL={stack.url}\n"
        f"  reward-router models{found}\n"
        f"  reward-router report {stack.run}{found}"
    )


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
    signal: str | None = None,
    encoder: str | EncoderPlan | None = None,
    check: Callable[[str], None] = lambda _: None,
) -> Iterator[Stack]:
    """Store, workers and gateway for the length of the block.

    Args:
        pool: scorers without `urls` are started: RMs from their `path`, `model` or `recorded`, rules as processes.
        checkpoint: directory, or None.
        data_dir: for the store, the logs and the resolved pool file.
        host: address of the gateway.
        port: wanted port of the gateway; another one if it is taken.
        worker_port: first wanted port of the workers.
        store_url: `embedded`, or the URL of a running server.
        console: where progress is shown.
        run: name of the default run.
        signal: kind of feedback that the default run must have; None: its own, or the setting's.
        encoder: the gateway's `--encoder`, or the server to be started for it.
        check: called with the running store's URL before any worker is started.

    Raises:
        ConfigurationError: something did not start; with the end of its log.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    embedded = EmbeddedStore(store_directory(data_dir)) if store_url == EMBEDDED else None
    try:
        if embedded is not None:
            with console.status("store"):
                store_url = embedded.start()
            console.print(
                "store     ready (Valkey, append-only file in", str(store_directory(data_dir)) + ")", highlight=False
            )
        check(store_url)
        with ProcessGroup(data_dir / "logs") as processes:
            ports = port_sequence(worker_port)
            starts = _planned(pool, encoder if isinstance(encoder, EncoderPlan) else None, ports, console)
            resolved = _placed(pool, start_workers(starts, processes, console))
            if isinstance(encoder, EncoderPlan):
                encoder = f"vllm:{starts[-1].url}"
            workers = tuple(processes.children)
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
            if encoder is not None:
                arguments += ["--encoder", encoder]
            if signal is not None:
                arguments += ["--signal", signal]
            processes.start(
                "gateway",
                arguments,
                {STORE_VARIABLE: store_url, **({"REWARD_ROUTER_RUN": run} if run else {})},
            )
            url = f"http://127.0.0.1:{gateway_port}"
            with console.status("gateway"):
                processes.wait_until_ready(f"{url}/readyz", "gateway", GATEWAY_SECONDS, lambda: None)
            console.print(f"gateway   ready on {url}", highlight=False)
            with noted_url(data_dir, url):
                yield Stack(url, resolved, processes, workers, run or read_settings().run)
    finally:
        if embedded is not None:
            embedded.stop()


def wait_for_signal(processes: ProcessGroup, supervisor: Supervisor) -> None:
    """Return on SIGINT or SIGTERM. Workers that leave are started again.

    Raises:
        ConfigurationError: another child left before that.
    """
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not stop.wait(0.5):
            processes.check(without=supervisor.workers)
            supervisor.tick()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _overridden(pool: PoolFile, worker: WorkerKind | None, device: Device | None, vllm_command: str | None) -> PoolFile:
    """The pool with what was said on the command line; `--worker` also beats the models' own."""
    given: dict[str, object] = {}
    if worker is not None:
        given["worker"] = worker.value
        for field in ("models", "referees"):
            given[field] = tuple(
                model.model_copy(update={"worker": None}) if isinstance(model, ModelEntry) else model
                for model in getattr(pool, field)
            )
    if device is not None:
        given["device"] = device.value
    if vllm_command is not None:
        given["vllm_command"] = tuple(shlex.split(vllm_command))
    return pool.model_copy(update=given)


def _show_dry(
    pool: PoolFile,
    checked: Callable[[], Preflight],
    planned: Callable[[], EncoderPlan | None],
    own: Sequence[Check],
    next_port: Callable[[], int],
) -> None:
    """Print the commands, who shares each GPU, and every check; nothing is started.

    Args:
        pool: the pool file.
        checked: settings, pool and checkpoint as they fit each other; raises where they do not.
        planned: the encoder's server, if one is to be started; raises where it cannot be.
        own: checks of the gateway itself.
        next_port: a free port, another one each time.

    Raises:
        typer.Exit: with status 1 where a check fails.
    """
    checks = [
        fit_check(checked),
        *own,
        *scorer_checks(pool, read_settings(), starts=True),
        tried("what is to be started can be", lambda: _show(pool, planned(), next_port)),
    ]  # fmt: skip
    tell(checks)


def _unfetched(model: ModelEntry) -> Path:
    """For a dry run: the hub's name, since nothing is downloaded."""
    return Path(str(model.model))


def port_sequence(first: int) -> Callable[[], int]:
    """Free ports, each another one, from `first` on where they are free."""
    taken: set[int] = set()

    def next_port() -> int:
        port = first
        while port in taken:
            port += 1
        port = free_port(port)
        while port in taken:
            port = free_port(0)
        taken.add(port)
        return port

    return next_port


def _planned(
    pool: PoolFile, encoder: EncoderPlan | None, next_port: Callable[[], int], console: Console
) -> list[WorkerStart]:
    """What is to be started; the encoder's server, whose transformer is exported if need be, is the last."""
    starts = [*plan_workers(pool, next_port, others=encoder.claims if encoder is not None else ())]
    for note in dict.fromkeys(start.note for start in starts if start.note is not None):
        console.print("[yellow]warning[/]  ", end=" ")
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if encoder is not None:
        with console.status("encoder: exporting its transformer"):
            ensure_exported(encoder.checkpoint, encoder.directory)
        starts.append(encoder.start(next_port()))
    return starts


def _show(pool: PoolFile, encoder: EncoderPlan | None, next_port: Callable[[], int]) -> None:
    """A dry run: the commands, and as comments who shares each GPU."""
    # Not through rich, which would wrap and colour what is meant for a shell.
    starts = [*plan_workers(pool, next_port, local=_unfetched, others=encoder.claims if encoder is not None else ())]
    if encoder is not None:
        if export := encoder.export_words():
            typer.echo(shlex.join(export))
        starts.append(encoder.start(next_port()))
    for start in starts:
        if start.note is not None:
            typer.echo(f"# note: {start.note}")
        typer.echo(start.shell())
    for line in share_lines(shares_of(starts)):
        typer.echo(f"# {line}")


def _placed(pool: PoolFile, urls: Mapping[str, Sequence[str]]) -> PoolFile:
    """The pool with where its scorers are."""
    placed = {
        field: tuple(model if model.urls else model.served_at(urls[model.name]) for model in getattr(pool, field))
        for field in ("models", "referees")
    }
    return pool.model_copy(update=placed)
