"""Which key a request carries, and what its holder may do there.

Routes of FastAPI say what they need with `require`; those of `handlers.hot` name their scope in its table. What is open
without a key is `OPEN_PATHS`; nothing else is.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fastapi import Depends, FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.routing import BaseRoute, Router
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from service.errors import ConfigurationError, ServiceError
from service.handlers.errors import render
from service.keys.access import Access, Scope
from service.keys.acts import ActLog
from service.keys.ring import KeyRing

OPEN_PATHS: Final = {
    "/healthz": "liveness probe; says whether the process serves",
    "/readyz": "readiness probe; names the default run and what is wrong",
    "/metrics": "Prometheus' scrape; names of runs, scorers and their addresses are labels",
    "/": "the console's page, which holds no data and asks for a key",
    "/console/{digest}/{name:path}": "what the console's page is made of: files of the package",
}
"""Paths that need no API key, and why: docs/security.md says it to operators. Keep the port off public networks."""

_OPEN_FOLDERS: Final = tuple(path.partition("{")[0] for path in OPEN_PATHS if "{" in path)

STREAMS: Final = frozenset({"/events"})
"""Answers without an end, which an answer to HEAD would wait for."""

ACCESS: Final = "reward_router.access"
"""Key of the ASGI scope that holds the caller's `Access`."""


def key_of(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Return the key that a request carries; b"" for none.

    `Authorization: Bearer KEY` or `X-API-Key: KEY`. `Authorization: Basic` with the key as password passes too:
    trainers that know a URL and no headers send it for `http://any:KEY@host/…`. Names of schemes are read in capitals
    or not, as RFC 9110 (11.1) has it.
    """
    for name, value in headers:
        if name == b"authorization":
            return _authorization(value)
        if name == b"x-api-key":
            return value
    return b""


def _authorization(value: bytes) -> bytes:
    """The key of an `Authorization` header; b"" where it holds none."""
    scheme, _, given = value.partition(b" ")
    given = given.strip(b" ")
    match scheme.lower():
        case b"bearer":
            return given
        case b"basic":
            try:
                return base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return b""
        case _:
            return b""


@dataclass(frozen=True, slots=True)
class Required:
    """FastAPI dependency: lets callers pass whose key has the scope, and gives their `Access`."""

    scope: Scope

    async def __call__(self, request: Request) -> Access:
        """Return what the caller may do.

        Raises:
            ForbiddenError: the key is not for this.
        """
        access: Access = request.scope[ACCESS]
        access.check_scope(self.scope)
        return access


def require(scope: Scope) -> Any:
    """Return what a route declares to be for keys of one scope.

    In the route's `dependencies=[require(Scope.READ)]`, or as a parameter where the handler checks runs:
    `access: Annotated[Access, require(Scope.ADMIN)]`, then `access.check_run(run)`.
    """
    return Depends(Required(scope))


def scope_of(route: APIRoute) -> Scope | None:
    """Return the scope that a route requires; None if it says none."""
    return next(_required(route.dependant), None)


def _required(dependant: Dependant) -> Iterator[Scope]:
    for dependency in dependant.dependencies:
        if isinstance(dependency.call, Required):
            yield dependency.call.scope
        yield from _required(dependency)


def routes_of(router: Router) -> Iterator[BaseRoute]:
    """Yield every route, those of included routers too: newer versions of FastAPI keep these apart."""
    for route in router.routes:
        included = getattr(route, "original_router", None)
        if included is None:
            yield route
        else:
            yield from routes_of(included)


def check_routes(app: FastAPI) -> None:
    """Return if every route is open or says its scope.

    Raises:
        ConfigurationError: one does not.
    """
    for route in routes_of(app.router):
        path = getattr(route, "path", "?")
        if is_open(path) or (isinstance(route, APIRoute) and scope_of(route) is not None):
            continue
        raise ConfigurationError(f"route {path} says no scope: give it `require(Scope.…)`, or a line in OPEN_PATHS")


def is_open(path: str) -> bool:
    """Return True if a path needs no API key."""
    return path in OPEN_PATHS or path.startswith(_OPEN_FOLDERS)


class KeyGuard:
    """Lets nobody without a key come to the application, but for open paths, and answers HEAD as GET.

    The server leaves out the body of an answer to HEAD.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, acts: ActLog) -> None:
        self._app = app
        self._keys = keys
        self._acts = acts

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD" and scope["path"] not in STREAMS:
            scope = {**scope, "method": "GET"}
        if is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        try:
            access = self._keys.find(key_of(scope["headers"]))
            access.enter()
        except ServiceError as error:
            response = await render(Request(scope), error)
            await response(scope, receive, send)
            return
        try:
            scope = {**scope, ACCESS: access}
            if scope["method"] in ("GET", "OPTIONS"):
                await self._app(scope, receive, send)
            else:
                await self._act(access, scope, receive, send)
        finally:
            access.leave()

    async def _act(self, access: Access, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve what may change the gateway: written down before, and with its status after."""
        about = {
            "key": access.name,
            "method": scope["method"],
            "path": scope["path"][:200],
            "query": scope["query_string"][:200].decode("latin-1"),
        }
        status = 500

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._acts.write("asked", **about)
        except ServiceError as error:
            response = await render(Request(scope), error)
            await response(scope, receive, send)
            return
        try:
            await self._app(scope, receive, seen)
        finally:
            with contextlib.suppress(ServiceError):
                self._acts.write("answered", **about, status=status)
