"""`vllm serve` command lines out of a pool file: which vLLM, with which flags, on which GPUs.

Knows the flags and environment variables of vLLM, and nothing of processes: `service.cli.launch` starts what this
module writes down, and `reward-router up --dry-run` prints it for those who start vLLM otherwise.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from service.errors import ConfigurationError
from service.pool import ModelEntry, PoolFile
from service.scorers.judge.entry import JudgeEntry
from service.scorers.vllm_entry import VllmEntry

DEFAULT_SHARE: Final = 0.9
"""Share of a GPU's memory for a model that names no `gpu_share`; vLLM's own default."""

LARGEST_SHARE: Final = 0.95
"""All that the processes on one GPU may claim together. The rest is for CUDA contexts, which no share counts."""

ENVIRONMENT: Final = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # Only used to sample tokens, which reward models do not; without the package flashinfer some versions fail on it.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
"""What every vLLM process is told, unless the environment or the pool file says otherwise."""

SHARE_REMEDY: Final = "lower `gpu_share`, or spread the models with `gpus`"
"""What to do where a GPU cannot hold the models that the pool file places on it."""

CPU_ENVIRONMENT: Final = {"VLLM_CPU_KVCACHE_SPACE": "1"}
"""GiB of main memory for the KV cache on a CPU; by default vLLM takes most of what there is."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What one process of vLLM will take of the memory of each of its GPUs.

    Attributes:
        name: for people.
        share: in (0, 1].
        gpus: those that it is placed on.
        remedy: what to do where they cannot hold it.
    """

    name: str
    share: float
    gpus: tuple[int, ...]
    remedy: str = SHARE_REMEDY


def find_vllm(command: Sequence[str] = ()) -> tuple[str, ...] | None:
    """How vLLM's command line is called here; None where there is none.

    The pool file's `vllm_command` if it has one; else the package in the running Python; else `vllm` on the PATH.

    Args:
        command: `vllm_command`.

    Raises:
        ConfigurationError: `vllm_command` is not a program.
    """
    if command:
        program = shutil.which(command[0])
        if program is None:
            raise ConfigurationError(
                f"vllm_command {command[0]!r} is not a program: name the `vllm` of the environment that has it"
            )
        return (str(Path(program).absolute()), *command[1:])
    if find_spec("vllm") is not None:
        return (sys.executable, "-m", "vllm.entrypoints.cli.main")
    program = shutil.which("vllm")
    return None if program is None else (str(Path(program).absolute()),)


def serve_words(model: VllmEntry, device: str, *, host: str, port: int) -> tuple[str, ...]:
    """What follows the command of `find_vllm`: `serve MODEL …`, with what the model is for.

    Args:
        model: with `path` or `model`.
        device: `cuda` or `cpu`.
        host: address to listen on.
        port: its port.
    """
    if model.source is None:
        raise ValueError(f"model {model.name!r} has neither `path` nor `model`")
    words = ["serve", model.source, "--host", host, "--port", str(port), "--served-model-name", model.served]
    words += model.vllm_task
    options = {
        "--revision": model.revision,
        # vLLM's `auto` makes float16 of float32 weights, which moves rewards in the third digit.
        "--dtype": model.dtype or ("float32" if device == "cpu" else None),
        "--max-model-len": model.max_model_len,
        "--chat-template": model.template_file,
        "--tensor-parallel-size": model.tensor_parallel if model.tensor_parallel > 1 else None,
        "--gpu-memory-utilization": model.gpu_share if device == "cuda" else None,
    }
    for flag, value in options.items():
        if value is not None:
            words += [flag, str(value)]
    if device == "cpu":
        # Compiling takes longer than small models run on a CPU, and wants a C++ compiler.
        words.append("--enforce-eager")
    return (*words, *model.vllm_args)


def serve_environment(
    model: VllmEntry, device: str, gpus: Sequence[int], environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """What is added to the environment of one replica.

    Args:
        model: its `env` wins over everything.
        device: `cuda` or `cpu`.
        gpus: of this replica; empty leaves all visible.
        environment: of the process that starts it; what it sets is left alone, and `gpus` count among the GPUs that
            its CUDA_VISIBLE_DEVICES leaves it.

    Raises:
        ConfigurationError: a GPU that is not among those.
    """
    defaults = ENVIRONMENT | (CPU_ENVIRONMENT if device == "cpu" else {})
    added = {name: value for name, value in defaults.items() if name not in environment}
    if device == "cuda" and gpus:
        added["CUDA_VISIBLE_DEVICES"] = ",".join(_visible(model, gpu, environment) for gpu in gpus)
    return added | model.env


def _visible(model: VllmEntry, gpu: int, environment: Mapping[str, str]) -> str:
    """The GPU's name for CUDA."""
    allotted = environment.get("CUDA_VISIBLE_DEVICES")
    if allotted is None:
        return str(gpu)
    names = [name.strip() for name in allotted.split(",") if name.strip()]
    if gpu >= len(names):
        raise ConfigurationError(
            f"model {model.name!r} is to be on GPU {gpu}, and CUDA_VISIBLE_DEVICES={allotted} leaves {len(names)} of "
            "them, counted from 0: change `gpus` in the pool file (for the encoder --encoder-gpu), or the variable"
        )
    return names[gpu]


