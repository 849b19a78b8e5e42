"""The routes for operators who change things: a run's pool. All of them below `/admin`, so that keys can bar them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from service.usecases.pools import PoolReply, PoolRequest, PoolService, PoolShown


def _pools(request: Request) -> PoolService:
    service: PoolService = request.app.state.pools
    return service


def admin_router() -> APIRouter:
    """The routes; the use case comes from `app.state`. `service.app` checks the keys of every path below `/admin`."""
    router = APIRouter(prefix="/admin", tags=["admin"])

    @router.get("/pool", summary="A run's pool", responses={404: {"description": "No such run."}})
    async def show(
        request: Request, run: Annotated[str | None, Query(description="The run; by default the gateway's.")] = None
    ) -> PoolShown:
        """Every arm that the run ever asked, what it is routed by, and what this gateway's own pool file would change
        (docs/pools-live.md).
        """
        return await _pools(request).show(run)

    @router.post(
        "/pool",
        summary="Change a run's pool",
        responses={
            404: {"description": "No such run."},
            409: {"description": "The pool has another version than was expected."},
            503: {"description": "The run does not learn, or the store is away."},
        },
    )
    async def apply(request: Request, change: PoolRequest) -> PoolReply:
        """Add, retire or replace scorers, and change prices, limits, v, gamma, the budget or the audits: one event of
        the run's log, which every gateway folds at its position. With `dry_run` nothing is changed.
        """
        return await _pools(request).apply(change)

    return router
