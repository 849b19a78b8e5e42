"""The route that shows audits with their texts; `handlers.hot` takes what people say of them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from service.usecases.people import MAX_SHOWN, AuditShown, PeopleService


def _people(request: Request) -> PeopleService:
    service: PeopleService = request.app.state.people
    return service


def audits_router() -> APIRouter:
    """The routes; the services come from `app.state`."""
    router = APIRouter(tags=["audits"])

    @router.get("/audits", summary="The newest audits, with their texts")
    async def audits(
        request: Request,
        run: Annotated[str | None, Query(description="The run; by default the gateway's.")] = None,
        count: Annotated[int, Query(ge=1, le=MAX_SHOWN, description="How many at most.")] = 20,
    ) -> list[AuditShown]:
        """Newest first. The store keeps as many as the pool file's `audit.keep` says."""
        return await _people(request).newest(run, count)

    return router
