"""From an entry of the pool file to the client of a service that speaks the scorer protocol.

Called by `service.scorers.registry` for the kinds `http` and `rule`.
"""

from __future__ import annotations

from service.scorers.building import checking, require_urls
from service.scorers.entry import ScorerEntry
from service.scorers.health import ReplicaMonitor
from service.scorers.http.client import HttpConfig, HttpScorer
from service.settings import Settings


def build_http_scorer(entry: ScorerEntry, settings: Settings) -> HttpScorer:
    """Return the client of a scorer's servers. The caller closes it.

    Raises:
        ConfigurationError: no `urls`, or one of them or the key cannot be used.
    """
    require_urls(entry.kind, entry.name, entry.urls)
    timeout = entry.timeout_seconds or settings.worker_timeout_seconds
    return HttpScorer(
        HttpConfig(
            name=entry.name,
            kind=entry.kind,
            urls=entry.urls,
            max_in_flight=entry.max_in_flight or settings.worker_max_in_flight,
            attempt_timeout_seconds=timeout,
            timeout_seconds=entry.timeout_seconds,
            requests_per_minute=entry.requests_per_minute,
            tokens_per_minute=entry.tokens_per_minute,
            api_key=entry.key(),
            applies=entry.admits if entry.choosy else None,
        ),
        monitor=lambda scorer: ReplicaMonitor([scorer], *checking(entry.name, settings, timeout)),
    )
