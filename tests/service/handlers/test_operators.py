"""The routes for operators: liveness, readiness, metrics, pool, posterior, and the OpenAPI document."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service import schemas
from service.handlers.openapi_trainers import TYPES
from service.scorers.protocol import WorkerTimeoutError
from service.telemetry import STAGES, Telemetry
from tests.support.asgi import Response
from tests.support.gateway import Gateway, fresh_run, open_gateway, pair, until

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

PATHS = {
    "/beliefs": "post",
    "/events": "get",
    "/runs": "get",
    "/reward": "post",
    "/reward/batch": "post",
    "/feedback": "post",
    "/feedback/batch": "post",
    "/audits/judge": "post",
    "/audits": "get",
    "/report": "get",
    "/get_reward": "post",
    "/get_reward/feedback": "post",
    "/v1/score/evaluation": "post",
    "/v1/score/evaluation/feedback": "post",
    "/remote_rm": "post",
    "/remote_rm/feedback": "post",
    "/healthz": "get",
    "/readyz": "get",
    "/metrics": "get",
    "/models": "get",
    "/posterior": "get",
    "/pool": "get",
    "/admin/pool": "post",
}


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess) -> AsyncIterator[Gateway]:
    """Three RMs, nothing learned."""
    async with open_gateway(valkey_server.url) as opened:
        yield opened


async def test_liveness_says_nothing_of_the_surroundings(own_valkey_server: ValkeyProcess) -> None:
    async with open_gateway(own_valkey_server.url) as gateway:
        own_valkey_server.kill()
        for arm in gateway.arms:
            arm.available = False
        response = await gateway.client.get("/healthz")
        assert (response.status, response.json) == (200, {"status": "live", "failed_tasks": []})


async def test_readiness_names_the_run_and_its_version(gateway: Gateway) -> None:
    reply = await gateway.client.ok("/reward", pair())
    await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 0})
    await gateway.learned(1)
    response = await gateway.client.get("/readyz")
    document = response.json
    (warning,) = document.pop("store_warnings")
    assert "appendfsync is no" in warning, "as the tests' server is set"
    assert document == {"status": "ready", "run": gateway.run, "posterior_version": 1}


async def test_not_ready_while_no_rm_can_be_asked(gateway: Gateway) -> None:
    gateway.arms[0].available = gateway.arms[1].available = False
    assert (await gateway.client.get("/readyz")).status == 200
    gateway.arms[2].available = False
    response = await gateway.client.get("/readyz")
    assert (response.status, response.error["code"]) == (503, "not_ready")
    assert response.error["details"] == {"models": ["rm-a", "rm-b", "rm-c"]}
    gateway.arms[1].available = True
    assert (await gateway.client.get("/readyz")).status == 200


async def test_not_ready_while_the_store_is_away_and_ready_again_by_itself(own_valkey_server: ValkeyProcess) -> None:
    async with open_gateway(own_valkey_server.url, store_timeout_seconds=0.5) as gateway:
        own_valkey_server.kill()
        response = await gateway.client.get("/readyz")
        assert (response.status, response.error["code"]) == (503, "store_unavailable")
        own_valkey_server.start()
        await until(lambda: is_ready(gateway), "ready again")


async def test_a_gateway_that_starts_before_its_store_becomes_ready(own_valkey_server: ValkeyProcess) -> None:
    own_valkey_server.kill()
    async with open_gateway(own_valkey_server.url, wait=False, store_timeout_seconds=0.5) as gateway:
        assert (await gateway.client.get("/readyz")).status == 503
        assert (await gateway.client.get("/healthz")).status == 200
        own_valkey_server.start()
        await until(lambda: is_ready(gateway), "ready")
        await gateway.client.ok("/reward", pair())


async def is_ready(gateway: Gateway) -> bool:
    return (await gateway.client.get("/readyz")).status == 200


async def test_readiness_answers_at_once_while_the_log_is_replayed(valkey_server: ValkeyProcess) -> None:
    run = fresh_run()
    async with open_gateway(valkey_server.url, run=run) as first:
        results = (await first.client.ok("/reward/batch", {"items": [pair(i) for i in range(200)]}))["results"]
        feedback = [{"decision_id": result["decision_id"], "preferred": 0} for result in results]
        await first.client.ok("/feedback/batch", {"items": feedback})
    async with open_gateway(valkey_server.url, run=run, wait=False) as second:
        response = await second.client.get("/readyz")
        assert response.status == 503
        assert response.error["code"] == "not_ready"
        assert "replaying" in response.error["message"]
        waited = await second.client.ok("/reward", pair())
        assert waited["posterior_version"] == 200, (
            "a request waits for the replay; it never draws from half a posterior"
        )
        assert (await second.client.get("/readyz")).json["posterior_version"] == 200


async def test_the_pool_is_shown_in_arm_order(gateway: Gateway) -> None:
    gateway.arms[1].available = False
    no_workers = {
        "kind": "rm",
        "referee": False,
        "rendering": None,
        "max_model_len": None,
        "over_long": None,
        "replicas": [],
        "judging": None,
    }
    assert (await gateway.client.get("/models")).json == [
        {"name": "rm-a", "available": True, **no_workers},
        {"name": "rm-b", "available": False, **no_workers},
        {"name": "rm-c", "available": True, **no_workers},
    ]


async def test_the_posterior_of_a_run_that_is_not_open_is_404(gateway: Gateway) -> None:
    response = await gateway.client.get("/posterior?run=nobody")
    assert (response.status, response.error["code"]) == (404, "not_found")
    assert "nobody" in response.error["message"]


async def test_equal_logs_have_equal_digests_and_other_ones_have_not(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, policy="single:rm-a") as gateway:
        suffix = fresh_run()
        runs = [f"{name}-{suffix}" for name in ("x", "y", "z")]
        for run in runs:
            for index in range(9):
                reply = await gateway.client.ok("/reward", {**pair(index), "run": run})
                preferred = 1 if (run.startswith("z") and index == 4) else 0
                body = {"decision_id": reply["decision_id"], "preferred": preferred, "run": run}
                await gateway.client.ok("/feedback", body)
        x, y, z = [(await gateway.learned(9, run))["digest"] for run in runs]
        assert x == y != z
        assert x == gateway.folded(runs[0]).digest()


def counters(response: Response) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name and labels."""
    assert response.status == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.body.decode())
        for sample in family.samples
    }


