"""What every kind of scorer has in the pool file. Each kind adds its own fields; `service.pool` reads the file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from router_core.records import Fact, Instance
from service.errors import ConfigurationError


class ScorerEntry(BaseModel):
    """What every kind of scorer has in the pool file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=200)
    kind: str
    urls: tuple[str, ...] = ()
    api_key: str | None = Field(default=None, repr=False)
    api_key_env: str | None = Field(default=None, min_length=1)
    max_in_flight: int | None = Field(default=None, ge=1)
    price: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    timeout_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    requests_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    tokens_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    applies: dict[str, Fact | tuple[Fact, ...]] = Field(default_factory=dict)

    def key(self, environment: Mapping[str, str] = os.environ) -> str | None:
        """Return the key that requests carry; None for none.

        Raises:
            ConfigurationError: `api_key_env` names a variable that is not set.
        """
        if self.api_key_env is None:
            return self.api_key
        key = environment.get(self.api_key_env)
        if not key:
            raise ConfigurationError(
                f"scorer {self.name!r}: the environment variable {self.api_key_env} (`api_key_env`) is not set: set it "
                "to the key, or leave the field out"
            )
        return key

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.api_key is not None and self.api_key_env is not None:
            raise ValueError(f"scorer {self.name!r} has both `api_key` and `api_key_env`: give one")
        return self

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
