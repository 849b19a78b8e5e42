"""The keys file: which keys there are, by their hashes. Read by `ring`, written by `reward-router keys`.

A key is 256 random bits, so that one pass of SHA-256 hides it: nobody can try 2²⁵⁶ keys, however fast the hash. Slow
hashes protect passwords that people think of, of which there are few, and would cost every request milliseconds here.
Salts keep equal passwords from having equal hashes, and random keys are never equal; without one a key is found by its
hash.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from service.errors import ConfigurationError
from service.keys.access import Scope

PREFIX = "rr_"
"""Begins every key, so that scanners for secrets find it."""

KeyName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
RunPattern = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._*-]{1,64}$")]


class KeyLimits(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Limits of one key, in each gateway process; None: none.

    Attributes:
        instances_per_minute: see `Meter`.
        max_in_flight: see `Meter`.
    """

    instances_per_minute: Annotated[int, Meta(ge=1)] | None = None
    max_in_flight: Annotated[int, Meta(ge=1)] | None = None


class KeyEntry(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """One key of the file.

    Attributes:
        name: who has it; keys that follow each other in a rotation share it.
        hash: `sha256:` and 64 hexadecimal digits, of the whole key.
        scopes: what it is for.
        runs: names of runs, or patterns with `*`; None: every run.
        created: when it was made.
        expires: when it ends; None: never.
        limits: its limits.
    """

    name: KeyName
    hash: Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}$")]
    scopes: Annotated[list[Scope], Meta(min_length=1)]
    runs: Annotated[list[RunPattern], Meta(min_length=1)] | None = None
    created: Annotated[datetime, Meta(tz=True)] | None = None
    expires: Annotated[datetime, Meta(tz=True)] | None = None
    limits: KeyLimits = KeyLimits()

    @property
    def digest(self) -> bytes:
        """The hash's 32 bytes."""
        return bytes.fromhex(self.hash.removeprefix("sha256:"))

    @property
    def id(self) -> str:
        """The hash's first 8 digits: names one key among several of one name."""
        return self.hash.removeprefix("sha256:")[:8]


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file: JSON, `{"keys": [...]}`. Without keys in it nobody gets in."""

    keys: list[KeyEntry] = []


def digest_of(key: bytes) -> bytes:
    """Return the SHA-256 of a key (32 bytes)."""
    return hashlib.sha256(key).digest()


def new_key() -> str:
    """Return a new key, of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def entry_of(
    key: str,
    name: str,
    scopes: list[Scope],
    *,
    runs: list[str] | None = None,
    expires: datetime | None = None,
    limits: KeyLimits | None = None,
) -> KeyEntry:
    """Return a key's entry, made now.

    Raises:
        ConfigurationError: a field does not fit.
    """
    entry = KeyEntry(
        name=name,
        hash="sha256:" + digest_of(key.encode()).hex(),
        scopes=scopes,
        runs=runs,
        created=datetime.now(UTC).replace(microsecond=0),
        expires=expires,
        limits=limits or KeyLimits(),
    )
    try:
        # Bounds are checked where structs are read.
        return msgspec.convert(msgspec.to_builtins(entry), KeyEntry)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"key {name!r}: {error}") from error


def read_key_file(path: Path) -> KeyFile:
    """Return what the file says.

    Raises:
        ConfigurationError: it cannot be read, or holds something else. Nothing of its content is shown.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=KeyFile)
    except OSError as error:
        raise ConfigurationError(
            f"keys file {path}: {error.strerror}: make it with `reward-router keys new`, or correct keys_file"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"keys file {path}: {error}: see docs/security.md for its fields") from error


def write_key_file(path: Path, file: KeyFile) -> None:
    """Write the file in one step; readers see the old one or the new one. A new file is for its owner only."""
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    text = msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n"
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """Keep other commands from changing the file meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
