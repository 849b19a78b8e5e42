"""A run's pool changes while it goes on: events of its log, the same on every gateway, whenever it was started."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from router_core.pools import PROBATION_SHARE
from service.keys.access import Scope
from service.keys.file import KeyFile, entry_of, new_key, write_key_file
from service.specification import Change
from tests.service.scorers.worker_servers import ScriptedWorker
from tests.support.gateway import Gateway, fresh_run, open_gateway, pair

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess
    from tests.service.scorers.worker_servers import Serve

THREE = ("rm-a", "rm-b", "rm-c")
FOLD: dict[str, Any] = {"block_size": 4, "refresh_events": 8}


def models(*names: str, **prices: float) -> list[dict[str, Any]]:
    """Entries of a pool file; `rm_a=2` is the price of rm-a."""
    costs = {name.replace("_", "-"): price for name, price in prices.items()}
    return [{"name": name, "price": costs.get(name, 1.0)} for name in names]


async def teach(gateway: Gateway, count: int, policy: str = "random") -> list[dict[str, Any]]:
    """So many decisions with their feedback."""
    replies = []
    for index in range(count):
        reply = await gateway.client.ok("/reward", {**pair(index), "policy": policy})
        await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": index % 2})
        replies.append(reply)
    return replies


async def apply(gateway: Gateway, entries: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Apply a pool file."""
    routing = {name: more.pop(name) for name in ("v", "gamma", "policy", "max_calls") if name in more}
    pool = {"models": entries, **more.pop("fields", {}), **({"routing": routing} if routing else {})}
    return await gateway.client.ok("/admin/pool", {"pool": pool, **more})


async def shown(gateway: Gateway) -> dict[str, Any]:
    response = await gateway.client.get(f"/pool?run={gateway.run}")
    assert response.status == 200, response.body
    document: dict[str, Any] = response.json
    return document


async def agree(*gateways: Gateway, version: int) -> str:
    """The digest that all of them have after so many events."""
    digests = {(await gateway.learned(version))["digest"] for gateway in gateways}
    assert len(digests) == 1
    return digests.pop()


@pytest.fixture
def fourth(serve: Serve) -> str:
    """A real worker of one more reward model."""
    return serve(ScriptedWorker("rm-d"))


async def test_prices_and_terms_change_at_a_position_of_the_log(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, **FOLD) as one:
        async with open_gateway(valkey_server.url, run=one.run, **FOLD) as two:
            await teach(one, 3)
            reply = await apply(one, models(*THREE, rm_a=2.0), v=0.05, gamma=0.5, policy="random", max_calls=2)
            assert reply["applied"]
            told = {(change["scorer"], change["field"]): change["after"] for change in reply["changes"]}
            assert told == {
                ("rm-a", "price"): 2.0, (None, "v"): 0.05, (None, "gamma"): 0.5, (None, "policy"): "random",
                (None, "max_calls"): 2,
            }  # fmt: skip
            await teach(two, 6)
            digest = await agree(one, two, version=10)
            for gateway in (one, two):
                found = await shown(gateway)
                assert (found["version"], found["v"], found["gamma"], found["policy"]) == (1, 0.05, 0.5, "random")
                assert [arm["price"] for arm in found["arms"]] == [2.0, 1.0, 1.0]
            reply = await two.client.ok("/reward", {**pair(), "policy": "single:rm-a"})
            assert reply["price"] == 2.0
            assert (await two.client.ok("/reward", pair()))["policy"] == "random"
        # One that starts afterwards, from the snapshot of eight events, with another pool file.
        async with open_gateway(valkey_server.url, run=one.run, **FOLD) as three:
            assert await agree(three, version=10) == digest
            found = await shown(three)
            assert (found["v"], found["policy"], found["arms"][0]["price"]) == (0.05, "random", 2.0)
            assert {change["field"] for change in found["proposal"]} == {"price"}


