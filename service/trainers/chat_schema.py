"""JSON schema of chat messages, for the documents of every route that takes them.

What is taken is `conversation.read_messages`' to say, which knows more shapes than are documented; it refuses one
request or item where a bound of the parser would refuse a whole batch. Used by `service.schemas` and the protocols.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from msgspec import Meta

_CONTENT: Final[dict[str, Any]] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "object",
                        "required": ["text"],
                        "properties": {
                            "type": {"enum": ["text", "input_text", "output_text"]},
                            "text": {"type": "string"},
                        },
                    },
                ]
            },
        },
    ]
}
_TOOL_CALL: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["function"],
    "properties": {
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"type": "string", "minLength": 1}},
        },
    },
}
Message = Annotated[
    dict[str, Any],
    Meta(
        extra_json_schema={
            "required": ["role", "content"],
            "properties": {
                "role": {"type": "string", "pattern": r"[^\s\x1c-\x1f\x85]", "examples": ["user"]},
                "content": _CONTENT,
                "name": {"type": ["string", "null"]},
                "tool_calls": {"type": ["array", "null"], "items": _TOOL_CALL},
                "tool_call_id": {"type": ["string", "null"]},
            },
        }
    ),
]
Messages = Annotated[list[Message], Meta(extra_json_schema={"minItems": 1})]
Said = str | Messages
"""A prompt or a response: a text, or messages."""
