"""What a run's pool is, in words: every scorer that the run ever asked, in arm order, and the terms it is asked on.

A run begins with the pool file of the gateway that opens it; its specification stands in the run's fingerprint. Each
change is an event of the log that holds the whole new one, so that every replica builds the same prior, plans and
scorers at the same position (docs/pools-live.md). Arms are never renumbered. Secrets are left out: a gateway takes
them, and where its servers are, from its own pool file. Knows no connection and no store. Called by `service.assembly`
and `service.usecases.pools`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import msgspec
import pydantic
from pydantic import BaseModel, Field, TypeAdapter

from router_core.pools import PROBATION_EVENTS, PoolState
from service.errors import ConfigurationError, ValidationError
from service.pool import Entry, PoolFile

SECRETS = frozenset({"api_key", "env"})
"""Fields of an entry that never leave the gateway's own pool file."""

LOCAL = SECRETS | {
    *("urls", "api_key_env", "path", "recorded", "tokenizer", "chat_template", "file", "worker", "licence", "replicas"),
    *("gpus", "gpu_share", "tensor_parallel", "dtype", "vllm_args", "processes", "memory_mb"),
}
"""Fields that say where a scorer is and how it is started: each gateway's own, as its pool file has them."""

REACH = LOCAL | {"rubric"}
"""Fields by which a gateway sends texts and keys somewhere, or reads a file or variable of its machine."""

IDENTITY = ("kind", "model", "revision", "head", "heads", "builtin", "rubric", "mode", "options")
"""Fields that make a scorer another one: what was learned of it says nothing any more."""

POOL_FIELDS = ("over_long", "combine", "audit")
"""Fields of the pool file beside its scorers that a run keeps."""

_ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)


class Start(NamedTuple):
    """What an arm starts from: `checkpoint`, `kinds` or `nothing`, and the numbers; none for `nothing`."""

    source: str
    column: bytes = b""


class Routing(msgspec.Struct, frozen=True):
    """What a run is routed by.

    Attributes:
        policy: of requests that name none; `cascade:B` holds the budget.
        v: exploration scale; None: what the checkpoint has.
        gamma: discount per block of events; None: what the checkpoint has.
        max_calls: scorers that one instance may be asked of; None: any number.
    """

    policy: str
    v: float | None = None
    gamma: float | None = None
    max_calls: int | None = None


class Arm(msgspec.Struct, frozen=True, omit_defaults=True):
    """One arm.

    Attributes:
        name: in the pool file.
        entry: its fields there, without secrets.
        retired: it is asked no more.
        source: see `Start`; of an arm that the run began with, `checkpoint` where there was one.
        column: float32 numbers, see `Checkpoint.column`; empty for what the checkpoint has under the name.
        since: version of the specification that added it.
        changed_ms: when its entry was last changed, Unix time in milliseconds; 0 for never.
    """

    name: str
    entry: dict[str, Any]
    retired: bool = False
    source: str = "checkpoint"
    column: bytes = b""
    since: int = 0
    changed_ms: int = 0


class Specification(msgspec.Struct, frozen=True, omit_defaults=True):
    """A run's pool.

    Attributes:
        arms: (K,) every scorer that was ever asked, in arm order.
        referees: entries of scorers that look at audits only.
        pool: `POOL_FIELDS` of the pool file, where they are set.
        routing: what it is routed by.
        version: how many changes there were.
        time_ms: when the last one was made.
        by: name of the key that made it.
    """

    arms: tuple[Arm, ...]
    referees: tuple[dict[str, Any], ...]
    pool: dict[str, Any]
    routing: Routing
    version: int = 0
    time_ms: int = 0
    by: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """(K,) distinct names: a retired arm whose name went to another one later is `NAME~1`, `NAME~2` …"""
        last = {arm.name: index for index, arm in enumerate(self.arms)}
        met: dict[str, int] = {}
        out = []
        for index, arm in enumerate(self.arms):
            met[arm.name] = met.get(arm.name, 0) + 1
            out.append(arm.name if last[arm.name] == index else f"{arm.name}~{met[arm.name]}")
        return tuple(out)

    @property
    def asked(self) -> tuple[Arm, ...]:
        """The arms that are asked, in arm order."""
        return tuple(arm for arm in self.arms if not arm.retired)

    @property
    def state(self) -> PoolState:
        """What the fold keeps of it."""
        probation = [PROBATION_EVENTS if arm.since and arm.source != "checkpoint" else 0.0 for arm in self.arms]
        return PoolState(tuple(arm.retired for arm in self.arms), tuple(probation), encode(self))

    def file(self, name: str = "pool") -> PoolFile:
        """The pool file that says the same: the scorers that are asked, without secrets."""
        return PoolFile.model_validate(
            {"name": name, "models": [arm.entry for arm in self.asked], "referees": self.referees, **self.pool}
        )


