"""Prompts and responses as messages: what reaches a reward model, the context, the log, and feedback by content."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.scorers.rm.client import ArmConfig, VllmArm
from service.scorers.rm.render import PlainTemplate, TemplateRendering
from service.scorers.rm.tokens import TokenRendering
from tests.conftest import ValkeyProcess
from tests.service.scorers.rm.test_tokens import byte_rendering, text_of
from tests.service.scorers.worker_servers import ScriptedWorker, Serve
from tests.support.gateway import Gateway, open_gateway

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "What is 7 + 5?"}
CALLING = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "id": "c1", "function": {"name": "add", "arguments": '{"a": 7}'}}],
}
TOLD = {"role": "tool", "content": "12", "tool_call_id": "c1", "name": "add"}
SAID = {"role": "assistant", "content": "It is 12."}
WITH_TOOLS = {"prompt": [SYSTEM, ASKED], "responses": [[CALLING, TOLD, SAID], "12"]}


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess) -> AsyncIterator[Gateway]:
    async with open_gateway(valkey_server.url) as opened:
        yield opened


async def asked_of(serve: Serve, valkey_url: str, body: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    """What a reward model's worker is sent for one request."""
    worker = ScriptedWorker()
    arm = VllmArm(ArmConfig(name="rm", urls=(serve(worker),), **options))
    async with open_gateway(valkey_url, arms=[arm]) as gateway:
        await gateway.client.ok("/reward", body)
    return worker.requests


async def test_a_reward_model_gets_turns_as_turns(serve: Serve, valkey_server: ValkeyProcess) -> None:
    requests = await asked_of(serve, valkey_server.url, WITH_TOOLS)
    sent = sorted((request["messages"] for request in requests), key=len)
    assert sent[0] == [SYSTEM, ASKED, {"role": "assistant", "content": "12"}]
    called = CALLING | {"content": ""}
    assert sent[1] == [SYSTEM, ASKED, {**called, "tool_calls": CALLING["tool_calls"]}, TOLD, SAID]


async def test_a_chat_template_sees_roles_and_calls(serve: Serve, valkey_server: ValkeyProcess) -> None:
    (request,) = await asked_of(serve, valkey_server.url, WITH_TOOLS, rendering=TemplateRendering(PlainTemplate()))
    head = "<|system|>\nBe brief.\n<|user|>\nWhat is 7 + 5?\n"
    assert request["input"] == [
        head + '<|assistant|>\nadd({"a": 7})\n<|tool|>\n12\n<|assistant|>\nIt is 12.\n',
        head + "<|assistant|>\n12\n",
    ]


async def test_ids_are_made_of_turns_too(serve: Serve, valkey_server: ValkeyProcess) -> None:
    rendering: TokenRendering = byte_rendering()
    (request,) = await asked_of(serve, valkey_server.url, {**WITH_TOOLS, "responses": ["12"]}, rendering=rendering)
    (ids,) = request["input"]
    assert text_of(ids) == "<s><system>Be brief.</s><user>What is 7 + 5?</s><assistant>12</s>"


async def test_one_user_message_is_the_text_itself(gateway: Gateway) -> None:
    reply = await gateway.client.ok("/reward", {"prompt": [ASKED], "responses": [[SAID], "13"], "policy": "random"})
    assert gateway.arm(reply["model"]).calls == [[("What is 7 + 5?", "It is 12."), ("What is 7 + 5?", "13")]]
    plain = {"prompt": ASKED["content"], "responses": ["It is 12.", "13"], "preferred": 0}
    assert (await gateway.client.ok("/feedback", plain))["decision_id"] == reply["decision_id"]


async def test_feedback_by_content_names_messages_as_they_were_sent(gateway: Gateway) -> None:
    reply = await gateway.client.ok("/reward", WITH_TOOLS)
    flat = {"prompt": "System: Be brief.\n\nUser: What is 7 + 5?", "responses": ["x", "12"], "preferred": 1}
    assert (await gateway.client.post("/feedback", flat)).status == 404
    feedback = await gateway.client.ok("/feedback", {**WITH_TOOLS, "preferred": 0})
    assert feedback["decision_id"] == reply["decision_id"]


async def test_reference_and_metadata_are_in_the_log(gateway: Gateway) -> None:
    facts = {"task": "math", "hard": True, "level": 3.0, "source": None}
    reply = await gateway.client.ok("/reward", {**WITH_TOOLS, "reference": "12", "metadata": facts})
    stored = gateway.decision(reply["decision_id"])
    assert (stored.reference, stored.metadata) == ("12", facts)


@pytest.mark.parametrize(
    ("prompt", "field", "words"),
    [
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "prompt", "text only"),
        ([{"content": "hi"}], "prompt", "no role"),
        ([{"role": "user"}], "prompt", "no content"),
        ([], "prompt", "at least one message"),
        ([ASKED] * 1001, "prompt", "at most 1000"),
        ([{"role": "tool", "content": "1", "tool_call_id": 7}], "prompt", "tool_call_id"),
    ],
)
async def test_messages_that_cannot_be_read_are_told(
    gateway: Gateway, prompt: list[Any], field: str, words: str
) -> None:
    reply = await gateway.client.post("/reward", {"prompt": prompt, "responses": ["a", "b"]})
    assert reply.status == 422
    assert reply.json["error"]["details"]["field"] == field
    assert words in reply.json["error"]["message"]


async def test_a_bad_conversation_costs_no_neighbour(gateway: Gateway) -> None:
    bad = {"prompt": [{"content": "hi"}], "responses": ["a", "b"]}
    first, second = (await gateway.client.ok("/reward/batch", {"items": [bad, WITH_TOOLS]}))["results"]
    assert first["error"]["details"]["field"] == "items[0].prompt"
    assert second["rewards"]
