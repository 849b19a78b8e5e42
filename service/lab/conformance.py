"""Does a service speak the scorer protocol? A list of checks, each with a sentence.

`reward-router check-scorer` prints them. They ask over HTTP what the gateway would ask, and what it must never be told.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from service.scorers.http.wire import (
    HEALTH_PATH,
    INFO_PATH,
    SCORE_PATH,
    Info,
    Result,
    read_results,
    value_problem,
)
from service.scorers.transport.exchange import AnswerError
from service.scorers.transport.http import HttpError, HttpPool, Response
from service.scorers.wire import error_message

MANY: Final = 16
"""Requests that are sent at once."""

LONG: Final = "word " * 4000
"""A response of 20,000 characters."""

AWKWARD: Final = ("", " \n", '«naïve» 東京 🙂 \u0000 \\ " </s> {{x}}', LONG)
"""Responses that a service has to bear."""


class CheckError(Exception):
    """A check failed; the message says what was seen and what to do."""


@dataclass(frozen=True, slots=True)
class Checked:
    """One check and how it went.

    Attributes:
        sentence: what the service has to do.
        problem: what it did instead; None where it passed.
    """

    sentence: str
    problem: str | None


@dataclass(frozen=True, slots=True)
class Sample:
    """An item that the service is asked about.

    Attributes:
        item: of the protocol, with at least two different responses.
        own: somebody gave it, so that the service has to give a reward.
    """

    item: dict[str, Any]
    own: bool = False


DEFAULT_SAMPLE: Final = Sample(
    {"prompt": "What is 7 + 5?", "responses": ["The answer is 12.", "It is 13."], "reference": "12"}
)


class Service:
    """The service that is checked.

    Args:
        pool: connections to it.
        keyless: the same without the key; None where there is none.
        seconds: longest time of one answer.
        sample: what it is asked about.
    """

    def __init__(self, pool: HttpPool, keyless: HttpPool | None, seconds: float, sample: Sample) -> None:
        self._pool = pool
        self.keyless = keyless
        self._seconds = seconds
        self.sample = sample

    async def send(self, method: str, path: str, body: bytes = b"", pool: HttpPool | None = None) -> Response:
        """Return the response, whatever its status.

        Raises:
            CheckError: there is none.
        """
        deadline = asyncio.get_running_loop().time() + self._seconds
        try:
            return await (pool or self._pool).request(method, path, body, deadline=deadline)
        except HttpError as error:
            raise CheckError(f"{method} {path}: {error}") from error

    async def fetch(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Return the body of an answer with status 200.

        Raises:
            CheckError: another status.
        """
        response = await self.send(method, path, body)
        if response.status != 200:
            raise CheckError(f"{method} {path} answered {response.status}: {error_message(response.body)}")
        return response.body

    async def score(self, *items: dict[str, Any], **fields: Any) -> list[Result]:
        """Return the results of items.

        Raises:
            CheckError: the answer is not of the protocol.
        """
        body = await self.fetch("POST", SCORE_PATH, json.dumps({"items": items, **fields}).encode())
        try:
            results = read_results(body, [len(item["responses"]) for item in items])
        except AnswerError as error:
            raise CheckError(str(error)) from error
        for result in results:
            problem = value_problem(result)
            if problem is not None:
                raise CheckError(problem)
        return results


async def check_service(service: Service) -> list[Checked]:
    """Return every check with its outcome, in order. A service without `/health` is asked nothing more."""
    checked: list[Checked] = []
    for sentence, check in CHECKS:
        try:
            await check(service)
        except CheckError as error:
            checked.append(Checked(sentence, str(error)))
            if check is _health:
                break
        else:
            checked.append(Checked(sentence, None))
    return checked


async def _health(service: Service) -> None:
    await service.fetch("GET", HEALTH_PATH)


async def _info(service: Service) -> None:
    body = await service.fetch("GET", INFO_PATH)
    try:
        msgspec.json.decode(body, type=Info)
    except msgspec.MsgspecError as error:
        raise CheckError(f"GET {INFO_PATH}: {error}; answer with name, kind and version") from error


async def _nothing(service: Service) -> None:
    await service.score()


