"""The encoder's server as `up` and the GPU benchmark start it: vLLM where there is one, else our small one.

Knows command lines and the exported directory's files; nothing of how processes are watched, which is
`service.cli.launch`'s.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from router_core.checkpoint import Checkpoint
from router_core.encoder.formatting import READING_FILE, REFERENCES_FILE
from router_core.encoder.registry import split_spec
from service.cli.launch import HOST, VLLM_SECONDS, WorkerStart, own_command
from service.cli.vllm_serve import serve_environment
from service.encoders.reading import files_digest
from service.pool import ModelEntry

NAME: Final = "encoder"
"""Of the served model, and of its only process."""


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
    """
    url = f"http://{HOST}:{port}"
    if vllm is None:
        words = (*own_command(), "encoder", "serve", str(directory), "--name", NAME, "--port", str(port))
        return WorkerStart(name, (name,), words, {"OMP_NUM_THREADS": "1"}, url, "CPU encoder")
    flags = ["serve", str(directory), "--host", HOST, "--port", str(port), "--served-model-name", NAME]
    flags += ["--runner", "pooling", "--convert", "embed", "--dtype", dtype]
    flags += ["--max-model-len", str(_facts(directory)["max_tokens"])]
    if device == "cpu":
        flags.append("--enforce-eager")
    elif gpu_share is not None:
        flags += ["--gpu-memory-utilization", str(gpu_share)]
    environment = serve_environment(ModelEntry(name=NAME), device, gpus)
    on = gpus if device == "cuda" else ()
    return WorkerStart(name, (name,), (*vllm, *flags, *arguments), environment, url, "vLLM", on, VLLM_SECONDS)


def ensure_exported(checkpoint: Path, directory: Path) -> bool:
    """Export the checkpoint's transformer to the directory unless it lies there; whether it was exported now.

    Raises:
        ConfigurationError: it cannot be written, or torch is missing.
        EncoderError: the checkpoint's encoder has no transformer.
        CheckpointError: no checkpoint.
    """
    from service.cli.encoder import write_export
    from service.encoders.load import READING_FOLDER

    loaded = Checkpoint.load(checkpoint)
    wanted = {"spec": split_spec(loaded.encoder_spec)[1], "files": files_digest(loaded.encoder_files)}
    standing = [_facts(folder) for folder in (directory, checkpoint / READING_FOLDER)]
    weights = any(directory.glob("*.safetensors")) and (directory / REFERENCES_FILE).is_file()
    if weights and all({key: facts.get(key) for key in wanted} == wanted for facts in standing):
        return False
    write_export(loaded, None, directory)
    return True


def _facts(directory: Path) -> dict[str, object]:
    """What stands in an exported directory's own file; nothing where there is none."""
    try:
        facts: dict[str, object] = json.loads((directory / READING_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return facts
