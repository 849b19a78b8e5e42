"""A pool with a real rule worker: routed to, abstaining, failing over; its rewards are in the reply."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.pool import load_pool
from service.scorers.registry import build_scorer
from service.settings import Settings
from tests.conftest import ValkeyProcess
from tests.support.arms import ScriptedArm
from tests.support.gateway import open_gateway
from tests.support.rules import rule_worker

MATHS = {
    "prompt": "What is one half of one third?",
    "responses": [r"It is $\boxed{\frac16}$.", r"It is $\boxed{\frac13}$."],
    "reference": "1/6",
    "metadata": {"task": "math"},
}
CHAT = {"prompt": "Hello?", "responses": ["Hi.", "Good day."], "metadata": {"task": "chat"}}

RULE = """
def picky(messages, response, reference, metadata):
    if "hang" in response:
        while True:
            pass
    return None if "skip" in response else len(messages[0]["content"])
"""


@pytest.fixture(scope="module")
def maths() -> Iterator[str]:
    with rule_worker("--rule", "math", "--processes", "2") as url:
        yield url


def pool_of(tmp_path: Path, url: str, fields: str = "") -> list[object]:
    file = tmp_path / "pool.yaml"
    file.write_text(f"models: [{{name: verifier, kind: rule, urls: ['{url}'] {fields}}}]")
    pool = load_pool(file)
    return [build_scorer(pool.models[0], Settings(), pool), ScriptedArm("rm")]


async def test_maths_go_to_the_verifier(valkey_server: ValkeyProcess, maths: str, tmp_path: Path) -> None:
    arms = pool_of(tmp_path, maths, ", applies: {metadata.task: math, reference: true}")
    async with open_gateway(valkey_server.url, arms=arms) as gateway:  # type: ignore[arg-type]
        reply = await gateway.client.ok("/reward", {**MATHS, "policy": "single:verifier"})
        assert (reply["rewards"], reply["preferred"]) == ([1.0, 0.0], 0)
        both = await gateway.client.ok("/reward", {**MATHS, "policy": "majority"})
        assert both["components"]["verifier"] == [1.0, 0.0]
        chat = [await gateway.client.ok("/reward", {**CHAT, "policy": "random"}) for _ in range(10)]
        assert {(one["model"], one["propensity"], one["fallback"]) for one in chat} == {("rm", 1.0, False)}


async def test_a_rule_that_abstains_or_hangs_loses_its_own_reward(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text(RULE)
    with rule_worker("--rule", f"{tmp_path / 'rules.py'}:picky", "--rule-seconds", "0.5", "--processes", "2") as url:
        arms = pool_of(tmp_path, url)
        async with open_gateway(valkey_server.url, arms=arms) as gateway:  # type: ignore[arg-type]
            texts = [["a", "b"], ["skip", "skip"], ["hang", "hang"], ["hang", "c"]]
            items = [{"prompt": "four", "responses": responses} for responses in texts]
            body = {"items": items, "policy": "single:verifier"}
            good, skipped, hung, half = (await gateway.client.ok("/reward/batch", body))["results"]
            assert good["rewards"] == [4.0, 4.0]
            assert skipped["error"]["code"] == "abstained"
            assert hung["error"]["code"] == "worker_rejected"
            assert (half["rewards"], half["failure"]) == ([None, 4.0], ["rule_timeout", None])
            routed = await gateway.client.ok("/reward/batch", {**body, "policy": "majority"})
            assert [one["rewards"] is not None for one in routed["results"]] == [True] * 4