def placements(model: VllmEntry) -> list[tuple[int, ...]]:
    """The GPUs of each replica: `gpus` dealt out in turn, `tensor_parallel` to each. Without `gpus`, the first ones.

    >>> placements(ModelEntry(name="rm", gpus=(2, 3), replicas=3))
    [(2,), (3,), (2,)]
    >>> placements(ModelEntry(name="rm", tensor_parallel=2))
    [(0, 1)]
    """
    gpus = model.gpus or tuple(range(model.tensor_parallel))
    groups = [gpus[start : start + model.tensor_parallel] for start in range(0, len(gpus), model.tensor_parallel)]
    return [groups[replica % len(groups)] for replica in range(model.replicas)]


def model_claims(models: Sequence[VllmEntry]) -> list[Claim]:
    """One claim for each replica of the models, in order."""
    return [Claim(model.name, model.gpu_share or DEFAULT_SHARE, gpus) for model in models for gpus in placements(model)]


def claims_by_gpu(claims: Sequence[Claim]) -> dict[int, list[Claim]]:
    """Who shares each GPU, by its number."""
    shared: dict[int, list[Claim]] = defaultdict(list)
    for claim in claims:
        for gpu in claim.gpus:
            shared[gpu].append(claim)
    return dict(sorted(shared.items()))


def check_shares(models: Sequence[VllmEntry], others: Sequence[Claim] = ()) -> None:
    """Return True if the processes that share a GPU fit on it, by what was asked for each.

    Args:
        models: those that vLLM is to serve on GPUs.
        others: what else `up` starts there: the encoder's server.

    Raises:
        ConfigurationError: the shares on a GPU sum to more than `LARGEST_SHARE`; names GPU, processes and remedy.
    """
    for gpu, claimed in claims_by_gpu([*model_claims(models), *others]).items():
        total = sum(claim.share for claim in claimed)
        # One alone may have all that vLLM lets it have; rounding must not refuse .95 itself.
        if len(claimed) > 1 and total > LARGEST_SHARE + 1e-9:
            listed = ", ".join(f"{claim.name} {claim.share:g}" for claim in claimed)
            remedies = ", or ".join(dict.fromkeys(claim.remedy for claim in claimed))
            raise ConfigurationError(
                f"GPU {gpu}: the shares of its memory sum to {total:.2f}, more than {LARGEST_SHARE:g} ({listed}): "
                f"{remedies}"
            )


def share_lines(claims: Sequence[Claim]) -> list[str]:
    """A sentence for each GPU: who takes which share of its memory.

    >>> share_lines([Claim("a", 0.5, (0, 1)), Claim("encoder", 0.1, (1,))])
    ['GPU 0: a 0.5 of its memory', 'GPU 1: a 0.5 + encoder 0.1 = 0.6 of its memory, at most 0.95']
    """
    lines = []
    for gpu, claimed in claims_by_gpu(claims).items():
        line = f"GPU {gpu}: " + " + ".join(f"{claim.name} {claim.share:g}" for claim in claimed)
        if len(claimed) > 1:
            line += f" = {round(sum(claim.share for claim in claimed), 4):g} of its memory, at most {LARGEST_SHARE:g}"
        else:
            line += " of its memory"
        lines.append(line)
    return lines


def served_by_vllm(model: VllmEntry, pool: PoolFile, command: Sequence[str] | None) -> bool:
    """Return True if `up` serves this model with vLLM rather than with the CPU worker.

    Args:
        model: of the pool, without `urls`.
        pool: its `worker` holds for models that name none of their own.
        command: of `find_vllm`.

    Raises:
        ConfigurationError: vLLM is asked for by name, and there is none.
    """
    if isinstance(model, JudgeEntry):
        # The small one of a directory is served on the CPU; nothing of ours serves one of the hub.
        kind = "cpu" if model.path is not None else "vllm"
    else:
        kind = (model.worker if isinstance(model, ModelEntry) else None) or pool.worker
    if model.source is None or kind == "cpu":
        return False
    if kind == "vllm" and command is None:
        raise ConfigurationError(
            f"model {model.name!r} is to be served by vLLM, which is not installed here: pip install "
            "'reward-router[vllm]', name another environment's with `vllm_command`, or choose `worker: cpu`"
        )
    return command is not None
