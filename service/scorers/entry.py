"""What every kind of scorer has in the pool file. Each kind adds its own fields; `service.pool` reads the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from router_core.records import Fact, Instance


class ScorerEntry(BaseModel):
    """What every kind of scorer has in the pool file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=200)
    kind: str
    urls: tuple[str, ...] = ()
    api_key: str | None = Field(default=None, repr=False)
    max_in_flight: int | None = Field(default=None, ge=1)
    price: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    applies: dict[str, Fact | tuple[Fact, ...]] = Field(default_factory=dict)

    @property
    def choosy(self) -> bool:
        """True if there are instances to which the scorer does not apply."""
        return bool(self.applies)

    def admits(self, instance: Instance) -> bool:
        """Return True if the instance has every fact that `applies` asks for.

        A key `metadata.NAME` asks for a value, or one of several; `reference: true` asks for a reference, `false` for
        none.
        """
        return all(_has(instance, key, wanted) for key, wanted in self.applies.items())

    @classmethod
    def resolved(cls, fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Return the fields with relative paths made absolute against the pool file's folder."""
        return dict(fields)

    def served_at(self, urls: Sequence[str]) -> Self:
        """Return the entry of a scorer that was started at these addresses."""
        return self.model_copy(update={"urls": tuple(urls)})

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, value: object, info: ValidationInfo) -> object:
        folder = (info.context or {}).get("folder")
        return cls.resolved(value, folder) if isinstance(folder, Path) and isinstance(value, Mapping) else value

    @field_validator("applies")
    @classmethod
    def _known_facts(cls, value: dict[str, Fact | tuple[Fact, ...]]) -> dict[str, Fact | tuple[Fact, ...]]:
        for key, wanted in value.items():
            if key == "reference":
                if not isinstance(wanted, bool):
                    raise ValueError(f"applies: reference is {wanted!r}; use true or false")
            elif not key.removeprefix("metadata.") or not key.startswith("metadata."):
                raise ValueError(f"applies: {key!r} is no fact of an instance; use `metadata.NAME` or `reference`")
        return value


def _has(instance: Instance, key: str, wanted: Fact | tuple[Fact, ...]) -> bool:
    if key == "reference":
        return (instance.reference is not None) is wanted
    fact = instance.metadata.get(key.removeprefix("metadata."))
    return fact in wanted if isinstance(wanted, tuple) else fact == wanted
