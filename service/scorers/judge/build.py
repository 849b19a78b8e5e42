"""From an entry of the pool file to a judge. Called by `service.scorers.registry`."""

from __future__ import annotations

from typing import Final

from service.scorers.building import checking, require_urls
from service.scorers.health import ReplicaMonitor
from service.scorers.judge.client import JudgeConfig, JudgeScorer
from service.scorers.judge.dialogue import ChatOptions
from service.scorers.judge.entry import JudgeEntry
from service.scorers.judge.health import JudgeChecks
from service.scorers.judge.rubrics import load_rubric
from service.settings import Settings

TIMEOUT_SECONDS: Final = 60.0
"""Time of one request by default: judges that give reasons write hundreds of tokens."""


def build_judge(entry: JudgeEntry, settings: Settings) -> JudgeScorer:
    """Return the client of a judge's servers. The caller closes it.

    Raises:
        ConfigurationError: no `urls`, or the rubric, a URL or the key cannot be used.
    """
    require_urls("judge", entry.name, entry.urls)
    timeout = entry.timeout_seconds or TIMEOUT_SECONDS
    return JudgeScorer(
        JudgeConfig(
            name=entry.name,
            urls=entry.urls,
            options=ChatOptions(
                entry.served, entry.max_tokens, entry.temperature, entry.label_mass, entry.extra_body or None
            ),
            rubric=load_rubric(entry.rubric),
            mode=entry.mode,
            verdict=entry.verdict,
            comparisons=entry.comparisons,
            max_in_flight=entry.max_in_flight or settings.worker_max_in_flight,
            attempt_timeout_seconds=timeout,
            answer_seconds=settings.worker_timeout_seconds,
            requests_per_minute=entry.requests_per_minute,
            tokens_per_minute=entry.tokens_per_minute,
            api_key=entry.key(),
            applies=entry.admits if entry.choosy else None,
        ),
        monitor=lambda judge: ReplicaMonitor([JudgeChecks(judge)], *checking(entry.name, settings, timeout)),
    )
