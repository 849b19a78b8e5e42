"""The workers that `up` starts: planned from a pool file, started in an order that GPUs can bear, awaited.

`plan_workers` decides what runs where; `start_workers` runs it. Processes that share a GPU start one after the other:
vLLM measures free memory while it starts, and would take what a neighbour allocates meanwhile for its own.
`service.cli.up` is the caller.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.markup import escape

from service.cli.processes import Child, ProcessGroup, answers
from service.cli.rule_serve import rule_words
from service.cli.vllm_serve import (
    DEFAULT_SHARE,
    Claim,
    check_shares,
    find_vllm,
    placements,
    serve_environment,
    serve_words,
    served_by_vllm,
)
from service.errors import ConfigurationError
from service.pool import ModelEntry, PoolFile
from service.scorers.judge.entry import JudgeEntry
from service.scorers.rule.entry import RuleEntry
from service.scorers.vllm_entry import VllmEntry

HOST: Final = "127.0.0.1"
"""Workers listen here only: vLLM does not guard `/classify`."""

WORKER_SECONDS: Final = 120.0
"""How long a worker of ours may take to load its model."""

VLLM_SECONDS: Final = 1800.0
"""How long vLLM may take: it may have to download the model first. One that fails is noticed at once."""

REPORT_SECONDS: Final = 30.0
"""Between two lines on what is awaited, where the console is no terminal."""

LAST_LINE: Final = 100
"""Characters shown of the last line of a log."""


LARGEST_CPU_BYTES: Final = 4 << 30
"""Weights beyond which a model goes to the CPU worker only where it was asked for: in float32 they take up to twice as
much memory, and a text takes a minute."""

SMALL_BYTES: Final = 256 << 20
"""Weights below which nobody misses vLLM."""

HUB_IGNORED: Final = ("*.bin", "*.pth")
"""Files of a hub model that are not downloaded: its weights are there as safetensors."""

VLLM_REMEDY: Final = (
    "pip install 'reward-router[vllm]', or name the vLLM of another environment with `vllm_command`; `worker: cpu` in "
    "the pool file says that the CPU worker is meant"
)


@dataclass(frozen=True, slots=True)
class WorkerStart:
    """One worker process that is to be started.

    Attributes:
        name: of the process and its log.
        models: the RMs that it serves; none for an encoder's server.
        command: program and arguments.
        environment: added to ours.
        url: where it will answer.
        kind: `vLLM`, `CPU worker`, `recorded` or `CPU encoder`, for people.
        gpus: the GPUs that it must not share with another one that is starting.
        share: of the memory of each of these GPUs; None where it has none, or takes vLLM's default.
        seconds: how long it may take until it is healthy.
        note: what a reader of the pool file would not expect of it; None for nothing.
    """

    name: str
    models: tuple[str, ...]
    command: tuple[str, ...]
    environment: dict[str, str]
    url: str
    kind: str
    gpus: tuple[int, ...] = ()
    share: float | None = None
    seconds: float = WORKER_SECONDS
    note: str | None = None

    def shell(self) -> str:
        """The same as one line for a shell."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*words, shlex.join(self.command)])


@dataclass(slots=True)
class _Waiting:
    """A started worker that is not healthy yet."""

    start: WorkerStart
    child: Child
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


def plan_workers(
    pool: PoolFile,
    next_port: Callable[[], int],
    *,
    local: Callable[[ModelEntry], Path] | None = None,
    others: Sequence[Claim] = (),
) -> tuple[WorkerStart, ...]:
    """What must be started for the scorers without `urls`; recorded RMs of one file share one process.

    Args:
        pool: the pool file.
        next_port: a free port, another one each time.
        local: the directory of a hub model that the CPU worker is to serve, downloaded if need be; by default the hub's
            own cache.
        others: what else is started on the GPUs.

    Raises:
        ConfigurationError: an RM that cannot be started, or GPUs that cannot hold what they are to hold.
    """
    waiting = [model for model in pool.reward_models if not model.urls]
    judges = [entry for entry in pool.to_serve if isinstance(entry, JudgeEntry)]
    lost = next((model for model in waiting if model.source is None and model.recorded is None), None)
    if lost is not None:
        raise ConfigurationError(
            f"model {lost.name!r} has no `urls`, `path`, `model` or `recorded` in the pool file: give one"
        )
    vllm = find_vllm(pool.vllm_command)
    by_vllm = {model.name for model in pool.to_serve if served_by_vllm(model, pool, vllm)}
    if pool.device == "cuda":
        check_shares([model for model in pool.to_serve if model.name in by_vllm], others)
    starts: list[WorkerStart] = []
    for model in waiting:
        if model.name in by_vllm and vllm is not None:
            starts += _vllm_starts(model, pool.device, vllm, next_port)
        elif model.source is not None:
            if model.rendering in ("messages", "auto") and model.chat_template != "plain":
                raise ConfigurationError(
                    f"model {model.name!r}: the CPU worker knows the tokenizer's own chat template only, not "
                    f"{model.chat_template}: use `rendering: template`, which renders in the gateway, or vLLM"
                )
            unasked = (model.worker or pool.worker) == "auto"
            if unasked and model.path is None:
                _require_small(model, hub_bytes(model))
            directory = model.path or (local or snapshot)(model)
            note = _without_vllm(model, weight_bytes(directory)) if unasked else None
            cpu = [_cpu_start(model, directory, name, next_port()) for name in _process_names(model)]
            starts += [replace(start, note=note) for start in cpu]
    for recorded in dict.fromkeys(model.recorded for model in waiting if model.recorded is not None):
        group = [model for model in waiting if model.recorded == recorded]
        starts.append(_recorded_start(recorded, group, next_port()))
    starts += [
        _rule_start(entry, next_port()) for entry in pool.scorers if isinstance(entry, RuleEntry) and not entry.urls
    ]
    for judge in judges:
        if judge.name in by_vllm and vllm is not None:
            starts += _vllm_starts(judge, pool.device, vllm, next_port)
        else:
            starts.append(_judge_start(judge, next_port()))
    return tuple(starts)


