"""The pool file: which scorers there are, where they are served, and how `up` starts the ones that are not.

    name: mine
    over_long: skip                          # a text that an RM cannot read whole: skip (default), refuse, cut_prompt
    worker: auto                             # auto (default): vLLM where there is one, else the CPU worker; vllm; cpu
    device: cuda                             # where vLLM runs: cuda (default) or cpu
    vllm_command: ../.venv-vllm/bin/vllm     # a vLLM that is installed elsewhere
    combine: gate:sums,skywork               # several scorers make one reward: docs/scorers.md
    routing: {policy: cascade:1.5, v: 0.2}   # what runs are routed by: policy, v, gamma, max_calls (docs/pools-live.md)
    models:
      - name: sums                           # another kind than `rm`: docs/scorers.md
        kind: rule
        builtin: math
      - name: skywork                        # its name everywhere
        urls: [http://127.0.0.1:8101]        # one per replica; without any, `up` starts a worker
        model: Skywork/Skywork-Reward-V2-Qwen3-0.6B   # `up` serves this model of the Hugging Face hub …
        path: models/rm-arithmetic           # … or this directory …
        recorded: pairs.jsonl                # … or the scores recorded in this file
        worker: vllm                         # for this model, another than the pool's
        revision: main                       # of `model`: branch, tag or commit
        licence: apache-2.0                  # for people
        served_name: rm-arithmetic           # the worker's name for it, if another
        rendering: template                  # `messages` (default, any worker), `template`, `tokens` or `auto`
        chat_template: plain                 # for `template`: plain, a .jinja file, or a tokenizer's directory
        applies: {metadata.task: math}       # asked about these instances only; by default about all
        reward_scale: 0.5                     # the gateway answers reward_scale * reward + reward_shift
        reward_shift: 0.0
        price: 3.5                           # of one call, in any unit; 1 by default; cascades weigh calls by it
        reward_limit: 100.0                  # largest size of a raw reward; learned by default
        heads: {helpful: 0.7, safe: 0.3}     # an RM of several labels: their names in order, and weights; or `head: 0`
        replicas: 2                          # how many workers `up` starts
        gpus: [0, 1]                         # the GPUs that they are placed on in turn
        gpu_share: 0.3                       # of one GPU's memory, for one replica
        tensor_parallel: 1                   # GPUs of one replica
        dtype: bfloat16
        max_model_len: 4096                  # tokens it reads at most; by default what the worker says
        tokenizer: models/rm-arithmetic      # for `tokens`, `auto`: directory or hub id; by default `path` or `model`
        tokens_per_request: 32768            # for `tokens`, `auto`: bound on one request
        vllm_args: [--max-num-batched-tokens, "8192"]
        env: {VLLM_LOGGING_LEVEL: WARNING}
    referees: []                             # scorers that only look at audits; the same fields (docs/audits.md)
    audit: {referee: sums, rate: 0.05}       # who looks at which share of the decisions; `service.audit_entry`

Relative paths are relative to the file. docs/models.md says more, docs/workers.md of `rendering` and `over_long`;
`service.cli.vllm_serve` makes commands of it. Knows no process and no network.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from router_core.records import MAX_ABS_SCORE
from service.audit_entry import AuditEntry, with_fields
from service.errors import ConfigurationError
from service.scorers.http.entry import HttpEntry
from service.scorers.judge.entry import JudgeEntry
from service.scorers.protocol import OverLong
from service.scorers.rule.entry import RuleEntry
from service.scorers.vllm_entry import VllmEntry, words


class ModelEntry(VllmEntry):
    """One reward model of the pool."""

    kind: Literal["rm"] = "rm"
    served_name: str | None = None
    rendering: Literal["auto", "messages", "template", "tokens"] = "messages"
    chat_template: str = "plain"
    tokenizer: str | None = Field(default=None, min_length=1)
    tokens_per_request: int | None = Field(default=None, ge=1)
    recorded: Path | None = None
    reward_scale: float = 1.0
    reward_shift: float = 0.0
    reward_limit: float | None = Field(default=None, gt=0, le=MAX_ABS_SCORE)
    head: int | None = Field(default=None, ge=0)
    heads: dict[str, float] | None = Field(default=None, min_length=1)
    worker: Literal["auto", "vllm", "cpu"] | None = None

    @property
    def served(self) -> str:
        """The worker's name for it."""
        return self.served_name or self.name

    @property
    def vllm_task(self) -> tuple[str, ...]:
        return ("--runner", "pooling", "--convert", "classify")

    @property
    def template_file(self) -> str | None:
        return self.chat_template if self.chat_template.endswith(".jinja") else None

    @classmethod
    def resolved(cls, fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        out = dict(fields)
        for key in ("path", "recorded"):
            if isinstance(out.get(key), str):
                out[key] = os.path.normpath((folder / out[key]).absolute())
        template = out.get("chat_template")
        if isinstance(template, str) and template != "plain":
            out["chat_template"] = str((folder / template).absolute())
        tokenizer = out.get("tokenizer")
        if isinstance(tokenizer, str) and (folder / tokenizer).exists():
            # Else it is a hub id, which looks like a relative path.
            out["tokenizer"] = str((folder / tokenizer).absolute())
        return out

    @model_validator(mode="after")
    def _startable(self) -> ModelEntry:
        given = [field for field in ("path", "model", "recorded") if getattr(self, field) is not None]
        if len(given) > 1:
            raise ValueError(f"model {self.name!r} has both `{given[0]}` and `{given[1]}`: give one")
        return self

    @model_validator(mode="after")
    def _tokenizable(self) -> ModelEntry:
        if self.rendering not in ("tokens", "auto"):
            for field in ("tokenizer", "tokens_per_request"):
                if getattr(self, field) is not None:
                    raise ValueError(f"model {self.name!r} has `{field}` without `rendering: tokens`: add it")
        elif self.recorded is not None:
            raise ValueError(f"model {self.name!r} is recorded by its texts: use `rendering: template` or `messages`")
        elif self.tokenizer is None and self.source is None:
            raise ValueError(
                f"model {self.name!r} has `rendering: {self.rendering}` and no `tokenizer`: name the RM's directory or "
                "hub id"
            )
        return self

    @model_validator(mode="after")
    def _headed(self) -> ModelEntry:
        if self.head is not None and self.heads is not None:
            raise ValueError(f"model {self.name!r} has both `head` and `heads`: give one")
        weights = [] if self.heads is None else [*self.heads.values()]
        if weights and not (all(map(math.isfinite, weights)) and any(weights)):
            raise ValueError(f"model {self.name!r}: heads are {self.heads}; use finite weights, one other than 0")
        return self

    @model_validator(mode="after")
    def _transforms(self) -> ModelEntry:
        if not math.isfinite(self.reward_scale) or self.reward_scale == 0:
            raise ValueError(f"model {self.name!r}: reward_scale is {self.reward_scale}; use a number other than 0")
        if not math.isfinite(self.reward_shift):
            raise ValueError(f"model {self.name!r}: reward_shift is {self.reward_shift}; use a finite number")
        return self


def _kind_of(entry: object) -> str:
    """Return the kind of an entry of the pool file: a reward model unless it says another."""
    return str(entry.get("kind", "rm") if isinstance(entry, Mapping) else getattr(entry, "kind", "rm"))


Entry = Annotated[
    Annotated[ModelEntry, Tag("rm")]
    | Annotated[JudgeEntry, Tag("judge")]
    | Annotated[RuleEntry, Tag("rule")]
    | Annotated[HttpEntry, Tag("http")],
    Discriminator(_kind_of),
]
"""One scorer of the pool file, by its kind."""


class RoutingEntry(BaseModel):
    """What runs are routed by, where the settings do not say it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str | None = Field(default=None, min_length=1)
    v: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    gamma: float | None = Field(default=None, gt=0, le=1)
    max_calls: int | None = Field(default=None, ge=1)


class PoolFile(BaseModel):
    """A pool: the scorers, in arm order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "pool"
    over_long: OverLong = OverLong.SKIP
    worker: Literal["auto", "vllm", "cpu"] = "auto"
    device: Literal["cuda", "cpu"] = "cuda"
    vllm_command: Annotated[tuple[str, ...], BeforeValidator(words)] = ()
    combine: str | None = Field(default=None, pattern=r"^(route|(sum|min)(:.+)?|(gate|within):.+)$")
    routing: RoutingEntry | None = None
    models: tuple[Entry, ...] = Field(min_length=1)
    referees: tuple[Entry, ...] = ()
    audit: AuditEntry | None = None

    @property
    def scorers(self) -> tuple[Entry, ...]:
        """Everybody who is asked: the models, then the referees."""
        return (*self.models, *self.referees)

    @property
    def reward_models(self) -> tuple[ModelEntry, ...]:
        """The scorers of kind `rm`, in order, referees last."""
        return tuple([model for model in self.scorers if isinstance(model, ModelEntry)])

    @property
    def to_serve(self) -> tuple[VllmEntry, ...]:
        """Models of the hub or of a directory that vLLM is to serve: reward models and judges without `urls`."""
        return tuple([one for one in self.scorers if isinstance(one, VllmEntry) and not one.urls])

    @model_validator(mode="after")
    def _distinct(self) -> PoolFile:
        names = [model.name for model in self.scorers]
        if len(set(names)) != len(names):
            raise ValueError(f"models are named twice: {', '.join(sorted(names))}")
        return self

    @model_validator(mode="after")
    def _audited(self) -> PoolFile:
        if self.audit is not None:
            self.audit.check([model.name for model in self.models], [model.name for model in self.referees])
        elif self.referees:
            raise ValueError("there are `referees` and no `audit` that asks them: add it, or leave them out")
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
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError(f"pool file {path} is not YAML: {error}") from error
    if isinstance(content, dict):
        content["models"] = content.get("models") or []
        command = words(content.get("vllm_command"))
        if isinstance(command, tuple | list) and command and "/" in str(command[0]):
            content["vllm_command"] = (str((path.parent / str(command[0])).absolute()), *command[1:])
    try:
        return PoolFile.model_validate(content, context={"folder": path.parent})
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "too_short":
            message = f"give at least {first['ctx']['min_length']}"
        if first["type"] == "union_tag_invalid":
            message = f"kind {first['ctx']['tag']!r} is unknown; use one of {first['ctx']['expected_tags']}"
        raise ConfigurationError(f"pool file {path}: {where}{message} (fields: docs/scorers.md)") from error


def with_audit(pool: PoolFile, fields: Mapping[str, Any]) -> PoolFile:
    """Return the pool with these fields in the place of those of its `audit`.

    Raises:
        ConfigurationError: a field does not fit, or a referee cannot be asked.
    """
    audit = with_fields(pool.audit, fields)
    try:
        audit.check([model.name for model in pool.models], [model.name for model in pool.referees])
    except ValueError as error:
        raise ConfigurationError(f"setting {error}") from error
    return pool.model_copy(update={"audit": audit})


def dump_pool(pool: PoolFile, path: Path) -> None:
    """Write a pool file that `load_pool` reads back."""
    content = pool.model_dump(mode="json", exclude_defaults=True)
    # It may hold workers' API keys.
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