async def test_a_retired_scorer_is_asked_no_more_and_keeps_its_history(valkey_server: ValkeyProcess) -> None:
    async with (
        open_gateway(valkey_server.url, **FOLD) as one,
        open_gateway(valkey_server.url, run=one.run, **FOLD) as two,
    ):
        await teach(one, 4, "single:rm-b")
        open_ = await one.client.ok("/reward", {**pair(9), "policy": "single:rm-b"})
        await apply(one, models("rm-a", "rm-c"))
        # Feedback on a decision that the retired scorer made.
        await two.client.ok("/feedback", {"decision_id": open_["decision_id"], "preferred": 1})
        replies = await teach(one, 12)
        assert {reply["model"] for reply in replies} <= {"rm-a", "rm-c"}
        assert {
            len(one.decision((await one.client.ok("/reward", pair(i)))["decision_id"]).propensities) for i in (1, 2)
        } == {3}
        stored = one.decision((await one.client.ok("/reward", pair(3)))["decision_id"])
        assert stored.propensities[1] == 0.0
        assert sum(stored.propensities) == pytest.approx(1.0)
        voted = await one.client.ok("/reward", {**pair(4), "policy": "majority"})
        assert set(voted["components"]) == {"rm-a", "rm-c"}
        refused = await one.client.post("/reward", {**pair(), "policy": "single:rm-b"})
        assert refused.status == 404
        await agree(one, two, version=18)
        learned = (await two.learned(18))["models"]
        assert [(model["model"], model["feedbacks"]) for model in learned][1] == ("rm-b", 5)
        assert [status["name"] for status in (await two.client.get("/models")).json] == ["rm-a", "rm-c"]
        metrics = (await one.client.get("/metrics")).body.decode()
        believed = [line for line in metrics.splitlines() if line.startswith("reward_router_posterior_mean{")]
        assert any('model="rm-a"' in line for line in believed)
        assert not any('model="rm-b"' in line for line in believed)
        # Asked again, it goes on where it was.
        back = await apply(two, models(*THREE))
        assert [(change["action"], change["scorer"]) for change in back["changes"]] == [("add", "rm-b")]
        arms = (await shown(two))["arms"]
        assert [(arm["arm"], arm["retired"], arm["on_probation"]) for arm in arms] == [
            (k, False, False) for k in range(3)
        ]


async def test_a_new_scorer_starts_from_nothing_with_a_bounded_share(valkey_server: ValkeyProcess, fourth: str) -> None:
    run = fresh_run()
    async with (
        open_gateway(valkey_server.url, run=run, **FOLD) as one,
        open_gateway(valkey_server.url, run=run, **FOLD) as two,
    ):
        await teach(one, 5)
        reply = await apply(one, [*models(*THREE), {"name": "rm-d", "urls": [fourth]}])
        assert [(change["action"], change["scorer"], change["after"]) for change in reply["changes"]] == [
            ("add", "rm-d", "nothing")
        ]
        assert (await shown(one))["arms"][3]["on_probation"]
        # The gateway whose pool file does not know it asks it too.
        await two.learned(6)
        asked = await two.client.ok("/reward", {**pair(), "policy": "single:rm-d"})
        assert asked["rewards"] == [float(len(response)) for response in pair()["responses"]]
        shares = [
            one.decision((await one.client.ok("/reward", pair(i)))["decision_id"]).propensities for i in range(20)
        ]
        assert np.array(shares)[:, 3] == pytest.approx(PROBATION_SHARE, abs=1e-3)
        await teach(two, 33, "single:rm-d")
        await agree(one, two, version=39)
        assert not (await shown(one))["arms"][3]["on_probation"]
        digest = await agree(one, version=39)
    async with open_gateway(valkey_server.url, run=run, **FOLD) as three:
        assert await agree(three, version=39) == digest
        # Its own pool file lacks the new scorer: that is proposed, and not done.
        proposal = (await shown(three))["proposal"]
        assert [(change["action"], change["scorer"]) for change in proposal] == [("retire", "rm-d")]
        asked = await three.client.ok("/reward", {**pair(), "policy": "single:rm-d"})
        assert asked["model"] == "rm-d"
        accepted = await three.client.ok("/admin/pool", {"pool": None})
        assert [(change["action"], change["scorer"]) for change in accepted["changes"]] == [("retire", "rm-d")]
        assert (await shown(three))["proposal"] == []


