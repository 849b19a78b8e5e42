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
        ([], ""),
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
        ([], ""),
        ([{"role": "assistant", "content": None}], ""),
        (
            [
                {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 7}}}]},
                {"role": "tool", "content": "12"},
                {"role": "assistant", "content": "It is 12."},
            ],
            "Assistant: add({'a': 7})\n\nTool: 12\n\nAssistant: It is 12.",
        ),
    ],
)
def test_completions(completion: Any, text: str) -> None:
    assert completion_text(completion) == text


def test_a_conversation_is_its_prompt_and_its_last_turn() -> None:
    assert split_messages([USER, {"role": "assistant", "content": "12"}]) == ([USER], "12")
    with pytest.raises(ValueError, match="empty"):
        split_messages([])


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
        ({"role": "user", "content": "x", "tool_calls": ["a"]}, "tool call that is 'a'"),
        ({"role": "user", "content": "x", "tool_calls": [{"function": "f"}]}, "tool call that is"),
    ],
)
def test_what_no_message_may_hold_is_named(message: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prompt_text([message])
