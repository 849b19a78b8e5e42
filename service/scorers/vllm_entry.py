"""What the pool file says of a model that vLLM serves: a reward model's and a judge's common fields.

`service.cli.vllm_serve` makes commands of it, `service.cli.manifests` pods.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from service.scorers.entry import ScorerEntry

RESERVED_ARGUMENTS = {
    "--host": "nothing: `up` chooses it",
    "--port": "nothing: `up` chooses it (--worker-port)",
    "--runner": "nothing: it follows from `kind`",
    "--convert": "nothing: it follows from `kind`",
    "--served-model-name": "`served_name`",
    "--revision": "`revision`",
    "--chat-template": "`chat_template`",
    "--dtype": "`dtype`",
    "--max-model-len": "`max_model_len`",
    "--gpu-memory-utilization": "`gpu_share`",
    "--tensor-parallel-size": "`tensor_parallel`",
}
"""Flags of `vllm serve` that have a field of their own in the pool file, so that nothing is said twice."""


def words(value: object) -> object:
    """A command written as one string, split as a shell would."""
    return tuple(shlex.split(value)) if isinstance(value, str) else value


class VllmEntry(ScorerEntry):
    """A model, and how it is started where `urls` do not say where it runs already."""

    path: Path | None = None
    model: str | None = Field(default=None, min_length=1)
    revision: str | None = None
    licence: str | None = None
    replicas: int = Field(default=1, ge=1, le=64)
    gpus: tuple[Annotated[int, Field(ge=0)], ...] = ()
    gpu_share: float | None = Field(default=None, gt=0, le=1)
    tensor_parallel: int = Field(default=1, ge=1)
    dtype: str | None = None
    max_model_len: int | None = Field(default=None, ge=1)
    vllm_args: Annotated[tuple[str, ...], BeforeValidator(words)] = ()
    env: dict[str, str] = Field(default_factory=dict)

    @property
    def served(self) -> str:
        """The worker's name for it."""
        return self.name

    @property
    def source(self) -> str | None:
        """What a worker loads: the directory or the hub's model; None for a recorded or an elsewhere served one."""
        return str(self.path) if self.path is not None else self.model

    @property
    def vllm_task(self) -> tuple[str, ...]:
        """Flags of `vllm serve` that say what the model is for; none for a generative one."""
        return ()

    @property
    def template_file(self) -> str | None:
        """The chat template that vLLM is given; None for the model's own."""
        return None

    def served_at(self, urls: Sequence[str]) -> Self:
        """See `ScorerEntry.served_at`: its urls are its replicas."""
        return self.model_copy(update={"urls": tuple(urls), "replicas": 1})

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.revision is not None and self.model is None:
            raise ValueError(f"model {self.name!r} has a `revision` and no `model` of the hub that it could be of")
        if self.urls and self.replicas > 1:
            raise ValueError(f"model {self.name!r} has `urls` and `replicas`: its urls are its replicas; leave one out")
        return self

    @model_validator(mode="after")
    def _placeable(self) -> Self:
        if len(set(self.gpus)) != len(self.gpus):
            raise ValueError(f"model {self.name!r}: a GPU is named twice in gpus {list(self.gpus)}")
        if self.gpus and len(self.gpus) % self.tensor_parallel:
            raise ValueError(
                f"model {self.name!r}: {len(self.gpus)} gpus cannot be dealt out in groups of tensor_parallel "
                f"{self.tensor_parallel}; name a multiple of it"
            )
        for word in self.vllm_args:
            flag = word.partition("=")[0]
            if flag in RESERVED_ARGUMENTS:
                raise ValueError(f"model {self.name!r}: vllm_args holds {flag}; use {RESERVED_ARGUMENTS[flag]}")
        return self
