"""Spans: OpenTelemetry's own SDK, real HTTP between caller, gateway and workers, and a real store."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs reward-router[tracing]")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from service.pool import PoolFile
from service.tracing import Tracing
from tests.service.scorers.worker_servers import ScriptedWorker, Serve, error
from tests.support.gateway import pair
from tests.support.live import LiveGateway, live_gateway
from tests.support.processes import Caller, Services, write_recorded_pairs

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
SECRET = "a-prompt-that-no-span-may-hold"


class Traced:
    """A gateway with one worker, and the spans that it has made."""

    def __init__(self, gateway: LiveGateway, worker: ScriptedWorker, exporter: InMemorySpanExporter) -> None:
        self.gateway = gateway
        self.worker = worker
        self._exporter = exporter

    def post(self, path: str, document: dict[str, Any], **headers: str) -> dict[str, Any]:
        """POST over a connection of its own."""
        request = urllib.request.Request(
            self.gateway.url + path,
            json.dumps(document).encode(),
            {"content-type": "application/json", **headers},
        )
        with urllib.request.urlopen(request, timeout=20) as response:
            found: dict[str, Any] = json.loads(response.read())
        return found

    def spans(self, name: str) -> list[ReadableSpan]:
        """Those of that name that have ended."""
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    def span(self, name: str) -> ReadableSpan:
        """The one of that name; a request's span ends a moment after its reply is read."""
        pause = threading.Event()
        for _ in range(500):
            if found := self.spans(name):
                assert len(found) == 1, found
                return found[0]
            pause.wait(0.02)
        raise AssertionError(f"no span {name!r}: {[span.name for span in self._exporter.get_finished_spans()]}")

    def everything(self) -> str:
        """All spans as text."""
        return "".join(span.to_json() for span in self._exporter.get_finished_spans())


@pytest.fixture
def traced(valkey_server: ValkeyProcess, serve: Serve) -> Iterator[Traced]:
    worker, exporter, provider = ScriptedWorker("rm"), InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    pool = PoolFile.model_validate({"models": [{"name": "rm", "urls": [serve(worker)], "rendering": "messages"}]})
    with live_gateway(valkey_server.url, pool=pool, tracing=Tracing(provider), new_run_wait_seconds=0) as gateway:
        exporter.clear()
        yield Traced(gateway, worker, exporter)


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def test_one_trace_goes_from_the_caller_to_the_worker(traced: Traced) -> None:
    reply = traced.post("/reward", pair(), traceparent=f"00-{TRACE}-{CALLER}-01", tracestate="vendor=a")
    root = traced.span("POST /reward")
    assert root.kind is SpanKind.SERVER
    assert f"{root.context.trace_id:032x}" == TRACE
    assert parent_of(root) == int(CALLER, 16)
    assert root.attributes is not None
    assert root.attributes["http.response.status_code"] == 200
    choose, score, saved = traced.span("choose"), traced.span("score rm"), traced.span("save_decisions")
    exchanges = traced.spans("POST")
    for child in (choose, score, saved):
        assert parent_of(child) == root.context.span_id, child.name
    # A conversation is a request of its own, so that a pair is two.
    assert [parent_of(exchange) for exchange in exchanges] == [score.context.span_id] * 2
    assert {f"{span.context.trace_id:032x}" for span in (choose, score, saved, *exchanges)} == {TRACE}
    assert saved.attributes is not None
    assert saved.attributes["reward_router.decision_ids"] == (reply["decision_id"],)
    # What the worker got names the span of the very request.
    named = {headers["traceparent"] for headers in traced.worker.headers[-2:]}
    assert named == {f"00-{TRACE}-{exchange.context.span_id:016x}-01" for exchange in exchanges}
    assert traced.worker.headers[-1]["tracestate"] == "vendor=a"