def start_workers(starts: Sequence[WorkerStart], processes: ProcessGroup, console: Console) -> dict[str, list[str]]:
    """Start all, those on one GPU in turn, and wait until each is healthy; says so as it goes.

    Args:
        starts: of `plan_workers`.
        processes: that they belong to.
        console: where progress is shown.

    Returns:
        The URLs of each RM's replicas.

    Raises:
        ConfigurationError: one left or took too long; with the end of its log.
    """
    pending = list(starts)
    waiting: list[_Waiting] = []
    reported = time.monotonic()
    with console.status("workers") as status:
        while pending or waiting:
            for start in _startable(pending, waiting):
                pending.remove(start)
                child = processes.run(start.name, start.command, start.environment)
                child.gpus, child.health = start.gpus, f"{start.url}/health"
                waiting.append(_Waiting(start, child))
            processes.check()
            for one in [one for one in waiting if answers(f"{one.start.url}/health")]:
                waiting.remove(one)
                _say_ready(one, console)
            late = next((one for one in waiting if one.seconds > one.start.seconds), None)
            if late is not None:
                raise ConfigurationError(processes.too_late(late.child, late.start.seconds, "its port does not answer"))
            line = progress_line(waiting, len(starts) - len(pending) - len(waiting), len(starts))
            status.update(escape(line))
            if not console.is_terminal and waiting and time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                console.print(line, highlight=False, markup=False, soft_wrap=True)
            if waiting:
                time.sleep(0.2)
    urls: dict[str, list[str]] = {}
    for start in starts:
        for model in start.models:
            urls.setdefault(model, []).append(start.url)
    return urls


def shares_of(starts: Iterable[WorkerStart]) -> list[Claim]:
    """What the processes that vLLM serves on GPUs take of them."""
    return [
        Claim(", ".join(start.models) or start.name, start.share, start.gpus)
        for start in starts
        if start.share is not None
    ]


def progress_line(waiting: Sequence[_Waiting], ready: int, total: int) -> str:
    """How many are ready, and below, a line each, what the others said last."""
    parts = [f"{one.start.name} {one.seconds:.0f} s: {one.child.last_line()[:LAST_LINE]}" for one in waiting]
    return f"workers: {ready} of {total} ready" + "".join(f"\n  {part}" for part in parts)


def snapshot(model: ModelEntry) -> Path:
    """The directory of a hub model, for the CPU worker; downloaded into the hub's cache if it is not there.

    Raises:
        ConfigurationError: it cannot be had; names the model and the reason.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigurationError(
            f"model {model.name!r} is on the Hugging Face hub, and neither vLLM nor huggingface_hub is installed "
            "here: pip install 'reward-router[vllm]' or 'reward-router[train]'"
        ) from error
    try:
        return Path(snapshot_download(str(model.model), revision=model.revision, ignore_patterns=[*HUB_IGNORED]))
    # The hub's errors are OSErrors (network, 404, gated) and ValueErrors (no such name).
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"model {model.name!r}: {model.model} cannot be had from the hub: {error}") from error


def hub_bytes(model: ModelEntry) -> int | None:
    """Return the size of a hub model's weights; None where the hub cannot be asked."""
    try:
        from huggingface_hub import snapshot_download

        files = snapshot_download(
            str(model.model), revision=model.revision, ignore_patterns=[*HUB_IGNORED], dry_run=True
        )
    except (ImportError, OSError, ValueError):
        return None
    return sum(file.file_size or 0 for file in files if not isinstance(file, str))


