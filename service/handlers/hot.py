"""The four hot routes as bare ASGI: parse with msgspec, call the use case, send. No framework on the way.

FastAPI declares the same routes for OpenAPI (`handlers.openapi`) and serves everything else.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

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
    RewardBatchReply,
    RewardBatchRequest,
    RewardRequest,
)
from service.telemetry import Telemetry
from service.usecases.learn import FeedbackService
from service.usecases.score import Scorer

_ENCODER = msgspec.json.Encoder()
_JSON_HEADER = (b"content-type", b"application/json")

Handler = Callable[[bytes], Awaitable[Any]]
T = TypeVar("T")


class ClientDisconnectedError(Exception):
    """The caller went away before its body was read; there is nobody to answer."""


class ApiKeys:
    """Checks `Authorization: Bearer KEY` or `X-API-Key: KEY` in constant time; without keys everything passes."""

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
            given = (
                value.removeprefix(b"Bearer ") if name == b"authorization" else value if name == b"x-api-key" else None
            )
            if given is not None and any(hmac.compare_digest(given, key) for key in self._keys):
                return
        raise UnauthorizedError("API key missing or wrong: send `Authorization: Bearer KEY` or `X-API-Key: KEY`")


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
    """

    def __init__(
        self,
        *,
        scorer: Scorer,
        feedback: FeedbackService,
        telemetry: Telemetry,
        keys: ApiKeys,
        limits: HotLimits,
        rest: ASGIApp,
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
        self._ok = {path: telemetry.requests.labels(path, "200") for path in self._routes}
        telemetry.in_flight.set_function(lambda: self._in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            handler = self._routes.get(scope["path"])
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
        return await self._scorer.score(_parse(self._reward, body))

    async def _score_batch(self, body: bytes) -> Any:
        request = _parse(self._reward_batch, body)
        results = await self._scorer.score_many(request.items, run=request.run, policy=request.policy)
        return RewardBatchReply([_item(result) for result in results])

    async def _accept(self, body: bytes) -> Any:
        return await self._feedback.accept(_parse(self._feedback_one, body))

    async def _accept_batch(self, body: bytes) -> Any:
        request = _parse(self._feedback_batch, body)
        results = await self._feedback.accept_many(request.items, run=request.run)
        return FeedbackBatchReply([_item(result) for result in results])


async def _refuse_method(_: bytes) -> Any:
    raise wrong_method("POST")


def _item(result: Any) -> Any:
    return error_reply(result) if isinstance(result, ServiceError) else result


def _parse(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
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
