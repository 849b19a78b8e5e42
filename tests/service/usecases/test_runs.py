"""Runs of one gateway never meet, and a run's name stands for one pool, prior and fold for ever."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import redis

from router_core.encoder.fuse import Fuse, PairEncoder
from router_core.encoder.surface import SurfaceBackbone
from router_core.prior import linucb_prior
from service.stores.memory import MemoryStore
from service.usecases import runs
from service.usecases.status import stored_runs
from tests.support.gateway import DIM, Gateway, fresh_run, open_gateway, pair, until

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess


async def teach(gateway: Gateway, run: str, count: int, preferred: int) -> None:
    """So many feedbacks of one kind."""
    before = (await gateway.client.ok("/reward", {**pair(), "run": run}))["posterior_version"]
    for index in range(count):
        reply = await gateway.client.ok("/reward", {**pair(index), "run": run, "policy": "single:rm-a"})
        body = {"decision_id": reply["decision_id"], "preferred": preferred, "run": run}
        await gateway.client.ok("/feedback", body)
    await gateway.learned(before + count, run)


async def test_runs_do_not_share_what_they_learn(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        right, wrong = gateway.run + "-right", gateway.run + "-wrong"
        await teach(gateway, right, 8, 1)
        await teach(gateway, wrong, 5, 0)
        found = {run: await gateway.learned(0, run) for run in (gateway.run, right, wrong)}
        assert [found[run]["version"] for run in (gateway.run, right, wrong)] == [0, 8, 5]
        assert found[right]["models"][0]["mean_reward"] == 1.0
        assert found[wrong]["models"][0]["mean_reward"] == 0.0
        assert found[gateway.run]["models"][0]["feedbacks"] == 0
        assert len({document["digest"] for document in found.values()}) == 3
        for run in (right, wrong):
            assert found[run]["digest"] == gateway.folded(run).digest()


async def test_requests_of_two_runs_at_once_are_drawn_from_their_own_posteriors(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        taught, fresh = gateway.run + "-taught", gateway.run + "-fresh"
        await teach(gateway, taught, 20, 1)
        await teach(gateway, fresh, 0, 0)
        runs = [taught if index % 2 else fresh for index in range(40)]
        replies = await asyncio.gather(
            *(gateway.client.ok("/reward", {**pair(index), "run": run}) for index, run in enumerate(runs))
        )
        for run, reply in zip(runs, replies, strict=True):
            assert (reply["run"], reply["posterior_version"]) == (run, 20 if run == taught else 0)
            means = gateway.decision(reply["decision_id"], run).means
            assert (means[0] > 0.6) == (run == taught)
            assert means[1] == 0.5


async def test_a_run_goes_on_where_it_was_left(valkey_server: ValkeyProcess) -> None:
    run = fresh_run()
    async with open_gateway(valkey_server.url, run=run) as gateway:
        await teach(gateway, run, 6, 1)
        before = await gateway.learned(6)
    async with open_gateway(valkey_server.url, run=run, seed=99, policy="random") as gateway:
        after = await gateway.learned(6)
        assert (after["digest"], after["last_event_id"]) == (before["digest"], before["last_event_id"])


async def test_feedback_on_a_decision_of_the_former_process_is_taken(valkey_server: ValkeyProcess) -> None:
    run = fresh_run()
    async with open_gateway(valkey_server.url, run=run) as gateway:
        reply = await gateway.client.ok("/reward", pair())
    async with open_gateway(valkey_server.url, run=run) as gateway:
        answer = await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 0})
        assert answer["duplicate"] is False
        await gateway.learned(1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"signal": "reward"}, "signal"),
        ({"lambda0": 7.0}, "hyper"),
        ({"block_size": 32}, "fold"),
        ({"encoder": "other"}, "d"),
    ],
)
async def test_a_runs_name_with_anything_else_behind_it_is_refused_and_the_change_named(
    valkey_server: ValkeyProcess, changes: dict[str, Any], named: str
) -> None:
    run = fresh_run()
    async with open_gateway(valkey_server.url, run=run) as gateway:
        await gateway.client.ok("/reward", pair())
    if changes.get("encoder") == "other":
        backbone = SurfaceBackbone()
        changes = {"encoder": PairEncoder(backbone, Fuse.identity(backbone.dim, 5))}
    async with open_gateway(valkey_server.url, run=run, wait=False, **changes) as gateway:
        response = await gateway.client.post("/reward", pair())
        assert (response.status, response.error["code"]) == (409, "run_conflict")
        assert run in response.error["message"]
        assert named in response.error["details"]["changed"]
        before_and_now = response.error["details"]["changed"][named]
        assert before_and_now["run"] != before_and_now["gateway"]
        ready = await gateway.client.get("/readyz")
        assert ready.status == 503
        assert run in ready.error["message"]
        other = await gateway.client.ok("/reward", {**pair(), "run": run + "-new"})
        assert other["recorded"] is True


async def test_a_run_opened_by_many_requests_at_once_is_opened_once(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, max_runs=2) as gateway:
        name = gateway.run + "-new"
        replies = await asyncio.gather(*(gateway.client.ok("/reward", {**pair(i), "run": name}) for i in range(20)))
        assert {reply["run"] for reply in replies} == {name}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"d": "d", "p": b"garbage", "s": b"preference:1.0"}, "cannot be read"),
        ({"of": "another program"}, "ForeignEntryError"),
    ],
)
async def test_a_run_whose_learner_stopped_makes_the_gateway_not_ready_and_says_why(
    valkey_server: ValkeyProcess, entry: dict[Any, Any], words: str
) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        decided = await gateway.client.ok("/reward", pair())
        with redis.Redis.from_url(valkey_server.url) as server:
            server.xadd(f"rr:{{{gateway.run}}}:log", entry)

        async def stopped() -> bool:
            return (await gateway.client.get("/readyz")).status == 503

        await until(stopped, "not ready")
        error = (await gateway.client.get("/readyz")).error
        assert error["code"] == "not_ready"
        assert gateway.run in error["message"]
        assert words in error["message"]
        metrics = (await gateway.client.get("/metrics")).body.decode()
        assert f'reward_router_learner_errors_total{{run="{gateway.run}"}} 1.0' in metrics
        await gateway.client.ok("/reward", pair())
        feedback = {"decision_id": decided["decision_id"], "preferred": 0}
        response = await gateway.client.post("/feedback", feedback)
        assert (response.status, response.error["code"]) == (503, "not_ready")


async def test_a_run_that_cannot_be_replayed_refuses_requests_at_once(valkey_server: ValkeyProcess) -> None:

    run = fresh_run()
    with redis.Redis.from_url(valkey_server.url) as server:
        server.hset(f"rr:{{{run}}}:snap", mapping={"position": 64, "data": b"not a snapshot"})
    async with open_gateway(valkey_server.url, run=run, wait=False) as gateway:

        async def refused() -> bool:
            return "SnapshotError" in (await gateway.client.get("/readyz")).body.decode()

        await until(refused, "refused")
        async with asyncio.timeout(gateway.settings.request_timeout_seconds / 2):
            response = await gateway.client.post("/reward", pair())
            assert (response.status, response.error["code"]) == (503, "not_ready")
            assert "SnapshotError" in response.error["message"]
            # Feedback into a log that cannot reach the posterior would be acknowledged and lost.
            response = await gateway.client.post("/feedback", {"decision_id": "d", "preferred": 0})
            assert (response.status, response.error["code"]) == (503, "not_ready")


async def test_feedback_makes_no_run(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        unknown = gateway.run + "-typo"
        response = await gateway.client.post("/feedback", {"decision_id": "d", "preferred": 0, "run": unknown})
        assert (response.status, response.error["code"]) == (404, "not_found")
        assert unknown in response.error["message"]
        assert (await gateway.client.get(f"/posterior?run={unknown}")).status == 404


async def test_feedback_finds_a_run_that_another_gateway_opened(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as one, open_gateway(valkey_server.url, run=one.run + "-other") as two:
        reply = await one.client.ok("/reward", pair())
        await two.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 0, "run": one.run})
        assert (await two.learned(1, one.run))["version"] == 1


async def test_an_idle_run_is_closed_to_make_room_and_opens_again_where_it_was(
    valkey_server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_gateway(valkey_server.url, max_runs=2) as gateway:
        idle, new = gateway.run + "-idle", gateway.run + "-new"
        reply = await gateway.client.ok("/reward", {**pair(), "run": idle})
        await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 0, "run": idle})
        digest = (await gateway.learned(1, idle))["digest"]
        monkeypatch.setattr(runs, "IDLE_SECONDS", 0.0)
        await gateway.client.ok("/reward", {**pair(), "run": new})
        assert f'run="{idle}"' not in (await gateway.client.get("/metrics")).body.decode()
        await gateway.client.ok("/reward", {**pair(), "run": idle})
        assert (await gateway.learned(1, idle))["digest"] == digest


async def test_a_run_keeps_the_prior_of_the_policy_that_opened_it(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        run = gateway.run + "-laser"
        await gateway.client.ok("/reward", {**pair(), "run": run, "policy": "laser"})
        assert (await gateway.learned(0, run))["prior"] == "linucb"
        response = await gateway.client.post("/reward", {**pair(), "run": run, "policy": "bayesian:none"})
        assert (response.status, response.error["code"]) == (409, "run_conflict")
        assert run in response.error["message"]
        assert "'linucb'" in response.error["message"]
        assert response.error["details"]["changed"] == {"prior": {"run": "linucb", "gateway": "none"}}
        # What insists on nothing takes the run as it is.
        for policy in ("bayesian", "random", "majority", "laser"):
            assert (await gateway.client.ok("/reward", {**pair(), "run": run, "policy": policy}))["run"] == run
        assert (await gateway.learned(0, run))["prior"] == "linucb"


async def test_a_refused_prior_in_a_batch_spoils_no_other_item(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        items = [pair(0), {**pair(1), "policy": "laser"}, {**pair(2), "policy": "laser", "run": gateway.run + "-l"}]
        results = (await gateway.client.ok("/reward/batch", {"items": items}))["results"]
        assert [result.get("error", {}).get("code") for result in results] == [None, "run_conflict", None]


async def test_another_gateway_finds_the_prior_of_a_run_in_its_fingerprint(valkey_server: ValkeyProcess) -> None:
    run = fresh_run()
    async with open_gateway(valkey_server.url) as one, open_gateway(valkey_server.url) as two:
        reply = await one.client.ok("/reward", {**pair(), "run": run, "policy": "laser"})
        # Feedback names no policy, and the other gateway's own default is another prior.
        await two.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1, "run": run})
        there, here = await two.learned(1, run), await one.learned(1, run)
        assert there["prior"] == here["prior"] == "linucb"
        assert there["digest"] == here["digest"] == one.folded(run, linucb_prior(3, DIM)).digest()
        assert (await two.client.ok("/reward", {**pair(), "run": run}))["policy"] == "bayesian"
        response = await two.client.post("/reward", {**pair(), "run": run, "policy": "bayesian:none"})
        assert response.error["code"] == "run_conflict"
    async with open_gateway(valkey_server.url) as three:
        response = await three.client.post("/reward", {**pair(), "run": run, "policy": "bayesian:none"})
        assert (response.status, response.error["code"]) == (409, "run_conflict")


@pytest.mark.parametrize("setting", [{"prior": "none"}, {"policy": "bayesian:none"}])
async def test_a_default_run_of_another_prior_than_the_gateway_is_set_to_is_refused(
    valkey_server: ValkeyProcess, setting: dict[str, Any]
) -> None:
    run = fresh_run()
    async with open_gateway(valkey_server.url, run=run, policy="laser") as gateway:
        await gateway.client.ok("/reward", pair())
    async with open_gateway(valkey_server.url, run=run, wait=False, **setting) as gateway:
        response = await gateway.client.post("/reward", pair())
        assert (response.status, response.error["code"]) == (409, "run_conflict")
        assert (await gateway.client.get("/readyz")).status == 503
        other = await gateway.client.ok("/reward", {**pair(), "run": run + "-new"})
        assert other["recorded"] is True
    # Left at `auto`, the gateway goes on with what the run has.
    async with open_gateway(valkey_server.url, run=run) as gateway:
        assert (await gateway.learned(0))["prior"] == "linucb"


async def test_of_policies_at_once_the_first_opens_the_run_and_the_others_fit_or_are_refused(
    valkey_server: ValkeyProcess,
) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        run = gateway.run + "-new"
        policies = ["laser", "bayesian:none", "random", "laser", "bayesian:none", "bayesian"]
        responses = await asyncio.gather(
            *(gateway.client.post("/reward", {**pair(), "run": run, "policy": policy}) for policy in policies)
        )
        assert [response.status for response in responses] == [200, 409, 200, 200, 409, 200]
        assert (await gateway.learned(0, run))["prior"] == "linucb"


async def test_a_run_of_another_prior_and_another_pool_goes_on_as_it_began(valkey_server: ValkeyProcess) -> None:
    run = fresh_run()
    async with open_gateway(valkey_server.url) as gateway:
        await gateway.client.ok("/reward", {**pair(), "run": run, "policy": "laser"})
    async with open_gateway(valkey_server.url, models=("rm-a", "rm-z", "rm-c")) as gateway:
        reply = await gateway.client.ok("/reward", {**pair(), "run": run, "policy": "laser"})
        assert reply["model"] in ("rm-a", "rm-c")
        assert (await gateway.learned(0, run))["prior"] == "linucb"


async def test_a_run_whose_prior_this_version_does_not_know_is_refused(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        run = gateway.run + "-later"
        with redis.Redis.from_url(valkey_server.url) as server:
            server.set(f"rr:{{{run}}}:meta", b'0 {"prior": "tea-leaves"}')
        response = await gateway.client.post("/reward", {**pair(), "run": run})
        assert (response.status, response.error["code"]) == (409, "run_conflict")
        assert response.error["details"]["changed"]["prior"] == {"run": "tea-leaves", "gateway": "none"}


async def test_a_laser_run_goes_on_where_it_was_left(valkey_server: ValkeyProcess) -> None:
    run = fresh_run()
    fold = {"block_size": 4, "refresh_events": 8}
    async with open_gateway(valkey_server.url, **fold, signal="loss") as gateway:
        for index in range(19):
            reply = await gateway.client.ok("/reward", {**pair(index), "run": run, "policy": "laser"})
            body = {"decision_id": reply["decision_id"], "loss": float(index * 7 % 5), "run": run}
            await gateway.client.ok("/feedback", body)
        before = await gateway.learned(19, run)
    # From the snapshot of sixteen events, which holds the history of losses, and three more.
    async with open_gateway(valkey_server.url, **fold, signal="loss") as gateway:
        await gateway.client.ok("/reward", {**pair(), "run": run})
        after = await gateway.learned(19, run)
        assert after["digest"] == before["digest"] == gateway.folded(run, linucb_prior(3, DIM)).digest()


async def test_a_run_has_the_signal_of_the_request_that_opened_it(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as one, open_gateway(valkey_server.url) as two:
        run = one.run + "-verified"
        reply = await one.client.ok("/reward", {**pair(), "run": run, "signal": "reward"})
        assert (await one.learned(0, run))["signal"] == "reward"
        refused = await one.client.post("/feedback", {"decision_id": reply["decision_id"], "preferred": 0, "run": run})
        assert (refused.status, refused.error["details"]["field"]) == (422, "reward")
        # Another gateway, whose own runs learn from preferences, finds the run's signal in the store.
        await two.client.ok("/feedback", {"decision_id": reply["decision_id"], "reward": 0.5, "run": run})
        assert (await one.learned(1, run))["version"] == 1
        wrong = await two.client.post("/reward", {**pair(), "run": run, "signal": "loss"})
        assert (wrong.status, wrong.error["code"]) == (409, "run_conflict")
        assert wrong.error["details"]["changed"] == {"signal": {"run": "reward", "gateway": "loss"}}
        batch = {"items": [pair(), {**pair(1), "signal": "loss"}], "run": run, "signal": "reward"}
        results = (await two.client.ok("/reward/batch", batch))["results"]
        assert [item.get("error", {}).get("code") for item in results] == [None, "run_conflict"]


async def test_a_default_run_keeps_its_signal_unless_the_gateway_insists(valkey_server: ValkeyProcess) -> None:
    run = fresh_run()
    async with open_gateway(valkey_server.url, run=run, signal="reward") as gateway:
        await gateway.client.ok("/reward", pair())
    async with open_gateway(valkey_server.url, run=run) as gateway:
        assert (await gateway.learned(0, run))["signal"] == "reward"
    async with open_gateway(valkey_server.url, run=run, signal="loss", wait=False) as gateway:
        response = await gateway.client.post("/reward", pair())
        assert (response.status, response.error["details"]["changed"]["signal"]["run"]) == (409, "reward")


async def test_a_run_of_another_program_is_listed_and_spoils_nothing() -> None:
    store = MemoryStore(window_seconds=60.0)
    await store.open_run("foreign", b"no JSON")
    (found,) = await stored_runs(store, ["foreign", "absent"])
    assert (found.run, found.events, found.signal, found.pool, found.archived) == ("foreign", 0, None, [], False)
