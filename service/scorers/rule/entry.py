"""What the pool file says of a scorer of kind `rule`: a function of a file, or a built-in one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from service.scorers.entry import ScorerEntry


class RuleEntry(ScorerEntry):
    """A rule and the worker that runs it.

    `file: rules.py:NAME` or `builtin: math` is what `up` starts a worker with; with `urls` the worker runs elsewhere.
    """

    kind: Literal["rule"]
    file: str | None = Field(default=None, pattern=r"^.+\.py:[A-Za-z_]\w*$")
    builtin: str | None = Field(default=None, min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)
    processes: int = Field(default=1, ge=1, le=64)
    rule_seconds: float = Field(default=5.0, gt=0, le=600)
    memory_mb: int = Field(default=1024, ge=64)

    @property
    def rule(self) -> str | None:
        """What `reward-router worker --rule` is given; None where the rule is served elsewhere."""
        return self.file or self.builtin

    @model_validator(mode="after")
    def _startable(self) -> RuleEntry:
        if self.file is not None and self.builtin is not None:
            raise ValueError(f"rule {self.name!r} has both `file` and `builtin`: give one")
        if self.rule is None and not self.urls:
            raise ValueError(
                f"rule {self.name!r} has no `file`, `builtin` or `urls`: give FILE.py:NAME, the name of a built-in "
                "rule, or where it is served"
            )
        return self

    @classmethod
    def resolved(cls, fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Make `file` absolute."""
        out = dict(fields)
        if isinstance(out.get("file"), str):
            out["file"] = os.path.normpath((folder / out["file"]).absolute())
        return out