async def _one(service: Service) -> None:
    (result,) = await service.score(service.sample.item)
    if service.sample.own and result.rewards is None:
        said = result.abstain if result.error is None else result.error.message
        raise CheckError(f"no rewards for the item that you gave: {said}")


async def _messages(service: Service) -> None:
    item = dict(service.sample.item)
    if "messages" in item:
        item["prompt"] = " ".join(turn["content"] for turn in item.pop("messages"))
    else:
        item["messages"] = [{"role": "user", "content": item.pop("prompt")}]
    await service.score(item)


async def _order(service: Service) -> None:
    item = service.sample.item
    other = {**item, "responses": [*reversed(item["responses"])]}
    longer = {**item, "responses": [*item["responses"], item["responses"][0]]}
    first = await service.score(item, longer, other)
    second = await service.score(other, item, longer)
    for left, right in zip(first, (second[1], second[2], second[0]), strict=True):
        if left.rewards != right.rewards:
            raise CheckError(
                f"an item had the rewards {left.rewards} as one of three, and {right.rewards} in another place: "
                "results must be in the order of the items, and the same item must earn the same"
            )


async def _equal(service: Service) -> None:
    response = service.sample.item["responses"][0]
    (result,) = await service.score({**service.sample.item, "responses": [response, response]})
    if result.rewards is not None and result.rewards[0] != result.rewards[1]:
        raise CheckError(f"two equal responses had the rewards {result.rewards}: score each text once")


async def _bare(service: Service) -> None:
    item = service.sample.item
    await service.score({name: item[name] for name in ("prompt", "messages", "responses") if name in item})


async def _unknown(service: Service) -> None:
    item = {**service.sample.item, "metadata": {"task": "math", "level": 3, "hard": True, "source": None}, "later": 1}
    await service.score(item, timeout_seconds=30.0, later=1)


async def _awkward(service: Service) -> None:
    await service.score(*({**service.sample.item, "responses": [text]} for text in AWKWARD))


async def _malformed(service: Service) -> None:
    for body in (b"{", b"[]", b'{"items": [{"responses": []}]}', b'{"items": [{"prompt": 1, "responses": ["a"]}]}'):
        response = await service.send("POST", SCORE_PATH, body)
        if not 400 <= response.status < 500:
            raise CheckError(f"{body.decode()} was answered with {response.status}; answer with 400 or 422")


async def _at_once(service: Service) -> None:
    body = json.dumps({"items": [service.sample.item]}).encode()
    for response in await asyncio.gather(*(service.send("POST", SCORE_PATH, body) for _ in range(MANY))):
        if response.status == 429 and response.retry_after_seconds is None:
            raise CheckError("429 without Retry-After: say in seconds when to come back")
        if response.status not in (200, 429):
            raise CheckError(f"one of them was answered with {response.status}: {error_message(response.body)}")


async def _key(service: Service) -> None:
    if service.keyless is None:
        return
    body = json.dumps({"items": [service.sample.item]}).encode()
    response = await service.send("POST", SCORE_PATH, body, service.keyless)
    if response.status not in (401, 403):
        raise CheckError(f"without the key it answered {response.status}; answer with 401")


CHECKS: Final[tuple[tuple[str, Callable[[Service], Awaitable[None]]], ...]] = (
    ("GET /health answers 200.", _health),
    ("GET /info says name, kind and version.", _info),
    ("POST /score without items answers without results.", _nothing),
    ("An item is rewarded, abstained from or failed: exactly one of them, one reward per response.", _one),
    ("A conversation may come as messages or as a prompt.", _messages),
    ("Results are in the order of the items, and do not depend on their neighbours.", _order),
    ("Equal responses of an item earn the same.", _equal),
    ("An item without reference and metadata is answered, if only by abstaining.", _bare),
    ("Metadata, timeout_seconds and unknown fields are accepted.", _unknown),
    ("Empty, long and unusual texts are answered.", _awkward),
    ("A malformed request is refused with 400 or 422.", _malformed),
    (f"{MANY} requests at once are answered, or refused with 429 and Retry-After.", _at_once),
    ("Without its key it refuses (checked where a key is given).", _key),
)
"""What is checked, in order."""
