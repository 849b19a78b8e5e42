"""Contexts over HTTP equal those computed here; servers fail, lie and come back."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from starlette.requests import Request

from router_core.encoder.base import ConcatBackbone
from router_core.encoder.export import export
from router_core.encoder.fuse import Fuse, PairEncoder
from router_core.encoder.split import SplitEncoder
from router_core.encoder.surface import SurfaceBackbone
from router_core.encoder.torch import TorchBackbone
from router_core.errors import EncoderError
from router_core.records import Instance
from service.encoders.client import EncoderConfig, StateClient
from service.encoders.health import EncoderChecks
from service.encoders.protocol import Encoded, EncoderInputError, EncoderUnavailableError
from service.encoders.reading import Reading
from service.encoders.remote import RemoteEncoder
from service.encoders.wire import EmbeddingsRequest
from service.scorers.health import HealthPolicy, ReplicaMonitor
from tests.service.encoders.conftest import Exported
from tests.service.scorers.worker_servers import Serve
from tests.support.gateway import until
from tests.support.transformers_dirs import save_transformer

INSTANCES = [
    Instance("a b c", ("d e f g", "h i")),
    Instance("x", ("y",)),
    Instance("p q", ("r s", "t u v", "", "w " * 80)),
]
NAN = base64.b64encode(np.full(16, np.nan, "<f4").tobytes()).decode()
TOLERANCE = 1e-5
"""Difference of x between one process and another: only batch shapes differ, and float32 carries 24 bits."""


class Scripted:
    """An ASGI server around an app, whose answers to `/v1/embeddings` may be changed or held."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.requests: list[EmbeddingsRequest] = []
        self.answer: Callable[[EmbeddingsRequest, Any], tuple[int, Any]] | None = None
        self.delay: Callable[[int], float] = lambda _: 0.0
        self.in_flight = 0
        self.most_in_flight = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/v1/embeddings":
            await self._app(scope, receive, send)
            return
        body = await Request(scope, receive).body()
        request = msgspec.json.decode(body, type=EmbeddingsRequest)
        self.requests.append(request)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.delay(len(self.requests)))
        finally:
            self.in_flight -= 1
        sent: list[Any] = []

        async def again() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def keep(message: Any) -> None:
            sent.append(message)

        await self._app(scope, again, keep)
        if self.answer is not None:
            status, document = self.answer(request, json.loads(sent[1]["body"]))
            content = json.dumps(document).encode()
            sent[0]["status"] = status
            sent[0]["headers"] = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
            sent[1]["body"] = content
        for message in sent:
            await send(message)


def client_of(reading: Reading, *urls: str, **options: Any) -> StateClient:
    config = EncoderConfig(urls=urls, dim=reading.dim, **{"timeout_seconds": 10.0, **options})
    return StateClient(config, min(reading.references.ids, key=len))


def monitor_of(client: StateClient, reading: Reading) -> ReplicaMonitor:
    return ReplicaMonitor([EncoderChecks(client, reading)], HealthPolicy(0.05, 10.0), np.random.default_rng(0))


@asynccontextmanager
async def remote(
    exported: Exported, *urls: str, lanes: int | None = None, monitored: bool = True, **options: Any
) -> AsyncIterator[RemoteEncoder]:
    """An untrained encoder over these servers."""
    reading = Reading.load(exported.directory)
    client = client_of(reading, *urls, **options)
    split = SplitEncoder((), reading, (), Fuse.identity(reading.dim))
    encoder = RemoteEncoder(split, client, monitor_of(client, reading) if monitored else None, lanes=lanes)
    await encoder.start()
    try:
        yield encoder
    finally:
        await encoder.close()


def local(exported: Exported) -> PairEncoder:
    return PairEncoder(exported.backbone, Fuse.identity(exported.backbone.dim))


async def test_contexts_equal_those_of_the_encoder_in_this_process(exported: Exported, serve: Serve) -> None:
    async with remote(exported, serve(exported.app())) as encoder:
        assert encoder.available
        assert (encoder.spec, encoder.d) == (local(exported).spec, local(exported).d)
        encoded = await encoder.encode(INSTANCES)
    np.testing.assert_allclose(encoded.x, local(exported).encode(INSTANCES), rtol=0, atol=TOLERANCE)
    assert encoded.seconds > 0


async def test_other_backbones_keep_their_columns_beside_the_served_one(exported: Exported, serve: Serve) -> None:
    reading = Reading.load(exported.directory)
    surface = SurfaceBackbone()
    fuse = Fuse.identity(2 * surface.dim + reading.dim)
    whole = PairEncoder(ConcatBackbone([surface, exported.backbone, surface]), fuse)
    client = client_of(reading, serve(exported.app()))
    split = SplitEncoder((surface,), reading, (surface,), fuse)
    assert split.spec == whole.spec
    encoder = RemoteEncoder(split, client, None)
    x = (await encoder.encode(INSTANCES)).x
    await encoder.close()
    np.testing.assert_allclose(x, whole.encode(INSTANCES), rtol=0, atol=TOLERANCE)


