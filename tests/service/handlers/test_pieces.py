"""`/reward/batch` in pieces: an RM is asked before the batch is encoded, and a piece that fails fails alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from router_core.encoder.fuse import Fuse, PairEncoder
from router_core.encoder.surface import SurfaceBackbone
from router_core.records import Instance
from service.encoders.protocol import AwaitedEncoder, Encoded, EncoderUnavailableError, ServerStatus
from service.scorers.protocol import WorkerUnavailableError
from service.scorers.rm.client import ArmConfig, VllmArm
from tests.service.scorers.worker_servers import RunningWorker, ScriptedWorker
from tests.support.arms import ScriptedArm, score_items
from tests.support.gateway import DIM, Gateway, fresh_run, open_gateway, pair, small_encoder, until
from tests.support.story import away_first

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess


class SteppedEncoder(AwaitedEncoder):
    """The small encoder as if it were elsewhere: each call first waits for `before`, told how many came before it.

    Attributes:
        sizes: instances of each call.
    """

    spec = "stepped"
    d = DIM
    available = True

    def __init__(self, before: Callable[[int], Awaitable[None]]) -> None:
        self._before = before
        self._encoder = small_encoder()
        self.sizes: list[int] = []

    def servers(self) -> list[ServerStatus]:
        """None."""
        return []

    async def start(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""

    async def encode(self, instances: Sequence[Instance]) -> Encoded:
        self.sizes.append(len(instances))
        await self._before(len(self.sizes) - 1)
        return Encoded(self._encoder.encode(instances), 0.0)


class SizedEncoder(PairEncoder):
    """The small encoder.

    Attributes:
        sizes: instances of each pass.
    """

    def __init__(self) -> None:
        backbone = SurfaceBackbone()
        super().__init__(backbone, Fuse.identity(backbone.dim, DIM))
        self.sizes: list[int] = []

    def encode(self, instances: Sequence[Instance]) -> NDArray[np.float32]:
        self.sizes.append(len(instances))
        return super().encode(instances)


async def at_once(_: int) -> None:
    """An encoder that never waits."""


def batch(count: int, **more: Any) -> dict[str, Any]:
    """That many pairs."""
    return {"items": [pair(index) for index in range(count)], **more}


async def results_of(gateway: Gateway, document: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of `/reward/batch`."""
    results: list[dict[str, Any]] = (await gateway.client.ok("/reward/batch", document))["results"]
    return results


async def test_rms_are_asked_about_the_first_piece_while_the_next_is_encoded(valkey_server: ValkeyProcess) -> None:
    arm = ScriptedArm("rm-a")

    async def asked_about_the_first(call: int) -> None:
        # Without pieces under way side by side nobody would ever ask, and the request would end at its deadline.
        if call == 1:
            await until(lambda: arm.calls, "the RM is asked")

    encoder = SteppedEncoder(asked_about_the_first)
    async with open_gateway(valkey_server.url, arms=[arm], encoder=encoder, batch_piece_responses=4) as gateway:
        results = await results_of(gateway, batch(5))
    assert encoder.sizes == [2, 2, 1]
    assert sorted(len(call) for call in arm.calls) == [2, 4, 4]
    for index, result in enumerate(results):
        assert result["rewards"] == [float(len(response)) for response in pair(index)["responses"]]


async def test_the_next_piece_is_encoded_while_an_rm_is_asked_about_the_first(valkey_server: ValkeyProcess) -> None:
    arm = ScriptedArm("rm-a")
    arm.gate = asyncio.Event()

    async def opens_the_gate(call: int) -> None:
        if call == 1 and arm.gate is not None:
            await until(lambda: arm.calls, "the RM is asked")
            arm.gate.set()

    async with open_gateway(
        valkey_server.url, arms=[arm], encoder=SteppedEncoder(opens_the_gate), batch_piece_responses=4
    ) as gateway:
        assert [len(result["rewards"]) for result in await results_of(gateway, batch(4))] == [2] * 4


