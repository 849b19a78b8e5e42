"""The client of the scorer protocol against a scripted service over real HTTP."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request

from router_core.records import Instance, Message
from service.errors import ConfigurationError
from service.pool import PoolFile
from service.scorers.health import HealthPolicy, ReplicaMonitor
from service.scorers.http.client import HttpConfig, HttpScorer
from service.scorers.protocol import (
    AbstainedError,
    Scored,
    WorkerError,
    WorkerInputError,
    WorkerRejectedError,
    WorkerTimeoutError,
    WorkerTooLongError,
    WorkerUnavailableError,
)
from service.scorers.registry import build_scorer
from service.settings import Settings
from tests.service.scorers.worker_servers import RunningWorker, soon
from tests.support.asgi import lifespan

Json = dict[str, Any]


class Service:
    """An ASGI service whose results are scripted by response text; it keeps what it was asked.

    Attributes:
        say: an item to its result; by default every reward is the response's length.
        answer: a request to (status, body, headers); None for the results of `say`.
    """

    def __init__(self) -> None:
        self.requests: list[Json] = []
        self.keys: list[str | None] = []
        self.say: Callable[[Json], Json] = lambda item: {"rewards": [float(len(text)) for text in item["responses"]]}
        self.answer: Callable[[Json], tuple[int, Any, Json] | None] = lambda request: None

    @property
    def asked(self) -> list[list[str]]:
        """The responses of each request, in order."""
        return [[text for item in request["items"] for text in item["responses"]] for request in self.requests]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        body = await Request(scope, receive).body()
        status, answer, headers = 200, {}, {}
        if scope["path"] == "/score":
            request = json.loads(body)
            self.requests.append(request)
            self.keys.append({k.decode(): v.decode() for k, v in scope["headers"]}.get("authorization"))
            told = self.answer(request)
            if told is None:
                told = 200, {"results": [self.say(item) for item in request["items"]]}, {}
            status, answer, headers = told
        content = json.dumps(answer).encode()
        sent = {"content-type": "application/json", "content-length": str(len(content)), **headers}
        pairs = [(name.encode(), value.encode()) for name, value in sent.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": content})


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    running = RunningWorker(service)
    yield running.url
    running.stop()
    running.join()


def one(*responses: str, **facts: Any) -> Instance:
    return Instance("p", responses, **facts)


async def scored(url: str, *instances: Instance, seconds: float = 5.0, **config: Any) -> list[Scored | WorkerError]:
    scorer = HttpScorer(HttpConfig(name="far", kind="http", urls=(url,), **config))
    try:
        return await scorer.score(instances, deadline=soon(seconds))
    finally:
        await scorer.close()


async def test_an_instance_travels_with_reference_and_facts(service: Service, url: str) -> None:
    told = await scored(url, one("a", "bcd", reference="r", metadata={"task": "math"}), api_key="k")
    assert told == [Scored([1.0, 3.0])]
    (request,) = service.requests
    assert request["items"] == [
        {"responses": ["a", "bcd"], "prompt": "p", "reference": "r", "metadata": {"task": "math"}}
    ]
    assert 0 < request["timeout_seconds"] < 5
    assert service.keys == ["Bearer k"]


async def test_each_result_is_the_outcome_of_its_item(service: Service, url: str) -> None:
    results: dict[str, Json] = {
        "part": {"rewards": [None, 2.0], "failures": ["rule_timeout", None], "components": {"style": [None, 0.5]}},
        "code": {"rewards": [None, 2.0], "failures": ["No Code!", None]},
        "skip": {"abstain": "no reference"},
        "fail": {"error": {"code": "rule_error", "message": "it raised"}},
        "late": {"error": {"code": "timeout", "message": "no time"}},
        "long": {"error": {"code": "too_long", "message": "9000 tokens"}},
        "none": {"rewards": [None, None]},
        "huge": {"rewards": [1e9, 0.0]},
    }
    service.say = lambda item: results.get(item["responses"][0], {"rewards": [0.0, 1.0]})
    told = await scored(url, *(one(name, "x") for name in [*results, "fine"]))
    part, code, skip, fail, late, long, none, huge, fine = told
    assert isinstance(part, Scored)
    assert math.isnan(part.rewards[0])
    assert part.rewards[1] == 2.0
    assert part.failures == ("rule_timeout", "")
    assert math.isnan(part.components["style"][0])
    assert isinstance(code, Scored)
    assert code.failures == ("failed", "")
    assert [type(error) for error in (skip, fail, late, long, none, huge)] == [
        AbstainedError, WorkerInputError, WorkerTimeoutError, WorkerTooLongError, WorkerInputError, WorkerInputError,
    ]  # fmt: skip
    assert fine == Scored([0.0, 1.0])
    assert len(service.requests) == 1


async def test_a_refusal_may_blame_the_length(service: Service, url: str) -> None:
    service.answer = lambda request: (413, {"detail": "too large"}, {})
    assert [type(error) for error in await scored(url, one("a"))] == [WorkerTooLongError]


async def test_equal_responses_have_one_reward_whatever_the_service_says(service: Service, url: str) -> None:
    said: dict[str, Json] = {
        "x": {"rewards": [1.0, 5.0, 2.0, 3.0], "components": {"style": [0.1, 0.5, 0.2, 0.3]}},
        "y": {"rewards": [None, 5.0, 2.0], "failures": ["rule_timeout", None, None]},
    }
    service.say = lambda item: said[item["responses"][0]]
    told = await scored(url, one("x", "other", "x", "x"), one("y", "other", "y"))
    assert told == [
        Scored([1.0, 5.0, 1.0, 1.0], components={"style": [0.1, 0.5, 0.1, 0.1]}),
        Scored([2.0, 5.0, 2.0], failures=["", "", ""]),
    ]
    assert service.asked == [["x", "other", "x", "x", "y", "other", "y"]], "the service may count them"


async def test_a_refused_input_is_found_by_halving(service: Service, url: str) -> None:
    service.answer = lambda request: (
        (422, {"error": {"message": "not this"}}, {}) if "bad" in json.dumps(request) else None
    )
    told = await scored(url, *(one(text) for text in ("a", "bad", "c", "d")))
    assert [isinstance(outcome, WorkerRejectedError) for outcome in told] == [False, True, False, False]
    assert "not this" in str(told[1])


@pytest.mark.parametrize(
    "results",
    [
        [{"rewards": [1.0]}],
        [{}, {}],
        [{"rewards": [1.0, 2.0]}, {"rewards": [1.0]}],
        [{"rewards": [1.0], "abstain": "both"}, {"rewards": [1.0]}],
        [{"rewards": [1.0], "failures": []}, {"rewards": [1.0], "components": {"a": []}}],
    ],
)
async def test_results_of_another_shape_blame_the_service(service: Service, url: str, results: list[Json]) -> None:
    service.answer = lambda request: (200, {"results": results}, {})
    told = await scored(url, one("a"), one("b"))
    assert {getattr(outcome, "code", None) for outcome in told} == {"worker_protocol"}


async def test_requests_are_cut_between_instances(service: Service, url: str) -> None:
    told = await scored(url, *(one("a", "b") for _ in range(3)), one("a", "b", "c", "d", "e"), responses_per_request=4)
    assert all(isinstance(outcome, Scored) for outcome in told)
    assert sorted(map(len, service.asked)) == [2, 4, 5]


async def test_retry_after_is_honoured(service: Service, url: str) -> None:
    service.answer = lambda request: (429, {"error": {"message": "slowly"}}, {"retry-after": "7"})
    now = [100.0]
    scorer = HttpScorer(HttpConfig(name="far", kind="http", urls=(url,)), clock=lambda: now[0])
    (told,) = await scorer.score([one("a")], deadline=soon())
    assert isinstance(told, WorkerUnavailableError)
    assert told.retry_after_seconds == 7
    assert not scorer.available
    assert isinstance((await scorer.score([one("a")], deadline=soon()))[0], WorkerUnavailableError)
    assert len(service.requests) == 1
    now[0] += 7.1
    service.answer = lambda request: None
    assert scorer.available
    assert await scorer.score([one("a")], deadline=soon()) == [Scored([1.0])]
    await scorer.close()


async def test_requests_per_minute_bound_what_is_sent(service: Service, url: str) -> None:
    scorer = HttpScorer(HttpConfig(name="far", kind="http", urls=(url,), requests_per_minute=1.0))
    assert await scorer.score([one("a")], deadline=soon()) == [Scored([1.0])]
    assert not scorer.available
    assert scorer.reachable
    assert isinstance((await scorer.score([one("b")], deadline=soon()))[0], WorkerUnavailableError)
    assert len(service.requests) == 1
    await scorer.close()


async def test_tokens_per_minute_bound_what_is_sent(service: Service, url: str) -> None:
    scorer = HttpScorer(HttpConfig(name="far", kind="http", urls=(url,), tokens_per_minute=2000.0))
    assert await scorer.score([one("a")], deadline=soon()) == [Scored([1.0])]
    assert scorer.available
    assert await scorer.score([one("b" * 600)], deadline=soon()) == [Scored([600.0])]
    assert not scorer.available
    assert scorer.reachable
    assert isinstance((await scorer.score([one("c")], deadline=soon()))[0], WorkerUnavailableError)
    assert len(service.requests) == 2
    await scorer.close()


async def test_a_text_of_more_than_a_burst_waits(service: Service, url: str) -> None:
    scorer = HttpScorer(HttpConfig(name="far", kind="http", urls=(url,), tokens_per_minute=60_000.0))
    long = "b" * 26_000  # 6,500 tokens: a burst of 6,000, and half a second of 1,000 tokens a second
    started = asyncio.get_running_loop().time()
    assert await scorer.score([one(long)], deadline=soon()) == [Scored([26_000.0])]
    assert asyncio.get_running_loop().time() - started >= 0.5
    longer = "b" * 60_000
    assert isinstance((await scorer.score([one(longer)], deadline=soon(0.1)))[0], WorkerError)
    assert len(service.requests) == 1
    await scorer.close()


async def test_a_slow_service_is_late_and_nothing_else(service: Service, url: str) -> None:
    gate = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await gate.wait()
        else:
            await service(scope, receive, send)

    running = RunningWorker(slow)
    (told,) = await scored(running.url, one("a"), seconds=0.1)
    assert isinstance(told, WorkerTimeoutError)
    running.stop()
    running.join()


async def test_a_service_is_used_once_its_probe_has_passed(service: Service, url: str) -> None:
    def monitor(scorer: HttpScorer) -> ReplicaMonitor:
        return ReplicaMonitor([scorer], HealthPolicy(), np.random.default_rng(0))

    service.answer = lambda request: (200, {"results": [{"rewards": [1.0, 2.0]}]}, {})
    scorer = HttpScorer(HttpConfig(name="far", kind="http", urls=(url,)), monitor=monitor)
    await scorer.check()
    assert not scorer.available
    assert "2 rewards to 1 responses" in str(scorer.status().replicas[0].problem)
    service.answer = lambda request: None
    await scorer.check()
    assert scorer.available
    assert scorer.status().kind == "http"
    await scorer.close()


async def test_the_pool_file_says_limits_and_key(service: Service, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"kind": "http", "urls": [url], "api_key_env": "FAR_KEY", "timeout_seconds": 3, "max_in_flight": 2}
    entry = PoolFile.model_validate({"models": [{"name": "far", **fields}]}).models[0]
    pool = PoolFile(models=(entry,))
    monkeypatch.delenv("FAR_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="variable FAR_KEY"):
        build_scorer(entry, Settings(), pool)
    monkeypatch.setenv("FAR_KEY", "secret")
    scorer = build_scorer(entry, Settings(), pool)
    await scorer.score([one("a")], deadline=soon(60))
    assert service.keys == ["Bearer secret"]
    assert service.requests[0]["timeout_seconds"] <= 0.8 * 3
    await scorer.close()


async def test_a_conversation_is_sent_as_messages() -> None:
    service = Service()
    worker = RunningWorker(service)
    scorer = HttpScorer(HttpConfig(name="service", kind="http", urls=(worker.url,)))
    turns = (Message("system", "Be brief."), Message("user", "Why?"))
    (outcome,) = await scorer.score([Instance("as text", ("a", "b"), turns=turns)], deadline=soon())
    assert isinstance(outcome, Scored)
    (item,) = service.requests[0]["items"]
    assert item["messages"] == [{"role": turn.role, "content": turn.text} for turn in turns]
    assert "prompt" not in item
    await scorer.close()
    worker.stop()
    worker.join()
