"""A clock that tests move: what a store keeps for a time is gone at once, and nobody sleeps for it."""

from __future__ import annotations

from collections.abc import Callable

import redis

from service.stores.records import system_ms


class Clock:
    """The system's clock and what tests have added to it.

    Args:
        server_url: URL of the server that holds a run's keys, which grow older with the clock; None for a store in
            memory.
    """

    def __init__(self, server_url: Callable[[str], str] | None = None) -> None:
        self._server_url = server_url
        self._added_ms = 0

    def now_ms(self) -> int:
        """Milliseconds since 1970 by this clock."""
        return system_ms() + self._added_ms

    def advance(self, seconds: float, run: str) -> None:
        """Let so much time pass, for all who read the clock, and for one run's keys and waiting audits."""
        self._added_ms += round(seconds * 1000)
        if self._server_url is not None:
            _age(self._server_url(run), run, round(seconds * 1000))


def _age(url: str, run: str, milliseconds: int) -> None:
    with redis.Redis.from_url(url) as client:
        for key in client.execute_command("KEYS", f"rr:{{{run}}}:*"):
            expires_ms = client.execute_command("PEXPIRETIME", key)
            if expires_ms > 0:
                # A time in the past deletes the key.
                client.execute_command("PEXPIREAT", key, expires_ms - milliseconds)
        waiting = f"rr:{{{run}}}:waiting"
        for name, due_ms in client.zrange(waiting, 0, -1, withscores=True):  # type: ignore[union-attr]
            if due_ms:
                client.zadd(waiting, {name: due_ms - milliseconds})
