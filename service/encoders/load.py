"""From the setting `vllm:URL` and a checkpoint to a `RemoteEncoder` that gives the contexts of the checkpoint's own.

Knows settings' words, files and the classes of this package. `service.gateway` calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from router_core.checkpoint import Checkpoint
from router_core.encoder.base import Backbone
from router_core.encoder.fuse import Fuse
from router_core.encoder.registry import load_backbone, split_spec
from router_core.encoder.split import SplitEncoder
from router_core.errors import RouterCoreError
from service.encoders.client import EncoderConfig, StateClient
from service.encoders.health import EncoderChecks
from service.encoders.reading import Reading, files_digest
from service.encoders.remote import LANES, RemoteEncoder
from service.errors import ConfigurationError
from service.scorers.health import HealthPolicy, ReplicaMonitor

PREFIX: Final = "vllm:"
READING_FOLDER: Final = "reading"
"""Inside a checkpoint: what `reward-router encoder export --checkpoint` leaves for the gateway."""


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """Options of the connection to the servers; see `Settings`."""

    timeout_seconds: float
    health_interval_seconds: float
    api_key: str | None
    seed: int | None
    parallel_requests: int = LANES


def is_remote(encoder: str) -> bool:
    """Return True if the setting names servers."""
    return encoder.startswith(PREFIX)


def parse_servers(encoder: str) -> tuple[tuple[str, ...], str | None]:
    """The URLs of `vllm:URL[,URL…][#MODEL]`, and the served model's name.

    >>> parse_servers("vllm:http://a:8000,http://b:8000/#enc")
    (('http://a:8000', 'http://b:8000'), 'enc')

    Raises:
        ConfigurationError: no URL.
    """
    urls, _, model = encoder.removeprefix(PREFIX).partition("#")
    found = tuple(url.strip().rstrip("/") for url in urls.split(",") if url.strip())
    if not found:
        raise ConfigurationError(f"encoder {encoder!r} names no server; give vllm:http://HOST:PORT")
    return found, model or None


def load_remote_encoder(
    encoder: str,
    checkpoint: Checkpoint | None,
    reading_directory: Path | None,
    options: RemoteOptions,
    observe_batch: Callable[[int], None] = lambda _: None,
) -> RemoteEncoder:
    """The encoder whose transformer is served; nothing is asked yet.

    Args:
        encoder: `vllm:URL[,URL…][#MODEL]`.
        checkpoint: whose encoder it stands for; None: an untrained fuse over the transformer alone.
        reading_directory: an exported directory; None: the checkpoint's own folder `reading`.
        options: of the connection.
        observe_batch: told the number of texts of each micro-batch.

    Raises:
        ConfigurationError: no reading, or it is not of the checkpoint's transformer.
    """
    urls, model = parse_servers(encoder)
    reading = Reading.load(_reading_directory(checkpoint, reading_directory))
    try:
        split = _split(checkpoint, reading)
    except RouterCoreError as error:
        raise ConfigurationError(str(error)) from error
    client = StateClient(
        EncoderConfig(
            urls=urls,
            dim=reading.dim,
            model=model,
            timeout_seconds=options.timeout_seconds,
            api_key=options.api_key,
        ),
        min(reading.references.ids, key=len),
    )
    policy = HealthPolicy(options.health_interval_seconds, options.timeout_seconds)
    monitor = ReplicaMonitor([EncoderChecks(client, reading)], policy, np.random.default_rng(options.seed))
    return RemoteEncoder(
        split, client, monitor, observe_batch=observe_batch, lanes=options.parallel_requests * len(urls)
    )


def _reading_directory(checkpoint: Checkpoint | None, given: Path | None) -> Path:
    if given is not None:
        return given
    if checkpoint is None or checkpoint.directory is None:
        raise ConfigurationError(
            "an encoder over vLLM needs the directory that `reward-router encoder export` wrote: set encoder_reading, "
            "or give the checkpoint that was exported"
        )
    directory = checkpoint.directory / READING_FOLDER
    if not directory.is_dir():
        raise ConfigurationError(
            f"{checkpoint.directory} has no folder {READING_FOLDER!r}, which tells how its transformer reads: run "
            f"`reward-router encoder export --checkpoint {checkpoint.directory} --out DIR`, or set encoder_reading"
        )
    return directory


def _split(checkpoint: Checkpoint | None, reading: Reading) -> SplitEncoder:
    if checkpoint is None:
        return SplitEncoder((), reading, (), Fuse.identity(reading.dim), reading.spec)
    left, transformer, right = split_spec(checkpoint.encoder_spec)
    files = files_digest(checkpoint.encoder_files)
    if (transformer, files) != (reading.spec, reading.files):
        what = "another fine-tuning of it" if transformer == reading.spec else f"encoder {reading.spec!r}"
        raise ConfigurationError(
            f"the checkpoint was trained with encoder {transformer!r}, the exported directory is of {what}: export "
            "this checkpoint's with `reward-router encoder export --checkpoint DIR --out DIR`"
        )
    before, after = _parts(left), _parts(right)
    split = SplitEncoder(before, reading, after, checkpoint.fuse, checkpoint.encoder_spec)
    checkpoint.require_encoder(split.spec, split.input_dim)
    return split


def _parts(specs: tuple[str, ...]) -> list[Backbone]:
    return [load_backbone(spec) for spec in specs]
