"""The console: its files, its stream of events, and beliefs. The browser is in tests/console."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from service.console import STATIC, console_files
from tests.support.events import watch
from tests.support.gateway import fresh_run, open_gateway, pair
from tests.support.live import LiveGateway, live_gateway
from tests.support.processes import fetch
from tests.support.rules import call

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

MOST_BYTES = 150_000
"""Of everything that the page consists of, licences included."""

EVERY = {"referee": "rm-c", "rate": 1.0, "schedule": "even"}


def send(gateway: LiveGateway, count: int = 1, **fields: Any) -> list[Any]:
    """Have pairs scored."""
    items = [{**pair(index), **fields} for index in range(count)]
    status, document = call(f"{gateway.url}/reward/batch", {"items": items})
    assert status == 200, document
    results: list[Any] = document["results"]
    return results


async def test_the_page_is_small_strict_and_kept_by_browsers(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, wait=False, api_keys=("secret",)) as gateway:
        page = await gateway.client.get("/")
        parts = re.findall(r'(?:src|href)="([^"]+)"', page.body.decode().partition("<body>")[0])
        answers = {part: await gateway.client.get("/" + part) for part in parts}
        again = await gateway.client.get("/", **{"if-none-match": page.headers["etag"]})
        stale = await gateway.client.get("/console/0123456789abcdef/app.js")
        outside = await gateway.client.get(f"/console/{console_files().digest}/../__init__.py")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["cache-control"] == "no-cache"
    assert len(parts) == 8
    for part, answer in answers.items():
        assert answer.status == 200, part
        assert "immutable" in answer.headers["cache-control"]
        assert answer.headers["content-security-policy"] == policy
    assert (again.status, stale.status, outside.status) == (304, 404, 404)
    assert sum(path.stat().st_size for path in STATIC.rglob("*") if path.is_file()) < MOST_BYTES


def test_the_page_has_no_inline_code_and_names_no_other_host() -> None:
    own = [path for path in STATIC.iterdir() if path.is_file()]
    for path in own:
        text = path.read_text()
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=\"|\sstyle=\"", text), path
        assert set(re.findall(r"https?://[^\s\"'`]+", text)) <= {"http://www.w3.org/2000/svg"}, path
    assert "dangerouslySetInnerHTML" not in "".join(path.read_text() for path in own)


@pytest.mark.parametrize(
    ("library", "licence", "word"),
    [
        ("preact.min.umd.js", "preact", "MIT"),
        ("preact-hooks.umd.js", "preact", "MIT"),
        ("htm.umd.js", "htm", "Apache License"),
        ("uPlot.iife.min.js", "uplot", "Permission is hereby granted"),
    ],
)
def test_every_library_has_its_licence(library: str, licence: str, word: str) -> None:
    vendor: Path = STATIC / "vendor"
    assert (vendor / library).exists()
    assert word in (vendor / f"{licence}.LICENSE.txt").read_text()


def test_the_stream_tells_decisions_draws_and_learning(valkey_server: ValkeyProcess) -> None:
    with live_gateway(valkey_server.url, audit=EVERY) as gateway:
        (reply,) = send(gateway, prompt="secret words")
        gateway.until(1)
        with watch(gateway.url + "/events") as stream:
            assert stream.content_type.startswith("text/event-stream")
            history = stream.next("history")
            report, state = stream.next("report"), stream.next("state")
    assert all(point["lag"] is not None for point in history)
    assert report["audits"] == 1
    assert (state["run"], state["decisions"], state["version"], state["lag"]) == (gateway.run, 1, 1, 0)
    assert (state["audits"], state["audits_waiting"], state["price"]) == (True, 0, 1.0)
    assert [arm["model"] for arm in state["arms"]] == ["rm-a", "rm-b", "rm-c"]
    assert [arm["asked"] for arm in state["arms"]] == [int(arm == reply["model"]) for arm in ("rm-a", "rm-b", "rm-c")]
    assert all(arm["sd"] > 0 for arm in state["arms"])
    assert [worker["name"] for worker in state["workers"]] == ["rm-a", "rm-b", "rm-c"]
    (newest,) = state["newest"]
    assert newest["decision_id"] == reply["decision_id"]
    assert max(newest["draws"]) == newest["draws"][("rm-a", "rm-b", "rm-c").index(reply["model"])]
    assert (newest["propensity"], newest["audited"]) == (reply["propensity"], True)
    assert [attempt["model"] for attempt in newest["attempts"]] == [reply["model"]]
    assert newest["now_means"] != newest["means"]
    assert "secret words" not in json.dumps(state)


def test_texts_are_told_only_where_allowed(valkey_server: ValkeyProcess) -> None:
    with live_gateway(valkey_server.url, console_texts=True) as gateway:
        send(gateway, prompt="x" * 3000, responses=["a", "b"])
        with watch(gateway.url + "/events") as stream:
            (newest,) = stream.next("state")["newest"]
    assert (newest["prompt"], newest["responses"]) == ("x" * 2000, ["a", "b"])


def test_viewers_share_snapshots_and_are_bounded(valkey_server: ValkeyProcess) -> None:
    with live_gateway(valkey_server.url, console_viewers=2) as gateway:
        with watch(gateway.url + "/events") as first, watch(gateway.url + "/events") as second:
            seen = [[stream.next("state")["time_ms"] for _ in range(2)] for stream in (first, second)]
            with watch(gateway.url + "/events") as third:
                assert third.status == 429
        assert set(seen[0]) & set(seen[1])
        assert fetch(f"{gateway.url}/events?run=nobody")[0] == 404
        for _ in range(200):
            with watch(gateway.url + "/events") as again:
                if again.status == 200:
                    break
        else:
            raise AssertionError("a place that was given up is not free")


def test_the_stream_needs_the_key(valkey_server: ValkeyProcess) -> None:
    with live_gateway(valkey_server.url, api_keys=("secret",)) as gateway:
        with watch(gateway.url + "/events") as refused:
            assert refused.status == 401
        with watch(gateway.url + "/events", authorization="Bearer secret") as stream:
            assert stream.next("state")["ready"] is True


async def test_beliefs_ask_nobody_and_save_nothing(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        reply = await gateway.client.ok("/beliefs", {**pair(0), "policy": "single:rm-b"})
        missing = await gateway.client.post("/beliefs", {**pair(0), "run": "nobody"})
        assert not any(arm.calls for arm in gateway.arms)
    assert (reply["run"], reply["posterior_version"]) == (gateway.run, 0)
    means = {one["model"]: one["mean"] for one in reply["beliefs"]}
    assert [model for model, mean in means.items() if mean is not None] == ["rm-b"]
    assert missing.status == 404


async def test_an_explained_reward_tells_its_draws(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        plain = await gateway.client.ok("/reward", pair(0))
        reply = await gateway.client.ok("/reward", {**pair(0), "explain": True})
        decision = gateway.decision(reply["decision_id"])
        single = {"prompt": "p", "responses": ["one"], "explain": True}
        first = await gateway.client.ok("/reward", single)
        follower = await gateway.client.ok("/reward", {**single, "responses": ["two"]})
    assert "beliefs" not in plain
    assert [one["mean"] for one in reply["beliefs"]] == decision.means
    assert [one["propensity"] for one in reply["beliefs"]] == decision.propensities
    assert max(reply["beliefs"], key=lambda one: one["draw"])["model"] == reply["model"]
    assert follower["sticky"] is True
    assert [one["draw"] for one in follower["beliefs"]] == [None, None, None]
    assert [one["mean"] for one in follower["beliefs"]] == [one["mean"] for one in first["beliefs"]]


async def test_the_report_says_who_was_asked(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, audit=EVERY) as gateway:
        items = [{**pair(index), "policy": "single:rm-a" if index % 4 else "single:rm-b"} for index in range(20)]
        await gateway.client.ok("/reward/batch", {"items": items})
        await gateway.learned(20)
        report = (await gateway.client.get("/report")).json
    assert [one["asked"] for one in report["scorers"]] == [0.75, 0.25, 0.0]
    assert report["scorers"][0]["asked_by_kind"] == {"all": 0.75}
    course = report["scorers"][0]["course"]["all"]
    assert len(course["asked"]) == len(course["accuracy"]) == len(report["parts_ms"]) == 8
    assert report["router"]["asked"] is None


def test_the_stream_follows_a_pool_that_changes(valkey_server: ValkeyProcess) -> None:
    with live_gateway(valkey_server.url, models=("rm-a", "rm-b")) as gateway:
        send(gateway, 2)
        other = fresh_run()
        send(gateway, 1, run=other)
        with watch(gateway.url + "/events") as stream:
            assert len(stream.next("state")["arms"]) == 2
            entries = [{"name": "rm-a"}, {"name": "rm-b"}, {"name": "rm-d", "urls": ["http://127.0.0.1:9"]}]
            status, document = call(f"{gateway.url}/admin/pool", {"pool": {"models": entries}})
            assert status == 200, document
            while len((state := stream.next("state"))["arms"]) == 2:
                pass
            with watch(f"{gateway.url}/events?run={other}") as beside:
                assert [one["name"] for one in beside.next("state")["workers"]] == ["rm-a", "rm-b"]
            call(f"{gateway.url}/admin/pool", {"pool": {"models": entries[1:]}})
            while not (last := stream.next("state"))["arms"][0]["retired"]:
                pass
    assert [arm["model"] for arm in state["arms"]] == ["rm-a", "rm-b", "rm-d"]
    assert [(arm["retired"], arm["on_probation"]) for arm in last["arms"]] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    assert [len(one["means"]) for one in state["newest"]] == [2, 2]
    assert [len(one["now_means"]) for one in state["newest"]] == [3, 3]


def test_every_gateway_shows_what_all_have_decided(valkey_server: ValkeyProcess) -> None:
    run = fresh_run()
    with (
        live_gateway(valkey_server.url, run=run, console_texts=True) as one,
        live_gateway(valkey_server.url, run=run) as other,
    ):
        made = {reply["decision_id"] for reply in send(one, 3, policy="single:rm-a")}
        made |= {reply["decision_id"] for reply in send(other, 2, policy="single:rm-b")}
        shown = []
        for gateway in (one, other):
            with watch(gateway.url + "/events") as stream:
                while (state := stream.next("state"))["decisions"] < 5:
                    pass
                shown.append(state)
    for state in shown:
        assert (state["decisions"], state["price"]) == (5, 1.0)
        assert [arm["asked"] for arm in state["arms"]] == [3, 2, 0]
        assert {decision["decision_id"] for decision in state["newest"]} == made
    assert sum(decision["prompt"] is not None for decision in shown[0]["newest"]) == 3
    assert all(decision["prompt"] is None for decision in shown[1]["newest"])


def test_runs_that_only_another_gateway_has_open_can_be_chosen(valkey_server: ValkeyProcess) -> None:
    with live_gateway(valkey_server.url) as one, live_gateway(valkey_server.url) as other:
        send(one)
        with watch(other.url + "/events") as stream:
            while one.run not in stream.next("runs"):
                pass
        with watch(f"{other.url}/events?run={one.run}") as stream:
            assert stream.next("state")["decisions"] == 1


def test_a_new_gateway_counts_on_and_shows_the_same_past(valkey_server: ValkeyProcess) -> None:
    run = fresh_run()
    with live_gateway(valkey_server.url, run=run) as gateway:
        send(gateway, 4)
    with live_gateway(valkey_server.url, run=run) as gateway, watch(gateway.url + "/events") as stream:
        state = stream.next("state")
    assert state["decisions"] == 4
    assert len(state["newest"]) == 4
