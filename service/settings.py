"""Everything an operator can choose, each with its unit and its default. Read once by `service.cli`; handed down from
there.

Every field is also an environment variable: `REWARD_ROUTER_` + the field's name in capitals.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from router_core.records import Signal
from service.errors import ConfigurationError
from service.stores.ids import RUN_PATTERN

EMBEDDED = "embedded"
"""`store_url` that starts and owns a Valkey server in `data_dir`."""


ApiKey = Annotated[str, Field(pattern=r"^[!-~]+$")]
"""Visible ASCII, at least one character: an empty key would let everybody in."""


class OnStoreUnavailable(StrEnum):
    """What `/reward` does when the decision cannot be saved."""

    REFUSE = "refuse"
    ANSWER = "answer"


class OnUnknownTemplate(StrEnum):
    """What becomes of a trainer's text whose chat template is not known."""

    SCORE = "score"
    REFUSE = "refuse"


class Settings(BaseSettings):
    """The gateway's settings."""

    # A compose file can say `${CHECKPOINT:-}`, but not leave a variable out: an empty one is as good as none.
    model_config = SettingsConfigDict(env_prefix="REWARD_ROUTER_", frozen=True, extra="forbid", env_ignore_empty=True)

    host: str = Field("127.0.0.1", description="Address to listen on. Beyond loopback an API key is needed.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on.")
    workers: int = Field(
        1,
        ge=1,
        le=256,
        description="Gateway processes at the port, each with its own copy of the posterior (docs/operations.md). "
        "Limits of requests and connections are each process's.",
    )
    hang_seconds: float = Field(
        30.0,
        ge=1.0,
        description="With several `workers`: one whose event loop has stood still for so long is killed and started "
        "again. It counts from the first time that it serves.",
    )
    api_keys: tuple[ApiKey, ...] = Field(
        (),
        repr=False,
        description="Accepted keys, sent as `Authorization: Bearer KEY` or `X-API-Key: KEY`, with every scope: the "
        "plain way. `keys_file` is the other, and both may be given.",
    )
    keys_file: Path | None = Field(
        None,
        description="File of hashed keys with scopes, runs and limits, which `reward-router keys` writes. It is read "
        "again when it changes (docs/security.md).",
    )
    acts_file: Path | None = Field(
        None,
        description="File to which every administrative act is appended before it is done, one JSON line each, beside "
        "the process's log (docs/security.md).",
    )
    allow_unauthenticated: bool = Field(False, description="Listen beyond loopback without a key.")

    run: str = Field("default", pattern=RUN_PATTERN, description="Name of the run that requests without `run` mean.")
    max_runs: int = Field(
        64,
        ge=1,
        description="Runs one gateway holds. Those that no request has named for 60 s are closed to make room for "
        "a new name.",
    )
    pool: Path | None = Field(None, description="Pool file (YAML): the reward models and where they are served.")
    checkpoint: Path | None = Field(
        None, description="Directory of a trained checkpoint; without one, nothing is known at the start."
    )
    encoder: str = Field(
        "static",
        description="Encoder when there is no checkpoint: static, minilm, smollm2-135m, torch:DIR. `vllm:URL[,URL]`, "
        "with or without checkpoint: the transformer is served there (docs/encoders.md).",
    )
    encoder_reading: Path | None = Field(
        None,
        description="Directory that `reward-router encoder export` wrote, for an encoder over vLLM; by default the "
        "checkpoint's folder `reading`.",
    )
    encoder_timeout_seconds: float = Field(
        5.0, gt=0, description="Longest wait for the states of one micro-batch from an encoder over vLLM."
    )
    encoder_parallel_requests: int = Field(
        8,
        ge=1,
        description="Micro-batches under way at once for each server of an encoder over vLLM; what comes meanwhile "
        "gathers into the next. Fewer make larger batches, more wait less.",
    )
    encoder_api_key: ApiKey | None = Field(
        None, repr=False, description="Sent to the encoder's servers as `Authorization: Bearer KEY`."
    )
    prior: Literal["auto", "paper", "calibrated", "none"] = Field(
        "auto", description="Prior form; `auto` takes the checkpoint's, or `none` without one."
    )
    lambda0: float | None = Field(None, gt=0, description="Overrides the prior precision λ₀ of the checkpoint.")
    sigma2: float | None = Field(None, gt=0, description="Overrides the reward variance σ².")
    v: float | None = Field(None, ge=0, description="Overrides the exploration scale v.")
    gamma: float | None = Field(None, gt=0, le=1, description="Overrides the discount γ per block of events.")
    adapt: bool | None = Field(
        None,
        description="Overrides whether λ₀ follows the feedback (empirical Bayes); setting `lambda0` turns it off.",
    )
    lambda_novel: float | None = Field(
        None,
        ge=0,
        description="Overrides the precision that λ₀ is drawn down to while texts are unlike the checkpoint's training "
        "pairs; 0: it makes no difference. Only while λ₀ follows the feedback.",
    )
    floor: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Overrides the share of the instances that go to models of which little is known, whatever is "
        "believed of them (docs/math/router.md); 0: none. Policies with point masses have none.",
    )
    alarm_rate: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Overrides the rate of false alarms per event at which a model that has changed is noticed and "
        "learned afresh (docs/math/router.md); 0: changes are not looked for. Not for losses.",
    )
    policy: str = Field("bayesian", description="Policy of requests that name none.")
    console_texts: bool = Field(
        False,
        description="Keep the beginnings of the newest prompts and responses, in memory and for an hour in the store, "
        "and show them in the console beside their decisions. Audits are shown with their texts either way.",
    )
    console_viewers: int = Field(
        16, ge=1, description="Open console pages that one gateway sends its state to; one more is answered 429."
    )

    signal: Signal = Field(
        Signal.PREFERENCE,
        description="Kind of feedback of new runs whose first request names none: preference, loss or reward. A run "
        "keeps its own. Where it is set, the default run must have it.",
    )
    seed: int | None = Field(None, description="Seed of the draws; by default drawn from the operating system.")

    shadow_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Fraction of the instances for which every other RM is asked too, after the reply, so that the run "
        "learns of all of them. Only in runs with the signal `preference`.",
    )

    audit: dict[str, Any] | None = Field(
        None,
        description="Audits, as JSON with the fields of the pool file's `audit` (docs/audits.md), for example "
        '`{"referee": "stacked", "rate": 0.1}`; each field stands in the place of the file\'s.',
    )
    sticky_seconds: float = Field(
        600.0,
        ge=0,
        le=86_400,
        description="How long requests with a single response stay with the RM that the first of their run, policy and "
        "prompt drew, so that a trainer that sends one response at a time compares like with like. 0: not at all.",
    )
    normalize: bool = Field(
        False,
        description="Give rewards on the scale of their RM, (raw reward - running mean) / running sd, where a request "
        "does not say `normalize`.",
    )
    trainer_patience_seconds: float = Field(
        60.0,
        ge=0,
        description="How long `/v1/score/evaluation` tries again by itself: its client neither retries nor looks at "
        "the status.",
    )

    chat_templates: tuple[Path, ...] = Field(
        (),
        description="Tokenizer directories, or files with a chat template, of policies whose template the gateway does "
        "not know: it learns from them how trainers' texts come apart. They come before the built-in ones.",
    )
    on_unknown_template: OnUnknownTemplate = Field(
        OnUnknownTemplate.SCORE,
        description="A trainer's text whose chat template is not known: score it as it came, or refuse it (422).",
    )

    store_url: str = Field(
        EMBEDDED,
        description="`embedded`, or redis://, rediss:// or unix:// of a Redis or Valkey server, or "
        "redis+cluster://HOST:PORT,HOST:PORT of a cluster.",
    )
    data_dir: Path = Field(
        Path(".data"),
        description="Directory of everything that is kept here; the embedded store's is `store` in it.",
    )
    store_fsync: Literal["everysec", "always"] = Field(
        "everysec",
        description="Embedded store: flush to disk each second (a power cut may lose it) or before each reply.",
    )
    store_timeout_seconds: float = Field(2.0, gt=0, description="Longest wait for the store.")
    store_replicas: int = Field(
        0,
        ge=0,
        description="Replicas of the store that must hold a feedback before it is acknowledged; 1 or more where a "
        "replica may take over.",
    )
    new_run_wait_seconds: float = Field(
        6.0,
        ge=0,
        description="How long a store must have been watched by gateways before one takes an unused run name: a store "
        "that has lost its runs looks new, and gateways that hold a run need up to 3 s and `store_timeout_seconds` to "
        "claim its name again. Only the first gateway at a store has to wait, and every new run in a cluster. 0: take "
        "it at once, for a store that no other pool uses. The embedded store never waits.",
    )
    allow_unsafe_store: bool = Field(
        False,
        description="Use a store that would lose acknowledged data: one that evicts, a replica, an old version. By "
        "default nothing is saved there (docs/operations.md).",
    )
    on_store_unavailable: OnStoreUnavailable = Field(
        OnStoreUnavailable.REFUSE,
        description="`/reward` without store: refuse (503), or answer and say `recorded: false`.",
    )
    decision_ttl_seconds: float = Field(86_400.0, gt=0, description="How long feedback may take; later it is 410.")
    content_keys: bool = Field(True, description="Let feedback name a decision by run, prompt and responses.")

    block_size: int = Field(64, ge=1, description="Events per block of the fold. Part of a run's identity.")
    refresh_events: int = Field(
        8192, ge=1, description="Events between two snapshots; a multiple of `block_size`. Part of a run's identity."
    )
    log_keep_events: int = Field(
        1_000_000,
        ge=0,
        description="Events kept in the log behind the newest snapshot, for audit and off-policy evaluation.",
    )

    request_timeout_seconds: float = Field(
        12.0,
        gt=0,
        description="Deadline of encoding and asking RMs, fallbacks included; saving the decision may add the store's.",
    )
    worker_timeout_seconds: float = Field(
        5.0, gt=0, description="Deadline of asking one RM about up to 64 instances, replicas and retries included."
    )
    worker_max_in_flight: int = Field(256, ge=1, description="Requests in flight per worker replica.")
    health_interval_seconds: float = Field(
        2.0, gt=0, description="Pause between two health checks of a worker replica."
    )
    max_in_flight: int = Field(1024, ge=1, description="Requests in flight; one more is answered 429.")
    max_connections_per_address: int = Field(
        0,
        ge=0,
        description="Connections that one client address may have open; one more is answered 429 and closed. 0: any "
        "number. A proxy is one address.",
    )
    read_timeout_seconds: float = Field(
        30.0,
        gt=0,
        description="Longest time from a request's first byte to its last; then 408, and the connection is closed.",
    )
    max_body_bytes: int = Field(8 << 20, ge=1024, description="Largest request body.")
    max_text_chars: int = Field(100_000, ge=1, description="Longest prompt or response, in characters.")
    max_responses: int = Field(64, ge=1, description="Responses per request at most.")
    max_batch: int = Field(1024, ge=1, description="Items per batch request at most.")
    max_calls_per_instance: int | None = Field(
        None, ge=1, description="RMs that `cascade:B` asks about one instance at most; by default any number."
    )
    max_rounds_per_instance: int | None = Field(
        None,
        ge=1,
        description="Rounds of calls that `cascade:B` makes one after another at most; where nobody has answered yet, "
        "the next best RM is asked all the same. By default any number.",
    )
    parallel_calls: int = Field(
        1,
        ge=1,
        le=2,
        description="2: `cascade:B` asks two RMs at once where a second call is worth its price whatever the first "
        "will say. Saves a round, at the same price.",
    )
    batch_piece_responses: int = Field(
        128,
        ge=0,
        description="Responses that a batch request encodes and asks RMs about at once; the next are encoded "
        "meanwhile. 0: the whole batch at once.",
    )
    blas_threads: int = Field(1, ge=1, description="Threads of the linear algebra library.")

    tracing: bool = Field(
        False,
        description="Send spans of requests to an OpenTelemetry collector; needs extra `tracing` (docs/tracing.md).",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log line.")

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if self.refresh_events % self.block_size:
            raise ValueError(
                f"refresh_events is {self.refresh_events}: give a multiple of block_size, {self.block_size}"
            )
        if self.shadow_rate > 0 and self.signal is not Signal.PREFERENCE:
            raise ValueError(
                f"shadow_rate is {self.shadow_rate} and signal is {self.signal.value!r}: a {self.signal.value} says "
                "nothing of the RMs that were not asked; set shadow_rate to 0, or the signal to 'preference'"
            )
        keyed = bool(self.api_keys) or self.keys_file is not None
        if self.host not in ("127.0.0.1", "::1", "localhost") and not keyed and not self.allow_unauthenticated:
            raise ValueError(
                f"host is {self.host}: listening beyond loopback needs API keys: `reward-router keys new NAME --file "
                "keys.json` and REWARD_ROUTER_KEYS_FILE=keys.json, or a key in REWARD_ROUTER_API_KEYS; or else "
                "REWARD_ROUTER_ALLOW_UNAUTHENTICATED=true"
            )
        return self


def store_directory(data_dir: Path) -> Path:
    """Return the directory of the embedded store: the same for every command with a `--data-dir`."""
    return data_dir / "store"


def read_settings(**given: Any) -> Settings:
    """Settings from the environment, overridden by what was given on the command line.

    Raises:
        ConfigurationError: a value does not fit.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except SettingsError as error:
        raise ConfigurationError(f"{error}: lists are JSON, as in REWARD_ROUTER_API_KEYS='[\"KEY\"]'") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigurationError(f"setting {where}: {message}" if where else message) from error
