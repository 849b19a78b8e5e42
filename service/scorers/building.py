"""What the builders of scorers behind servers share. Called by the `build` modules of the kinds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from service.errors import ConfigurationError
from service.scorers.health import HealthPolicy
from service.settings import Settings


def require_urls(word: str, name: str, urls: Sequence[str]) -> None:
    """Raise ConfigurationError if a scorer of the pool file has no URLs.

    Args:
        word: what errors call the scorer, for example `judge`.
        name: its name in the pool.
        urls: of its servers.
    """
    if not urls:
        raise ConfigurationError(
            f"{word} {name!r} has no `urls` in the pool file: say where it is served, or let `reward-router up` start "
            "it"
        )


def checking(name: str, settings: Settings, timeout_seconds: float) -> tuple[HealthPolicy, np.random.Generator]:
    """Return when a scorer's servers are checked, and the generator of its pauses.

    Each scorer has a seed of its own, so that those of a pool are not checked all at once.

    Args:
        name: the scorer's name in the pool.
        settings: the interval and the seed.
        timeout_seconds: longest wait for one answer.
    """
    seed = None if settings.seed is None else [settings.seed, *name.encode()]
    return HealthPolicy(settings.health_interval_seconds, timeout_seconds), np.random.default_rng(seed)