def weight_bytes(directory: Path) -> int | None:
    """Return the size of the weights in a directory; None where there are none."""
    sizes = [file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in directory.glob(pattern)]
    return sum(sizes) if sizes else None


def _without_vllm(model: ModelEntry, size: int | None) -> str | None:
    """Return what to say of a model that has the CPU worker because vLLM is not there; None for a small one.

    Raises:
        ConfigurationError: it is too large for that.
    """
    _require_small(model, size)
    if size is not None and size < SMALL_BYTES:
        return None
    told = "" if size is None else f" ({size / 1e9:.1f} GB of weights)"
    return f"vLLM is not installed here, so that {model.name}{told} has the slow CPU worker, in float32: {VLLM_REMEDY}"


def _require_small(model: ModelEntry, size: int | None) -> None:
    """Raises ConfigurationError if the weights are too large for a CPU worker that nobody asked for."""
    if size is not None and size > LARGEST_CPU_BYTES:
        raise ConfigurationError(
            f"model {model.name!r} has {size / 1e9:.1f} GB of weights and vLLM is not installed here: the CPU worker "
            f"would take twice that memory, and a minute a text; {VLLM_REMEDY}"
        )


def _startable(pending: Sequence[WorkerStart], waiting: Iterable[_Waiting]) -> list[WorkerStart]:
    """Those whose GPUs hold no other one that is still starting; in order, so none is overtaken on its own GPU."""
    busy = {gpu for one in waiting for gpu in one.start.gpus}
    out = []
    for start in pending:
        if busy.isdisjoint(start.gpus):
            out.append(start)
        busy.update(start.gpus)
    return out


def _say_ready(one: _Waiting, console: Console) -> None:
    what = ", ".join(one.start.models) or one.start.name
    where = f" GPU {','.join(map(str, one.start.gpus))}" if one.start.gpus else ""
    console.print(
        f"worker    ready: {what} on {one.start.url} ({one.start.kind}{where}, {one.seconds:.0f} s)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _vllm_starts(model: VllmEntry, device: str, vllm: Sequence[str], next_port: Callable[[], int]) -> list[WorkerStart]:
    starts = []
    for name, gpus in zip(_process_names(model), placements(model), strict=True):
        port = next_port()
        starts.append(
            WorkerStart(
                name=name,
                models=(model.name,),
                command=(*vllm, *serve_words(model, device, host=HOST, port=port)),
                environment=serve_environment(model, device, gpus),
                url=f"http://{HOST}:{port}",
                kind="vLLM",
                gpus=gpus if device == "cuda" else (),
                share=(model.gpu_share or DEFAULT_SHARE) if device == "cuda" else None,
                seconds=VLLM_SECONDS,
            )
        )
    return starts


def _cpu_start(model: ModelEntry, directory: Path, name: str, port: int) -> WorkerStart:
    words = ("worker", "--model", str(directory), "--name", model.served, "--port", str(port))
    return WorkerStart(
        name=name,
        models=(model.name,),
        command=(*own_command(), *words),
        environment={"OMP_NUM_THREADS": "1"} | model.env,
        url=f"http://{HOST}:{port}",
        kind="CPU worker",
    )


def _recorded_start(recorded: Path, group: Sequence[ModelEntry], port: int) -> WorkerStart:
    words = ["worker", "--recorded", str(recorded), "--port", str(port)]
    for model in group:
        words += ["--model", model.served]
    return WorkerStart(
        name=f"worker-recorded-{port}",
        models=tuple(model.name for model in group),
        command=(*own_command(), *words),
        environment={},
        url=f"http://{HOST}:{port}",
        kind="recorded",
    )


def _judge_start(entry: JudgeEntry, port: int) -> WorkerStart:
    return WorkerStart(
        name=f"worker-{_safe(entry.name)}",
        models=(entry.name,),
        command=(*own_command(), "worker", "--judge", str(entry.path), "--name", entry.served, "--port", str(port)),
        environment={},
        url=f"http://{HOST}:{port}",
        kind="CPU judge",
    )


def _rule_start(entry: RuleEntry, port: int) -> WorkerStart:
    return WorkerStart(
        name=f"worker-{_safe(entry.name)}",
        models=(entry.name,),
        command=(*own_command(), *rule_words(entry, host=HOST, port=port)),
        environment={},
        url=f"http://{HOST}:{port}",
        kind="rule",
    )


def own_command() -> tuple[str, ...]:
    """`reward-router` as it runs now."""
    return (sys.executable, "-m", "service.cli")


def _process_names(model: VllmEntry) -> list[str]:
    """One name a replica; also the name of a log file."""
    safe = _safe(model.name)
    if model.replicas == 1:
        return [f"worker-{safe}"]
    return [f"worker-{safe}-{replica}" for replica in range(model.replicas)]


def _safe(name: str) -> str:
    """A name as part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in name)
