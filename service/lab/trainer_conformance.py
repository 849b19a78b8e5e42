"""Does a gateway answer what trainers send? Their requests, in our own wording, are replayed against it.

Each recording has the shape of one trainer's requests: templated text, messages, several turns, calls of tools, an
empty batch. An answer counts if the trainer's own client would take it: status 200, the right fields, as many finite
numbers as samples. Called by `service.cli.check_trainer`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx
import msgspec

from service.trainers.protocols import PROTOCOLS
from service.trainers.recorded import TOOLS, TURNS

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Recording:
    """One request of a trainer.

    Attributes:
        trainer: its name; several where they share a helper.
        what: the request in words.
        path: where it is sent.
        body: what is sent.
        rewards: how many rewards have to come back.
    """

    trainer: str
    what: str
    path: str
    body: Document
    rewards: int


@dataclass(frozen=True, slots=True)
class Replayed:
    """What became of one recording; `problem` is None where the trainer would have its rewards."""

    recording: Recording
    problem: str | None


HELPERS = "TRL, verl, ms-swift, AReaL, verifiers, SkyRL, ROLL, Atropos, NeMo Gym, NeMo RL"
"""Who asks through the client, by `/reward/batch`."""


def recordings() -> list[Recording]:
    """Return all of them: every URL protocol's example and recorded requests, and what the helpers' client sends."""
    asked = [
        Recording(one.trainer, what, one.path, body, 1 if one.single else _count(body))
        for one in PROTOCOLS
        for what, body in {"its example": one.example, **one.recorded}.items()
    ]
    group = {"prompt": "What is 7 + 5?", "responses": ["12", "13", "Twelve."], "reference": "12"}
    turns = {"prompt": TURNS, "responses": ["24"]}
    tools = {"prompt": "What is 7 + 5?", "responses": [TOOLS]}
    return [
        *asked,
        Recording(HELPERS, "a group with a reference", "/reward/batch", {"items": [group]}, 3),
        Recording(HELPERS, "several turns", "/reward/batch", {"items": [turns]}, 1),
        Recording(HELPERS, "calls of tools", "/reward/batch", {"items": [tools]}, 1),
        Recording(HELPERS, "a batch of both", "/reward/batch", {"items": [turns, tools]}, 2),
    ]


def replay(client: httpx.Client, query: Mapping[str, str]) -> list[Replayed]:
    """Send every recording, and say which would work.

    Args:
        client: whose base URL is the gateway's.
        query: what a trainer's URL says, such as `run`; the client's requests say it in their body.
    """
    return [Replayed(one, _problem(client, one, query)) for one in recordings()]


def _problem(client: httpx.Client, recording: Recording, query: Mapping[str, str]) -> str | None:
    batch = recording.path == "/reward/batch"
    body = {**recording.body, **query} if batch else recording.body
    try:
        answer = client.post(recording.path, json=body, params={} if batch else dict(query))
    except httpx.TransportError as error:
        return f"{type(error).__name__}: {error}"
    if answer.status_code != 200:
        return f"status {answer.status_code}: {answer.text[:300]}"
    try:
        rewards = _rewards(recording.path, answer.content)
    except (msgspec.MsgspecError, KeyError, TypeError, IndexError) as error:
        return f"the answer cannot be read ({error}): {answer.text[:300]}"
    numbers = [one for one in rewards if isinstance(one, int | float) and math.isfinite(one)]
    if len(rewards) != recording.rewards or len(numbers) != len(rewards):
        return f"{recording.rewards} rewards were asked for, and the answer is {answer.text[:300]}"
    return None


def _rewards(path: str, content: bytes) -> Sequence[Any]:
    if path == "/reward/batch":
        results = msgspec.json.decode(content)["results"]
        return [reward for one in results for reward in one.get("rewards", [None])]
    [protocol] = [one for one in PROTOCOLS if one.path == path]
    if protocol.reply is None:
        return [msgspec.json.decode(content)]
    reply: Any = msgspec.json.decode(content, type=protocol.reply)
    found: Sequence[Any] = reply.scores
    return found


def _count(body: Document) -> int:
    """Return how many samples a body of lists holds."""
    return len(next(value for value in body.values() if isinstance(value, list)))
