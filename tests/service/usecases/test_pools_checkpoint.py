"""What an arm starts from that comes to a live run: the checkpoint's column, or an average scorer's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from router_core.pools import PROBATION_SHARE
from tests.service.scorers.worker_servers import ScriptedWorker
from tests.support.gateway import Gateway, fresh_run, open_gateway, pair
from tests.support.votes import MODELS, OFFSETS, VOTES, checkpoint

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess
    from tests.service.scorers.worker_servers import Serve


async def apply(gateway: Gateway, *entries: dict[str, Any], **routing: Any) -> list[dict[str, Any]]:
    pool = {"models": entries, **({"routing": routing} if routing else {})}
    changes: list[dict[str, Any]] = (await gateway.client.ok("/admin/pool", {"pool": pool}))["changes"]
    return changes


async def teach(gateway: Gateway, count: int) -> None:
    for index in range(count):
        reply = await gateway.client.ok("/reward", {**pair(index), "policy": "bayesian"})
        await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})


async def test_a_scorer_that_the_checkpoint_knows_starts_from_its_column(
    valkey_server: ValkeyProcess, tmp_path: Path, serve: Serve
) -> None:
    path, encoder = checkpoint(tmp_path, VOTES)
    first, last = MODELS[:2], MODELS[2]
    given: dict[str, Any] = {"models": first, "encoder": encoder, "checkpoint": path, "run": fresh_run()}
    async with open_gateway(valkey_server.url, **given) as one, open_gateway(valkey_server.url, **given) as two:
        await teach(one, 5)
        changes = await apply(
            one, *({"name": name} for name in first), {"name": last, "urls": [serve(ScriptedWorker(last))]}
        )
        assert [(change["action"], change["scorer"], change["after"]) for change in changes] == [
            ("add", last, "checkpoint")
        ]
        decision = one.decision((await one.client.ok("/reward", pair()))["decision_id"])
        assert decision.offsets == pytest.approx(OFFSETS)
        assert not (await one.client.get("/pool")).json["arms"][2]["on_probation"]
        # Learned votes of all three combine.
        voted = await two.client.ok("/reward", {**pair(3), "policy": "stacked"})
        assert set(voted["components"]) == set(MODELS)
        await teach(two, 6)
        assert (await one.learned(12))["digest"] == (await two.learned(12))["digest"]
        digest = (await one.learned(12))["digest"]
    async with open_gateway(valkey_server.url, **given) as three:
        assert (await three.learned(12))["digest"] == digest


async def test_a_scorer_that_nobody_knows_starts_as_an_average_one(
    valkey_server: ValkeyProcess, tmp_path: Path, serve: Serve
) -> None:
    path, encoder = checkpoint(tmp_path, VOTES)
    async with open_gateway(valkey_server.url, models=MODELS, encoder=encoder, checkpoint=path) as gateway:
        await teach(gateway, 5)
        entries = [{"name": name} for name in MODELS]
        changes = await apply(gateway, *entries, {"name": "rm-new", "urls": [serve(ScriptedWorker("rm-new"))]})
        assert changes[0]["after"] == "kinds"
        decision = gateway.decision((await gateway.client.ok("/reward", pair()))["decision_id"])
        assert min(OFFSETS) < decision.offsets[3] < max(OFFSETS)
        assert decision.propensities[3] == pytest.approx(PROBATION_SHARE, abs=1e-3)
        # It has no vote, and the others keep theirs; a budget goes on, and one scorer may be dropped.
        voted = await gateway.client.ok("/reward", {**pair(3), "policy": "stacked"})
        assert voted["p_right"] > 0.5
        await apply(gateway, *entries[1:], {"name": "rm-new", "price": 2.0}, policy="cascade:1.5")
        for index in range(20):
            reply = await gateway.client.ok("/reward", pair(index))
            assert reply["policy"] == "cascade:1.5"
            await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})
        arms = (await gateway.client.get("/pool")).json["arms"]
        assert [arm["retired"] for arm in arms] == [True, False, False, False]
        assert arms[3]["price"] == 2.0
        assert (await gateway.learned(27))["version"] == 27


async def test_a_gateway_whose_file_has_a_scorer_more_than_its_checkpoint_starts(
    valkey_server: ValkeyProcess, tmp_path: Path
) -> None:
    path, encoder = checkpoint(tmp_path, VOTES)
    given: dict[str, Any] = {"encoder": encoder, "checkpoint": path, "run": fresh_run()}
    async with open_gateway(valkey_server.url, models=MODELS, **given) as gateway:
        await teach(gateway, 3)
    async with open_gateway(valkey_server.url, models=(*MODELS, "rm-new"), **given) as gateway:
        shown = (await gateway.client.get("/pool")).json
        assert [(change["action"], change["scorer"]) for change in shown["proposal"]] == [("add", "rm-new")]
        await teach(gateway, 2)
        assert (await gateway.client.ok("/admin/pool", {}))["applied"]
        asked = await gateway.client.ok("/reward", {**pair(), "policy": "single:rm-new"})
        assert asked["model"] == "rm-new"
