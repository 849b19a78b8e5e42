"""API keys of callers: which headers carry one, and whether it is right. Knows no route."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Sequence

from service.errors import UnauthorizedError


class ApiKeys:
    """Checks `Authorization: Bearer KEY` or `X-API-Key: KEY` in constant time; without keys everything passes.

    `Authorization: Basic` with the key as password passes too: trainers that know a URL and no headers send it for
    `http://any:KEY@host/…`. Names of schemes are read in capitals or not, as RFC 9110 (11.1) has it.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    @property
    def needed(self) -> bool:
        """True if callers must send a key."""
        return bool(self._keys)

    def check(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Return if a key is right.

        Raises:
            UnauthorizedError: none, or a wrong one.
        """
        if not self._keys:
            return
        for name, value in headers:
            given = _authorization(value) if name == b"authorization" else value if name == b"x-api-key" else b""
            if given and any(hmac.compare_digest(given, key) for key in self._keys):
                return
        raise UnauthorizedError(
            "API key missing or wrong: send `Authorization: Bearer KEY` or `X-API-Key: KEY`. The gateway's keys are "
            "its REWARD_ROUTER_API_KEYS; commands and trainers' clients read theirs from REWARD_ROUTER_API_KEY"
        )


def _authorization(value: bytes) -> bytes:
    """The key of an `Authorization` header; b"" where it holds none."""
    scheme, _, given = value.partition(b" ")
    given = given.strip(b" ")
    match scheme.lower():
        case b"bearer":
            return given
        case b"basic":
            try:
                return base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return b""
        case _:
            return b""