async def test_another_scorer_of_the_same_name_replaces_the_old_one(valkey_server: ValkeyProcess, fourth: str) -> None:
    async with open_gateway(valkey_server.url, models=("rm-a", "rm-b")) as gateway:
        await apply(gateway, [*models("rm-a", "rm-b"), {"name": "rm-d", "urls": [fourth], "model": "org/one"}])
        await teach(gateway, 3, "single:rm-d")
        reply = await apply(gateway, [*models("rm-a", "rm-b"), {"name": "rm-d", "urls": [fourth], "model": "org/two"}])
        assert [(change["action"], change["scorer"]) for change in reply["changes"]] == [("replace", "rm-d")]
        found = await shown(gateway)
        assert [(arm["name"], arm["retired"]) for arm in found["arms"]] == [
            ("rm-a", False), ("rm-b", False), ("rm-d~1", True), ("rm-d", False),
        ]  # fmt: skip
        assert (found["arms"][2]["events"] > 2.0, found["arms"][3]["events"]) == (True, 0.0)
        again = await gateway.client.ok("/reward", {**pair(), "policy": "single:rm-d"})
        assert gateway.decision(again["decision_id"]).arm == 3


async def test_a_change_is_looked_at_before_it_is_made(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        dry = await apply(gateway, models("rm-a", "rm-b"), dry_run=True)
        assert (dry["applied"], dry["version"], len(dry["changes"])) == (False, 1, 1)
        assert (await shown(gateway))["version"] == 0
        nothing = await apply(gateway, models(*THREE))
        assert (nothing["applied"], nothing["changes"]) == (False, [])
        wrong: list[tuple[dict[str, Any], int, str]] = [
            ({"pool": {"models": []}}, 422, "models"),
            ({"pool": {"models": [{"name": "rm-z"}]}}, 422, "urls"),
            ({"pool": {"models": models(*THREE), "routing": {"policy": "single:rm-z"}}}, 422, "rm-z"),
            ({"pool": {"models": models(*THREE), "routing": {"policy": "laser"}}}, 422, "prior"),
            ({"pool": {"models": models("rm-a")}, "expect": 3}, 409, "version 0"),
            ({"pool": {"models": models("rm-a")}, "run": gateway.run + "-typo"}, 404, "unknown"),
        ]
        for body, status, words in wrong:
            response = await gateway.client.post("/admin/pool", body)
            assert response.status == status, response.body
            assert words in response.error["message"]
        assert (await shown(gateway))["version"] == 0


async def test_a_key_for_some_runs_names_no_new_address(
    valkey_server: ValkeyProcess, fourth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_SECRET", "s3cret")
    keys = {"some": new_key(), "all": new_key()}
    entries = [
        entry_of(keys["some"], "some", list(Scope), runs=["t-*"]),
        entry_of(keys["all"], "all", list(Scope)),
    ]
    write_key_file(tmp_path / "keys.json", KeyFile(entries))
    headers = {name: {"authorization": f"Bearer {key}"} for name, key in keys.items()}
    rubric = tmp_path / "rubric.jinja"
    rubric.write_text("{{ prompt }}")
    added: list[dict[str, Any]] = [
        {"name": "rm-d", "urls": [fourth]},
        {"name": "rm-a", "urls": [fourth], "api_key_env": "SOME_SECRET"},
        {"name": "j", "kind": "judge", "urls": [fourth], "model": "m", "rubric": str(rubric)},
    ]
    async with open_gateway(valkey_server.url, keys_file=tmp_path / "keys.json") as gateway:
        assert gateway.run.startswith("t-")
        assert (await gateway.client.post("/reward", pair(0), **headers["all"])).status == 200
        for entry in added:
            pool = {"models": [*models("rm-b", "rm-c"), entry]}
            refused = await gateway.client.post("/admin/pool", {"pool": pool}, **headers["some"])
            assert (refused.status, refused.error["code"]) == (403, "forbidden"), entry
            assert "send a key for all runs" in refused.error["message"]
        cheaper = {"pool": {"models": models("rm-a", "rm-b", rm_a=3)}}
        assert (await gateway.client.post("/admin/pool", cheaper, **headers["some"])).status == 200
        whole = {"pool": {"models": [*models("rm-a"), added[0]]}}
        assert (await gateway.client.post("/admin/pool", whole, **headers["all"])).status == 200
        # What the run has by now is known.
        assert (await gateway.client.post("/admin/pool", whole, **headers["some"])).status == 200


async def test_changes_at_once_through_two_gateways_are_both_made(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as one, open_gateway(valkey_server.url, run=one.run) as two:
        await asyncio.gather(
            *(apply(gateway, models(*THREE), v=0.1 + 0.1 * index) for index, gateway in enumerate((one, two)))
        )
        await agree(one, two, version=2)
        assert (await shown(one))["v"] == (await shown(two))["v"]
        assert (await shown(one))["version"] == 2


async def test_the_audit_rate_changes_in_a_live_run(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url) as gateway:
        await teach(gateway, 3)
        audit = {"referee": "rm-c", "rate": 1.0, "schedule": "even"}
        await apply(gateway, models(*THREE), fields={"audit": audit})
        reply = await gateway.client.ok("/reward", {**pair(1), "policy": "single:rm-a"})
        await gateway.learned(5)
        event = gateway.events()[-1]
        assert (event.decision_id, event.audit and event.audit.referee) == (reply["decision_id"], "rm-c")
        await apply(gateway, models(*THREE), fields={"audit": {**audit, "rate": 0.0}})
        later = await gateway.client.ok("/reward", pair(2))
        assert gateway.decision(later["decision_id"]).inclusion == 0.0
        (change,) = (await apply(gateway, models(*THREE)))["changes"]
        ended = str(Change.model_validate(change))
        assert ended == "audits end (they had rate 0.0; referee rm-c; schedule even)"


async def test_a_referee_stays_where_it_was_unless_the_file_says(valkey_server: ValkeyProcess, fourth: str) -> None:
    audit = {"referee": "rm-d", "rate": 1.0, "schedule": "even"}
    async with open_gateway(valkey_server.url) as gateway:
        await apply(gateway, models(*THREE), fields={"audit": audit, "referees": [{"name": "rm-d", "urls": [fourth]}]})
        said = {"audit": {**audit, "trust": 0.8}, "referees": [{"name": "rm-d"}]}
        changed = await apply(gateway, models(*THREE), fields=said)
        assert [one["field"] for one in changed["changes"]] == ["audit.trust"]
        assert (await shown(gateway))["pool"]["referees"] == [{"name": "rm-d", "urls": [fourth]}]
        await gateway.client.ok("/reward", pair(1))
        await gateway.learned(3)
        assert gateway.events()[-1].audit is not None


async def test_a_gateway_with_another_pool_file_takes_the_runs_and_proposes_its_own(
    valkey_server: ValkeyProcess,
) -> None:
    run = fresh_run()
    async with open_gateway(valkey_server.url, run=run) as gateway:
        await teach(gateway, 2)
    async with open_gateway(valkey_server.url, run=run, models=("rm-c", "rm-a"), gamma=0.9) as gateway:
        found = await shown(gateway)
        assert [arm["name"] for arm in found["arms"]] == [*THREE]
        proposal = {(change["action"], change["scorer"], change["field"]) for change in found["proposal"]}
        assert proposal == {("retire", "rm-b", None), ("change", None, "gamma")}
        reply = await gateway.client.ok("/reward", {**pair(), "policy": "single:rm-a"})
        assert gateway.decision(reply["decision_id"]).arm == 0
        away = await gateway.client.post("/reward", {**pair(), "policy": "single:rm-b"})
        assert (away.status, away.error["code"]) == (503, "no_worker")
        await gateway.client.ok("/admin/pool", {})
        assert (await shown(gateway))["proposal"] == []
        assert (await gateway.learned(3))["version"] == 3
