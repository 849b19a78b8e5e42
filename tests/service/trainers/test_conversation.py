"""Messages become text in one documented way, and what is no text is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from service.trainers.conversation import completion_text, prompt_text, split_messages

USER = {"role": "user", "content": "What is 7 + 5?"}


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("as it is ", "as it is "),
        ([USER], "What is 7 + 5?"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "a\nb"),
        ([{"role": "system", "content": "s"}, USER], "System: s\n\nUser: What is 7 + 5?"),
        (
            [USER, {"role": "assistant", "content": "12"}, {"role": "user", "content": "And 13?"}],
            "User: What is 7 + 5?\n\nAssistant: 12\n\nUser: And 13?",
        ),
        ([{"role": "system", "content": "alone"}], "System: alone"),
        (np.array([USER], dtype=object), "What is 7 + 5?"),
        ((USER,), "What is 7 + 5?"),
    ],
)
def test_prompts(prompt: Any, text: str) -> None:
    assert prompt_text(prompt) == text


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("12", "12"),
        ([{"role": "assistant", "content": "12"}], "12"),
        ([{"role": "assistant", "content": ""}], ""),
        ([{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "now"}}]}], "now()"),
        (
            [
                {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 7}}}]},
                {"role": "tool", "content": "12"},
                {"role": "assistant", "content": "It is 12."},
            ],
            'Assistant: add({"a": 7})\n\nTool: 12\n\nAssistant: It is 12.',
        ),
    ],
)
def test_completions(completion: Any, text: str) -> None:
    assert completion_text(completion) == text


def test_a_conversation_is_its_prompt_and_its_last_turn() -> None:
    assert split_messages([USER, {"role": "assistant", "content": "12"}]) == ([USER], "12")
    for short in ([], [USER]):
        with pytest.raises(ValueError, match=r"messages (is \[\]|holds one message): give"):
            split_messages(short)


@pytest.mark.parametrize(
    "messages",
    [
        [{"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}],
        [{"role": "system", "text": "s"}, {"role": "prompter", "text": "u"}, {"role": "assistant", "text": "a"}],
        [{"role": r, "parts": [{"text": t}]} for r, t in (("system", "s"), ("user", "u"), ("model", "a"))],
        [
            {"role": r, "content": [{"type": "input_text", "text": t}]}
            for r, t in zip(("system", "user", "bot"), "sua", strict=True)
        ],
    ],
)
def test_other_dialects_say_the_same(messages: list[dict[str, Any]]) -> None:
    assert prompt_text(messages) == "System: s\n\nUser: u\n\nAssistant: a"
    assert prompt_text(messages[1:2]) == completion_text(messages[1:2]) == "u"
    assert split_messages(messages) == (messages[:-1], "a")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], r"is \[\]: give a string, or at least one message"),
        ([{"role": "user"}], r"\[0\] has no content, but role: give its text"),
        ([{"role": "user", "content": None}], r"\[0\].content is null: give its text"),
        ([{"from": "human", "value": None}], r"\[0\].value is null: give its text"),
        ([{"role": "user", "content": []}], r"\[0\].content is \[\]: give text, or at least one part"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text is None: give the part's text"),
        ([{"role": None, "content": "x"}], r"\[0\].role is None: give system, user, assistant or tool"),
        ([{"role": " ", "content": "x"}], r"\[0\].role is blank: give system"),
        ([{"role": 3, "content": "x"}], r"\[0\].role is 3: give system"),
        ([{"content": "x"}], r"\[0\] has no role, but content: say who speaks"),
        ([{}], r"\[0\] has no role, but nothing: say who speaks"),
        ([USER, {"human": "x"}], r"\[1\] has no role, but human: say who speaks"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], r"tool_calls\[0\] has a name that is None: give"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], r"\[0\].content is null: give its text"),
    ],
)
def test_what_would_be_an_empty_text_is_refused_by_field_value_and_remedy(messages: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match="prompt.*" + words):
        prompt_text(messages)
    with pytest.raises(ValueError, match="completion.*" + words):
        completion_text(messages)


@pytest.mark.parametrize("prompt", [7, None, ["text", "text"], {"role": "user", "content": "x"}])
def test_what_is_neither_text_nor_messages_is_refused(prompt: Any) -> None:
    with pytest.raises(ValueError, match="give a string or a list of messages"):
        prompt_text(prompt)


def test_images_are_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"part of type 'image'.*prompt_text of your own"):
        prompt_text([{"role": "user", "content": [{"type": "image"}]}])


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": 5}, "content that is 5"),
        ({"role": "user", "content": [5]}, "part that is 5"),
        ({"role": "user", "content": "x", "tool_calls": ["a"]}, "tool call that is str"),
        ({"role": "user", "content": "x", "tool_calls": [{"function": "f"}]}, "tool call that is"),
        ({"role": "user", "content": "x", "tool_calls": 5}, "tool_calls is int: give a list"),
        ({"role": "user", "content": "x", "tool_calls": {"function": "f"}}, "tool_calls is dict: give a list"),
        ({"role": "user", "content": "x", "tool_calls": {}}, "tool_calls is dict: give a list"),
    ],
)
def test_what_no_message_may_hold_is_named(message: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prompt_text([message])
