"""What the pool file says of a scorer of kind `judge`: a generative model behind an OpenAI-compatible server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from service.scorers.judge.rubrics import BUILT_IN, Mode
from service.scorers.judge.verdicts import LABEL_MASS
from service.scorers.vllm_entry import VllmEntry

RESERVED_FIELDS = {
    "model": "`model`",
    "messages": "`rubric`",
    "logprobs": "`verdict`",
    "stream": "nothing: answers are read whole",
    "n": "nothing: one completion is read",
}
"""Fields of a request that have one of their own in the pool file, so that nothing is said twice."""


class JudgeEntry(VllmEntry):
    """A judge; docs/judges.md describes it.

    `path` is a directory that `up` serves on the CPU, `model` one of the hub that vLLM serves; with `urls` the judge is
    served elsewhere, as `model`.
    """

    kind: Literal["judge"]
    rubric: str = Field(default="helpfulness", min_length=1)
    mode: Mode = Mode.PAIRWISE
    verdict: Literal["auto", "logprobs", "text"] = "auto"
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=0.0, ge=0.0, le=2.0)
    comparisons: int = Field(default=16, ge=1, le=10_000)
    label_mass: float = Field(default=LABEL_MASS, gt=0.0, le=1.0)
    extra_body: dict[str, Any] = Field(default_factory=dict)

    @property
    def served(self) -> str:
        """The servers' name for the model."""
        return self.model or self.name

    @field_validator("urls")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        # Clients of OpenAI's are given the URL with /v1, and others without.
        return tuple([url.rstrip("/").removesuffix("/v1") for url in value])

    @model_validator(mode="after")
    def _askable(self) -> JudgeEntry:
        if not self.urls and self.source is None:
            raise ValueError(
                f"judge {self.name!r} has no `urls`, `path` or `model`: say where an OpenAI-compatible server has it, "
                "for example http://127.0.0.1:8000, or name the directory of a small one, which `up` serves on the "
                "CPU, or a model of the Hugging Face hub for vLLM"
            )
        if self.urls and self.model is None and self.path is None:
            raise ValueError(f"judge {self.name!r} has no `model`: give the server's name for it (GET /v1/models)")
        for field in self.extra_body:
            if field in RESERVED_FIELDS:
                raise ValueError(f"judge {self.name!r}: extra_body holds {field}; use {RESERVED_FIELDS[field]}")
        return self

    @classmethod
    def resolved(cls, fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Make the paths of a rubric and of a model absolute; see `ScorerEntry.resolved`."""
        out = dict(fields)
        if isinstance(out.get("path"), str):
            out["path"] = os.path.normpath((folder / out["path"]).absolute())
        rubric = out.get("rubric")
        if isinstance(rubric, str) and rubric not in BUILT_IN:
            out["rubric"] = os.path.normpath((folder / rubric).absolute())
        return out
