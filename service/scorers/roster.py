"""Roster: this gateway's connections to the scorers of all runs, built when a run's pool first names them.

A scorer of one name and one entry is connected to once, however many runs ask it. One that no open run asks any more is
closed when nobody can still be waiting for it. Built by `service.gateway`, called by `service.assembly`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from service.errors import ConfigurationError
from service.pool import Entry, PoolFile
from service.scorers.absent import AbsentScorer
from service.scorers.protocol import OverLong, Scorer
from service.scorers.registry import build_scorer
from service.settings import Settings
from service.specification import effective, entry_fields

logger = logging.getLogger(__name__)


class Roster:
    """Connections.

    Args:
        settings: limits and times.
        pool: the gateway's own pool file: addresses and keys.
        given: scorers to be used instead of connections, by name; for tests and benchmarks.
        wrap: goes around every connection, for tracing.
        grace_seconds: how long a scorer is kept after the last run has let go of it.
    """

    def __init__(
        self,
        settings: Settings,
        pool: PoolFile,
        *,
        given: Mapping[str, Scorer] | None = None,
        wrap: Callable[[Scorer], Scorer] = lambda scorer: scorer,
        grace_seconds: float,
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._local: dict[str, Entry] = {entry.name: entry for entry in pool.scorers}
        self._given = dict(given or {})
        self._built: dict[str, Scorer] = dict(self._given)
        self._begun: set[str] = set()
        self._leaving: dict[str, float] = {}
        self._wrap = wrap
        self._grace_seconds = grace_seconds
        self._read_ms = int(time.time() * 1000)

    def scorer(self, fields: Mapping[str, Any], pool: Mapping[str, Any], changed_ms: int = 0) -> Scorer:
        """Return the scorer of an entry; one that cannot be built is a scorer that is away, and the log says why.

        Args:
            fields: the entry, as a run has it.
            pool: fields of the run's pool file beside its scorers.
            changed_ms: when the run's entry was last changed.
        """
        name = str(fields["name"])
        if name in self._given:
            return self._given[name]
        try:
            entry = effective(fields, self._local.get(name), newer=changed_ms > self._read_ms)
            key = self._key(entry, pool)
            if key not in self._built:
                self._built[key] = self.build(entry, pool)
        except ConfigurationError as error:
            logger.error("scorer cannot be asked", extra={"fields": {"scorer": name, "error": error.message}})
            key = f"{name} away {error.message}"
            self._built.setdefault(key, AbsentScorer(name, str(fields.get("kind", "rm")), error.message))
        return self._built[key]

    def build(self, entry: Entry, pool: Mapping[str, Any]) -> Scorer:
        """Return a new connection, which nobody keeps.

        Raises:
            ConfigurationError: see `build_scorer`.
        """
        over_long = OverLong(pool.get("over_long", OverLong.SKIP))
        pool_file = self._pool.model_copy(update={"over_long": over_long})
        return self._wrap(build_scorer(entry, self._settings, pool_file))

    def keep(self, entry: Entry, scorer: Scorer, pool: Mapping[str, Any]) -> None:
        """Take a connection that `build` has made, for `scorer` to find."""
        self._built.setdefault(self._key(entry, pool), scorer)

    @staticmethod
    def _key(entry: Entry, pool: Mapping[str, Any]) -> str:
        # Prices are the router's.
        fields = {**entry_fields(entry), "api_key": entry.api_key, "price": None}
        return json.dumps([fields, pool.get("over_long")], sort_keys=True, default=str)

    @property
    def scorers(self) -> Sequence[Scorer]:
        """Everybody who is connected to."""
        return tuple(self._built.values())

    def holds(self, scorers: Iterable[Scorer]) -> bool:
        """Return True if none of them was closed by `let_go`."""
        held = {id(scorer) for scorer in self._built.values()}
        return all(id(scorer) in held for scorer in scorers)

    async def begin(self, scorers: Iterable[Scorer]) -> None:
        """Probe the scorers that are new here, and begin their health checks. A wrong worker gets no traffic."""
        keys = {id(scorer): key for key, scorer in self._built.items()}
        fresh = [key for scorer in scorers if (key := keys.get(id(scorer))) is not None and key not in self._begun]
        self._begun.update(fresh)
        await asyncio.gather(*(self._built[key].check() for key in fresh))
        for key in fresh:
            self._built[key].start()

    async def let_go(self, used: Iterable[Scorer], now: float) -> None:
        """Close the scorers that no run has asked for `grace_seconds`.

        Args:
            used: scorers of all open runs, and of the gateway's own pool.
            now: monotonic time.
        """
        kept = {id(scorer) for scorer in used}
        for key, scorer in list(self._built.items()):
            if id(scorer) in kept or key in self._given:
                self._leaving.pop(key, None)
            elif now - self._leaving.setdefault(key, now) >= self._grace_seconds:
                del self._built[key], self._leaving[key]
                self._begun.discard(key)
                await scorer.close()

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(scorer.close() for scorer in self._built.values()))
