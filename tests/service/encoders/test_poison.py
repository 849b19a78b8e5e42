"""Texts on which the encoder's server fails are charged to themselves, not to the server or to their neighbours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from router_core.records import Instance
from service.encoders.client import EncoderConfig, StateClient
from service.encoders.protocol import EncoderInputError, EncoderUnavailableError
from service.encoders.wire import EmbeddingsRequest
from service.scorers.requests import SuspectError
from service.scorers.transport.breaker import BreakerPolicy
from tests.service.encoders.conftest import Exported
from tests.service.encoders.test_remote import NAN, TOLERANCE, Scripted, local, remote
from tests.service.scorers.worker_servers import Json, Mortal, Serve, soon
from tests.support.gateway import open_gateway, pair

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

BAD = Instance("a b", ("c d e", "p o i s o n"))
FINE = [Instance(f"x {n}", ("y z", "w " * (n + 1))) for n in range(11)]
Answer = Callable[[EmbeddingsRequest, Any], tuple[int, Any]]


def failing(status: int) -> Answer:
    return lambda *_: (status, {"error": {"message": "no", "type": "x", "code": status}})


def of_rows(change: Callable[[list[Any]], object]) -> Answer:
    def answer(_: EmbeddingsRequest, document: Any) -> tuple[int, Any]:
        change(document["data"])
        return 200, document

    return answer


FAULTS = {
    "500": failing(500),
    "400": failing(400),
    "short": of_rows(lambda rows: rows.pop()),
    "NaN": of_rows(lambda rows: rows[-1].update(embedding=NAN)),
}


def poisoned(exported: Exported, fault: Answer) -> Scripted:
    bad = exported.backbone.token_ids(BAD.prompt, BAD.responses[1])
    server = Scripted(exported.app())
    server.answer = lambda request, document: fault(request, document) if bad in request.input else (200, document)
    return server


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_only_the_culprit_of_a_micro_batch_fails_and_no_breaker_counts(
    exported: Exported, serve: Serve, fault: Answer, servers: int
) -> None:
    urls = [serve(poisoned(exported, fault)) for _ in range(servers)]
    breaker = BreakerPolicy(failures_to_open=1, backoff_seconds=30)
    async with remote(exported, *urls, monitored=False, breaker=breaker) as encoder:
        outcomes = await asyncio.gather(
            encoder.encode(FINE[:4]),
            encoder.encode([*FINE[4:7], BAD, *FINE[7:9]]),
            encoder.encode(FINE[9:]),
            return_exceptions=True,
        )
        assert isinstance(outcomes[1], EncoderInputError)
        assert outcomes[1].places == {3}
        expected = local(exported).encode(FINE)
        for outcome, rows in ((outcomes[0], expected[:4]), (outcomes[2], expected[9:])):
            assert not isinstance(outcome, BaseException)
            np.testing.assert_allclose(outcome.x, rows, rtol=0, atol=TOLERANCE)
        assert all(one.up for one in encoder.servers())
        assert encoder.available


@pytest.mark.parametrize("fault", [FAULTS["500"], FAULTS["short"]])
async def test_a_server_that_fails_on_everything_is_taken_out_and_not_asked_in_halves(
    exported: Exported, serve: Serve, fault: Answer
) -> None:
    server = Scripted(exported.app())
    server.answer = fault
    breaker = BreakerPolicy(failures_to_open=1, backoff_seconds=30)
    async with remote(exported, serve(server), monitored=False, breaker=breaker) as encoder:
        with pytest.raises(EncoderUnavailableError):
            await encoder.encode(FINE)
        assert not encoder.available
        assert len(server.requests) == 2, "the batch, and the reference"


@pytest.mark.parametrize("pieces", [0, 4])
async def test_an_instance_of_a_batch_that_cannot_be_encoded_leaves_the_others_their_rewards(
    exported: Exported, serve: Serve, valkey_server: ValkeyProcess, pieces: int
) -> None:
    url = serve(poisoned(exported, FAULTS["500"]))
    async with remote(exported, url, monitored=False) as encoder:
        items = [pair(index) for index in range(6)]
        items.insert(2, {"prompt": BAD.prompt, "responses": list(BAD.responses)})
        async with open_gateway(valkey_server.url, encoder=encoder, batch_piece_responses=pieces) as gateway:
            results = (await gateway.client.ok("/reward/batch", {"items": items}))["results"]
            assert [place for place, one in enumerate(results) if one.get("error")] == [2]
            assert "fails on this input alone" in results[2]["error"]["message"]
            alone = await gateway.client.post("/reward", items[2])
            assert alone.status == 422
            assert (await gateway.client.get("/readyz")).status == 200


def states(request: Json) -> Json:
    return {"data": [{"index": i, "embedding": [float(sum(ids))]} for i, ids in enumerate(request["input"])]}


async def test_texts_that_end_servers_end_two_at_most() -> None:
    servers = [Mortal("666", states) for _ in range(3)]
    async with AsyncExitStack() as stack:
        for server in servers:
            await server.start()
            stack.callback(server.end)
        breaker = BreakerPolicy(backoff_seconds=30)
        config = EncoderConfig(urls=tuple(server.url for server in servers), dim=1, breaker=breaker)
        client = StateClient(config, [1])
        stack.push_async_callback(client.close)
        texts = [[[number]] for number in range(2, 12)]
        texts[6] = [[666]]
        with pytest.raises(SuspectError) as suspected:
            await client.states([ids for (ids,) in texts], deadline=soon(), alone=False)
        assert suspected.value.crashed
        for ids in texts:
            client.doubt(ids)
        for _ in range(2):
            for ids in texts:
                if ids == [[666]]:
                    with pytest.raises(EncoderInputError, match="dropped"):
                        await client.states(ids, deadline=soon())
                else:
                    assert (await client.states(ids, deadline=soon())).tolist() == [[float(ids[0][0])]]
            assert sum(server.alive for server in servers) == 1
