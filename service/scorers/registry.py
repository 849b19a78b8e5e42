"""Kinds of scorers: what the pool file calls them, and what makes one. A new kind is a room here and a line in `KINDS`.

Called by `service.gateway` and by tools that ask a pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from service.pool import Entry, PoolFile
from service.scorers.http.build import build_http_scorer
from service.scorers.judge.build import build_judge
from service.scorers.protocol import Scorer
from service.scorers.rm.build import build_reward_model
from service.settings import Settings

Builder = Callable[[Any, Settings, PoolFile], Scorer]
"""Makes a scorer from an entry of its kind, the settings and its pool."""

KINDS: Final[Mapping[str, Builder]] = {
    "rm": lambda entry, settings, pool: build_reward_model(entry, settings, pool.over_long),
    "judge": lambda entry, settings, pool: build_judge(entry, settings),
    "rule": lambda entry, settings, pool: build_http_scorer(entry, settings),
    "http": lambda entry, settings, pool: build_http_scorer(entry, settings),
}


def build_scorer(entry: Entry, settings: Settings, pool: PoolFile) -> Scorer:
    """Return the scorer of an entry of the pool file. The caller closes it.

    Raises:
        ConfigurationError: the entry does not say where the scorer is, or names something that cannot be used.
    """
    return KINDS[entry.kind](entry, settings, pool)