async def test_an_encoder_in_the_gateway_takes_one_piece_at_a_time(valkey_server: ValkeyProcess) -> None:
    encoder = SizedEncoder()
    async with open_gateway(valkey_server.url, encoder=encoder, batch_piece_responses=4) as gateway:
        assert len(await results_of(gateway, batch(7))) == 7
    assert encoder.sizes == [2, 2, 2, 1]


@pytest.mark.parametrize(
    ("options", "document", "sizes"),
    [
        ({"batch_piece_responses": 0}, batch(6), [6]),
        ({"batch_piece_responses": 12}, batch(6), [6]),
        ({"batch_piece_responses": 5}, batch(6), [2, 2, 2]),
        ({"batch_piece_responses": 1}, batch(3), [1, 1, 1]),
        ({"batch_piece_responses": 4}, batch(6, policy="laser", run=fresh_run()), [6]),
        ({"batch_piece_responses": 4}, batch(6, policy="majority"), [2, 2, 2]),
    ],
)
async def test_a_piece_holds_so_many_responses_and_whole_instances(
    valkey_server: ValkeyProcess, options: dict[str, Any], document: dict[str, Any], sizes: list[int]
) -> None:
    encoder = SteppedEncoder(at_once)
    async with open_gateway(valkey_server.url, encoder=encoder, **options) as gateway:
        results = await results_of(gateway, document)
        assert encoder.sizes == sizes
        assert len({result["decision_id"] for result in results}) == len(document["items"])
        for index, result in enumerate(results):
            assert gateway.decision(result["decision_id"], result["run"]).n == len(pair(index)["responses"])


