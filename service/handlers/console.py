"""The console's routes: the page at `/`, what it is made of, and the stream of events that it shows.

The page is the same for everybody and holds no data. It asks for an API key where the gateway wants one, and sends it
with each request.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from service.console import console_files
from service.errors import NotFoundError, ServiceError
from service.handlers.keys import key_of, require
from service.handlers.queries import RunQuery
from service.keys.access import Access, Scope
from service.keys.ring import KeyRing
from service.usecases.watch import Watcher

PAGE: Final = "/"
ASSETS: Final = "/console/"
EVENTS: Final = "/events"

POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""The page runs its own files only, asks its own gateway only, and stands in no frame."""

HEADERS: Final = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

FOR_EVER: Final = "public, max-age=31536000, immutable"


def console_router() -> APIRouter:
    """The routes; the watcher comes from `app.state`."""
    router = APIRouter()

    @router.get(PAGE, include_in_schema=False)
    async def page(request: Request) -> Response:
        files = console_files()
        tag = f'"{files.digest}"'
        headers = {**HEADERS, "cache-control": "no-cache", "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(files.page.content, headers=headers, media_type=files.page.media_type)

    @router.get(ASSETS + "{digest}/{name:path}", include_in_schema=False)
    async def part(digest: str, name: str) -> Response:
        files = console_files()
        found = files.parts.get(name)
        if found is None or digest != files.digest:
            raise NotFoundError("no such file of the console: load the page again")
        return Response(found.content, headers={**HEADERS, "cache-control": FOR_EVER}, media_type=found.media_type)

    @router.get(
        EVENTS,
        tags=["operations"],
        summary="What a run does now, as server-sent events",
        response_class=StreamingResponse,
        dependencies=[require(Scope.READ)],
        responses={
            200: {"content": {"text/event-stream": {}}, "description": "A stream without end."},
            404: {"description": "No such run is open."},
            429: {"description": "Enough pages are open (`console_viewers`)."},
        },
    )
    async def events(request: Request, run: RunQuery = None) -> StreamingResponse:
        """First `history`, the points of the last hour; then `state`, every two seconds, and `report`, what
        `/report` answers, when audits have said something new. Made for the console; fields may change.
        """
        watcher: Watcher = request.app.state.watcher
        keys: KeyRing = request.app.state.keys

        def access() -> Access:
            found = keys.find(key_of(request.scope["headers"]))
            found.check_scope(Scope.READ)
            return found

        frames = watcher.frames(run, access)
        # Refusals come before the answer begins.
        first = await anext(frames)
        return StreamingResponse(
            _after(first, frames),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )

    return router


async def _after(first: bytes, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    # The answer has begun: all that can be said of a key that has ended meanwhile is the end of the stream.
    with contextlib.suppress(ServiceError):
        async for frame in frames:
            yield frame
