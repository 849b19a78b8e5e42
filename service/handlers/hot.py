"""The hot routes as bare ASGI: parse with msgspec, call the use case, send. No framework on the way.

Those of RLHF trainers come from `handlers.trainers` and are served in the same way.

FastAPI declares the same routes for OpenAPI (`handlers.openapi`) and serves everything else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import msgspec
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from service.errors import OverCapacityError, ServiceError
from service.handlers.body import BatchReader, ClientDisconnectedError, check_sender, parse_body, read_body
from service.handlers.errors import as_service_error, error_reply, headers_of, wrong_method
from service.handlers.headers import with_security_headers
from service.handlers.keys import key_of
from service.keys.access import Access, Scope
from service.keys.ring import KeyRing
from service.schemas import (
    FeedbackBatchReply,
    FeedbackBatchRequest,
    FeedbackRequest,
    JudgementRequest,
    NoReward,
    RewardBatchReply,
    RewardBatchRequest,
    RewardReply,
    RewardRequest,
)
from service.telemetry import Telemetry
from service.usecases.learn import FeedbackService
from service.usecases.people import PeopleService
from service.usecases.score import RewardService

_ENCODER = msgspec.json.Encoder()
_JSON_HEADERS = with_security_headers([(b"content-type", b"application/json")])

Handler = Callable[[bytes, Access], Awaitable[Any]]
"""Takes the body, and what the caller may do."""


class QueryHandler(Protocol):
    """Takes the body, what the caller may do, and the query string."""

    def __call__(self, body: bytes, access: Access, /, *, query: bytes) -> Awaitable[Any]: ...


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
        people: use case of `/audits/judge`.
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
        people: PeopleService,
        telemetry: Telemetry,
        keys: KeyRing,
        limits: HotLimits,
        rest: ASGIApp,
        trainers: Mapping[str, tuple[Scope, QueryHandler]] | None = None,
    ) -> None:
        self._scorer = scorer
        self._feedback = feedback
        self._people = people
        self._telemetry = telemetry
        self._keys = keys
        self._limits = limits
        self._rest = rest
        self._in_flight = 0
        self._reward = msgspec.json.Decoder(RewardRequest)
        self._reward_batch = BatchReader(RewardBatchRequest, RewardRequest)
        self._feedback_one = msgspec.json.Decoder(FeedbackRequest)
        self._feedback_batch = BatchReader(FeedbackBatchRequest, FeedbackRequest)
        self._judgement = msgspec.json.Decoder(JudgementRequest)
        self._routes: dict[str, tuple[Scope, Handler]] = {
            "/reward": (Scope.REWARD, self._score),
            "/reward/batch": (Scope.REWARD, self._score_batch),
            "/beliefs": (Scope.REWARD, self._believe),
            "/feedback": (Scope.FEEDBACK, self._accept),
            "/feedback/batch": (Scope.FEEDBACK, self._accept_batch),
            "/audits/judge": (Scope.FEEDBACK, self._judge),
        }
        self._trainers = dict(trainers or {})
        self._ok = {path: telemetry.requests.labels(path, "200") for path in (*self._routes, *self._trainers)}
        telemetry.watch(telemetry.in_flight, lambda: self._in_flight)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            route = self._routes.get(scope["path"])
            if route is None and scope["path"] in self._trainers:
                needed, handler = self._trainers[scope["path"]]
                route = needed, partial(handler, query=scope["query_string"])
            if route is not None:
                await self._serve(scope, receive, send, *route)
                return
        await self._rest(scope, receive, send)

    @property
    def scopes(self) -> dict[str, Scope]:
        """What each of the hot paths requires."""
        return {
            **{path: scope for path, (scope, _) in self._routes.items()},
            **{path: scope for path, (scope, _) in self._trainers.items()},
        }

    def count_refusal(self, code: str) -> None:
        """Count a connection that was closed before its request was whole.

        Args:
            code: of the error that it was told.
        """
        self._telemetry.refused_connections.labels(code).inc()

    async def _serve(self, scope: AsgiScope, receive: Receive, send: Send, needed: Scope, handler: Handler) -> None:
        path, status, headers = scope["path"], 200, _JSON_HEADERS
        try:
            reply = await self._answer(scope, receive, needed, handler)
            self._ok[path].inc()
        except ClientDisconnectedError:
            self._telemetry.requests.labels(path, "499").inc()
            return
        except Exception as error:  # noqa: BLE001 - the boundary: everything becomes an answer
            shown = as_service_error(error)
            reply, status = error_reply(shown), shown.status
            headers = [*_JSON_HEADERS, *((k.encode(), v.encode()) for k, v in headers_of(shown).items())]
            self._telemetry.requests.labels(path, str(status)).inc()
        body = _ENCODER.encode(reply)
        headers = [*headers, (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: AsgiScope, receive: Receive, needed: Scope, handler: Handler) -> Any:
        """The reply. A place among `max_in_flight` is taken only when the body is there."""
        # Looked at before the body too: what will not be answered need not be read.
        self._check_room()
        access = self._keys.find(key_of(scope["headers"]))
        if scope["method"] != "POST":
            raise wrong_method("POST")
        access.check_scope(needed)
        check_sender(scope["headers"], keyed=self._keys.needed)
        access.enter()
        try:
            body = await read_body(receive, self._limits.max_body_bytes)
            self._check_room()
            self._in_flight += 1
            try:
                return await handler(body, access)
            finally:
                self._in_flight -= 1
        finally:
            access.leave()

    def _check_room(self) -> None:
        if self._in_flight >= self._limits.max_in_flight:
            raise OverCapacityError(
                f"{self._limits.max_in_flight} requests are in flight (max_in_flight): try again, or add a gateway",
                retry_after_seconds=1,
            )

    async def _score(self, body: bytes, access: Access) -> Any:
        return await self._scorer.score(parse_body(self._reward, body), access)

    async def _score_batch(self, body: bytes, access: Access) -> Any:
        request, items = self._reward_batch.read(body)
        access.charge(len(items))
        results = await self._scorer.score_many(
            items,
            run=request.run,
            policy=request.policy,
            signal=request.signal,
            normalize=request.normalize,
            access=access,
        )
        return RewardBatchReply([_reward_item(result) for result in results])

    async def _believe(self, body: bytes, access: Access) -> Any:
        return await self._scorer.believe(parse_body(self._reward, body), access)

    async def _accept(self, body: bytes, access: Access) -> Any:
        return await self._feedback.accept(parse_body(self._feedback_one, body), access)

    async def _accept_batch(self, body: bytes, access: Access) -> Any:
        request, items = self._feedback_batch.read(body)
        access.charge(len(items))
        results = await self._feedback.accept_many(items, run=request.run, access=access)
        return FeedbackBatchReply([error_item(result) for result in results])

    async def _judge(self, body: bytes, access: Access) -> Any:
        return await self._people.judge(parse_body(self._judgement, body), access)


def error_item(result: Any) -> Any:
    return error_reply(result) if isinstance(result, ServiceError) else result


def _reward_item(result: RewardReply | ServiceError) -> RewardReply | NoReward:
    return NoReward(error_reply(result).error) if isinstance(result, ServiceError) else result
