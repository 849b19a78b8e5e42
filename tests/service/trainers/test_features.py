"""The table "What goes along" of docs/trainers/index.md: what reaches a scorer and what comes back, by trainer."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest

from router_core.records import Instance
from service.trainers.areal import AwaitedReward
from service.trainers.ms_swift import RouterORM
from service.trainers.options import PREFIX, ClientOptions, from_environment
from service.trainers.rowwise import RowOptions
from service.trainers.trl import AsyncRouterReward
from service.trainers.verl import DEADLINE_SECONDS, RouterRewardManager, coalescer_of, compute_score_async
from tests.conftest import ValkeyProcess
from tests.docs.tables import ROOT
from tests.support.arms import ScriptedArm
from tests.support.gateway import fresh_run
from tests.support.live import LiveGateway, live_gateway

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 7 + 5?"},
    {"role": "assistant", "content": "11"},
    {"role": "user", "content": "Sure?"},
]
TOOLS = [
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "12", "tool_call_id": "c1"},
    {"role": "assistant", "content": "It is 12."},
]
TEMPLATED = (
    "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in CHAT) + "<|im_start|>assistant\n"
)
ANSWER = "It is 12."


@pytest.fixture(scope="module")
def seen() -> list[Instance]:
    """What the scorer was asked about."""
    return []


@pytest.fixture(scope="module")
def gateway(valkey_server: ValkeyProcess, seen: list[Instance]) -> Iterator[LiveGateway]:
    arm = ScriptedArm("rm-a")
    arm.only = lambda instance: seen.append(instance) is None
    with live_gateway(valkey_server.url, arms=[arm, ScriptedArm("rm-b")], trainer_patience_seconds=0) as running:
        yield running


@pytest.fixture
def options(gateway: LiveGateway, seen: list[Instance], monkeypatch: pytest.MonkeyPatch) -> ClientOptions:
    seen.clear()
    given = ClientOptions(url=gateway.url, run=fresh_run(), policy="single:rm-a", deadline_seconds=20)
    for name in ("url", "run", "policy"):
        monkeypatch.setenv(PREFIX + name.upper(), getattr(given, name))
    return given


async def posted(options: ClientOptions, path: str, body: Any) -> Any:
    async with httpx.AsyncClient(base_url=options.url, trust_env=False) as client:
        words = {"run": options.run, "policy": options.policy, **({"reward_key": "score"} if "remote" in path else {})}
        response = await client.post(path, json=body, params=words)
        response.raise_for_status()
        return response.json()


async def openrlhf(options: ClientOptions) -> Any:
    body = {"query": [TEMPLATED + ANSWER], "prompts": [TEMPLATED], "labels": ["12"]}
    reply = await posted(options, "/get_reward", body)
    return reply["extra_logs"]["rm_component/rm-a"]


async def llamafactory(options: ClientOptions) -> Any:
    reply = await posted(options, "/v1/score/evaluation", {"messages": [TEMPLATED + ANSWER]})
    return [one["rm-a"] for one in reply["components"]]


async def slime(options: ClientOptions) -> Any:
    reply = await posted(options, "/remote_rm", {"prompt": CHAT, "response": ANSWER, "label": "12"})
    return [reply["components"]["rm-a"]]


async def trl(options: ClientOptions) -> Any:
    logged: dict[str, float] = {}
    reward = AsyncRouterReward(options, row_options=RowOptions(reference="solution"))
    words: dict[str, Any] = {"solution": ["12"], "log_metric": logged.__setitem__}
    await reward([CHAT], [[{"role": "assistant", "content": ANSWER}]], **words)
    await reward.client.close()
    return [logged["reward_router/component/rm-a"]]


async def verl_score(truth: str | None, chat: Any) -> dict[str, Any]:
    found = await compute_score_async("toy", ANSWER, truth, {"prompt": chat})
    given = from_environment(os.environ, deadline_seconds=DEADLINE_SECONDS)
    await coalescer_of(given, os.getpid()).close()
    return found


async def areal_score(options: ClientOptions, response: str, **columns: Any) -> None:
    reward = AwaitedReward(options)
    await reward(TEMPLATED, response, [], [], **columns)
    await reward.close()


async def verl(options: ClientOptions) -> Any:
    found = await verl_score("12", CHAT)
    return [json.loads(found["components"])["rm-a"]]


async def ms_swift(options: ClientOptions) -> Any:
    await RouterORM(options=options)(
        [ANSWER], messages=[[*CHAT, {"role": "assistant", "content": ANSWER}]], solution=["12"]
    )


async def areal(options: ClientOptions) -> Any:
    await areal_score(options, ANSWER + "<|im_end|>", answer="12")


WAYS: dict[str, Callable[[ClientOptions], Any]] = {
    "TRL": trl,
    "verl": verl,
    "ms-swift": ms_swift,
    "AReaL": areal,
    "OpenRLHF": openrlhf,
    "LLaMA-Factory": llamafactory,
    "slime": slime,
}
NO_REFERENCE = {"LLaMA-Factory"}
NO_COMPONENTS = {"ms-swift", "AReaL"}


@pytest.mark.parametrize("trainer", WAYS)
async def test_turns_and_reference_reach_the_scorer(trainer: str, options: ClientOptions, seen: list[Instance]) -> None:
    components = await WAYS[trainer](options)
    asked = seen[-1]
    assert asked.turns is not None
    assert [(turn.role, turn.text) for turn in asked.turns] == [(one["role"], one["content"]) for one in CHAT]
    assert asked.responses == (ANSWER,)
    assert asked.reference == (None if trainer in NO_REFERENCE else "12")
    assert components == (None if trainer in NO_COMPONENTS else [float(len(ANSWER))])


async def test_trls_calls_of_tools_are_the_response(options: ClientOptions, seen: list[Instance]) -> None:
    reward = AsyncRouterReward(options)
    await reward([CHAT], [TOOLS])
    await reward.client.close()
    assert seen[-1].answers is not None
    [turns] = seen[-1].answers
    assert turns is not None
    assert [turn.role for turn in turns] == ["assistant", "tool", "assistant"]


@pytest.mark.parametrize("trainer", ["verl", "ms-swift", "AReaL", "slime"])
async def test_calls_of_tools_in_the_messages_are_turns(
    trainer: str, options: ClientOptions, seen: list[Instance]
) -> None:
    chat = [*CHAT, *TOOLS[:2]]
    if trainer == "verl":
        await verl_score(None, chat)
    elif trainer == "ms-swift":
        await RouterORM(options=options)([ANSWER], messages=[[*chat, {"role": "assistant", "content": ANSWER}]])
    elif trainer == "AReaL":
        await areal_score(options, ANSWER, messages=chat)
    else:
        await posted(options, "/remote_rm", {"prompt": chat, "response": ANSWER})
    asked = seen[-1]
    assert asked.turns is not None
    assert [turn.role for turn in asked.turns][-2:] == ["assistant", "tool"]
    assert "add" in asked.prompt


async def test_verls_manager_sends_the_ground_truth(options: ClientOptions, seen: list[Instance]) -> None:
    torch = pytest.importorskip("torch")
    fields = {"raw_prompt": CHAT, "reward_model": {"ground_truth": "12"}}
    batch = {"responses": torch.ones(2, dtype=torch.long), "attention_mask": torch.ones(4, dtype=torch.long)}
    sample = SimpleNamespace(batch=batch, non_tensor_batch=fields)
    manager = RouterRewardManager(None, SimpleNamespace(decode=lambda ids, skip_special_tokens: ANSWER))
    found = await manager.run_single([sample])
    await manager._coalescer.close()
    assert found["reward_score"] == len(ANSWER)
    assert seen[-1].reference == "12"


def test_the_page_says_what_these_tests_show() -> None:
    text = (ROOT / "docs/trainers/index.md").read_text("utf-8")
    section = re.split(r"^## ", text[text.index("## What goes along") :], flags=re.MULTILINE)[1]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    head, *rows = lines
    cells = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert set(cells) == set(WAYS)
    for trainer, row in cells.items():
        assert row["reference"].startswith("no") == (trainer in NO_REFERENCE)
        assert row["components"].startswith("no") == (trainer in NO_COMPONENTS)