async def test_metrics_count_what_happened(gateway: Gateway) -> None:
    client, run = gateway.client, gateway.run
    gateway.arm("rm-a").error = WorkerTimeoutError("slow")
    replies = (await client.ok("/reward/batch", {"items": [pair(index) for index in range(30)]}))["results"]
    replies.append(await client.ok("/reward", pair(30)))
    await client.post("/reward", {})
    first = {"decision_id": replies[0]["decision_id"], "preferred": 0}
    await client.ok("/feedback", first)
    await client.ok("/feedback", first)
    await client.post("/feedback", {**first, "preferred": 1})
    await client.post("/feedback", {**first, "loss": 1.0})
    await client.post("/feedback", {"decision_id": "nobody", "preferred": 1})
    await gateway.learned(1)
    found = counters(await client.get("/metrics"))

    def value(name: str, **labels: str) -> float:
        return found[(f"reward_router_{name}", tuple(sorted(labels.items())))]

    assert value("requests_total", route="/reward", status="200") == 1
    assert value("requests_total", route="/reward/batch", status="200") == 1
    assert value("requests_total", route="/reward", status="422") == 1
    assert value("requests_total", route="/feedback", status="409") == 1
    assert {
        o: value("feedback_total", run=run, outcome=o)
        for o in ("applied", "duplicate", "conflict", "unknown", "invalid")
    } == {
        "applied": 1,
        "duplicate": 1,
        "conflict": 1,
        "unknown": 1,
        "invalid": 1,
    }
    assert sum(v for (name, _), v in found.items() if name == "reward_router_draws_total") == 31
    failed = value("worker_calls_total", model="rm-a", outcome="worker_timeout")
    assert failed == sum(reply["fallback"] for reply in replies) > 0
    assert value("fallbacks_total", model="rm-a", reason="worker_timeout") == failed
    answered = sum(value("worker_calls_total", model=model, outcome="ok") for model in ("rm-b", "rm-c"))
    assert answered == 31
    assert value("posterior_version_events", run=run) == 1
    assert value("log_lag_events", run=run) == 0
    assert value("requests_in_flight") == 0
    for stage in STAGES:
        assert value("stage_seconds_count", stage=stage) > 0, stage
    assert value("choice_batch_size_count") >= 2


async def test_every_declared_metric_is_exported_with_a_sentence(gateway: Gateway) -> None:
    await gateway.client.ok("/reward", pair())
    families = {
        family.name: family
        for family in text_string_to_metric_families((await gateway.client.get("/metrics")).body.decode())
    }
    declared = {family.name for family in Telemetry().registry.collect()}
    assert len(declared) >= 17
    assert declared <= set(families)
    assert all(families[name].documentation.endswith(".") for name in declared)
    assert all(name.startswith("reward_router_") for name in declared)


async def test_no_metric_and_no_log_line_holds_a_prompt_or_a_response(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    secret = {"prompt": "SECRET-PROMPT", "responses": ["SECRET-A", "SECRET-B"]}
    reply = await gateway.client.ok("/reward", secret)
    await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 0})
    for arm in gateway.arms:
        arm.refuses = lambda _: True
    await gateway.client.post("/reward", secret)
    for arm in gateway.arms:
        arm.available = False
    await gateway.client.post("/reward", secret)
    await gateway.client.post("/reward", {**secret, "responses": [5]})
    assert "SECRET" not in (await gateway.client.get("/metrics")).body.decode()
    for record in caplog.records:
        if record.name.startswith(("service", "router_core")):
            assert "SECRET" not in record.getMessage() + str(getattr(record, "fields", ""))


async def document_of(gateway: Gateway) -> dict[str, Any]:
    response = await gateway.client.get("/openapi.json")
    assert response.status == 200
    document: dict[str, Any] = response.json
    return document


