"""The part of `RedisStore` that groups and normalised scores need: sticky choices, and the log of score moments.

Knows their keys; never looks inside a value. `service.stores.redis.RedisStore` inherits it.

Keys of a run R, beside those of `service.stores.redis`:

    rr:{R}:s:<hash>   a sticky choice                          as long as it sticks
    rr:{R}:scores     stream of score moments: m the entry     until trimmed
    rr:{R}:scale      hash: position, data                     for ever
"""

from __future__ import annotations

from collections.abc import Sequence

from service.stores.protocol import ScoreEntry, ScoreLogPart
from service.stores.redis_base import RedisBase, run_prefix
from service.stores.resp import Arg, Reply


class RedisScores(RedisBase):
    """See `service.stores.protocol.Store` for the methods."""

    async def stick(self, run: str, choices: Sequence[tuple[str, bytes]], *, seconds: float) -> list[bytes | None]:
        """Set each choice if none stands, all in one write; None where it was set, else the one that stands."""
        prefix, milliseconds = run_prefix(run), max(round(seconds * 1000), 1)
        commands: list[tuple[Arg, ...]] = [
            ("SET", f"{prefix}s:{key}", value, "NX", "GET", "PX", milliseconds) for key, value in choices
        ]
        return [self._hot.checked(reply) for reply in await self._hot.pipeline(commands)]

    async def exchange_scores(self, run: str, entries: Sequence[bytes], *, after: str, count: int) -> ScoreLogPart:
        """Append, then read what comes after `after`, then the log's status: one write."""
        key = run_prefix(run) + "scores"
        commands: list[tuple[Arg, ...]] = [("XADD", key, "*", "m", entry) for entry in entries]
        commands.append(("XREAD", "COUNT", count, "STREAMS", key, after))
        # Last, so that what is trimmed between the two is noticed.
        commands.append(("XINFO", "STREAM", key))
        *added, read, info = await self._hot.pipeline(commands)
        for reply in added:
            self._hot.checked(reply)
        found = self._hot.checked(read)
        status, _ = self._log_status(info)
        return ScoreLogPart([_entry(reply) for reply in found[0][1]] if found else [], status)

    async def load_scale(self, run: str) -> bytes | None:
        """The newest snapshot of the score moments, or None."""
        data: bytes | None = await self._bulk.execute("HGET", run_prefix(run) + "scale", "data")
        return data

    async def save_scale(self, run: str, position: int, data: bytes, *, trim_before: str) -> None:
        """Keep the snapshot unless a newer one is kept, and drop the entries before that id."""
        prefix = run_prefix(run)
        await self._keep_newest(prefix + "scale", position, data)
        await self._bulk.execute(
            "XTRIM", prefix + "scores", "MINID", "=", trim_before, timeout_seconds=self._bulk_timeout
        )


def _entry(reply: Reply) -> ScoreEntry:
    entry_id, words = reply
    return ScoreEntry(entry_id.decode(), words[1])
