"""What is done about killers holds for services that speak the scorer protocol, too."""

from __future__ import annotations

from contextlib import AsyncExitStack

from router_core.records import Instance
from service.scorers.http.client import HttpConfig, HttpScorer
from service.scorers.protocol import Scored, WorkerInputError
from service.scorers.transport.breaker import BreakerPolicy
from tests.service.scorers.worker_servers import Json, Mortal, soon

KILLER = "KILLER"


def score(request: Json) -> Json:
    return {"results": [{"rewards": [float(len(text)) for text in item["responses"]]} for item in request["items"]]}


async def test_a_killer_in_a_batch_ends_two_services_and_costs_only_its_own_reward() -> None:
    workers = [Mortal(KILLER, score) for _ in range(3)]
    async with AsyncExitStack() as stack:
        for worker in workers:
            await worker.start()
            stack.callback(worker.end)
        urls = tuple(worker.url for worker in workers)
        breaker = BreakerPolicy(backoff_seconds=30)
        scorer = HttpScorer(HttpConfig(name="service", kind="http", urls=urls, breaker=breaker))
        stack.push_async_callback(scorer.close)
        instances = [Instance(f"p{n}", (KILLER if n == 7 else "x" * (n + 1), "y")) for n in range(20)]
        for _ in range(2):
            outcomes = await scorer.score(instances, deadline=soon(20))
            assert isinstance(outcomes[7], WorkerInputError)
            fine = [outcome for outcome in outcomes if isinstance(outcome, Scored)]
            assert [outcome.rewards[0] for outcome in fine] == [n + 1.0 for n in range(20) if n != 7]
            assert sum(worker.alive for worker in workers) == 1
