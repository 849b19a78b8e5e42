"""Scorers that do not apply to every instance: who is drawn, who is asked, and what happens when nobody applies."""

from __future__ import annotations

import pytest

from service.scorers.protocol import AbstainedError, Scored
from tests.conftest import ValkeyProcess
from tests.support.arms import ScriptedArm
from tests.support.gateway import open_gateway

PAIR = {"prompt": "What is 7 + 5?", "responses": ["12", "about 13"]}
MATHS = {**PAIR, "metadata": {"task": "math"}}


def pool() -> list[ScriptedArm]:
    general, verifier = ScriptedArm("general"), ScriptedArm("verifier")
    verifier.only = lambda instance: instance.metadata.get("task") == "math"
    return [general, verifier]


async def test_who_does_not_apply_is_not_drawn(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, arms=pool()) as gateway:
        plain = [await gateway.client.ok("/reward", {**PAIR, "policy": "random"}) for _ in range(20)]
        maths = [await gateway.client.ok("/reward", {**MATHS, "policy": "random"}) for _ in range(40)]
        assert {reply["model"] for reply in plain} == {"general"}
        assert {reply["propensity"] for reply in plain} == {1.0}
        assert not any(reply["fallback"] for reply in plain)
        assert {reply["model"] for reply in maths} == {"general", "verifier"}
        assert [reply["propensity"] for reply in maths] == pytest.approx([0.5] * 40)


async def test_all_means_all_that_apply(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, arms=pool()) as gateway:
        for body, asked in ((PAIR, ["general"]), (MATHS, ["general", "verifier"])):
            reply = await gateway.client.ok("/reward", {**body, "policy": "majority"})
            assert [attempt["model"] for attempt in reply["attempts"]] == asked


async def test_an_instance_to_which_nobody_applies_is_an_error_of_its_own(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, arms=pool()) as gateway:
        items = [PAIR, MATHS]
        body = {"items": items, "policy": "single:verifier"}
        refused, scored = (await gateway.client.ok("/reward/batch", body))["results"]
        assert refused["error"]["code"] == "abstained"
        assert refused["rewards"] is None
        assert scored["model"] == "verifier"


async def test_a_scorer_that_abstains_when_asked_is_no_failure(valkey_server: ValkeyProcess) -> None:
    class Abstaining(ScriptedArm):
        def _scored(self, items: object) -> Scored:
            raise AbstainedError("no reference")

    arms = [ScriptedArm("general"), Abstaining("verifier")]
    async with open_gateway(valkey_server.url, arms=arms) as gateway:
        body = {**PAIR, "policy": "majority"}
        told = (await gateway.client.ok("/reward", body))["attempts"]
        assert [(one["outcome"], one["reason"]) for one in told] == [("answered", None), ("abstained", "abstained")]


async def test_long_facts_are_refused_by_name(valkey_server: ValkeyProcess) -> None:
    async with open_gateway(valkey_server.url, max_text_chars=100) as gateway:
        for field, value in (("reference", "x" * 101), ("metadata", {"note": "x" * 101})):
            reply = await gateway.client.post("/reward", {**PAIR, field: value})
            assert reply.status == 422
            assert reply.json["error"]["details"]["field"].startswith(field)
