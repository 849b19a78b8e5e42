"""Conversations of trainers reach the gateway as messages, not as one flattened text."""

from __future__ import annotations

import pytest

from service.trainers.chat_families import FAMILIES
from service.trainers.conversation import as_sent, completion_text
from service.trainers.rowwise import RowOptions, plan
from service.trainers.shim import ShimOptions
from service.trainers.slime import SlimeRequest, read
from service.trainers.templated import Templates
from service.trainers.values import RewardItem

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Why?"}
CHAT = [SYSTEM, USER]
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 7}}, "id": "c1"}]}


def test_rows_of_one_chat_are_one_instance_of_messages() -> None:
    planned = plan([CHAT, [*CHAT], [USER]], [[{"role": "assistant", "content": "So."}], "Or so.", "x"], RowOptions())
    first, second = planned.items()
    assert first.document() == {"prompt": CHAT, "responses": ["So.", "Or so."]}
    assert second.document() == {"prompt": "Why?", "responses": ["x"]}


def test_a_text_function_of_the_caller_s_own_wins() -> None:
    options = RowOptions(prompt_text=lambda prompt: f"<{prompt[-1]['content']}>")
    (item,) = plan([CHAT], ["x"], options).items()
    assert item.document()["prompt"] == "<Why?>"


def test_calls_of_tools_are_sent_with_json_arguments() -> None:
    (sent,) = as_sent([CALL], "completion", "assistant")
    assert isinstance(sent, dict)
    assert sent["tool_calls"] == [
        {"type": "function", "id": "c1", "function": {"name": "add", "arguments": '{"a": 7}'}}
    ]
    assert completion_text([CALL]) == 'add({"a": 7})'


@pytest.mark.parametrize(
    "prompt", [CHAT, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"]
)
def test_a_url_trainer_s_chat_is_messages_and_its_label_the_reference(prompt: str | list[dict[str, str]]) -> None:
    (sample,) = read(SlimeRequest(prompt, "So.", "12"), ShimOptions(), Templates(FAMILIES))
    assert sample.prompt == CHAT
    assert sample.reference == "12"


def test_an_item_carries_reference_and_facts() -> None:
    item = RewardItem("p", ("a",), reference="12", metadata={"task": "math"})
    assert item.document() == {"prompt": "p", "responses": ["a"], "reference": "12", "metadata": {"task": "math"}}


def test_half_a_surrogate_pair_in_a_message_can_be_sent() -> None:
    item = RewardItem([SYSTEM, {"role": "user", "content": "\ud800"}], ("a",))
    assert item.document()["prompt"][1]["content"] == "?"