async def test_one_rm_for_a_whole_batch_stays_one(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(
        valkey_server.url, encoder=SteppedEncoder(at_once), batch_piece_responses=2, policy="laser"
    ) as gateway:
        assert len({result["model"] for result in await results_of(gateway, batch(8))}) == 1


async def test_pieces_of_several_runs_and_policies_keep_their_places(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(
        valkey_server.url, encoder=SteppedEncoder(at_once), batch_piece_responses=2, max_text_chars=60
    ) as gateway:
        items = [{**pair(i), "policy": f"single:rm-{'abc'[i % 3]}", "run": f"{gateway.run}-{i % 2}"} for i in range(12)]
        items[7] = {"prompt": "x" * 61, "responses": ["a", "b"]}
        results = await results_of(gateway, {"items": items})
    for index, result in enumerate(results):
        if index == 7:
            assert result["error"]["code"] == "validation"
            continue
        assert (result["model"], result["run"]) == (f"rm-{'abc'[index % 3]}", f"{gateway.run}-{index % 2}")
        assert result["rewards"] == [float(len(response)) for response in pair(index)["responses"]]


@pytest.mark.parametrize("responses", [0, 2, 128])
async def test_what_is_asked_of_one_run_and_policy_does_not_wait_for_the_others(
    valkey_server: ValkeyProcess, responses: int
) -> None:
    arms = [ScriptedArm(name) for name in ("rm-a", "rm-b", "rm-c")]
    async with open_gateway(valkey_server.url, arms=arms, batch_piece_responses=responses) as gateway:
        gate = asyncio.Event()
        for arm in arms:
            arm.gate = gate
        items = [
            {**pair(i), "policy": f"single:{arms[i % 3].name}", "run": f"{gateway.run}-{i // 3}"} for i in range(9)
        ]
        asked = asyncio.create_task(results_of(gateway, {"items": items}))
        await until(lambda: sum(len(arm.calls) for arm in arms) == 9, "all nine are asked about at once")
        gate.set()
        assert not any("error" in result for result in await asked)


async def test_a_piece_whose_encoding_fails_spoils_no_other(valkey_server: ValkeyProcess) -> None:
    async def away_once(call: int) -> None:
        if call == 1:
            raise EncoderUnavailableError("the encoder's server went away")

    async with open_gateway(valkey_server.url, encoder=SteppedEncoder(away_once), batch_piece_responses=4) as gateway:
        results = await results_of(gateway, batch(6))
    assert [result.get("error", {}).get("code") for result in results] == [
        *(None, None),
        *("encoder_unavailable", "encoder_unavailable"),
        *(None, None),
    ]


async def test_what_fails_every_piece_is_the_answer_to_the_request(valkey_server: ValkeyProcess) -> None:
    async def away(_: int) -> None:
        raise EncoderUnavailableError("the encoder's server went away")

    async with open_gateway(valkey_server.url, encoder=SteppedEncoder(away), batch_piece_responses=4) as gateway:
        response = await gateway.client.post("/reward/batch", batch(6))
    assert response.status == 503
    assert response.error["code"] == "encoder_unavailable"


async def test_rewards_that_came_in_time_are_given_though_a_later_piece_is_late(valkey_server: ValkeyProcess) -> None:
    async def never(call: int) -> None:
        if call == 1:
            await asyncio.Event().wait()

    async with open_gateway(
        valkey_server.url, encoder=SteppedEncoder(never), batch_piece_responses=4, request_timeout_seconds=4.0
    ) as gateway:
        results = await results_of(gateway, batch(4))
    assert [result.get("error", {}).get("code") for result in results[2:]] == ["deadline_exceeded"] * 2
    assert [len(result["rewards"]) for result in results[:2]] == [2, 2]


async def test_a_fault_in_one_piece_is_told_and_ends_no_other_task_unseen(valkey_server: ValkeyProcess) -> None:
    async def broken(call: int) -> None:
        if call == 0:
            raise RuntimeError("a fault")

    async with open_gateway(valkey_server.url, encoder=SteppedEncoder(broken), batch_piece_responses=4) as gateway:
        response = await gateway.client.post("/reward/batch", batch(6))
        assert (response.status, response.error["code"]) == (500, "internal")
        assert len(await results_of(gateway, batch(6))) == 6


async def test_singles_of_one_prompt_stick_to_one_rm_across_pieces(valkey_server: ValkeyProcess) -> None:
    items = [{"prompt": "one prompt", "responses": [f"response {index}"]} for index in range(12)]
    async with open_gateway(valkey_server.url, encoder=SteppedEncoder(at_once), batch_piece_responses=2) as gateway:
        assert len({result["model"] for result in await results_of(gateway, {"items": items})}) == 1


class LeavingArm(ScriptedArm):
    """Goes away, for good, while it is asked."""

    async def _take(self, items: list[tuple[str, str]], deadline: float) -> None:
        await super()._take(items, deadline)
        await asyncio.sleep(0.01)
        self.available = False
        raise WorkerUnavailableError("it went away")


@contextmanager
def narrow_arms(
    names: Sequence[str], *, limit: int, delay: float = 0.02, parallel_requests: int = 2, timeout: float = 5.0
) -> Iterator[list[Any]]:
    """Real clients of slow workers, that have up to `limit` requests in flight, `parallel_requests` of one call."""
    workers = [ScriptedWorker(name) for name in names]
    for worker in workers:
        worker.delay = delay
    servers = [RunningWorker(worker) for worker in workers]
    try:
        yield [
            VllmArm(
                ArmConfig(
                    name=name,
                    urls=(running.url,),
                    parallel_requests=parallel_requests,
                    max_in_flight=limit,
                    attempt_timeout_seconds=timeout,
                )
            )
            for name, running in zip(names, servers, strict=True)
        ]
    finally:
        for running in servers:
            running.stop(force=True)
            running.join()


@pytest.mark.parametrize("policy", ["random", "majority"])
async def test_an_rm_at_its_limit_with_other_pieces_of_the_batch_is_waited_for(
    valkey_server: ValkeyProcess, policy: str
) -> None:
    with narrow_arms(["rm-a", "rm-b"], limit=1) as arms:
        async with open_gateway(
            valkey_server.url, arms=arms, encoder=SteppedEncoder(at_once), batch_piece_responses=2, policy=policy
        ) as gateway:
            results = await results_of(gateway, batch(12))
    for index, result in enumerate(results):
        assert not result["fallback"]
        if policy == "random":
            assert result["rewards"] == [float(len(response)) for response in pair(index)["responses"]]
            assert away_first(gateway.decision(result["decision_id"])) == []


async def test_a_batch_that_was_admitted_is_not_put_off_by_others(valkey_server: ValkeyProcess) -> None:
    """Its first piece is answered; then somebody else has the RM at its limit, and its second piece comes."""
    busy = asyncio.Event()

    async def before(call: int) -> None:
        if call == 1:
            await busy.wait()

    with narrow_arms(["rm-a"], limit=1) as (arm,):
        async with open_gateway(
            valkey_server.url, arms=[arm], encoder=SteppedEncoder(before), batch_piece_responses=2
        ) as gateway:
            asked = asyncio.create_task(results_of(gateway, batch(2)))
            # A request for each of its two responses.
            await until(lambda: arm.snapshots()[0].requests == 2 and arm.available, "the first piece is answered")
            other = asyncio.create_task(score_items(arm, [("p", "r")], deadline=asyncio.get_running_loop().time() + 5))
            await until(lambda: not arm.available, "somebody else asks")
            busy.set()
            assert [result.get("fallback") for result in await asked] == [False, False]
            await other


async def test_pieces_of_a_batch_wait_for_no_connection_on_the_time_of_their_attempts(
    valkey_server: ValkeyProcess,
) -> None:
    """Sixteen requests of 0.1 s, one at a time, where an attempt may take 0.5 s."""
    with narrow_arms(["rm-a"], limit=1, delay=0.1, parallel_requests=8, timeout=0.5) as (arm,):
        async with open_gateway(
            valkey_server.url, arms=[arm], encoder=SteppedEncoder(at_once), batch_piece_responses=2
        ) as gateway:
            results = await results_of(gateway, batch(8))
    assert [result.get("fallback") for result in results] == [False] * 8


async def test_an_rm_on_trial_with_one_piece_is_waited_for_by_the_others(valkey_server: ValkeyProcess) -> None:
    """Its breaker is half open: one request may go, and what comes back decides."""
    items = [{"prompt": f"prompt {index}", "responses": ["a response"]} for index in range(8)]
    with narrow_arms(["rm-a"], limit=8) as (arm,):
        async with open_gateway(
            valkey_server.url, arms=[arm], encoder=SteppedEncoder(at_once), batch_piece_responses=1
        ) as gateway:
            arm.replicas[0].breaker.trip()
            assert not arm.reachable
            await until(lambda: arm.reachable, "the back-off is over")
            results = await results_of(gateway, {"items": items})
    assert [result.get("fallback") for result in results] == [False] * 8


async def test_pieces_have_no_more_requests_in_flight_together_than_a_whole_batch(
    valkey_server: ValkeyProcess,
) -> None:
    worker = ScriptedWorker("rm-a")
    worker.delay = 0.02
    running = RunningWorker(worker)
    arm: Any = VllmArm(ArmConfig(name="rm-a", urls=(running.url,), parallel_requests=3))
    async with open_gateway(
        valkey_server.url, arms=[arm], encoder=SteppedEncoder(at_once), batch_piece_responses=4
    ) as gateway:
        results = await results_of(gateway, batch(16))
    assert not any(result["fallback"] for result in results)
    assert worker.most_in_flight == 3
    running.stop(force=True)
    running.join()


async def test_an_rm_that_leaves_while_pieces_wait_for_it_keeps_no_reward_from_them(
    valkey_server: ValkeyProcess,
) -> None:
    arms = [LeavingArm("rm-a"), ScriptedArm("rm-b")]
    async with open_gateway(
        valkey_server.url, arms=arms, encoder=SteppedEncoder(at_once), batch_piece_responses=2, policy="random"
    ) as gateway:
        results = await results_of(gateway, batch(32))
    assert {result["model"] for result in results} == {"rm-b"}
    assert any(result["fallback"] for result in results)


async def test_at_most_four_pieces_are_asked_about_at_once(valkey_server: ValkeyProcess) -> None:
    arm = ScriptedArm("rm-a")
    arm.gate = asyncio.Event()
    async with open_gateway(
        valkey_server.url, arms=[arm], encoder=SteppedEncoder(at_once), batch_piece_responses=2
    ) as gateway:
        asked = asyncio.create_task(results_of(gateway, batch(9)))
        await until(lambda: len(arm.calls) >= 4, "four pieces are asked about")
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(arm.calls) == 4
        arm.gate.set()
        assert len(await asked) == 9
    assert len(arm.calls) == 9
