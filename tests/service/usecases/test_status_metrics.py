"""What a scrape of the gateway says of posteriors, workers and the store, against what they are."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from router_core.policies.bayesian import posterior_beliefs
from router_core.records import Instance
from service.stores.protocol import FeedbackStatus
from service.usecases.runs import RECENT_INSTANCES
from tests.conftest import ValkeyProcess
from tests.support.asgi import AsgiClient
from tests.support.gateway import Gateway, open_gateway, pair, small_encoder, until


async def scrape(client: AsgiClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """(sample's name without the prefix, labels) -> value."""
    text = (await client.get("/metrics")).body.decode()
    return {
        (sample.name.removeprefix("reward_router_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


async def asked_and_taught(gateway: Gateway, policy: str, count: int = 12) -> None:
    for index in range(count):
        reply = await gateway.client.ok("/reward", {**pair(index), "policy": policy})
        await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": index % 2})
    await gateway.learned(count)


@pytest.mark.parametrize("policy", ["bayesian", "single:rm-b"])
async def test_posterior_mean_and_sd_are_the_beliefs_on_the_newest_instances_whatever_the_policy(
    valkey_server: ValkeyProcess, policy: str
) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        await asked_and_taught(gateway, policy)
        found = await scrape(gateway.client)
        instances = [Instance(pair(i)["prompt"], tuple(pair(i)["responses"])) for i in range(12)]
        x = small_encoder().encode(instances)
        posterior = gateway.folded()
        beliefs = posterior_beliefs(x, posterior.prior.offsets(x), posterior)
        for k, model in enumerate(("rm-a", "rm-b", "rm-c")):
            mean = found[key("posterior_mean", run=gateway.run, model=model)]
            sd = found[key("posterior_sd", run=gateway.run, model=model)]
            assert mean == pytest.approx(beliefs.means[:, k].mean(), abs=1e-5)
            assert sd == pytest.approx(beliefs.sds[:, k].mean(), rel=1e-4)


async def test_only_so_many_instances_are_kept_for_the_posterior_s_metrics(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        assert key("posterior_mean", run=gateway.run, model="rm-a") not in await scrape(gateway.client)
        items: list[dict[str, Any]] = [pair(index) for index in range(5)]
        for _ in range(RECENT_INSTANCES + 3):
            await gateway.client.ok("/reward/batch", {"items": items})
        found = await scrape(gateway.client)
        first = Instance(items[0]["prompt"], tuple(items[0]["responses"]))
        posterior = gateway.folded()
        x = small_encoder().encode([first])
        beliefs = posterior_beliefs(x, posterior.prior.offsets(x), posterior)
        assert found[key("posterior_sd", run=gateway.run, model="rm-a")] == pytest.approx(beliefs.sds[0, 0], rel=1e-4)


async def test_a_run_s_counters_are_zero_before_they_first_count(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        found = await scrape(gateway.client)
        for outcome in (*FeedbackStatus, "invalid"):
            assert found[key("feedback_total", run=gateway.run, outcome=outcome)] == 0
        assert found[key("learner_errors_total", run=gateway.run)] == 0
        assert found[key("decisions_total", run=gateway.run, policy="bayesian")] == 0
        for model in ("rm-a", "rm-b", "rm-c"):
            assert found[key("draws_total", run=gateway.run, model=model)] == 0
            assert found[key("worker_calls_total", model=model, outcome="ok")] == 0


async def test_a_scrape_says_whether_the_store_answers(own_valkey_server: ValkeyProcess) -> None:
    async with open_gateway(own_valkey_server.url, store_timeout_seconds=0.5) as gateway:
        assert (await scrape(gateway.client))[key("store_up")] == 1
        own_valkey_server.kill()
        found = await scrape(gateway.client)
        assert found[key("store_up")] == 0
        assert found[key("store_errors_total", operation="log_status")] >= 1
        own_valkey_server.start()

        async def up() -> bool:
            return (await scrape(gateway.client))[key("store_up")] == 1

        # On a busy machine the first connection after the restart may take longer than the store's time.
        await until(up, "the store to be seen again")


async def test_decisions_are_counted_by_run_and_policy_also_where_every_rm_is_asked(
    valkey_server: ValkeyProcess,
) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        await gateway.client.ok("/reward", pair())
        await gateway.client.ok("/reward/batch", {"items": [pair(1), pair(2)], "policy": "majority"})
        for arm in gateway.arms:
            arm.available = False
        assert (await gateway.client.post("/reward", pair(3))).status == 503
        found = await scrape(gateway.client)
        assert found[key("decisions_total", run=gateway.run, policy="bayesian")] == 1
        assert found[key("decisions_total", run=gateway.run, policy="majority")] == 2


async def test_a_refused_store_and_a_waiting_learner_show_as_metrics(own_valkey_server: ValkeyProcess) -> None:
    async with open_gateway(own_valkey_server.url, store_timeout_seconds=0.5) as gateway:

        async def shows(*lines: str) -> bool:
            text = (await gateway.client.get("/metrics")).body.decode()
            return all(line in text.splitlines() for line in lines)

        waiting = f'reward_router_learner_waiting{{run="{gateway.run}"}}'
        assert await shows("reward_router_store_refused 0.0", f"{waiting} 0.0")
        own_valkey_server.kill()
        await until(lambda: shows(f"{waiting} 1.0"), "the learner waits")
        own_valkey_server.start(maxmemory="100mb", maxmemory_policy="allkeys-lru")
        await until(lambda: shows(f"{waiting} 0.0"), "the learner goes on")
    async with open_gateway(own_valkey_server.url, wait=False) as gateway:
        assert "reward_router_store_refused 1.0" in (await gateway.client.get("/metrics")).body.decode()