async def test_the_request_holds_token_ids_and_asks_for_raw_states(exported: Exported, serve: Serve) -> None:
    server = Scripted(exported.app())
    async with remote(exported, serve(server), monitored=False) as encoder:
        await encoder.encode(INSTANCES)
    [request] = server.requests
    pairs = [(instance.prompt, response) for instance in INSTANCES for response in instance.responses]
    assert request.input == [exported.backbone.token_ids(*pair) for pair in pairs]
    assert (request.use_activation, request.encoding_format, request.model) == (False, "base64", None)


async def test_requests_of_one_turn_become_one_micro_batch_and_each_gets_its_own_rows(
    exported: Exported, serve: Serve
) -> None:
    server = Scripted(exported.app())
    async with remote(exported, serve(server), monitored=False) as encoder:
        parts = await asyncio.gather(*(encoder.encode([instance]) for instance in INSTANCES))
    assert [len(request.input) for request in server.requests] == [7]
    expected = local(exported).encode(INSTANCES)
    np.testing.assert_allclose(np.concatenate([part.x for part in parts]), expected, rtol=0, atol=TOLERANCE)


async def test_a_slow_micro_batch_holds_up_no_other(exported: Exported, serve: Serve) -> None:
    server = Scripted(exported.app())
    server.delay = lambda count: 30.0 if count == 1 else 0.0
    async with remote(exported, serve(server), monitored=False, timeout_seconds=60.0) as encoder:
        slow = asyncio.create_task(encoder.encode([INSTANCES[0]]))
        await until(lambda: server.in_flight == 1, "the slow one is under way")
        await asyncio.gather(*(encoder.encode([instance]) for instance in INSTANCES))
        assert not slow.done()
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)


async def test_what_waits_for_a_lane_goes_as_one_request(exported: Exported, serve: Serve) -> None:
    server = Scripted(exported.app())
    server.delay = lambda count: 0.2 if count == 1 else 0.0
    async with remote(exported, serve(server), monitored=False, lanes=1) as encoder:
        first = asyncio.create_task(encoder.encode([INSTANCES[1]]))
        await until(lambda: server.in_flight == 1, "the first one is under way")
        later = [asyncio.create_task(encoder.encode([INSTANCES[1]])) for _ in range(5)]
        await asyncio.gather(first, *later)
    assert [len(request.input) for request in server.requests] == [1, 5]


async def test_a_request_never_holds_more_texts_than_it_may(exported: Exported, serve: Serve) -> None:
    server = Scripted(exported.app())
    async with remote(exported, serve(server), monitored=False, texts_per_request=4) as encoder:
        parts = await asyncio.gather(*(encoder.encode([instance]) for instance in [*INSTANCES, INSTANCES[0]]))
        big = await encoder.encode([Instance("q", tuple("abcdefghij"))])
    assert max(len(request.input) for request in server.requests) == 4
    assert sum(len(request.input) for request in server.requests) == 2 + 1 + 4 + 2 + 10
    expected = local(exported).encode([*INSTANCES, INSTANCES[0]])
    np.testing.assert_allclose(np.concatenate([part.x for part in parts]), expected, rtol=0, atol=TOLERANCE)
    assert big.x.shape == (1, encoder.d)


async def test_one_who_gives_up_spoils_nothing_for_the_others(exported: Exported, serve: Serve) -> None:
    server = Scripted(exported.app())
    async with remote(exported, serve(server), monitored=False) as encoder:
        tasks = [asyncio.create_task(encoder.encode([instance])) for instance in INSTANCES]
        await asyncio.sleep(0)
        tasks[1].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(done[1], asyncio.CancelledError)
    expected = local(exported).encode(INSTANCES)
    np.testing.assert_allclose(done[2].x, expected[2:], rtol=0, atol=TOLERANCE)  # type: ignore[union-attr]


async def test_a_text_that_cannot_be_read_fails_its_own_request_only(exported: Exported, serve: Serve) -> None:
    unreadable = Instance("half a pair of surrogates", ("\ud800", "b"))
    async with remote(exported, serve(exported.app()), monitored=False) as encoder:
        done = await asyncio.gather(
            *(encoder.encode([instance]) for instance in [INSTANCES[0], unreadable, INSTANCES[2]]),
            return_exceptions=True,
        )
    assert isinstance(done[1], EncoderInputError)
    assert "cannot read a text" in str(done[1])
    expected = local(exported).encode([INSTANCES[0], INSTANCES[2]])
    found = np.concatenate([one.x for one in (done[0], done[2]) if isinstance(one, Encoded)])
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


