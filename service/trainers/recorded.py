"""Conversations in the shapes in which trainers send them, in our own words, for the recorded requests of protocols.

Called by the wire formats beside it and by `service.lab.trainer_conformance`.
"""

from __future__ import annotations

from typing import Any, Final

ASKED: Final = "<|im_start|>user\nWhat is 7 + 5?<|im_end|>\n<|im_start|>assistant\n"
"""A prompt as a policy's template writes it."""
ASKED_AGAIN: Final = (
    f"<|im_start|>system\nBe brief.<|im_end|>\n{ASKED}12<|im_end|>\n"
    "<|im_start|>user\nAnd doubled?<|im_end|>\n<|im_start|>assistant\n"
)
"""A prompt of several turns likewise."""
TURNS: Final[list[dict[str, Any]]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 7 + 5?"},
    {"role": "assistant", "content": "12"},
    {"role": "user", "content": "And doubled?"},
]
"""The same as messages."""
TOOLS: Final[list[dict[str, Any]]] = [
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 7, "b": 5}'}},
        ],
    },
    {"role": "tool", "content": "12"},
    {"role": "assistant", "content": "It is 12."},
]
"""A response that calls a tool."""
