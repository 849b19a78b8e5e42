"""The pool file: which reward models there are, where they are served, and how `up` starts the ones that are not.

    name: demo
    models:
      - name: rm-arithmetic                  # its name everywhere
        urls: [http://127.0.0.1:8101]        # one per replica; without any, `up` starts a worker
        served_name: rm-arithmetic           # the worker's name for it, if another
        rendering: template                  # `messages` (default, any worker) or `template` (one request per pair)
        chat_template: plain                 # for `template`: plain, a .jinja file, or a tokenizer's directory
        path: models/rm-arithmetic           # `up` serves this Hugging Face directory …
        recorded: pairs.jsonl                # … or the scores recorded in this file

Relative paths are relative to the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import ConfigurationError


class ModelEntry(BaseModel):
    """One reward model of the pool."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=200)
    urls: tuple[str, ...] = ()
    served_name: str | None = None
    rendering: Literal["messages", "template"] = "messages"
    chat_template: str = "plain"
    path: Path | None = None
    recorded: Path | None = None
    max_in_flight: int | None = Field(default=None, ge=1)
    api_key: str | None = Field(default=None, repr=False)

    @model_validator(mode="after")
    def _startable(self) -> ModelEntry:
        if self.path is not None and self.recorded is not None:
            raise ValueError(f"model {self.name!r} has both `path` and `recorded`: give one")
        return self


class PoolFile(BaseModel):
    """A pool: the reward models, in arm order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "pool"
    models: tuple[ModelEntry, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> PoolFile:
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError(f"models are named twice: {', '.join(sorted(names))}")
        return self


def load_pool(path: Path) -> PoolFile:
    """Read a pool file.

    Raises:
        ConfigurationError: no such file, not YAML, or a field that does not fit.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigurationError(f"pool file {path}: {error.strerror}; give --pool an existing file") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"pool file {path} is not YAML: {error}") from error
    if isinstance(content, dict):
        content["models"] = [_resolved(model, path.parent) for model in content.get("models") or []]
    try:
        return PoolFile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigurationError(
            f"pool file {path}: {where}: {first['msg']} (see service/pool.py for the fields)"
        ) from error


def dump_pool(pool: PoolFile, path: Path) -> None:
    """Write a pool file that `load_pool` reads back."""
    content = pool.model_dump(mode="json", exclude_defaults=True)
    # It may hold workers' API keys.
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")


def _resolved(model: object, folder: Path) -> object:
    """Paths of one entry, made absolute against the file's folder."""
    if not isinstance(model, dict):
        return model
    out = dict(model)
    for key in ("path", "recorded"):
        if isinstance(out.get(key), str):
            out[key] = str((folder / out[key]).absolute())
    template = out.get("chat_template")
    if isinstance(template, str) and template != "plain":
        out["chat_template"] = str((folder / template).absolute())
    return out
