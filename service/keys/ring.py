"""The keys that a gateway accepts: those of the keys file, read again when it changes, and the plain `api_keys`.

One `KeyRing` per process, built by `service.gateway`; `service.handlers.keys` asks it who calls.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from service.errors import ConfigurationError, UnauthorizedError
from service.keys.access import EVERYTHING, Access, Meter, Scope
from service.keys.file import KeyEntry, KeyFile, digest_of, read_key_file

POLL_SECONDS = 1.0
"""How often the file is looked at: a revoked key is refused after that at the latest."""

logger = logging.getLogger(__name__)

Stamp = tuple[int, int, int]
"""Device's file number, time of change in ns, size: differs when the file was replaced or written."""


class KeyRing:
    """Finds the access of a key.

    A key is looked up by its SHA-256, and keys themselves are never compared. So the time that it takes tells nothing:
    a caller cannot choose a key whose hash begins like another's.

    Args:
        plain: keys of the setting `api_keys`, with every scope and run. They are kept as hashes.
        path: the keys file; None for none.

    Raises:
        ConfigurationError: the file cannot be read.
    """

    def __init__(self, plain: Sequence[str] = (), path: Path | None = None) -> None:
        self._path = path
        self._plain = {
            digest_of(key.encode()): Access(f"api_keys[{index}]", frozenset(Scope)) for index, key in enumerate(plain)
        }
        self.needed = bool(plain) or path is not None
        """True if callers must send a key."""
        self.problem: str | None = None
        """Why the file could not be read again; None while it is in force as it stands."""
        self._stamp: Stamp | None = None
        self._entries: dict[bytes, KeyEntry] = {}
        self._keys = dict(self._plain)
        if path is not None:
            self._stamp = _stamp_of(path)
            self._take(read_key_file(path))

    def find(self, key: bytes) -> Access:
        """Return what the holder of a key may do.

        Args:
            key: as it was sent; b"" for none.

        Raises:
            UnauthorizedError: there is no such key, or it has expired.
        """
        if not self.needed:
            return EVERYTHING
        digest = digest_of(key)
        access = self._keys.get(digest)
        if access is None or not key:
            raise UnauthorizedError(
                "API key missing or wrong: send `Authorization: Bearer KEY` or `X-API-Key: KEY`. `reward-router keys` "
                "makes keys; commands read theirs from REWARD_ROUTER_API_KEY, trainers' clients from "
                "REWARD_ROUTER_CLIENT_API_KEY"
            )
        if access.expires != math.inf and time.time() >= access.expires:
            raise UnauthorizedError(f"the key {access.name!r} has expired: make another with `reward-router keys new`")
        return access

    async def follow_forever(self, changed: Callable[[Sequence[str]], None] = lambda _: None) -> None:
        """Read the file again whenever it changes.

        Args:
            changed: told what was added and removed, in words without secrets.
        """
        while self._path is not None:
            await asyncio.sleep(POLL_SECONDS)
            words = self.read_again()
            if words:
                changed(words)

    def read_again(self) -> list[str]:
        """Take what the file says if it has changed; return what is different, in words.

        A file that cannot be read, or is malformed, changes nothing: the keys stay as they are, and `problem` says why.
        """
        if self._path is None:
            return []
        stamp = _stamp_of(self._path)
        if stamp == self._stamp:
            return []
        self._stamp = stamp
        before = dict(self._entries)
        try:
            self._take(read_key_file(self._path))
        except ConfigurationError as error:
            if self.problem != error.message:
                logger.error("keys file not taken, the keys stay", extra={"fields": {"error": error.message}})
            self.problem = error.message
            return []
        self.problem = None
        words = _differences(before, self._entries)
        logger.info("keys file taken", extra={"fields": {"changes": words}})
        return words

    def _take(self, file: KeyFile) -> None:
        """Put the file's keys in force. A key whose limits have not changed goes on with its meter."""
        old, self._entries = self._entries, {entry.digest: entry for entry in file.keys}
        keys = dict(self._plain)
        for digest, entry in self._entries.items():
            standing = old.get(digest)
            meter = self._keys[digest].meter if standing is not None and standing.limits == entry.limits else None
            keys[digest] = _access_of(entry, meter)
        self._keys = keys


def _access_of(entry: KeyEntry, meter: Meter | None) -> Access:
    limits = entry.limits
    if meter is None and (limits.instances_per_minute is not None or limits.max_in_flight is not None):
        meter = Meter(limits.instances_per_minute, limits.max_in_flight)
    return Access(
        entry.name,
        frozenset(entry.scopes),
        None if entry.runs is None else tuple(entry.runs),
        math.inf if entry.expires is None else entry.expires.timestamp(),
        meter,
    )


def _stamp_of(path: Path) -> Stamp | None:
    """Return the file's stamp; None if it is not there. Follows links, as those of a Kubernetes Secret."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _differences(before: dict[bytes, KeyEntry], after: dict[bytes, KeyEntry]) -> list[str]:
    words = [f"added {after[digest].name} ({after[digest].id})" for digest in after if digest not in before]
    words += [f"removed {before[digest].name} ({before[digest].id})" for digest in before if digest not in after]
    words += [
        f"changed {entry.name} ({entry.id})"
        for digest, entry in after.items()
        if digest in before and before[digest] != entry
    ]
    return words