class Change(BaseModel):
    """One difference between a run's pool and another specification."""

    action: str = Field(description="add, retire, replace, change")
    scorer: str | None = Field(None, description="Null for what concerns the whole pool.")
    field: str | None = None
    before: Any = None
    after: Any = None

    def __str__(self) -> str:
        """Return it as one line."""
        if self.action == "change" and self.field == "audit":
            return f"audits end (they had {self.before})" if self.after is None else f"audits begin: {self.after}"
        if self.action == "change":
            where = "" if self.scorer is None else f"{self.scorer}: "
            return f"{where}{self.field} {_shown(self.before)} -> {_shown(self.after)}"
        told = f"{self.action} {self.scorer}"
        return f"{told} (starts from {self.after})" if self.action in ("add", "replace") else told


def _shown(value: object) -> str:
    return "default" if value is None else str(value)


def entry_fields(entry: Entry) -> dict[str, Any]:
    """Return an entry's fields as the log may hold them: without secrets, and without those that are not set."""
    fields = entry.model_dump(mode="json", exclude_defaults=True, exclude=set(SECRETS))
    if entry.urls:
        fields["urls"] = [_without_password(url) for url in entry.urls]
    return {"name": entry.name, "kind": entry.kind, **fields}


def reach(fields: Mapping[str, Any]) -> str:
    """Return what an entry says of `REACH`, in one form: whom a gateway that asks it talks to, with what."""
    return json.dumps({name: fields[name] for name in sorted(REACH & fields.keys())}, sort_keys=True)


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def read_entry(fields: Mapping[str, Any]) -> Entry:
    """Return the entry of such fields.

    Raises:
        ConfigurationError: they are none.
    """
    try:
        return _ENTRY.validate_python(dict(fields))
    except pydantic.ValidationError as error:
        raise ConfigurationError(f"scorer {fields.get('name')!r}: {error.errors()[0]['msg']}") from error


def pool_fields(pool: PoolFile) -> dict[str, Any]:
    """Return the pool file's `POOL_FIELDS`, where they are set."""
    found: dict[str, Any] = pool.model_dump(mode="json", exclude_defaults=True, include=set(POOL_FIELDS))
    return found


def founded(pool: PoolFile, routing: Routing, start_of: Callable[[str], Start]) -> Specification:
    """Return the specification that a run begins with.

    Args:
        pool: the gateway's pool file.
        routing: what it is routed by.
        start_of: what a scorer starts from, by name.
    """
    starts = {one.name: start_of(one.name) for one in pool.models}
    # What the checkpoint has under a name is known by the checkpoint's digest, which stands in the fingerprint.
    columns = {name: b"" if start.source == "checkpoint" else start.column for name, start in starts.items()}
    arms = [Arm(one.name, entry_fields(one), False, starts[one.name].source, columns[one.name]) for one in pool.models]
    return Specification(tuple(arms), tuple(entry_fields(one) for one in pool.referees), pool_fields(pool), routing)


def changed(
    standing: Specification,
    pool: PoolFile,
    given: Mapping[str, Any],
    start_of: Callable[[str, bool], Start],
    now_ms: int,
    *,
    servers: bool = False,
) -> tuple[Specification, list[Change]]:
    """Return the specification after a pool file was applied, and what differs; the standing one where nothing does.

    Args:
        standing: the run's.
        pool: what it shall be.
        given: fields of `Routing` that shall be otherwise; the others stay.
        start_of: what a scorer that is added starts from, by name; the second argument is True where an earlier arm
            had the name, so that nothing that is known under it holds.
        now_ms: Unix time in milliseconds.
        servers: other addresses are a change too: an operator says so, and not a gateway that was started elsewhere.
    """
    version, changes = standing.version + 1, list[Change]()
    wanted = {one.name: entry_fields(one) for one in pool.models}
    arms: list[Arm] = []
    places = {arm.name: index for index, arm in enumerate(standing.arms)}
    for index, arm in enumerate(standing.arms):
        # Of several arms of one name the last is the one that a pool file can mean.
        fields = wanted.get(arm.name) if places[arm.name] == index else None
        arms.append(_moved(arm, fields, changes, now_ms, servers=servers))
    for name, fields in wanted.items():
        index = places.get(name, -1)
        if index >= 0 and not arms[index].retired:
            continue
        start = start_of(name, index >= 0)
        replaced = index >= 0 and not standing.arms[index].retired
        changes[:] = [one for one in changes if not (replaced and one.action == "retire" and one.scorer == name)]
        changes.append(Change(action="replace" if replaced else "add", scorer=name, after=start.source))
        arms.append(Arm(name, fields, False, *start, since=version, changed_ms=now_ms))
    before = {one["name"]: one for one in standing.referees}
    referees = tuple(_placed(entry_fields(one), before.get(one.name)) for one in pool.referees)
    _compare(None, {"referees": sorted(before)}, {"referees": sorted(one["name"] for one in referees)}, changes)
    for one in referees:
        if one["name"] in before:
            _compare(one["name"], _shared(before[one["name"]]), _shared(one), changes)
    fields = pool_fields(pool)
    was, will_be = _flat(standing.pool, fields)
    _compare(None, was, will_be, changes)
    moved = msgspec.structs.replace(standing.routing, **given)
    _compare(None, msgspec.structs.asdict(standing.routing), msgspec.structs.asdict(moved), changes)
    if not changes:
        return standing, []
    return Specification(tuple(arms), referees, fields, moved, version, now_ms), changes