async def test_another_server_answers_where_one_cannot(exported: Exported, serve: Serve) -> None:
    broken = Scripted(exported.app())
    broken.answer = lambda *_: (500, {"error": {"message": "no", "type": "x", "code": 500}})
    async with remote(exported, serve(broken), serve(exported.app()), monitored=False) as encoder:
        for _ in range(4):
            assert (await encoder.encode([INSTANCES[0]])).x.shape == (1, encoder.d)
    assert broken.requests


async def test_no_server_is_told_as_unavailable_with_its_reason(exported: Exported, refused_url: str) -> None:
    async with remote(exported, refused_url, monitored=False) as encoder:
        with pytest.raises(EncoderUnavailableError, match="no replica could answer: connection refused") as told:
            await encoder.encode(INSTANCES)
    assert told.value.status == 503
    assert told.value.retry_after_seconds == 1


async def test_the_deadline_bounds_a_server_that_hangs(exported: Exported, serve: Serve) -> None:
    server = Scripted(exported.app())
    server.delay = lambda _: 30.0
    async with remote(exported, serve(server), monitored=False, timeout_seconds=0.2) as encoder:
        with pytest.raises(EncoderUnavailableError, match="no answer in time"):
            await encoder.encode(INSTANCES)


def changed(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[EmbeddingsRequest, Any], tuple[int, Any]]:
    def answer(_: EmbeddingsRequest, document: Any) -> tuple[int, Any]:
        change(document["data"])
        return 200, document

    return answer


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows.pop(), "vectors for"),
        (lambda rows: rows[0].update(index=9), "out of range or repeated"),
        (lambda rows: rows[0].update(index=1), "out of range or repeated"),
        (lambda rows: rows[0].update(embedding=[1.0, 2.0]), "2 columns, expected 16"),
        (lambda rows: rows[0].update(embedding="AAA"), "not base64"),
        (lambda rows: rows[0].update(embedding=None), "not an embeddings reply"),
    ],
)
async def test_an_answer_that_is_none_is_never_used(change: Any, words: str, exported: Exported, serve: Serve) -> None:
    server = Scripted(exported.app())
    server.answer = changed(change)
    async with remote(exported, serve(server), monitored=False) as encoder:
        with pytest.raises(EncoderUnavailableError, match=words):
            await encoder.encode(INSTANCES)


async def test_decimal_numbers_are_read_as_well_and_nan_for_all_is_the_servers_fault(
    exported: Exported, serve: Serve
) -> None:
    server = Scripted(exported.app())
    async with remote(exported, serve(server), monitored=False) as encoder:
        server.answer = changed(lambda rows: [row.update(embedding=[0.5] * 16) for row in rows])
        assert np.isfinite((await encoder.encode(INSTANCES)).x).all()
        server.answer = changed(lambda rows: [row.update(embedding=NAN) for row in rows])
        with pytest.raises(EncoderUnavailableError, match="NaN or infinity"):
            await encoder.encode(INSTANCES)


@pytest.mark.parametrize("value", [3e38, -1e12, 1e300])
async def test_absurd_numbers_of_one_text_cost_its_caller_alone(exported: Exported, serve: Serve, value: float) -> None:
    server = Scripted(exported.app())
    wanted: list[list[int]] = []

    def answer(request: EmbeddingsRequest, document: Any) -> tuple[int, Any]:
        for ids, row in zip(request.input, document["data"], strict=True):
            if ids == wanted[0]:
                row.update(embedding=[value] * 16)
        return 200, document

    async with remote(exported, serve(server), monitored=False) as encoder:
        clean = (await encoder.encode(INSTANCES[1:])).x
        asked = len(server.requests)
        await encoder.encode(INSTANCES[:1])
        wanted.append(list(server.requests[asked].input[0]))
        server.answer = answer
        poisoned, others = await asyncio.gather(
            encoder.encode(INSTANCES[:1]), encoder.encode(INSTANCES[1:]), return_exceptions=True
        )
    assert isinstance(poisoned, EncoderInputError), poisoned
    assert isinstance(others, Encoded), others
    np.testing.assert_allclose(others.x, clean, atol=TOLERANCE)


async def problem_of(exported: Exported, url: str, **options: Any) -> str:
    """What the probe finds wrong with a server."""
    async with remote(exported, url, **options) as encoder:
        [server] = encoder.servers()
        assert not encoder.available
        assert not server.up
        return server.problem or ""


