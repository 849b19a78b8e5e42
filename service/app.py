"""The ASGI application: FastAPI for operators' routes and OpenAPI, the hot routes in front, lifespan around both."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ConnectionScope

from router_core.encoder.fuse import PairEncoder
from router_core.policies import ScoreScale
from service.encoders.protocol import AwaitedEncoder
from service.errors import ServiceError
from service.gateway import Gateway, build_gateway, package_version
from service.handlers import openapi
from service.handlers.admin import admin_router
from service.handlers.audits import audits_router
from service.handlers.console import console_router
from service.handlers.docs_page import DOCS_POLICY, docs_page
from service.handlers.errors import render
from service.handlers.headers import SecureAnswers
from service.handlers.keys import KeyGuard, check_routes, require
from service.handlers.system import system_router
from service.keys.access import Scope
from service.pool import PoolFile
from service.scorers.protocol import Scorer
from service.settings import Settings
from service.stores.protocol import Store

if TYPE_CHECKING:
    from service.tracing import Tracing


class Application(Protocol):
    """What `create_app` returns: an ASGI application that is also told of refused connections."""

    async def __call__(self, scope: ConnectionScope, receive: Receive, send: Send) -> None:
        """Serve one request."""

    def count_refusal(self, code: str) -> None:
        """See `HotRoutes.count_refusal`."""


def create_app(
    settings: Settings,
    pool: PoolFile,
    *,
    encoder: PairEncoder | AwaitedEncoder | None = None,
    arms: Sequence[Scorer] | None = None,
    store: Store | None = None,
    score_scale: ScoreScale | None = None,
    tracing: Tracing | None = None,
) -> Application:
    """The gateway as an ASGI application; arguments as `gateway.build_gateway`.

    Raises:
        ConfigurationError: settings, pool and checkpoint do not fit each other.
    """
    gateway = build_gateway(
        settings, pool, encoder=encoder, arms=arms, store=store, score_scale=score_scale, tracing=tracing
    )
    routes = gateway.hot_routes(_operators_app(gateway))
    return routes if gateway.tracing is None else gateway.tracing.app(routes)


def _operators_app(gateway: Gateway) -> ASGIApp:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        try:
            yield
        finally:
            await gateway.stop()

    app = FastAPI(
        title="Reward router",
        version=package_version(),
        summary="Draws one reward model per instance, and learns from feedback which one.",
        lifespan=lifespan,
        # FastAPI's own pages load scripts from a CDN.
        docs_url=None,
        redoc_url=None,
        # Served below, for keys only.
        openapi_url=None,
    )

    @app.get("/docs", include_in_schema=False, dependencies=[require(Scope.READ)])
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()), headers={"content-security-policy": DOCS_POLICY})

    @app.get("/openapi.json", include_in_schema=False, dependencies=[require(Scope.READ)])
    async def document() -> JSONResponse:
        return JSONResponse(app.openapi())

    app.state.status = gateway.status
    app.state.people = gateway.people
    app.state.reporter = gateway.reporter
    app.state.watcher = gateway.watcher
    app.state.keys = gateway.keys
    app.include_router(console_router())
    app.state.pools = gateway.pools
    app.include_router(system_router())
    app.include_router(audits_router())
    app.include_router(admin_router(keyed=gateway.keys.needed, max_body_bytes=gateway.settings.max_body_bytes))
    app.add_exception_handler(ServiceError, render)
    app.add_exception_handler(HTTPException, render)
    app.add_exception_handler(RequestValidationError, render)
    app.add_exception_handler(Exception, render)
    openapi.install(app)
    check_routes(app)
    return SecureAnswers(KeyGuard(app, gateway.keys, gateway.acts))