def _moved(arm: Arm, fields: dict[str, Any] | None, changes: list[Change], now_ms: int, *, servers: bool) -> Arm:
    """The arm after the change: retired, asked again, or on other terms."""
    if fields is None or not same_scorer(fields, arm.entry):
        if not arm.retired:
            changes.append(Change(action="retire", scorer=arm.name))
        return msgspec.structs.replace(arm, retired=True)
    fields = _placed(fields, arm.entry)
    if arm.retired:
        changes.append(Change(action="add", scorer=arm.name, after="its history"))
    _compare(arm.name, _shared(arm.entry), _shared(fields), changes)
    if servers:
        _compare(arm.name, {"urls": arm.entry.get("urls")}, {"urls": fields.get("urls")}, changes)
    if fields == arm.entry:
        return msgspec.structs.replace(arm, retired=False)
    return msgspec.structs.replace(arm, retired=False, entry=fields, changed_ms=now_ms)


def _placed(fields: dict[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """An entry with where its scorer is: a file that does not say so leaves it where it was."""
    if before is None or not same_scorer(fields, before):
        return fields
    return {**{name: value for name, value in before.items() if name in LOCAL}, **fields}


def _shared(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are a run's own."""
    return {name: value for name, value in fields.items() if name not in LOCAL}


def _flat(*pools: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Fields of pool files; those of `audit` one by one where all have it, else in one text."""
    everywhere = all("audit" in fields for fields in pools)
    return [_flattened(fields, fields.get("audit"), one_by_one=everywhere) for fields in pools]


def _flattened(fields: Mapping[str, Any], audit: Mapping[str, Any] | None, *, one_by_one: bool) -> dict[str, Any]:
    out = {name: value for name, value in fields.items() if name != "audit"}
    if audit is None:
        return out
    if one_by_one:
        return {**out, **{f"audit.{name}": value for name, value in audit.items()}}
    told = {name: ", ".join(value) if isinstance(value, list | tuple) else value for name, value in audit.items()}
    return {**out, "audit": "; ".join(f"{name} {value}" for name, value in told.items())}


def _compare(scorer: str | None, before: Mapping[str, Any], after: Mapping[str, Any], changes: list[Change]) -> None:
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            changes.append(
                Change(action="change", scorer=scorer, field=name, before=before.get(name), after=after.get(name))
            )


def same_scorer(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return True if two entries are of one scorer, on whatever terms."""
    return all(_identity(one, name) == _identity(other, name) for name in IDENTITY)


def _identity(fields: Mapping[str, Any], name: str) -> object:
    value = fields.get(name)
    # The file of a rubric lies elsewhere on every machine.
    return PurePath(value).name if name == "rubric" and isinstance(value, str) else value


def effective(arm_fields: Mapping[str, Any], local: Entry | None, *, newer: bool) -> Entry:
    """Return the entry that a gateway asks a scorer by.

    Args:
        arm_fields: the run's.
        local: the entry of the gateway's own pool file; None where it has none of the name.
        newer: the run's was changed after the gateway read its file, so that its addresses hold.
    """
    entry = read_entry(arm_fields)
    fields = {} if local is None else entry_fields(local)
    if local is None or not same_scorer(fields, arm_fields):
        return entry
    kept = SECRETS if newer else LOCAL
    known = type(entry).model_fields
    return entry.model_copy(update={name: getattr(local, name) for name in kept if name in known})


def encode(specification: Specification) -> bytes:
    """The payload of a change's event: equal bytes, equal pools."""
    return _ENCODER.encode(specification)


def decode(payload: bytes) -> Specification:
    """Read `encode` back.

    Raises:
        ValidationError: it is none.
    """
    try:
        return _DECODER.decode(payload)
    except msgspec.DecodeError as error:
        raise ValidationError(f"the log holds a change of the pool that cannot be read: {error}") from error


def digest_of(specification: Specification) -> str:
    """SHA-256 (hex) of a specification."""
    return hashlib.sha256(encode(specification)).hexdigest()


_ENCODER = msgspec.msgpack.Encoder(order="deterministic")
_DECODER = msgspec.msgpack.Decoder(Specification)
