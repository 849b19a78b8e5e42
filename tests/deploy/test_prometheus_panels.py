"""A real Prometheus, with our configuration and rules, scrapes a real gateway under load: every panel's query has data.

The gateway has two worker processes; the second one is killed, so that there are fallbacks and a worker that is down.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from deploy.grafana.panels import OPTIONAL, ROWS
from tests.conftest import ValkeyProcess, free_port
from tests.support.processes import MODELS, Caller, Service, write_recorded_pairs
from tests.support.prometheus import Prometheus, filled_in, tool

DATA_SECONDS = 240.0
"""Longest wait for what a scrape every two seconds shows; tests that pass wait about ten."""

RUN = "dashboard"


@dataclass(slots=True)
class Stack:
    """A gateway, its workers, and the Prometheus that scrapes it."""

    prometheus: Prometheus
    gateway: Service
    spare_worker: Service
    store: ValkeyProcess
    pairs: list[dict[str, object]]
    caller: Caller = field(init=False)

    async def load(self, rng: random.Random) -> None:
        """A few requests of every kind: two policies, a batch, feedback, a repeat of it, one that nobody knows."""
        decided = []
        for pair in rng.sample(self.pairs, 8):
            policy = "random" if rng.random() < 0.7 else "bayesian"
            status, reply = await self.caller.post("/reward", {**pair, "policy": policy})
            if status == 200:
                decided.append(reply["decision_id"])
        await self.caller.post("/reward/batch", {"items": rng.sample(self.pairs, 3), "policy": "majority"})
        for index, decision in enumerate(decided):
            feedback = {"decision_id": decision, "preferred": index % 2}
            await self.caller.post("/feedback", feedback)
            await self.caller.post("/feedback", feedback)
        await self.caller.post("/feedback", {"decision_id": "nobody", "preferred": 0})

    async def until(self, condition: Callable[[], object], what: Callable[[], str], *, load: bool = True) -> None:
        """Wait until the condition holds, under load."""
        rng = random.Random(0)
        deadline = time.monotonic() + DATA_SECONDS
        while not condition():
            assert time.monotonic() < deadline, what()
            if load:
                await self.load(rng)


@pytest.fixture
def prometheus_installed() -> None:
    """Skips before anything is started."""
    tool("prometheus")


@pytest.fixture
def stack(prometheus_installed: None, own_valkey_server: ValkeyProcess, tmp_path: Path) -> Iterator[Stack]:
    pairs = write_recorded_pairs(tmp_path / "pairs.jsonl", 60)
    with ExitStack() as cleanup:

        def launch(name: str, arguments: list[str], environment: dict[str, str], health: str) -> Service:
            port = free_port()
            words = [*arguments, "--port", str(port)]
            service = Service(words, environment, tmp_path / f"{name}.log", port, health)
            cleanup.callback(service.stop)
            service.launch()
            return service

        recorded = ["worker", "--recorded", str(tmp_path / "pairs.jsonl")]
        main = launch("main", [*recorded, *(word for m in MODELS[:2] for word in ("--model", m))], {}, "/health")
        spare = launch("spare", [*recorded, "--model", MODELS[2]], {}, "/health")
        urls = [main.url, main.url, spare.url]
        models = [{"name": model, "urls": [url]} for model, url in zip(MODELS, urls, strict=True)]
        (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"models": models}))
        settings = {
            "REWARD_ROUTER_STORE_URL": own_valkey_server.url,
            "REWARD_ROUTER_RUN": RUN,
            "REWARD_ROUTER_SHADOW_RATE": "0.5",
            "REWARD_ROUTER_HEALTH_INTERVAL_SECONDS": "0.5",
            "REWARD_ROUTER_STORE_TIMEOUT_SECONDS": "0.5",
        }
        gateway = launch("gateway", ["serve", "--pool", str(tmp_path / "pool.yaml")], settings, "/readyz")
        for service in (main, spare, gateway):
            service.wait_until_ready()
        prometheus = cleanup.enter_context(Prometheus(tmp_path, {"gateway": [f"127.0.0.1:{gateway.port}"]}))
        instances = [
            {"prompt": pair.instance.prompt, "responses": list(pair.instance.responses), "run": RUN} for pair in pairs
        ]
        yield Stack(prometheus, gateway, spare, own_valkey_server, instances)


async def test_every_panel_has_data_and_the_data_are_what_happened(stack: Stack) -> None:
    prometheus = stack.prometheus
    queries = {panel.title: [filled_in(q.expr) for q in panel.queries] for row in ROWS for panel in row.panels}
    assert len(queries) > 25
    stack.caller = Caller(stack.gateway.url)
    await stack.load(random.Random(1))
    stack.spare_worker.kill()
    missing = {title: exprs for title, exprs in queries.items() if title not in OPTIONAL}

    def all_have_data() -> bool:
        for title, exprs in list(missing.items()):
            if all(prometheus.query(expr) for expr in exprs):
                del missing[title]
        return not missing

    await stack.until(all_have_data, lambda: f"panels without data: {missing}")

    def value(title: str, **labels: str) -> float:
        series = prometheus.query(queries[title][0])
        return sum(v for found, v in series if all(found.get(name) == word for name, word in labels.items()))

    facts: dict[str, Callable[[], bool]] = {
        "three RMs share the draws": lambda: abs(value("Share per reward model") - 1) < 1e-6,
        "a worker is down": lambda: value("Workers", model=MODELS[2]) == 0 and value("Workers", model=MODELS[0]) == 1,
        "two RMs can be asked": lambda: value("Reward models that can be asked") == 2,
        "fallbacks of the RM that is away": lambda: value("Fallbacks per second", model=MODELS[2]) > 0,
        "fallbacks of no other": lambda: value("Fallbacks per second", model=MODELS[0]) == 0,
        "share of fallbacks": lambda: 0 < value("Fallbacks") < 1,
        "majority requests": lambda: value("Rewards per second by policy", policy="majority") > 0,
        "random requests": lambda: value("Rewards per second by policy", policy="random") > 0,
        "feedback": lambda: value("Feedback by outcome", outcome="applied") > 0,
        "feedback sent again": lambda: value("Feedback by outcome", outcome="duplicate") > 0,
        "feedback that nobody knows": lambda: value("Feedback by outcome", outcome="unknown") > 0,
        "events learned": lambda: value("Events learned") > 10,
        "a posterior that is unsure": lambda: value("Posterior sd per reward model", model=MODELS[0]) > 0,
        "one gateway": lambda: value("Gateways") == 1,
        "a store": lambda: value("Store") == 1,
        "shadows": lambda: value("Shadowed instances per second", outcome="recorded") > 0,
        "stages": lambda: (
            {labels["stage"] for labels, _ in prometheus.query(queries["95 % per stage"][0])}
            == {"encode", "draw", "worker", "store", "total"}
        ),
    }

    def facts_hold() -> bool:
        return all(holds() for holds in facts.values())

    await stack.until(facts_hold, lambda: f"not seen: {[what for what, holds in facts.items() if not holds()]}")

    def alerts() -> set[str]:
        return {alert["labels"]["alertname"] for alert in prometheus.get("alerts")["alerts"]}

    worker_alerts = {"RewardRouterWorkerDown", "RewardRouterModelDown", "RewardRouterFallbackRate"}
    await stack.until(lambda: worker_alerts <= alerts(), lambda: f"pending or firing are only {alerts()}")
    assert "RewardRouterStoreUnreachable" not in alerts()

    stack.store.kill()

    def store_is_missed() -> bool:
        return "RewardRouterStoreUnreachable" in alerts() and value("Failed store calls per second") > 0

    await stack.until(store_is_missed, lambda: f"pending or firing are only {alerts()}")
    await stack.caller.close()
