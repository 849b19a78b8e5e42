"""Messages of a conversation, as data files hold them: read, checked, and written as text.

Knows the chat form of OpenAI and others: `role`, `content`, and `name`, `tool_calls`, `tool_call_id` where there are
any. Called by `router_core.rows`; what requests hold, in more shapes, is read by `service.usecases.converse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import msgspec

from router_core.records import Message, ToolCall, Turns

SEPARATOR = "\n\n"


class _Function(msgspec.Struct):
    name: str
    arguments: str = ""


class _Call(msgspec.Struct):
    function: _Function
    id: str = ""


class _Message(msgspec.Struct):
    role: str
    content: str | None = None
    name: str | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None


def turns_of(value: list[Any]) -> Turns:
    """Read a list of messages.

    Raises:
        ValueError: a message has no role, or neither words nor calls, or a field does not fit.
    """
    if not value:
        _refuse("[] has no message: give text, or at least one message")
    try:
        messages = msgspec.convert(value, list[_Message])
    except msgspec.ValidationError as error:
        raise ValueError(f"messages have `role`, `content` and, for tools, `tool_calls`: {error}") from error
    for index, message in enumerate(messages):
        if not message.role.strip():
            _refuse(f"[{index}].role is empty: say who speaks")
        if message.content is None and not message.tool_calls:
            _refuse(f"[{index}] says nothing: give `content`, or `tool_calls`")
    return tuple([_turn(message) for message in messages])


def text_of(turns: Sequence[Message]) -> str:
    r"""Return messages as one text, each as `Role: content`, with a blank line between them.

    >>> text_of([Message("system", "Be brief."), Message("user", "Why?")])
    'System: Be brief.\n\nUser: Why?'
    """
    return SEPARATOR.join([f"{turn.role.capitalize()}: {words_of(turn)}" for turn in turns])


def words_of(turn: Message) -> str:
    """Return a message's words with its calls of tools among them, for readers that know no tools.

    >>> words_of(Message("assistant", "", calls=(ToolCall("add", "[7, 5]"),)))
    'add([7, 5])'
    """
    calls = [f"{call.name}({call.arguments})" for call in turn.calls]
    return "\n".join([*([turn.text] if turn.text or not calls else []), *calls])


def chat_message(turn: Message) -> dict[str, object]:
    """Return a message in the chat form, without the fields that it has not."""
    message: dict[str, object] = {"role": turn.role, "content": turn.text}
    if turn.name:
        message["name"] = turn.name
    if turn.calls:
        message["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in turn.calls
        ]
    if turn.answers:
        message["tool_call_id"] = turn.answers
    return message


def _turn(message: _Message) -> Message:
    calls = tuple([ToolCall(call.function.name, call.function.arguments, call.id) for call in message.tool_calls or ()])
    return Message(message.role, message.content or "", message.name or "", calls, message.tool_call_id or "")


def _refuse(words: str) -> NoReturn:
    raise ValueError(words)
