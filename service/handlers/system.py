"""The routes for operators: liveness, readiness, metrics, the pool and the posterior."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field

from service.handlers.keys import require
from service.handlers.queries import RunQuery
from service.keys.access import Access, Scope
from service.scorers.status import ScorerStatus
from service.usecases.status import PosteriorStatus, RunStatus, StatusService


class Live(BaseModel):
    """The process serves."""

    status: str = Field("live", examples=["live"])
    failed_tasks: list[str] = Field(
        default=[], description="Background tasks that ended by a fault of the gateway; a restart begins them again."
    )


class Ready(BaseModel):
    """The gateway can score and learn."""

    status: str = Field("ready", examples=["ready"])
    run: str
    posterior_version: int
    store_warnings: list[str] = Field(description="How the store may lose acknowledged data, each with the remedy.")


def _status(request: Request) -> StatusService:
    service: StatusService = request.app.state.status
    return service


def system_router() -> APIRouter:
    """The routes; the services come from `app.state`."""
    router = APIRouter()

    @router.get("/healthz", tags=["operations"], summary="Is the process alive?")
    async def healthz(request: Request) -> Live:
        """Always 200 while the process serves; says nothing of its surroundings."""
        return Live(status="live", failed_tasks=list(_status(request).failed_tasks()))

    @router.get(
        "/readyz",
        tags=["operations"],
        summary="Can it score and learn?",
        responses={
            503: {"description": "The store is away or unsafe, no worker answers, or the log is still being replayed."}
        },
    )
    async def readyz(request: Request) -> Ready:
        """200 when the default run's posterior is loaded, the store answers, and at least one RM can be asked; where
        the encoder is served apart, one of its servers too.
        """
        service = _status(request)
        run, version = await service.check_ready()
        return Ready(status="ready", run=run, posterior_version=version, store_warnings=list(service.store_findings()))

    @router.get("/metrics", tags=["operations"], summary="Metrics for Prometheus", response_class=Response)
    async def metrics(request: Request) -> Response:
        """Prometheus' text format; names and units in docs/metrics.md."""
        return Response(await _status(request).render_metrics(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/models", tags=["routing"], summary="The pool and its workers", dependencies=[require(Scope.READ)])
    async def models(request: Request) -> list[ScorerStatus]:
        """Each RM: what requests to it hold, how many tokens it reads, and its replicas: address, whether it is up,
        requests in flight, smoothed latency, what the probe found. Scorers that are asked about audits only come last.
        """
        status = _status(request)
        referees = [one.model_copy(update={"referee": True}) for one in status.referees()]
        return [*status.models(), *referees]

    @router.get(
        "/posterior",
        tags=["routing"],
        summary="What a run has learned",
        responses={404: {"description": "No such run is open."}},
    )
    async def posterior(
        request: Request,
        access: Annotated[Access, require(Scope.READ)],
        run: RunQuery = None,
    ) -> PosteriorStatus:
        """Version, digest (equal digests mean equal posteriors, bit for bit), and per RM the feedbacks and mean
        reward.
        """
        return await _status(request).posterior(run, access)

    @router.get("/runs", tags=["routing"], summary="The runs of the store")
    async def runs(request: Request, access: Annotated[Access, require(Scope.READ)]) -> list[RunStatus]:
        """Every run that a gateway has opened in this store: events, signal, prior and scorers."""
        return await _status(request).list_runs(access)

    return router
