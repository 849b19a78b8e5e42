"""What a caller may do: the scopes of its key, the runs that it may name, and its limits.

Built by `ring` from the keys file; handed by the handlers to the use cases, which check the runs that a request names.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase

from service.errors import ForbiddenError, KeyLimitError


class Scope(StrEnum):
    """What a key may be for. None includes another."""

    REWARD = "reward"
    """Ask for rewards."""
    FEEDBACK = "feedback"
    """Teach: send feedback, and judge audits."""
    READ = "read"
    """See the pool, the posteriors, the reports, and the audits with their texts."""
    ADMIN = "admin"
    """Change the gateway; every such act is written to the log of acts."""


class Meter:
    """Counts what one key uses, on the event loop of one gateway process.

    Args:
        instances_per_minute: instances (a request that carries none counts as one) that may be asked about. A minute's
            worth may come at once. None: any number.
        max_in_flight: requests that may be under way at once. None: any number.
    """

    __slots__ = ("_at", "_left", "in_flight", "instances_per_minute", "max_in_flight")

    def __init__(self, instances_per_minute: int | None, max_in_flight: int | None) -> None:
        self.instances_per_minute = instances_per_minute
        self.max_in_flight = max_in_flight
        self.in_flight = 0
        self._left = float(instances_per_minute or 0)
        self._at = time.monotonic()

    def take(self, count: int, now: float | None = None) -> float:
        """Take so many instances if any are left; return 0.0, or the seconds until there will be one again.

        A batch may take more than are left, and the next ones wait the longer: what is in a batch is known only after
        it was read.
        """
        if self.instances_per_minute is None:
            return 0.0
        now = time.monotonic() if now is None else now
        per_second = self.instances_per_minute / 60.0
        self._left = min(float(self.instances_per_minute), self._left + (now - self._at) * per_second)
        self._at = now
        if self._left < 1.0:
            return (1.0 - self._left) / per_second
        self._left -= count
        return 0.0

    def charge(self, count: int) -> None:
        """Take so many more of a request that `take` has let pass."""
        self._left -= count


@dataclass(frozen=True, slots=True)
class Access:
    """What the holder of one key may do.

    Attributes:
        name: of the key, as the keys file has it; shown in errors and in the log of acts.
        scopes: what it is for.
        runs: names of runs, or patterns of them with `*`; None: every run.
        expires: seconds since the epoch from which the key is refused.
        meter: its limits; None where it has none.
    """

    name: str
    scopes: frozenset[Scope]
    runs: tuple[str, ...] | None = None
    expires: float = math.inf
    meter: Meter | None = field(default=None, compare=False)

    def check_scope(self, scope: Scope) -> None:
        """Return if the key is for this.

        Raises:
            ForbiddenError: it is not.
        """
        if scope not in self.scopes:
            has = ", ".join(sorted(self.scopes)) or "none"
            raise ForbiddenError(
                f"this needs the scope {scope.value!r}, and the key {self.name!r} has {has}: send another key, or make "
                f"one with `reward-router keys new --scope {scope.value}`",
                details={"scope": scope.value},
            )

    def sees(self, run: str) -> bool:
        """Return True if the key may name this run."""
        return self.runs is None or any(fnmatchcase(run, pattern) for pattern in self.runs)

    def check_run(self, run: str) -> None:
        """Return if the key may name this run.

        Raises:
            ForbiddenError: it may not.
        """
        if not self.sees(run):
            raise ForbiddenError(
                f"the key {self.name!r} may not use run {run!r}: name one of its runs, {', '.join(self.runs or ())}",
                details={"run": run, "field": "run"},
            )

    def seen(self, runs: Iterable[str]) -> list[str]:
        """Return those of the runs that the key may name."""
        return [run for run in runs if self.sees(run)]

    def enter(self) -> None:
        """Count a request that begins; `leave` ends it.

        Raises:
            KeyLimitError: the key has used up its limits.
        """
        meter = self.meter
        if meter is None:
            return
        if meter.max_in_flight is not None and meter.in_flight >= meter.max_in_flight:
            raise KeyLimitError(
                f"the key {self.name!r} has {meter.max_in_flight} requests under way (max_in_flight of the key): send "
                "fewer at once",
                details={"limit": meter.max_in_flight},
                retry_after_seconds=1,
            )
        seconds = meter.take(1)
        if seconds:
            raise KeyLimitError(
                f"the key {self.name!r} may ask about {meter.instances_per_minute} instances a minute "
                "(instances_per_minute of the key): wait, or raise its limit",
                details={"limit": meter.instances_per_minute},
                retry_after_seconds=math.ceil(seconds),
            )
        meter.in_flight += 1

    def leave(self) -> None:
        """End what `enter` began."""
        if self.meter is not None:
            self.meter.in_flight -= 1

    def charge(self, instances: int) -> None:
        """Count the instances of a request; `enter` has counted one."""
        if self.meter is not None and instances > 1:
            self.meter.charge(instances - 1)


EVERYTHING = Access("no key", frozenset(Scope))
"""Of callers of a gateway without keys, and of calls within the process."""
