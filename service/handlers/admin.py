"""A run's pool: shown to keys with the scope `read`, changed below `/admin` by keys with the scope `admin`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Request

from service.handlers.body import check_sender, parse_body, read_body
from service.handlers.keys import require
from service.handlers.queries import RunQuery
from service.keys.access import Access, Scope
from service.schemas import PoolRequest
from service.usecases.pools import PoolReply, PoolService, PoolShown

_DECODER = msgspec.json.Decoder(PoolRequest)

_EXAMPLE = {
    "pool": {
        "models": [
            {"name": "skywork", "urls": ["http://127.0.0.1:8101"], "price": 2.0},
            {"name": "new-rm", "urls": ["http://127.0.0.1:8102"]},
        ],
        "routing": {"v": 0.1},
    },
    "dry_run": True,
}


def _pools(request: Request) -> PoolService:
    service: PoolService = request.app.state.pools
    return service


def admin_router(*, keyed: bool, max_body_bytes: int) -> APIRouter:
    """The routes; the use case comes from `app.state`.

    Args:
        keyed: callers must send a key.
        max_body_bytes: largest body.
    """
    router = APIRouter()

    @router.get(
        "/pool",
        tags=["routing"],
        summary="A run's pool",
        responses={404: {"description": "No such run."}, 503: {"description": "Its log is still being replayed."}},
    )
    async def show(
        request: Request,
        access: Annotated[Access, require(Scope.READ)],
        run: RunQuery = None,
    ) -> PoolShown:
        """Every arm that the run ever asked, what it is routed by, and what this gateway's own pool file would change
        (docs/pools-live.md).
        """
        return await _pools(request).show(run, access)

    @router.post(
        "/admin/pool",
        tags=["admin"],
        summary="Change a run's pool",
        responses={
            400: {"description": "The body is not JSON."},
            404: {"description": "No such run."},
            409: {"description": "The pool has another version than was expected."},
            413: {"description": "The body is too large."},
            415: {"description": "The body is not declared as JSON."},
            422: {"description": "The pool file cannot be read, or this gateway could not ask by it."},
            503: {"description": "The run does not learn, or the store is away."},
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": {"$ref": "#/components/schemas/PoolRequest"}, "example": _EXAMPLE}
                },
            }
        },
    )
    async def apply(request: Request, access: Annotated[Access, require(Scope.ADMIN)]) -> PoolReply:
        """Add, retire or replace scorers, and change prices, limits, v, gamma, the budget or the audits: one event of
        the run's log, which every gateway folds at its position. With `dry_run` nothing is changed.
        """
        check_sender(request.scope["headers"], keyed=keyed)
        change = parse_body(_DECODER, await read_body(request.receive, max_body_bytes))
        return await _pools(request).apply(change, access)

    return router
