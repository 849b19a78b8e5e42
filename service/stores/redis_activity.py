"""The part of `RedisStore` that the console needs: what all gateways of a run have decided of late, and its charts.

Knows their keys; never looks inside a decision or a point. `service.stores.redis.RedisStore` inherits it.

Keys of a run R, beside those of `service.stores.redis`:

    rr:{R}:counts     hash: totals by name                     for ever
    rr:{R}:newest     sorted set: decision, when it was made   as long as its teller says, after the last one
    rr:{R}:at:<slot>  a point of the charts                    as long as its maker says
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from service.stores.protocol import Activity
from service.stores.redis_base import RedisBase, run_prefix
from service.stores.resp import Arg


class RedisActivity(RedisBase):
    """See `service.stores.protocol.Store` for the methods."""

    async def tell_activity(
        self,
        run: str,
        counts: Mapping[str, float],
        newest: Sequence[tuple[int, bytes]],
        *,
        keep: int,
        seconds: float,
    ) -> None:
        """Add to the run's totals, and to its newest decisions, in one write."""
        prefix = run_prefix(run)
        commands: list[tuple[Arg, ...]] = [
            ("HINCRBYFLOAT", prefix + "counts", name, repr(count)) for name, count in counts.items()
        ]
        for time_ms, decision in newest:
            commands.append(("ZADD", prefix + "newest", time_ms, decision))
        commands.append(("ZREMRANGEBYRANK", prefix + "newest", 0, -(keep + 1)))
        commands.append(("PEXPIRE", prefix + "newest", round(seconds * 1000)))
        for reply in await self._hot.pipeline(commands):
            self._hot.checked(reply)

    async def activity(self, run: str, *, newest: int) -> Activity:
        """Return the run's totals and up to so many of its newest decisions."""
        prefix = run_prefix(run)
        commands: list[tuple[Arg, ...]] = [("HGETALL", prefix + "counts")]
        if newest:
            commands.append(("ZRANGE", prefix + "newest", -newest, -1))
        words, *found = [self._hot.checked(reply) for reply in await self._hot.pipeline(commands)]
        counts = {bytes(name).decode(): float(count) for name, count in zip(words[::2], words[1::2], strict=True)}
        return Activity(counts, [bytes(decision) for decision in found[0]] if found else [])

    async def keep_point(self, run: str, slot: int, point: bytes, *, seconds: float) -> bytes:
        """Keep a point unless the slot has one; return the one that stands."""
        key, milliseconds = f"{run_prefix(run)}at:{slot}", max(round(seconds * 1000), 1)
        standing = await self._hot.execute("SET", key, point, "NX", "GET", "PX", milliseconds)
        return point if standing is None else bytes(standing)

    async def points(self, run: str, slots: Sequence[int]) -> list[bytes]:
        """Return the points of these slots, in their order, without those that have none."""
        prefix = run_prefix(run)
        found = await self._hot.execute("MGET", *[f"{prefix}at:{slot}" for slot in slots])
        return [bytes(point) for point in found if point is not None]
