"""`GET /models` says what the probes learned of real workers: how much they read, and how they are asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from service.app import create_app
from service.pool import ModelEntry, PoolFile
from service.scorers.protocol import OverLong
from service.settings import Settings
from service.workers.cpu import cpu_app
from tests.service.scorers.worker_servers import RunningWorker, ScriptedWorker, Serve, reply
from tests.service.workers.test_cpu import MAX_LENGTH, build
from tests.support.asgi import AsgiClient, running
from tests.support.gateway import fresh_run, small_encoder, until


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reward model's directory."""
    return build(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def workers(model: Path) -> Iterator[dict[int, str]]:
    """The small CPU worker twice: tokens that it reads at most -> where it is."""
    started = {length: RunningWorker(cpu_app([model], max_length=length, threads=1)) for length in (MAX_LENGTH, 100)}
    yield {length: one.url for length, one in started.items()}
    for one in started.values():
        one.stop(force=False)
    for one in started.values():
        one.join()


@asynccontextmanager
async def gateway_of(store_url: str, *models: ModelEntry, over_long: OverLong) -> AsyncIterator[AsgiClient]:
    """A gateway for these models."""
    settings = Settings(store_url=store_url, run=fresh_run(), seed=0, health_interval_seconds=0.05)
    pool = PoolFile(models=models, over_long=over_long)
    async with running(create_app(settings, pool, encoder=small_encoder())) as client:
        yield client


async def shown(client: AsgiClient) -> list[dict[str, Any]]:
    """The pool's models."""
    response = await client.get("/models")
    assert response.status == 200, response.body
    models: list[dict[str, Any]] = response.json
    return models


async def test_each_worker_says_how_much_it_reads_and_the_least_of_them_holds(
    workers: dict[int, str], model: Path, valkey_url: str
) -> None:
    both = (workers[MAX_LENGTH], workers[100])
    entries = (
        ModelEntry(name="both", urls=both, served_name="tiny", rendering="tokens", path=model),
        ModelEntry(name="shorter", urls=both[:1], served_name="tiny", max_model_len=50),
        ModelEntry(name="texts", urls=both[:1], served_name="tiny", rendering="template", chat_template=str(model)),
    )
    async with gateway_of(valkey_url, *entries, over_long=OverLong.CUT_PROMPT) as client:
        models = await shown(client)
        assert [one["rendering"] for one in models] == ["tokens", "messages", "template"]
        assert [one["max_model_len"] for one in models] == [100, 50, MAX_LENGTH]
        assert {one["over_long"] for one in models} == {"cut_prompt"}
        lengths = [[replica["max_model_len"] for replica in one["replicas"]] for one in models]
        assert lengths == [[MAX_LENGTH, 100], [MAX_LENGTH], [MAX_LENGTH]]
        assert all(one["available"] for one in models)


async def test_a_length_that_nobody_tells_is_null(serve: Serve, refused_url: str, valkey_url: str) -> None:
    silent = ScriptedWorker()
    silent.answer = lambda request: (200, reply([0.5 if request.get("use_activation") is None else 0.0]))
    entries = (ModelEntry(name="rm", urls=(serve(silent),)), ModelEntry(name="away", urls=(refused_url,)))
    async with gateway_of(valkey_url, *entries, over_long=OverLong.SKIP) as client:
        models = await shown(client)
        assert [one["available"] for one in models] == [True, False]
        assert [one["max_model_len"] for one in models] == [None, None]
        assert [one["replicas"][0]["max_model_len"] for one in models] == [None, None]


async def test_a_worker_that_comes_back_as_another_is_shown_as_what_it_is_now(model: Path, valkey_url: str) -> None:
    first = RunningWorker(cpu_app([model], threads=1))
    port = int(first.url.rpartition(":")[2])
    entry = ModelEntry(name="tiny", urls=(first.url,))
    async with gateway_of(valkey_url, entry, over_long=OverLong.SKIP) as client:
        assert (await shown(client))[0]["max_model_len"] == MAX_LENGTH
        first.stop()
        first.join()

        async def gone() -> bool:
            return not (await shown(client))[0]["available"]

        await until(gone, "the worker is out")
        second = RunningWorker(cpu_app([model], max_length=80, threads=1), port)

        async def shorter() -> bool:
            return (await shown(client))[0]["max_model_len"] == 80

        await until(shorter, "the new worker's length is shown")
    second.stop(force=False)
    second.join()


async def test_the_schema_describes_what_operators_read(valkey_url: str, refused_url: str) -> None:
    entry = ModelEntry(name="away", urls=(refused_url,))
    async with gateway_of(valkey_url, entry, over_long=OverLong.SKIP) as client:
        schemas = (await client.get("/openapi.json")).json["components"]["schemas"]
        for name, fields in (
            ("ScorerStatus", ("rendering", "max_model_len", "over_long")),
            ("ReplicaStatus", ("max_model_len",)),
        ):
            for field in fields:
                assert "null" in schemas[name]["properties"][field]["description"]
                assert field in schemas[name]["required"]
