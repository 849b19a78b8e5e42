"""Spans of OpenTelemetry around what a request does: at the port, in the encoder and draw, at scorers, in the store.

Off by default. The parts of the gateway know nothing of spans: `service.gateway` wraps them in the classes below where
the setting `tracing` is on, and imports this module, and with it OpenTelemetry, only then. The trace of a caller
(`traceparent` and `tracestate`, https://www.w3.org/TR/trace-context/) goes on in ours and is passed on to scorers and
to the encoder's servers. Spans hold names, counts and ids; never a text, a key or the words of an error.

    POST /reward               the request
    ├── choose                 encoder and draw, waiting for the micro-batch included
    ├── score rm-a             one scorer, for all instances of a turn
    │   └── POST               one request to one replica
    └── save_decisions         the store

Where spans are sent is said by OpenTelemetry's own variables: `OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_SERVICE_NAME`,
`OTEL_TRACES_SAMPLER` and others.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, cast

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Message, Receive, Scope, Send

from router_core.policies import Policy
from router_core.records import Instance
from service.scorers.admission import Ticket
from service.scorers.protocol import AbstainedError, Scored, Scorer, WorkerError, WorkerTooLongError
from service.scorers.served import ServedScorer
from service.scorers.transport.http import Response
from service.scorers.transport.replica import Request
from service.stores.protocol import Store
from service.usecases.choose import Chooser, Chosen
from service.usecases.runs import Run

UNTRACED: Final = frozenset({"/healthz", "/readyz", "/metrics"})
"""Paths of probes and scrapes, which would outnumber all others."""

NAMELESS: Final = frozenset({404, 405})
"""Statuses of paths that are not ours: they name no span, so that the number of names stays bounded."""

SHOWN_DECISIONS: Final = 16
"""Ids of decisions that one span holds at most."""

STORED: Final = (
    "save_decisions",
    "save_audited",
    "update_decisions",
    "apply_feedback",
    "judge_audit",
    "stick",
    "exchange_scores",
    "open_run",
)
"""Calls of the store that requests wait for. Others are made in the background, in turns that never end."""

Attributes = Mapping[str, Any]
"""Strings, numbers or lists of strings, by the names of OpenTelemetry's conventions and of ours."""