async def test_the_openapi_document_has_all_routes(gateway: Gateway) -> None:
    document = await document_of(gateway)
    assert document["openapi"].startswith("3.")
    assert {path: next(iter(methods)) for path, methods in document["paths"].items()} == PATHS
    for path, methods in document["paths"].items():
        operation = methods[PATHS[path]]
        assert operation["summary"], path
        assert operation["description"], path
        assert "200" in operation["responses"], path


def references(node: Any) -> list[str]:
    """Every `$ref` below a node."""
    if isinstance(node, dict):
        found = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return found + [reference for child in node.values() for reference in references(child)]
    if isinstance(node, list):
        return [reference for child in node for reference in references(child)]
    return []


async def test_every_reference_of_the_openapi_document_leads_somewhere(gateway: Gateway) -> None:
    document = await document_of(gateway)
    assert references(document)
    for reference in references(document):
        node: Any = document
        for part in reference.removeprefix("#/").split("/"):
            assert part in node, reference
            node = node[part]


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the dev dependencies")
    return jsonschema.Draft202012Validator({**schema, "components": document["components"]})


async def test_the_openapi_schemas_are_json_schemas(gateway: Gateway) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the dev dependencies")
    for name, schema in (await document_of(gateway))["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema.get("title") or schema.get("description"), name


async def test_the_examples_fit_their_schemas_and_the_structs_that_parse_them(gateway: Gateway) -> None:
    document = await document_of(gateway)
    seen = 0
    for path, methods in document["paths"].items():
        content = methods[PATHS[path]].get("requestBody", {}).get("content", {}).get("application/json")
        if content is None:
            continue
        validator(document, content["schema"]).validate(content["example"])
        # A trainer's path for feedback takes its protocol's struct, and values besides.
        schema = content["schema"].get("allOf", [content["schema"]])[0]
        name = schema["$ref"].rsplit("/", 1)[1]
        struct = getattr(schemas, name, None) or next(found for found in TYPES if found.__name__ == name)
        msgspec.json.decode(msgspec.json.encode(content["example"]), type=struct)
        seen += 1
    assert seen == 13


async def test_the_reward_example_can_be_sent_and_every_reply_fits_its_schema(gateway: Gateway) -> None:
    document = await document_of(gateway)

    def check(path: str, status: int, reply: Any) -> None:
        content = document["paths"][path]["post"]["responses"][str(status)]["content"]["application/json"]
        validator(document, content["schema"]).validate(reply)

    example = document["paths"]["/reward"]["post"]["requestBody"]["content"]["application/json"]["example"]
    reply = await gateway.client.ok("/reward", example)
    check("/reward", 200, reply)
    check("/reward", 200, await gateway.client.ok("/reward", {**example, "explain": True}))
    check("/beliefs", 200, await gateway.client.ok("/beliefs", example))
    items = {"items": [pair(0), {**pair(1), "policy": "nonsense"}, {"prompt": "p", "responses": ["one"]}]}
    check("/reward/batch", 200, await gateway.client.ok("/reward/batch", items))
    feedback = {"decision_id": reply["decision_id"], "preferred": 0}
    check("/feedback", 200, await gateway.client.ok("/feedback", feedback))
    mixed = {"items": [feedback, {**feedback, "preferred": 1}]}
    check("/feedback/batch", 200, await gateway.client.ok("/feedback/batch", mixed))
    for path, body in (
        ("/reward", b"{"),
        ("/reward", b'{"prompt": 5}'),
        ("/reward", b'{"prompt": "p", "responses": ["a"], "policy": "nonsense"}'),
        ("/feedback", b'{"decision_id": "nobody", "preferred": 0}'),
        ("/feedback", b'{"decision_id": "%b", "preferred": 1}' % reply["decision_id"].encode()),
    ):
        response = await gateway.client.request("POST", path, body)
        check(path, response.status, response.json)


async def test_operators_replies_fit_their_schemas(gateway: Gateway) -> None:
    document = await document_of(gateway)
    for path in ("/healthz", "/readyz", "/models", "/posterior"):
        content = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]
        validator(document, content["schema"]).validate((await gateway.client.get(path)).json)


async def test_the_documentation_page_is_served(gateway: Gateway) -> None:
    response = await gateway.client.get("/docs")
    assert response.status == 200
    assert b"openapi.json" in response.body
    text = response.body.decode()
    assert all(path in text for path in ("/reward", "/feedback", "/posterior", "PosteriorStatus"))
    # Nothing is loaded from elsewhere: no script, no style sheet, no picture.
    assert not re.findall(r"<script|<link|<img|src=", text)


async def test_every_field_of_the_posterior_is_described(gateway: Gateway) -> None:
    schemas = (await document_of(gateway))["components"]["schemas"]
    for name in ("PosteriorStatus", "ArmLearned"):
        assert [field for field, shape in schemas[name]["properties"].items() if "description" not in shape] == []


async def test_the_application_stops_while_learners_wait_for_events(valkey_server: ValkeyProcess) -> None:
    async with asyncio.timeout(10), open_gateway(valkey_server.url) as gateway:
        for name in ("a", "b", "c"):
            await gateway.client.ok("/reward", {**pair(), "run": f"{gateway.run}-{name}"})
