"""The client against the real gateway, and against a transport that answers as told."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import pytest

from service.scorers.protocol import WorkerUnavailableError
from service.trainers import exchange
from service.trainers.client import AsyncRouterClient, RouterClient
from service.trainers.options import ClientOptions, from_environment
from service.trainers.values import (
    Accepted,
    Declined,
    Feedback,
    Missing,
    RewardItem,
    RouterProtocolError,
    RouterRefusedError,
    RouterUnavailableError,
    Scored,
    items_of,
)
from tests.conftest import ValkeyProcess, free_port
from tests.support.gateway import fresh_run
from tests.support.live import LiveGateway, live_gateway

PAIR = items_of(["What is 7 + 5?"], [["12", "thirteen"]])


@pytest.fixture(scope="module")
def gateway(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    with live_gateway(valkey_server.url, max_batch=16) as running:
        yield running


@pytest.fixture
def options(gateway: LiveGateway) -> ClientOptions:
    return ClientOptions(url=gateway.url, run=fresh_run(), deadline_seconds=20)


class Scripted:
    """A transport that gives one answer after the other, and keeps what it was asked."""

    def __init__(self, *answers: httpx.Response | Exception | Callable[[Any], httpx.Response]) -> None:
        self.answers = list(answers)
        self.asked: list[Any] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        document = json.loads(request.content) if request.content else None
        self.asked.append(document)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else answer(document)

    def client(self, **options: Any) -> RouterClient:
        return RouterClient(transport=httpx.MockTransport(self), **options)


def error(status: int, code: str, **more: Any) -> httpx.Response:
    body = {"error": {"code": code, "message": f"because {code}", "details": more.pop("details", {})}}
    return httpx.Response(status, json=body, **more)


def item_error(code: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": f"because {code}", "details": {}}}


def reply(prompt: str, *rewards: float | None) -> dict[str, Any]:
    return {
        "decision_id": f"d-{prompt}",
        "run": "r",
        "model": "rm-a",
        "rewards": list(rewards),
        "preferred": None,
        "margin": None,
        "propensity": 0.5,
        "policy": "bayesian",
        "posterior_version": 3,
        "fallback": False,
        "recorded": True,
        "brand_new": 1,
    }


def all_scored(document: Any) -> httpx.Response:
    return httpx.Response(200, json={"results": [reply(item["prompt"], 1.0) for item in document["items"]]})


def unscaled(prompt: str, *rewards: float | None) -> dict[str, Any]:
    return {**reply(prompt, *rewards), "failure": [None if one is not None else "no_reward" for one in rewards]}


def test_a_reward_that_waits_for_its_scale_is_asked_for_again() -> None:
    first = httpx.Response(200, json={"results": [unscaled("p", 1.0, None), reply("q", 2.0)]})
    second = httpx.Response(200, json={"results": [reply("p", 0.5, -0.5)]})
    script = Scripted(first, second)
    with script.client() as client:
        found = client.reward_many(items_of(["p", "q"], [["a", "b"], ["c"]]))
    assert [result.rewards for result in found if result.ok] == [(0.5, -0.5), (2.0,)]
    assert [len(asked["items"]) for asked in script.asked] == [2, 1]


def test_one_reward_that_waits_for_its_scale_is_asked_for_again() -> None:
    script = Scripted(httpx.Response(200, json=unscaled("p", None)), httpx.Response(200, json=reply("p", 0.5)))
    with script.client() as client:
        assert client.reward("p", ["a"]).rewards == (0.5,)


def test_a_reward_that_its_model_refused_is_not_asked_for_again() -> None:
    refused = {**reply("p", None), "failure": ["worker_rejected"]}
    script = Scripted(httpx.Response(200, json={"results": [refused]}))
    with script.client() as client:
        [found] = client.reward_many(items_of(["p"], [["a"]]))
    assert found.ok
    assert found.failures == ("worker_rejected",)


def test_a_scale_that_does_not_come_is_waited_for_in_a_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "FIRST_PAUSE_SECONDS", 0.0)
    script = Scripted(*[httpx.Response(200, json={"results": [unscaled("p", None)]})] * exchange.SCALE_TRIES)
    with script.client() as client:
        [found] = client.reward_many(items_of(["p"], [["a"]]))
    assert found.ok
    assert found.rewards == (None,)
    assert script.answers == []


def test_rewards_come_back_typed_and_feedback_moves_the_posterior(gateway: LiveGateway, options: ClientOptions) -> None:
    with RouterClient(options) as client:
        before = client.reward(*("What is 7 + 5?", ["12", "thirteen"]))
        assert before.rewards == (2.0, 8.0)
        assert before.preferred == 1
        assert before.recorded
        assert before.posterior_version == 0
        assert set(before.extra) >= {"timings"}
        answer = client.feedback(Feedback(decision_id=before.decision_id, preferred=1))
        assert not answer.duplicate
        assert client.feedback(Feedback(decision_id=before.decision_id, preferred=1)).duplicate
    assert gateway.until(1, options.run)["version"] == 1
    with RouterClient(options) as client:
        assert client.posterior()["version"] == 1


def test_feedback_may_name_its_decision_by_content(options: ClientOptions) -> None:
    with RouterClient(options) as client:
        scored = client.reward("p", ["a", "bb"])
        [answer] = client.feedback_many([Feedback(prompt="p", responses=("a", "bb"), preferred=0)])
    assert isinstance(answer, Accepted)
    assert answer.decision_id == scored.decision_id


def test_feedback_that_is_refused_says_why_for_each(options: ClientOptions) -> None:
    with RouterClient(options) as client:
        scored = client.reward("p", ["a", "bb"])
        given = [Feedback(decision_id=scored.decision_id, preferred=0), Feedback(decision_id="dnone", preferred=0)]
        first, second = client.feedback_many(given)
        assert isinstance(first, Accepted)
        assert isinstance(second, Declined)
        assert second.code == "not_found"
        with pytest.raises(RouterRefusedError, match="feedback_conflict"):
            client.feedback(Feedback(decision_id=scored.decision_id, preferred=1))


def test_large_batches_are_cut_and_come_back_in_order(gateway: LiveGateway, options: ClientOptions) -> None:
    items = [RewardItem(f"p{i}", ("x" * (i + 1), "")) for i in range(50)]
    with RouterClient(options) as client:
        results = client.reward_many(items)  # 128 an own request, of which the gateway takes 16
    assert [result.rewards[0] for result in results if isinstance(result, Scored)] == [i + 1.0 for i in range(50)]


async def test_the_asynchronous_client_does_the_same(gateway: LiveGateway, options: ClientOptions) -> None:
    items = [RewardItem(f"p{i}", ("x" * (i + 1), "")) for i in range(50)]
    async with AsyncRouterClient(options) as client:
        results = await client.reward_many(items)
        assert [result.rewards[0] for result in results if isinstance(result, Scored)] == [i + 1.0 for i in range(50)]
        scored = await client.reward("p", ["a", "bb"])
        answers = await client.feedback_many([Feedback(decision_id=scored.decision_id, preferred=1)])
        assert [answer.ok for answer in answers] == [True]
        assert (await client.feedback(Feedback(decision_id=scored.decision_id, preferred=1))).duplicate
        assert (await client.posterior())["run"] == options.run


def test_one_asynchronous_client_serves_one_event_loop_after_the_other(options: ClientOptions) -> None:
    client = AsyncRouterClient(options)

    async def step() -> float | None:
        async with client:
            return (await client.reward("p", ["abc"])).rewards[0]

    assert [asyncio.run(step()) for _ in range(3)] == [3.0, 3.0, 3.0]


def test_threads_share_a_client(options: ClientOptions) -> None:
    found: dict[int, float | None] = {}
    with RouterClient(options) as client:

        def ask(index: int) -> None:
            found[index] = client.reward(f"p{index}", ["x" * (index + 1)]).rewards[0]

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {index: index + 1.0 for index in range(24)}


def _in_a_child(client: RouterClient, results: Any) -> None:
    results.put(client.reward("child", ["abcd"]).rewards[0])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_uses_connections_of_its_own(options: ClientOptions) -> None:
    context = multiprocessing.get_context("fork")
    with RouterClient(options) as client:
        assert client.reward("parent", ["abc"]).rewards == (3.0,)
        results = context.Queue()
        children = [context.Process(target=_in_a_child, args=(client, results)) for _ in range(2)]
        for child in children:
            child.start()
        assert [results.get(timeout=60) for _ in children] == [4.0, 4.0]
        for child in children:
            child.join(60)
        assert client.reward("parent", ["ab"]).rewards == (2.0,)


def test_a_client_can_be_pickled(options: ClientOptions) -> None:
    with RouterClient(options) as client:
        client.reward("p", ["a"])
        copy = pickle.loads(pickle.dumps(client))
    assert copy.options == options
    with copy:
        assert copy.reward("p", ["abc"]).rewards == (3.0,)


def test_errors_can_be_pickled() -> None:
    before = RouterRefusedError(422, "validation", "bad", {"field": "run"})
    after = pickle.loads(pickle.dumps(before))
    assert (str(after), after.status, after.code, after.details) == (
        str(before),
        422,
        "validation",
        {"field": "run"},
    )


def test_a_wrong_key_is_final_and_the_right_one_opens(valkey_server: ValkeyProcess) -> None:
    with live_gateway(valkey_server.url, api_keys=("secret",)) as gateway:
        with (
            RouterClient(url=gateway.url, api_key="wrong") as client,
            pytest.raises(RouterRefusedError, match="API key") as refused,
        ):
            client.reward_many(PAIR)
        assert (refused.value.status, refused.value.code) == (401, "unauthorized")
        with RouterClient(url=gateway.url, api_key="secret") as client:
            assert client.reward_many(PAIR)[0].ok


def test_models_that_are_away_are_waited_for_until_the_deadline(gateway: LiveGateway, options: ClientOptions) -> None:
    for arm in gateway.arms:
        arm.error = WorkerUnavailableError("away")
    try:
        with RouterClient(options) as client:
            [result] = client.reward_many(PAIR, deadline_seconds=0.5)
            assert isinstance(result, Missing)
            with pytest.raises(RouterUnavailableError, match="/reward gave nothing"):
                client.reward("p", ["a"], deadline_seconds=0.5)
            back = threading.Timer(0.3, lambda: [setattr(arm, "error", None) for arm in gateway.arms])
            back.start()
            [result] = client.reward_many(PAIR)
            assert isinstance(result, Scored)
    finally:
        for arm in gateway.arms:
            arm.error = None


def test_a_gateway_that_is_not_there_is_missing_rewards_not_zeros() -> None:
    with RouterClient(url=f"http://127.0.0.1:{free_port()}", deadline_seconds=0.4) as client:
        [result] = client.reward_many(PAIR)
        assert isinstance(result, Missing)
        assert "ConnectError" in result.message
        assert "is the gateway running" in result.message.lower()
        with pytest.raises(RouterUnavailableError):
            client.feedback_many([Feedback(decision_id="d", preferred=0)])


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_a_gateway_that_hangs_is_given_up_at_the_deadline(silent_port: int) -> None:
    with RouterClient(url=f"http://127.0.0.1:{silent_port}", deadline_seconds=2, attempt_seconds=0.3) as client:
        [result] = client.reward_many(PAIR)
    assert isinstance(result, Missing)
    assert "ReadTimeout" in result.message


async def test_so_it_is_by_the_asynchronous_client(silent_port: int) -> None:
    url = f"http://127.0.0.1:{silent_port}"
    async with AsyncRouterClient(url=url, deadline_seconds=2, attempt_seconds=0.3) as client:
        [result] = await client.reward_many(PAIR)
        assert isinstance(result, Missing)
        assert "Timeout" in result.message
        with pytest.raises(RouterUnavailableError):
            await client.feedback(Feedback(decision_id="d", preferred=0))


async def test_a_final_refusal_of_one_request_ends_the_others(gateway: LiveGateway) -> None:
    async with AsyncRouterClient(url=gateway.url, policy="no-such", max_items=1) as client:
        with pytest.raises(RouterRefusedError, match="no-such"):
            await client.reward_many(PAIR * 20)


def test_only_the_items_that_may_be_retried_are_sent_again() -> None:
    def first(document: Any) -> httpx.Response:
        results = [reply("a", 1.0), item_error("no_worker"), item_error("worker_rejected"), item_error("over_capacity")]
        return httpx.Response(200, json={"results": results})

    transport = Scripted(first, all_scored)
    with transport.client() as client:
        results = client.reward_many(items_of(list("abcd"), [["x"]] * 4))
    assert [[item["prompt"] for item in document["items"]] for document in transport.asked] == [
        list("abcd"),
        ["b", "d"],
    ]
    assert [result.ok for result in results] == [True, True, False, True]
    assert results[2] == Missing("worker_rejected", "because worker_rejected")


def test_feedback_that_was_acknowledged_is_told_though_the_gateway_goes_away_then() -> None:
    accepted = {"decision_id": "a", "event_id": "1-0", "duplicate": False}
    first = httpx.Response(200, json={"results": [accepted, item_error("store_unavailable")]})
    gone = [error(503, "store_unavailable") for _ in range(500)]
    feedback = [Feedback(decision_id=name, preferred=0) for name in "ab"]
    with Scripted(first, *gone).client(deadline_seconds=1) as client:
        results = client.feedback_many(feedback)
    assert results == [Accepted("a", "1-0", False), Declined("store_unavailable", "because store_unavailable")]
    with Scripted(*gone).client(deadline_seconds=1) as client, pytest.raises(RouterUnavailableError):
        client.feedback_many(feedback)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_may_be_retried_is_retried(status: int) -> None:
    transport = Scripted(error(status, "x"), httpx.ReadError("dropped"), all_scored)
    with transport.client() as client:
        [result] = client.reward_many(PAIR)
    assert isinstance(result, Scored)
    assert len(transport.asked) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 409, 410, 422, 500])
def test_what_is_final_is_not(status: int) -> None:
    transport = Scripted(error(status, "some_code"))
    with transport.client() as client, pytest.raises(RouterRefusedError, match="because some_code") as refused:
        client.reward_many(PAIR)
    assert (refused.value.status, refused.value.code) == (status, "some_code")
    assert len(transport.asked) == 1


def test_retry_after_is_obeyed() -> None:
    transport = Scripted(error(503, "not_ready", headers={"retry-after": "1"}), all_scored)
    with transport.client() as client:
        started = time.monotonic()
        client.reward_many(PAIR)
        assert time.monotonic() - started >= 1.0


def test_a_retry_that_the_deadline_forbids_is_not_waited_for() -> None:
    transport = Scripted(error(503, "not_ready", headers={"retry-after": "60"}))
    with transport.client(deadline_seconds=30) as client:
        [result] = client.reward_many(PAIR)
    assert isinstance(result, Missing)
    assert len(transport.asked) == 1


def test_a_body_that_is_too_large_is_halved_and_one_text_alone_is_missing() -> None:
    def too_large(document: Any) -> httpx.Response:
        sizes = [len(item["prompt"]) for item in document["items"]]
        return error(413, "payload_too_large") if sum(sizes) > 3 else all_scored(document)

    transport = Scripted(*[too_large] * 9)
    with transport.client() as client:
        results = client.reward_many(items_of(["a", "b", "c", "long", "d"], [["x"]] * 5))
    assert [result.ok for result in results] == [True, True, True, False, True]


def test_bytes_bound_a_request_too() -> None:
    transport = Scripted(*[all_scored] * 3)
    with transport.client(max_bytes=10, connections=1) as client:
        client.reward_many(items_of(["aaaa", "bbbb", "cccccccccccc", "d"], [["x"]] * 4))
    assert [[item["prompt"] for item in document["items"]] for document in transport.asked] == [
        ["aaaa", "bbbb"],
        ["cccccccccccc"],
        ["d"],
    ]


def test_run_policy_and_normalize_go_along_and_are_left_out_where_unset() -> None:
    transport = Scripted(all_scored, all_scored)
    with transport.client(run="r1", policy="laser", normalize=True) as client:
        client.reward_many(PAIR)
    with transport.client() as client:
        client.reward_many([RewardItem("p", ("a",), run="r2")])
    assert {name: transport.asked[0][name] for name in ("run", "policy", "normalize")} == {
        "run": "r1",
        "policy": "laser",
        "normalize": True,
    }
    assert transport.asked[1] == {"items": [{"prompt": "p", "responses": ["a"], "run": "r2"}]}


def test_a_null_reward_stays_null() -> None:
    transport = Scripted(lambda _: httpx.Response(200, json={"results": [reply("p", None, 1.5)]}))
    with transport.client() as client:
        [result] = client.reward_many(PAIR)
    assert isinstance(result, Scored)
    assert result.rewards == (None, 1.5)
    assert result.extra == {"brand_new": 1}


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>login</html>"),
        httpx.Response(200, text="[" * 100_000),
        httpx.Response(200, content=b'{"results": "\xe9"}'),
        httpx.Response(200, json={"results": []}),
        httpx.Response(200, json=["x"]),
        httpx.Response(200, json={"results": [{"rewards": [1.0]}]}),
        httpx.Response(200, json={"results": ["x"]}),
    ],
)
def test_an_answer_of_something_else_is_an_error_not_a_reward(answer: httpx.Response) -> None:
    with Scripted(answer).client() as client, pytest.raises(RouterProtocolError):
        client.reward_many(PAIR)


def test_half_a_surrogate_pair_does_not_cost_the_batch() -> None:
    transport = Scripted(all_scored)
    with transport.client() as client:
        client.reward_many([RewardItem("a\ud83d", ("b\ude00",))])
    assert transport.asked[0]["items"] == [{"prompt": "a?", "responses": ["b?"]}]


@pytest.mark.parametrize(
    "fields",
    [{}, {"preferred": 0, "loss": 0.5}],
)
def test_feedback_holds_one_value(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="feedback holds"):
        Feedback(decision_id="d", **fields)


def test_a_reward_item_that_cannot_be_sent_costs_itself_alone() -> None:
    run: Any = 7
    with Scripted(all_scored).client() as client:
        bad, good = client.reward_many([RewardItem("p", ("x",), run=run), RewardItem("p", ("x",))])
    assert isinstance(bad, Missing)
    assert (bad.code, good.ok) == ("validation", True)


def test_feedback_that_names_nothing_is_refused() -> None:
    with Scripted().client() as client, pytest.raises(ValueError, match="names no decision"):
        client.feedback(Feedback(preferred=0))


def test_an_empty_list_costs_no_request() -> None:
    with Scripted().client() as client:
        assert client.reward_many([]) == []
        assert client.feedback_many([]) == []


def test_options_come_from_the_environment_and_arguments_win() -> None:
    environment = {
        "REWARD_ROUTER_CLIENT_URL": "http://router:9",
        "REWARD_ROUTER_CLIENT_RUN": "r",
        "REWARD_ROUTER_CLIENT_DEADLINE_SECONDS": "7.5",
        "REWARD_ROUTER_CLIENT_NORMALIZE": "true",
        "REWARD_ROUTER_CLIENT_API_KEY": "",
    }
    found = from_environment(environment, run="other", policy=None)
    assert (found.url, found.run, found.deadline_seconds, found.normalize, found.api_key) == (
        "http://router:9",
        "other",
        7.5,
        True,
        None,
    )


@pytest.mark.parametrize(
    ("environment", "overrides", "said"),
    [
        ({"REWARD_ROUTER_CLIENT_DEADLINE_SECONDS": "soon"}, {}, "REWARD_ROUTER_CLIENT_DEADLINE_SECONDS is 'soon'"),
        ({"REWARD_ROUTER_CLIENT_NORMALIZE": "maybe"}, {}, "REWARD_ROUTER_CLIENT_NORMALIZE is 'maybe'"),
        ({"REWARD_ROUTER_CLIENT_URL": "router:8080"}, {}, "url is 'router:8080'"),
        ({}, {"uri": "x"}, "uri: no such option"),
        ({}, {"deadline_seconds": 0}, "deadline_seconds is 0"),
    ],
)
def test_options_that_cannot_be_are_refused_with_a_remedy(
    environment: dict[str, str], overrides: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        from_environment(environment, **overrides)


def test_the_key_is_not_printed() -> None:
    assert "hush" not in repr(ClientOptions(api_key="hush"))


@pytest.mark.parametrize(
    ("prompt", "responses", "words"),
    [
        (None, ("a",), "prompt is None: give its text"),
        ([{"content": "p"}], ("a",), r"prompt\[0\] has no role"),
        ("p", ("a", None), r"responses\[1\] is None: give its text"),
    ],
)
def test_an_instance_is_texts_or_messages(prompt: Any, responses: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RewardItem(prompt, responses)


def test_the_first_failed_try_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    away = httpx.Response(503, json={"error": {"code": "not_ready", "message": "loading"}})
    good = httpx.Response(200, json={"version": 1})
    script = Scripted(away, away, good)
    with RouterClient(url="http://router:8080", deadline_seconds=60, transport=httpx.MockTransport(script)) as client:
        client.posterior()
    first, last = (record.getMessage() for record in caplog.records if record.name == "reward_router")
    assert "http://router:8080 does not answer /posterior (HTTP 503" in first
    assert "trying again for up to 60 s" in first
    assert last == "the gateway at http://router:8080 answers again"


def test_an_address_where_nothing_ever_answered_is_said(caplog: pytest.LogCaptureFixture) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with RouterClient(url=url, deadline_seconds=0.3) as client, pytest.raises(RouterUnavailableError):
        client.posterior()
    (said,) = (record.getMessage() for record in caplog.records if record.name == "reward_router")
    assert said.startswith(f"nothing has ever answered at {url} (/posterior, ConnectError")
