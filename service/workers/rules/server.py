"""The rule worker's HTTP side, as raw ASGI: `POST /score`, `GET /health`, `GET /info` of the scorer protocol.

Reads and checks requests and cuts them into questions for `RulePool`. `reward-router worker --rule` runs it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import msgspec

from service.errors import ConfigurationError
from service.scorers.http.wire import (
    HEALTH_PATH,
    INFO_PATH,
    SCORE_PATH,
    Info,
    Item,
    Problem,
    Result,
    ScoreReply,
    ScoreRequest,
)
from service.scorers.wire import UNREADABLE, ErrorBody, ErrorReply
from service.workers.rules.child import ABSTAINED, REWARD, Outcome, Question
from service.workers.rules.processes import RuleConfig, RulePool
from service.workers.server import ApiError, Receive, Scope, Send, check_headers, expect, own_version, read_body

REQUEST_SECONDS: Final = 60.0
"""Time of a request that says no `timeout_seconds`."""


class RuleApp:
    """An ASGI application that scores by a rule.

    Args:
        config: the rule and its bounds.
        name: what `GET /info` says.
    """

    def __init__(self, config: RuleConfig, *, name: str) -> None:
        self._pool = RulePool(config)
        self._name = name
        self._requests = msgspec.json.Decoder(ScoreRequest)
        self._encoder = msgspec.json.Encoder()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point: `http` and `lifespan`."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        status = 200
        try:
            body = await self._route(scope, receive)
        except ApiError as error:
            status = error.status
            body = self._encoder.encode(ErrorReply(ErrorBody(str(error), error.kind, error.param, error.status)))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self._pool.start()
        except ConfigurationError as error:
            await send({"type": "lifespan.startup.failed", "message": error.message})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._pool.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _route(self, scope: Scope, receive: Receive) -> bytes:
        path, method = scope["path"], scope["method"]
        if path == SCORE_PATH:
            expect(method, "POST")
            check_headers(scope["headers"])
            return await self._score(await read_body(receive))
        if path == HEALTH_PATH:
            expect(method, "GET")
            return b"{}"
        if path == INFO_PATH:
            expect(method, "GET")
            return self._encoder.encode(Info(self._name, "rule", own_version()))
        raise ApiError("Not Found", status=404, kind="NotFoundError")

    async def _score(self, body: bytes) -> bytes:
        try:
            request = self._requests.decode(body)
        except UNREADABLE as error:
            raise ApiError(f"The body is not a score request: {error}") from error
        for index, item in enumerate(request.items):
            if (item.prompt is None) == (item.messages is None):
                raise ApiError(f"items[{index}] needs exactly one of prompt and messages.", param="items")
        until = asyncio.get_running_loop().time() + (request.timeout_seconds or REQUEST_SECONDS)
        results = await asyncio.gather(*(self._result(item, until) for item in request.items))
        return self._encoder.encode(ScoreReply([*results]))

    async def _result(self, item: Item, until: float) -> Result:
        turns = [] if item.messages is None else [{"role": it.role, "content": it.content} for it in item.messages]
        messages = turns if item.prompt is None else [{"role": "user", "content": item.prompt}]
        outcomes = await asyncio.gather(
            *(
                self._pool.ask(Question(messages, response, item.reference, item.metadata), until)
                for response in item.responses
            )
        )
        return result_of(outcomes)


def result_of(outcomes: Sequence[Outcome]) -> Result:
    """Return the result of an item from what became of its responses.

    >>> result_of([Outcome(REWARD, 1.0), Outcome(ABSTAINED)])
    Result(rewards=[1.0, None], failures=[None, 'abstained'], components={}, abstain=None, error=None)
    """
    if all(outcome.kind == ABSTAINED for outcome in outcomes):
        return Result(abstain="the rule returned None")
    if all(outcome.kind != REWARD for outcome in outcomes):
        failed = next(outcome for outcome in outcomes if outcome.kind != ABSTAINED)
        return Result(error=Problem(failed.message, failed.kind))
    if all(outcome.kind == REWARD for outcome in outcomes):
        return Result(rewards=[outcome.reward for outcome in outcomes])
    return Result(
        rewards=[outcome.reward if outcome.kind == REWARD else None for outcome in outcomes],
        failures=[None if outcome.kind == REWARD else outcome.kind for outcome in outcomes],
    )
