"""The encoder's server as `up` and the GPU benchmark start it: vLLM where there is one, else our small one.

Knows command lines and the exported directory's files; nothing of how processes are watched, which is
`service.cli.launch`'s.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from router_core.checkpoint import Checkpoint
from router_core.encoder.formatting import READING_FILE, REFERENCES_FILE
from router_core.encoder.registry import load_backbone, split_spec
from service.cli.launch import HOST, VLLM_SECONDS, WorkerStart, own_command
from service.cli.vllm_serve import DEFAULT_SHARE, Claim, find_vllm, serve_environment
from service.encoders.reading import files_digest
from service.errors import ConfigurationError
from service.pool import ModelEntry, PoolFile

NAME: Final = "encoder"
"""Name of the served model, and of its only process."""


SERVED: Final = "served"
"""`--encoder` of `up` that starts a server for the checkpoint's transformer."""

ENCODER_SHARE: Final = 0.1
"""Share of a GPU's memory for the encoder that `up` starts there; 2.4 GB of 24."""

SHARE_REMEDY: Final = "give the encoder a smaller share or another GPU (--encoder-share, --encoder-gpu)"
"""What to do where a GPU cannot hold the encoder beside its models."""


@dataclass(frozen=True, slots=True)
class EncoderPlan:
    """The encoder's server that `up` is to start for a checkpoint.

    Attributes:
        checkpoint: whose transformer it is.
        directory: where it is exported to.
        vllm: how vLLM is called; None for our own server, on the CPU.
        device: `cuda` or `cpu`, for vLLM.
        share: of the GPU's memory.
        gpu: its number.
    """

    checkpoint: Path
    directory: Path
    vllm: tuple[str, ...] | None
    device: str
    share: float
    gpu: int

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What it takes of GPUs."""
        if self.vllm is None or self.device != "cuda":
            return ()
        return (Claim(NAME, self.share, (self.gpu,), SHARE_REMEDY),)

    def start(self, port: int) -> WorkerStart:
        """Its process; the directory need not be there yet.

        Raises:
            EncoderError: the directory is not there, and the checkpoint's transformer cannot be loaded to be asked.
        """
        return encoder_start(
            self.directory,
            port,
            vllm=self.vllm,
            device=self.device,
            gpu_share=self.share,
            gpus=(self.gpu,),
            max_tokens=self._longest_text(),
        )

    def export_words(self) -> tuple[str, ...]:
        """The command that exports the transformer; nothing where it lies there."""
        if is_exported(self.checkpoint, self.directory):
            return ()
        out = ("--out", str(self.directory))
        return (*own_command(), "encoder", "export", "--checkpoint", str(self.checkpoint), *out)

    def _longest_text(self) -> int:
        if is_exported(self.checkpoint, self.directory):
            return int(str(_facts(self.directory)["max_tokens"]))
        checkpoint = Checkpoint.load(self.checkpoint)
        backbone = load_backbone(split_spec(checkpoint.encoder_spec)[1], root=checkpoint.directory)
        # Loaded, so torch is there; at the top it would be needed by every `up`.
        from router_core.encoder.torch import TorchBackbone

        assert isinstance(backbone, TorchBackbone)
        return backbone.max_tokens


def plan_encoder(
    pool: PoolFile, checkpoint: Path | None, directory: Path, *, share: float = ENCODER_SHARE, gpu: int = 0
) -> EncoderPlan:
    """What `--encoder served` starts: vLLM where the pool's models have it, else our own server.

    Raises:
        ConfigurationError: there is no checkpoint whose transformer could be served, or `vllm_command` is no program.
    """
    if checkpoint is None:
        raise ConfigurationError(
            f"--encoder {SERVED} serves a checkpoint's transformer: give --checkpoint, or --encoder vllm:URL"
        )
    vllm = None if pool.worker == "cpu" else find_vllm(pool.vllm_command)
    return EncoderPlan(checkpoint, directory, vllm, pool.device, share, gpu)


def encoder_start(
    directory: Path,
    port: int,
    *,
    name: str = NAME,
    vllm: Sequence[str] | None,
    device: str = "cuda",
    dtype: str = "float32",
    gpu_share: float | None = None,
    gpus: tuple[int, ...] = (),
    arguments: Sequence[str] = (),
    max_tokens: int | None = None,
) -> WorkerStart:
    """The process that serves an exported directory.

    Args:
        directory: see `router_core.encoder.export`.
        port: its port.
        name: of the process and its log.
        vllm: how vLLM is called; None starts our own server, on the CPU.
        device: `cuda` or `cpu`, for vLLM.
        dtype: vLLM's; float32 gives the contexts of training to 1e-4.
        gpu_share: of the GPU's memory, for vLLM.
        gpus: that it is placed on.
        arguments: more words for `vllm serve`.
        max_tokens: the longest text it reads; what the directory says when None.
    """
    url = f"http://{HOST}:{port}"
    if vllm is None:
        words = (*own_command(), "encoder", "serve", str(directory), "--name", NAME, "--port", str(port))
        return WorkerStart(name, (), words, {"OMP_NUM_THREADS": "1"}, url, "CPU encoder")
    flags = ["serve", str(directory), "--host", HOST, "--port", str(port), "--served-model-name", NAME]
    flags += ["--runner", "pooling", "--convert", "embed", "--dtype", dtype]
    flags += ["--max-model-len", str(max_tokens or _facts(directory)["max_tokens"])]
    if device == "cpu":
        flags.append("--enforce-eager")
    elif gpu_share is not None:
        flags += ["--gpu-memory-utilization", str(gpu_share)]
    environment = serve_environment(ModelEntry(name=NAME), device, gpus)
    on = gpus if device == "cuda" else ()
    share = (gpu_share or DEFAULT_SHARE) if on else None
    return WorkerStart(name, (), (*vllm, *flags, *arguments), environment, url, "vLLM", on, share, VLLM_SECONDS)


def ensure_exported(checkpoint: Path, directory: Path) -> bool:
    """Export the checkpoint's transformer to the directory unless it lies there. Return True if it was exported now.

    Raises:
        ConfigurationError: it cannot be written, or torch is missing.
        EncoderError: the checkpoint's encoder has no transformer.
        CheckpointError: no checkpoint.
    """
    from service.cli.encoder import write_export

    if is_exported(checkpoint, directory):
        return False
    write_export(Checkpoint.load(checkpoint), None, directory)
    return True


def is_exported(checkpoint: Path, directory: Path) -> bool:
    """Return True if the checkpoint's transformer, as it is now, lies in the directory.

    Raises:
        EncoderError: the checkpoint's encoder has no transformer.
        CheckpointError: no checkpoint.
    """
    from service.encoders.load import READING_FOLDER

    loaded = Checkpoint.load(checkpoint)
    wanted = {"spec": split_spec(loaded.encoder_spec)[1], "files": files_digest(loaded.encoder_files)}
    standing = [_facts(folder) for folder in (directory, checkpoint / READING_FOLDER)]
    weights = any(directory.glob("*.safetensors")) and (directory / REFERENCES_FILE).is_file()
    return weights and all({key: facts.get(key) for key in wanted} == wanted for facts in standing)


def _facts(directory: Path) -> dict[str, object]:
    """What stands in an exported directory's own file; nothing where there is none."""
    try:
        facts: dict[str, object] = json.loads((directory / READING_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return facts
