"""What the pool file says of a scorer of kind `http`: a service of anybody that speaks the scorer protocol."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from service.scorers.entry import ScorerEntry


class HttpEntry(ScorerEntry):
    """A service that speaks the scorer protocol; docs/scorers.md describes it."""

    kind: Literal["http"]

    @model_validator(mode="after")
    def _reachable(self) -> HttpEntry:
        if not self.urls:
            raise ValueError(f"scorer {self.name!r} is of kind http and has no `urls`: say where it is served")
        return self