class Tracing:
    """Wraps parts of a gateway. One per process.

    Args:
        provider: where spans go; shut down by `close`.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer: Tracer = provider.get_tracer("reward-router")
        self._headers = TraceContextTextMapPropagator()

    def app(self, app: Any) -> TracedApp:
        """Return the application with a span around each request."""
        return TracedApp(app, self)

    def chooser(self, chooser: Chooser) -> Chooser:
        """Return the chooser with a span around each choice."""
        return cast(Chooser, _TracedChooser(chooser, self))

    def scorer(self, scorer: Scorer) -> Scorer:
        """Return the scorer with a span around each asking, and below it one around each request to a replica."""
        if isinstance(scorer, ServedScorer):
            scorer.intercept(self.exchange)
        return cast(Scorer, _TracedScorer(scorer, self))

    def store(self, store: Store) -> Store:
        """Return the store with spans around those of its calls that requests wait for."""
        return cast(Store, _TracedStore(store, self))

    def exchange(self, url: str, request: Request) -> Request:
        """Return a way of sending requests to a replica that makes a span of each and passes the trace on."""

        async def traced(
            method: str, path: str, body: bytes = b"", *, deadline: float, headers: Mapping[str, str] | None = None
        ) -> Response:
            about = {"http.request.method": method, "url.full": url + path, "http.request.body.size": len(body)}
            with self.span(method, about, kind=SpanKind.CLIENT) as span:
                carried = dict(headers or {})
                self._headers.inject(carried)
                response: Response = await request(method, path, body, deadline=deadline, headers=carried)
                _note_status(span, response.status, failed=response.status >= 400)
                return response

        return traced

    def parent_of(self, headers: Sequence[tuple[bytes, bytes]]) -> Context:
        """Return the context that a request's headers name; an empty one where they name none."""
        carried = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in headers
            if name in (b"traceparent", b"tracestate")
        }
        return self._headers.extract(carried, context=Context())

    @contextmanager
    def span(
        self,
        name: str,
        attributes: Attributes,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        context: Context | None = None,
    ) -> Iterator[Span]:
        """Make a span the current one. Of an exception it notes the type alone: messages may quote what was sent."""
        with self._tracer.start_as_current_span(
            name, context, kind, attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield span
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(Status(StatusCode.ERROR))
                raise

    def close(self) -> None:
        """Send what is left, and end. Blocks for as long as the collector is given."""
        self._provider.shutdown()


def open_tracing(version: str) -> Tracing:
    """Return a tracing that sends spans over OTLP/HTTP, as OpenTelemetry's variables say.

    Args:
        version: of this service.
    """
    named = Resource({"service.name": "reward-router", "service.version": version})
    provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


class TracedApp:
    """ASGI application: a span around each request but probes and scrapes.

    Args:
        app: the gateway's.
        tracing: makes spans.
    """

    def __init__(self, app: Any, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    def count_refusal(self, code: str) -> None:
        """See `HotRoutes.count_refusal`."""
        self._app.count_refusal(code)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in UNTRACED:
            await self._app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        about = {"http.request.method": method, "url.path": path}
        parent = self._tracing.parent_of(scope["headers"])
        with self._tracing.span(method, about, kind=SpanKind.SERVER, context=parent) as span:

            async def noting(message: Message) -> None:
                if message["type"] == "http.response.start":
                    status = message["status"]
                    _note_status(span, status, failed=status >= 500)
                    if status not in NAMELESS:
                        span.update_name(f"{method} {path}")
                        span.set_attribute("http.route", path)
                await send(message)

            await self._app(scope, receive, noting)


class _TracedChooser:
    def __init__(self, chooser: Chooser, tracing: Tracing) -> None:
        self._chooser = chooser
        self._tracing = tracing

    async def choose(self, run: Run, policy: Policy, instances: Sequence[Instance]) -> Chosen:
        about = {
            "reward_router.run": run.name,
            "reward_router.policy": policy.name,
            "reward_router.instances": len(instances),
        }
        with self._tracing.span("choose", about):
            return await self._chooser.choose(run, policy, instances)


class _TracedScorer:
    def __init__(self, scorer: Scorer, tracing: Tracing) -> None:
        self._scorer = scorer
        self._tracing = tracing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    async def score(
        self, instances: Sequence[Instance], *, deadline: float, ticket: Ticket | None = None
    ) -> list[Scored | WorkerError]:
        scorer = self._scorer
        about = {
            "reward_router.scorer": scorer.name,
            "reward_router.kind": scorer.kind,
            "reward_router.instances": len(instances),
        }
        with self._tracing.span(f"score {scorer.name}", about) as span:
            outcomes = await scorer.score(instances, deadline=deadline, ticket=ticket)
            errors = [one for one in outcomes if isinstance(one, WorkerError)]
            span.set_attribute("reward_router.answered", len(outcomes) - len(errors))
            failed = [one.code for one in errors if not isinstance(one, AbstainedError | WorkerTooLongError)]
            if failed:
                span.set_attribute("error.type", failed[0])
                span.set_status(Status(StatusCode.ERROR))
            return outcomes


class _TracedStore:
    def __init__(self, store: Store, tracing: Tracing) -> None:
        self._store = store
        self._tracing = tracing
        for name in STORED:
            setattr(self, name, self._traced(name, getattr(store, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def _traced(self, name: str, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def traced(run: str, *args: Any, **options: Any) -> Any:
            # No request waits for it: a lone span would say nothing.
            if not trace.get_current_span().get_span_context().is_valid:
                return await call(run, *args, **options)
            about: dict[str, Any] = {
                "db.system.name": "redis",
                "db.operation.name": name,
                "reward_router.run": run,
            }
            named = [getattr(one, "decision_id", None) for one in args[0]] if args and name != "open_run" else []
            if shown := [one for one in named if one is not None][:SHOWN_DECISIONS]:
                about["reward_router.decision_ids"] = shown
            with self._tracing.span(name, about, kind=SpanKind.CLIENT):
                return await call(run, *args, **options)

        return traced


def _note_status(span: Span, status: int, *, failed: bool) -> None:
    span.set_attribute("http.response.status_code", status)
    if failed:
        span.set_attribute("error.type", str(status))
        span.set_status(Status(StatusCode.ERROR))
