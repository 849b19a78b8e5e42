"""The routes that show audits, with their texts or as a report; `handlers.hot` takes what people say of them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from service.handlers.keys import require
from service.handlers.queries import RunQuery
from service.keys.access import Access, Scope
from service.usecases.people import MAX_SHOWN, AuditShown, PeopleService
from service.usecases.report import Reporter, RunReport


def _people(request: Request) -> PeopleService:
    service: PeopleService = request.app.state.people
    return service


def audits_router() -> APIRouter:
    """The routes; the services come from `app.state`."""
    router = APIRouter(tags=["audits"])

    @router.get("/audits", summary="The newest audits, with their texts")
    async def audits(
        request: Request,
        access: Annotated[Access, require(Scope.READ)],
        run: RunQuery = None,
        count: Annotated[int, Query(ge=1, le=MAX_SHOWN, description="How many at most.")] = 20,
    ) -> list[AuditShown]:
        """Newest first. The store keeps as many as the pool file's `audit.keep` says."""
        return await _people(request).newest(run, count, access)

    @router.get(
        "/report",
        summary="What the audits of a run say",
        responses={404: {"description": "No such run is open."}},
    )
    async def report(
        request: Request,
        access: Annotated[Access, require(Scope.READ)],
        run: RunQuery = None,
    ) -> RunReport:
        """How often each scorer is right, per kind of text and over time, with bounds that hold however often one
        looks; the referees against gold; what rewards follow besides quality (docs/audits.md).
        """
        reporter: Reporter = request.app.state.reporter
        return await reporter.report(run, access)

    return router
