"""The ASGI application: FastAPI for operators' routes and OpenAPI, the hot routes in front, lifespan around both."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from router_core.encoder.fuse import PairEncoder
from router_core.policies import ScoreScale
from service.encoders.protocol import AwaitedEncoder
from service.errors import ServiceError
from service.gateway import Gateway, build_gateway
from service.handlers import openapi
from service.handlers.audits import audits_router
from service.handlers.console import ASSETS, EVENTS, PAGE, console_router
from service.handlers.docs_page import docs_page
from service.handlers.errors import render
from service.handlers.hot import HotRoutes
from service.handlers.keys import ApiKeys
from service.handlers.system import system_router
from service.pool import PoolFile
from service.scorers.protocol import Scorer
from service.settings import Settings
from service.stores.protocol import Store

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics", PAGE})
"""Paths that need no API key: probes, scrapes, and the console's page, which holds no data and asks for the key. Keep
the port off public networks, or put a proxy before it."""

OPEN_FOLDER = ASSETS
"""What the console's page is made of: files of the package."""


def package_version() -> str:
    """The installed version, or `0+unknown` in a source tree that is not installed."""
    try:
        return version("reward-router")
    except PackageNotFoundError:
        return "0+unknown"


def create_app(
    settings: Settings,
    pool: PoolFile,
    *,
    encoder: PairEncoder | AwaitedEncoder | None = None,
    arms: Sequence[Scorer] | None = None,
    store: Store | None = None,
    score_scale: ScoreScale | None = None,
) -> HotRoutes:
    """The gateway as an ASGI application; arguments as `gateway.build_gateway`.

    Raises:
        ConfigurationError: settings, pool and checkpoint do not fit each other.
    """
    gateway = build_gateway(settings, pool, encoder=encoder, arms=arms, store=store, score_scale=score_scale)
    return gateway.hot_routes(_operators_app(gateway))


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
    )

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))

    app.state.status = gateway.status
    app.state.people = gateway.people
    app.state.reporter = gateway.reporter
    app.state.watcher = gateway.watcher
    app.include_router(system_router())
    app.include_router(audits_router())
    app.include_router(console_router())
    app.add_exception_handler(ServiceError, render)
    app.add_exception_handler(HTTPException, render)
    app.add_exception_handler(Exception, render)
    openapi.install(app)
    return _KeyCheck(app, ApiKeys(gateway.settings.api_keys))


class _KeyCheck:
    """Refuses operators' routes without a key, but for probes and scrapes, and answers HEAD as GET.

    The server leaves out the body of an answer to HEAD.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if scope["path"] not in OPEN_PATHS and not scope["path"].startswith(OPEN_FOLDER):
                try:
                    self._keys.check(scope["headers"])
                except ServiceError as error:
                    response = await render(Request(scope), error)
                    await response(scope, receive, send)
                    return
            # A stream has no end that the answer to HEAD could wait for.
            if scope["method"] == "HEAD" and scope["path"] != EVENTS:
                scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)
