"""Lua scripts of the store, by file, and the value that they compare a run's identity with.

Called by `service.stores.redis` and its halves.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from service.stores.protocol import RunIdentity


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and the name under which the server caches it."""

    text: str
    sha1: str

    @classmethod
    def load(cls, name: str) -> Script:
        text = Path(__file__).with_name(name).read_text(encoding="utf-8")
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def identity_value(identity: RunIdentity) -> bytes:
    """Return `<born> <fingerprint>`, the value of a run's key `meta`."""
    return identity.born.encode() + b" " + identity.fingerprint
