"""What each call of the client asks, whichever client asks it: its exchanges, its headers, its deadline.

Knows options and exchanges; opens no connection. `client` derives both clients from it.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import quote

import httpx2 as httpx

from service.trainers.conversation import said_length
from service.trainers.exchange import (
    Answer,
    Broken,
    Exchange,
    Patience,
    Send,
    Words,
    call,
    chunks,
    feedback_chunk,
    reward_chunk,
    reward_single,
    why_again,
)
from service.trainers.options import ClientOptions
from service.trainers.values import (
    Accepted,
    Feedback,
    FeedbackResult,
    RewardItem,
    RewardResult,
    Scored,
    accepted_from,
)

logger = logging.getLogger("reward_router")

KEEP_ALIVE_SECONDS = 3.0
"""Idle connections are kept for less than the 5 s after which uvicorn closes them."""


class Calls:
    """What both clients share: options, and the exchanges of each call."""

    def __init__(self, options: ClientOptions | None = None, **fields: Any) -> None:
        self.options = options if options is not None else ClientOptions(**fields)
        if options is not None and fields:
            raise ValueError(f"options and {sorted(fields)} were given: put the latter into the options")
        self._failing = False
        self._reached = False

    def __reduce__(self) -> tuple[type[Self], tuple[ClientOptions]]:
        """Options alone: connections do not travel."""
        return type(self), (self.options,)

    def _heard(self, send: Send, answer: Answer | Broken) -> Answer | Broken:
        """Return the answer; warn of the first of several tries that fail, and say when one succeeds again."""
        failure = why_again(answer)
        self._reached = self._reached or isinstance(answer, Answer)
        if failure is not None and not self._failing:
            said = (
                "the gateway at %s does not answer %s (%s): trying again for up to %.0f s"
                if self._reached
                else "nothing has ever answered at %s (%s, %s): is this the gateway's URL, and is the gateway running? "
                "Trying again for up to %.0f s"
            )
            left = max(send.deadline - time.monotonic(), 0.0)
            logger.warning(said, self.options.url, send.path, failure, left)
        elif failure is None and self._failing:
            logger.warning("the gateway at %s answers again", self.options.url)
        self._failing = failure is not None
        return answer

    def _patience(self, deadline_seconds: float | None) -> Patience:
        seconds = self.options.deadline_seconds if deadline_seconds is None else deadline_seconds
        return Patience(time.monotonic() + seconds, self.options.attempt_seconds, time.monotonic, random.random)

    def _reward_words(self) -> Words:
        options = self.options
        return Words(
            {
                "run": options.run,
                "policy": options.policy,
                "signal": options.signal,
                "normalize": options.normalize,
            }
        )

    def _reward_exchanges(self, items: Sequence[RewardItem], patience: Patience) -> list[Exchange[list[RewardResult]]]:
        sizes = [said_length(item.prompt) + sum(map(said_length, item.responses)) for item in items]
        lists = chunks(items, sizes, self.options.max_items, self.options.max_bytes)
        return [reward_chunk(part, self._reward_words(), patience) for part in lists]

    def _feedback_exchanges(
        self, items: Sequence[Feedback], patience: Patience
    ) -> list[Exchange[list[FeedbackResult]]]:
        sizes = [sum(map(said_length, (item.prompt or "", *(item.responses or ())))) for item in items]
        lists = chunks(items, sizes, self.options.max_items, self.options.max_bytes)
        return [feedback_chunk(part, Words({"run": self.options.run}), patience) for part in lists]

    def _one_reward(self, item: RewardItem, patience: Patience) -> Exchange[Scored]:
        words = {name: value for name, value in self._reward_words().fields.items() if value is not None}
        return reward_single({**words, **item.document()}, patience)

    def _one_feedback(self, item: Feedback, patience: Patience) -> Exchange[Accepted]:
        words = {} if self.options.run is None else {"run": self.options.run}
        return accepted_from((yield from call("/feedback", {**words, **item.document()}, patience)))

    def _posterior(self, run: str | None, patience: Patience) -> Exchange[dict[str, Any]]:
        name = run or self.options.run
        path = "/posterior" if name is None else f"/posterior?run={quote(name, safe='')}"
        document: dict[str, Any] = yield from call(path, None, patience)
        return document

    def _http(self, transport: object | None) -> dict[str, Any]:
        """Arguments of both of httpx's clients."""
        options = self.options
        limits = httpx.Limits(
            max_connections=options.connections,
            max_keepalive_connections=options.connections,
            keepalive_expiry=KEEP_ALIVE_SECONDS,
        )
        headers = {"content-type": "application/json"}
        if options.api_key is not None:
            headers["authorization"] = f"Bearer {options.api_key}"
        chosen: dict[str, Any] = {} if transport is None else {"transport": transport}
        if options.url.startswith("http://"):
            # Reading the certificate authorities takes longer than many a request.
            chosen["verify"] = False
        return {
            "base_url": options.url,
            "headers": headers,
            "limits": limits,
            "trust_env": options.trust_env,
            **chosen,
        }