def test_feedback_and_its_event_are_one_trace(traced: Traced) -> None:
    reply = traced.post("/reward", pair())
    traced.post("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})
    root, applied = traced.span("POST /feedback"), traced.span("apply_feedback")
    assert parent_of(root) is None
    assert parent_of(applied) == root.context.span_id
    assert applied.attributes is not None
    assert applied.attributes["reward_router.decision_ids"] == (reply["decision_id"],)


def test_a_caller_that_is_not_sampled_stays_unsampled(traced: Traced) -> None:
    traced.post("/reward", pair(), traceparent=f"00-{TRACE}-{CALLER}-00")
    assert traced.worker.headers[-1]["traceparent"].startswith(f"00-{TRACE}-")
    assert traced.worker.headers[-1]["traceparent"].endswith("-00")
    assert traced.everything() == ""


def test_spans_hold_no_texts_not_even_of_errors(traced: Traced) -> None:
    traced.worker.answer = lambda _: (400, error(f"cannot read {SECRET}", 400))
    with pytest.raises(urllib.error.HTTPError) as refused:
        traced.post("/reward", {"prompt": SECRET, "responses": [SECRET, SECRET + "!"]})
    refused.value.close()
    score = traced.span("score rm")
    assert score.attributes is not None
    assert score.attributes["error.type"] == "worker_rejected"
    assert traced.span("POST /reward")
    assert SECRET not in traced.everything()


def test_probes_and_background_work_make_no_spans(traced: Traced) -> None:
    with urllib.request.urlopen(traced.gateway.url + "/readyz", timeout=20) as response:
        assert response.status == 200
    with pytest.raises(urllib.error.HTTPError) as missing:
        traced.post("/nowhere/at/all", {})
    missing.value.close()
    traced.post("/reward", pair(), traceparent=f"00-{TRACE}-{CALLER}-01")
    traced.span("POST /reward")
    names = {json.loads(line)["name"] for line in traced.everything().replace("}{", "}\x00{").split("\x00")}
    # A path that is not ours gives no name of its own.
    assert names == {"POST /reward", "choose", "score rm", "POST", "save_decisions"}


def test_an_audit_is_a_trace_of_its_own(valkey_server: ValkeyProcess, serve: Serve) -> None:
    worker, referee, exporter = ScriptedWorker("rm"), ScriptedWorker("ref"), InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    pool = PoolFile.model_validate(
        {
            "models": [{"name": "rm", "urls": [serve(worker)], "rendering": "messages"}],
            "referees": [{"name": "ref", "urls": [serve(referee)], "rendering": "messages"}],
            "audit": {"referee": "ref", "rate": 1},
        }
    )
    with live_gateway(valkey_server.url, pool=pool, tracing=Tracing(provider), new_run_wait_seconds=0) as gateway:
        traced = Traced(gateway, worker, exporter)
        traced.post("/reward", pair(), traceparent=f"00-{TRACE}-{CALLER}-01")
        asked = traced.span("score ref")
    assert parent_of(asked) is None
    assert f"{asked.context.trace_id:032x}" != TRACE
    assert referee.headers[-1]["traceparent"].startswith(f"00-{asked.context.trace_id:032x}-")


WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        # FastAPI brings OpenTelemetry's API with it, which alone does nothing.
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from service.app import create_app
from service.errors import ConfigurationError
from service.pool import PoolFile
from service.settings import Settings

pool = PoolFile.model_validate({"models": [{"name": "rm", "urls": ["http://127.0.0.1:9"], "rendering": "template"}]})
create_app(Settings(store_url="redis://127.0.0.1:9/0"), pool)
assert "service.tracing" not in sys.modules
try:
    create_app(Settings(store_url="redis://127.0.0.1:9/0", tracing=True), pool)
except ConfigurationError as error:
    print(error)
"""


def test_the_sdk_is_needed_only_when_on() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'reward-router[tracing]'" in done.stdout


class Collector:
    """Takes OTLP over HTTP, as a collector does."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
                for resource in body.resource_spans:
                    (service,) = [
                        one.value.string_value for one in resource.resource.attributes if one.key == "service.name"
                    ]
                    outer.spans += [(service, span.name) for part in resource.scope_spans for span in part.spans]
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.mark.slow
async def test_a_served_gateway_sends_its_spans_to_the_collector(
    tmp_path: Path, own_valkey_server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wordllama", reason="needs reward-router[embedded]")
    pairs = write_recorded_pairs(tmp_path / "pairs.jsonl", 2)
    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-router")
    with Services(tmp_path) as services:
        worker = services.worker(tmp_path / "pairs.jsonl")
        worker.wait_until_ready()
        gateway = services.gateway("gateway", worker, own_valkey_server.url, tracing="true")
        gateway.wait_until_ready()
        caller = Caller(gateway.url)
        body = {"prompt": pairs[0].instance.prompt, "responses": pairs[0].instance.responses}
        status, reply = await caller.post("/reward", body)
        assert status == 200, reply
        await caller.close()
        # What has not been sent yet is sent when the gateway ends.
        await asyncio.to_thread(gateway.stop)
    collector.close()
    assert {("my-router", "POST /reward"), ("my-router", "save_decisions")} <= set(collector.spans)
