"""The hot routes as bare ASGI: parse with msgspec, call the use case, send. No framework on the way.

Those of RLHF trainers come from `handlers.trainers` and are served in the same way.

FastAPI declares the same routes for OpenAPI (`handlers.openapi`) and serves everything else.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import (
    BadRequestError,
    OverCapacityError,
    PayloadTooLargeError,
    ServiceError,
    UnauthorizedError,
    ValidationError,
)
from service.handlers.errors import as_service_error, error_reply, headers_of, wrong_method
from service.schemas import (
    FeedbackBatchReply,
    FeedbackBatchRequest,
    FeedbackRequest,
    NoReward,
    RewardBatchReply,
    RewardBatchRequest,
    RewardReply,
    RewardRequest,
)
from service.telemetry import Telemetry
from service.usecases.learn import FeedbackService
from service.usecases.score import RewardService

_ENCODER = msgspec.json.Encoder()
_JSON_HEADER = (b"content-type", b"application/json")

Handler = Callable[[bytes], Awaitable[Any]]


class QueryHandler(Protocol):
    """Takes the body and the query string."""

    def __call__(self, body: bytes, /, *, query: bytes) -> Awaitable[Any]: ...


T = TypeVar("T")


class ClientDisconnectedError(Exception):
    """The caller went away before its body was read; there is nobody to answer."""


class ApiKeys:
    """Checks `Authorization: Bearer KEY` or `X-API-Key: KEY` in constant time; without keys everything passes.

    `Authorization: Basic` with the key as password passes too: trainers that know a URL and no headers send it for
    `http://any:KEY@host/…`.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def check(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Return if a key is right.

        Raises:
            UnauthorizedError: none, or a wrong one.
        """
        if not self._keys:
            return
        for name, value in headers:
            given = _authorization(value) if name == b"authorization" else value if name == b"x-api-key" else None
            if given is not None and any(hmac.compare_digest(given, key) for key in self._keys):
                return
        raise UnauthorizedError("API key missing or wrong: send `Authorization: Bearer KEY` or `X-API-Key: KEY`")


def _authorization(value: bytes) -> bytes:
    """The key of an `Authorization` header; b"" for what is none."""
    if not value.startswith(b"Basic "):
        return value.removeprefix(b"Bearer ")
    try:
        return base64.b64decode(value[6:], validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


@dataclass(frozen=True, slots=True)
class HotLimits:
    """Bounds before parsing; see `Settings`."""

    max_body_bytes: int
    max_in_flight: int


class HotRoutes:
    """ASGI application: answers the hot routes itself and hands everything else on.

    Args:
        scorer: use case of `/reward`.
        feedback: use case of `/feedback`.
        telemetry: request counters.
        keys: who may call.
        limits: body size and requests in flight.
        rest: the application for everything else.
        trainers: more routes, whose handlers see the query string.
    """

    def __init__(
        self,
        *,
        scorer: RewardService,
        feedback: FeedbackService,
        telemetry: Telemetry,
        keys: ApiKeys,
        limits: HotLimits,
        rest: ASGIApp,
        trainers: Mapping[str, QueryHandler] | None = None,
    ) -> None:
        self._scorer = scorer
        self._feedback = feedback
        self._telemetry = telemetry
        self._keys = keys
        self._limits = limits
        self._rest = rest
        self._in_flight = 0
        self._reward = msgspec.json.Decoder(RewardRequest)
        self._reward_batch = msgspec.json.Decoder(RewardBatchRequest)
        self._feedback_one = msgspec.json.Decoder(FeedbackRequest)
        self._feedback_batch = msgspec.json.Decoder(FeedbackBatchRequest)
        self._routes: dict[str, Handler] = {
            "/reward": self._score,
            "/reward/batch": self._score_batch,
            "/feedback": self._accept,
            "/feedback/batch": self._accept_batch,
        }
        self._trainers = dict(trainers or {})
        self._ok = {path: telemetry.requests.labels(path, "200") for path in (*self._routes, *self._trainers)}
        telemetry.in_flight.set_function(lambda: self._in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            handler = self._routes.get(scope["path"])
            if handler is None and scope["path"] in self._trainers:
                handler = partial(self._trainers[scope["path"]], query=scope["query_string"])
            if handler is not None:
                await self._serve(scope, receive, send, handler if scope["method"] == "POST" else _refuse_method)
                return
        await self._rest(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, handler: Handler) -> None:
        path, status, headers = scope["path"], 200, [_JSON_HEADER]
        self._in_flight += 1
        try:
            if self._in_flight > self._limits.max_in_flight:
                raise OverCapacityError(
                    f"{self._limits.max_in_flight} requests are in flight (max_in_flight): try again, or add a gateway",
                    retry_after_seconds=1,
                )
            self._keys.check(scope["headers"])
            reply = await handler(await self._read(receive))
            self._ok[path].inc()
        except ClientDisconnectedError:
            self._telemetry.requests.labels(path, "499").inc()
            return
        except Exception as error:  # noqa: BLE001 - the boundary: everything becomes an answer
            shown = as_service_error(error)
            reply, status = error_reply(shown), shown.status
            headers = [_JSON_HEADER, *((k.encode(), v.encode()) for k, v in headers_of(shown).items())]
            self._telemetry.requests.labels(path, str(status)).inc()
        finally:
            self._in_flight -= 1
        body = _ENCODER.encode(reply)
        headers = [*headers, (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _read(self, receive: Receive) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnectedError
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._limits.max_body_bytes:
                raise PayloadTooLargeError(
                    f"the body is larger than {self._limits.max_body_bytes} bytes (max_body_bytes): send smaller ones"
                )
            if not message.get("more_body", False) and not chunks:
                return bytes(chunk)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    async def _score(self, body: bytes) -> Any:
        return await self._scorer.score(parse_body(self._reward, body))

    async def _score_batch(self, body: bytes) -> Any:
        request = parse_body(self._reward_batch, body)
        results = await self._scorer.score_many(
            request.items, run=request.run, policy=request.policy, normalize=request.normalize
        )
        return RewardBatchReply([_reward_item(result) for result in results])

    async def _accept(self, body: bytes) -> Any:
        return await self._feedback.accept(parse_body(self._feedback_one, body))

    async def _accept_batch(self, body: bytes) -> Any:
        request = parse_body(self._feedback_batch, body)
        results = await self._feedback.accept_many(request.items, run=request.run)
        return FeedbackBatchReply([error_item(result) for result in results])


async def _refuse_method(_: bytes) -> Any:
    raise wrong_method("POST")


def error_item(result: Any) -> Any:
    return error_reply(result) if isinstance(result, ServiceError) else result


def _reward_item(result: RewardReply | ServiceError) -> RewardReply | NoReward:
    return NoReward(error_reply(result).error) if isinstance(result, ServiceError) else result


def parse_body(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """The document of a body.

    Raises:
        ValidationError: it is not what the path takes.
        BadRequestError: it is not JSON in UTF-8.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise ValidationError(f"{error}: see /docs for the fields of this path") from error
    except msgspec.DecodeError as error:
        raise BadRequestError(
            f"the body is not JSON ({error}): send a JSON object with content-type application/json"
        ) from error
    except UnicodeDecodeError as error:
        raise BadRequestError("the body is not UTF-8: send JSON in UTF-8") from error