async def test_a_server_of_other_weights_is_refused_with_a_sentence(
    exported: Exported, serve: Serve, tmp_path: Path
) -> None:
    source = save_transformer(tmp_path / "other", "llama", chat=True, seed=1)
    other = Exported(TorchBackbone.load(source, "torch:other"), source)
    problem = await problem_of(exported, serve(other.app()))
    assert "differ from the checkpoint's by" in problem
    assert "reward-router encoder export" in problem


async def test_a_server_that_normalises_is_refused_and_told_apart_from_other_weights(
    exported: Exported, serve: Serve
) -> None:
    server = Scripted(exported.app())

    def unit(rows: list[dict[str, Any]]) -> None:
        states = Reading.load(exported.directory).references.states
        for row in rows:
            state = states[row["index"]]
            row["embedding"] = (state / np.linalg.norm(state)).tolist()

    server.answer = changed(unit)
    assert "normalised to length 1" in await problem_of(exported, serve(server))


async def test_a_server_with_too_short_a_context_or_another_name_is_refused(
    exported: Exported, serve: Serve, tmp_path: Path
) -> None:
    short = TorchBackbone.load(exported.directory, "torch:short", max_tokens=20)
    problem = await problem_of(exported, serve(Exported(short, exported.directory).app()))
    assert "takes at most 20 tokens" in problem
    assert "--max-model-len 64" in problem
    assert "serves encoder, not 'x'" in await problem_of(exported, serve(exported.app()), model="x")


async def test_a_server_that_comes_back_is_probed_and_asked_again(exported: Exported, serve: Serve) -> None:
    server = Scripted(exported.app())
    server.answer = lambda *_: (503, {"error": {"message": "loading", "type": "x", "code": 503}})
    async with remote(exported, serve(server)) as encoder:
        assert not encoder.available
        with pytest.raises(EncoderUnavailableError, match="all are out"):
            await encoder.encode(INSTANCES)
        server.answer = None
        await until(lambda: encoder.available, "the server is admitted")
        assert (await encoder.encode(INSTANCES)).x.shape == (3, encoder.d)


async def test_another_model_in_a_servers_place_gets_no_traffic(
    exported: Exported, serve: Serve, tmp_path: Path
) -> None:
    server = Scripted(exported.app())
    async with remote(exported, serve(server)) as encoder:
        assert encoder.available
        server.answer = changed(lambda rows: [row.update(embedding=[1.0]) for row in rows])
        await until(lambda: not encoder.available, "the server is rejected")
        assert "1 columns, expected 16" in (encoder.servers()[0].problem or "")


@pytest.mark.parametrize("value", [1.0, float("nan")], ids=["other weights", "nan"])
async def test_a_server_whose_states_change_gets_no_traffic(value: float, exported: Exported, serve: Serve) -> None:
    server = Scripted(exported.app())
    async with remote(exported, serve(server)) as encoder:
        assert encoder.available
        states = base64.b64encode(np.full(16, value, "<f4").tobytes()).decode()
        server.answer = changed(lambda rows: [row.update(embedding=states) for row in rows])
        await until(lambda: not encoder.available, "the server is rejected")
        problem = encoder.servers()[0].problem or ""
        assert ("differ from the checkpoint's" if np.isfinite(value) else "NaN or infinity") in problem


def test_the_halves_check_what_is_handed_to_them(exported: Exported) -> None:
    reading = Reading.load(exported.directory)
    with pytest.raises(EncoderError, match="the fuse takes 5 columns"):
        SplitEncoder((), reading, (), Fuse.identity(5))
    split = SplitEncoder((), reading, (), Fuse.identity(reading.dim))
    with pytest.raises(EncoderError, match="responses is empty"):
        split.prepare([Instance("a", ())])
    prepared = split.prepare(INSTANCES)
    with pytest.raises(EncoderError, match=r"states have shape \(2, 16\), expected \(7, 16\)"):
        split.finish(prepared, np.zeros((2, 16), np.float32))
    assert split.prepare([]).ids == []


def test_an_encoder_with_the_mean_of_states_splits_as_well(tmp_path: Path) -> None:
    source = save_transformer(tmp_path / "source", "bert")
    backbone = TorchBackbone.load(source, "torch:bert")
    export(backbone, tmp_path / "out")
    reading = Reading.load(tmp_path / "out")
    fuse = Fuse.identity(reading.dim)
    split = SplitEncoder((), reading, (), fuse)
    prepared = split.prepare(INSTANCES)
    x = split.finish(prepared, backbone.embed_ids(prepared.ids))
    np.testing.assert_allclose(x, PairEncoder(backbone, fuse).encode(INSTANCES), rtol=0, atol=TOLERANCE)
