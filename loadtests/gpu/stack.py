"""The stack under test, as processes: store, one server per RM, the encoder's server, one gateway.

Knows the product's own command lines (`service.cli`); what is measured on it is `loadtests.gpu.measure`'s.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console

from loadtests.gpu.shapes import Models, Shape
from service.cli.encoder_launch import encoder_start
from service.cli.launch import plan_workers, start_workers
from service.cli.processes import ProcessGroup, free_port
from service.cli.up import port_sequence
from service.pool import ModelEntry, PoolFile, dump_pool
from service.stores.embedded import EmbeddedStore

GATEWAY_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Placement:
    """How the servers run.

    Attributes:
        vllm: how vLLM is called; None for our own servers on the CPU.
        device: `cuda` or `cpu`.
        dtype: of the RMs.
        encoder_dtype: of the encoder.
        rm_share: of the GPU's memory, for each RM.
        encoder_share: for each server of the encoder.
        encoders: servers of the encoder.
        arguments: more words for each `vllm serve`.
    """

    vllm: tuple[str, ...] | None
    device: str = "cuda"
    dtype: str = "bfloat16"
    encoder_dtype: str = "bfloat16"
    rm_share: float = 0.19
    encoder_share: float = 0.07
    encoders: int = 1
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Running:
    """Ports on loopback."""

    gateway: int
    rms: dict[str, int]
    encoders: tuple[int, ...]


def pool_of(models: Models, shape: Shape, placement: Placement) -> PoolFile:
    """The pool file of these RMs: token ids are sent."""
    entries = [
        ModelEntry(
            name=path.name,
            path=path,
            rendering="tokens",
            dtype=placement.dtype,
            max_model_len=shape.rm_tokens,
            gpu_share=placement.rm_share,
            vllm_args=placement.arguments,
        )
        for path in models.rms
    ]
    return PoolFile(
        name="gpu-benchmark",
        worker="cpu" if placement.vllm is None else "vllm",
        device="cpu" if placement.device == "cpu" else "cuda",
        vllm_command=placement.vllm or (),
        models=tuple(entries),
    )


@contextmanager
def running(models: Models, shape: Shape, placement: Placement, folder: Path, console: Console) -> Iterator[Running]:
    """Everything, for the length of the block.

    Raises:
        ConfigurationError: something did not start; with the end of its log.
    """
    ports = port_sequence(18_101)
    pool = pool_of(models, shape, placement)
    starts = [
        encoder_start(
            models.encoder,
            ports(),
            name=f"encoder-{number}",
            vllm=placement.vllm,
            device=placement.device,
            dtype=placement.encoder_dtype,
            gpu_share=placement.encoder_share,
            gpus=(0,),
            arguments=placement.arguments,
        )
        for number in range(placement.encoders)
    ]
    with EmbeddedStore(folder / "store") as store, ProcessGroup(folder / "logs") as processes:
        urls = start_workers([*starts, *plan_workers(pool, ports)], processes, console)
        placed = [model.model_copy(update={"urls": tuple(urls[model.name])}) for model in pool.reward_models]
        dump_pool(pool.model_copy(update={"models": tuple(placed)}), folder / "pool.yaml")
        gateway = free_port(18_080)
        words = ["serve", "--pool", str(folder / "pool.yaml"), "--port", str(gateway), "--store", store.url]
        words += ["--encoder", "vllm:" + ",".join(start.url for start in starts)]
        # The store outlives a benchmark of a kept folder: a run of its own each time.
        words += ["--run", f"gpu-{time.time_ns()}"]
        processes.start("gateway", words, {"REWARD_ROUTER_ENCODER_READING": str(models.encoder), **_PATIENT})
        with console.status("gateway"):
            ready = f"http://127.0.0.1:{gateway}/readyz"
            processes.wait_until_ready(ready, "gateway", GATEWAY_SECONDS, lambda: None)
        rms = {model.name: _port(urls[model.name][0]) for model in pool.models}
        yield Running(gateway, rms, tuple(_port(start.url) for start in starts))


_PATIENT = {
    # A saturated server answers behind its queue; what is measured is throughput, not the deadline.
    "REWARD_ROUTER_REQUEST_TIMEOUT_SECONDS": "120",
    "REWARD_ROUTER_WORKER_TIMEOUT_SECONDS": "60",
    "REWARD_ROUTER_ENCODER_TIMEOUT_SECONDS": "60",
}


def _port(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port
