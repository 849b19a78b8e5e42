r"""Chat messages, in the shapes in which trainers hold them, as the gateway takes them: as messages, and as text.

Knows the shapes in which trainers hold conversations: lists of `{"role", "content"}`, content as text or as parts;
ShareGPT's `{"from", "value"}`; `{"role", "text"}`; Gemini's `{"role", "parts"}`. A message that says nothing at all, or
does not say who speaks, is refused: it would be scored as an empty text. Knows no chat template: each reward model has
its own, and the gateway's workers apply it to the turns. So messages are sent as messages, and one user message as its
content, untouched. As text, which prompts are compared by, turns are `Role: content` with a blank line between them.

Called by the helpers, each of which takes another `prompt_text` where this one does not fit, and by the gateway.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SEPARATOR = "\n\n"

Said = str | Sequence[Mapping[str, Any]]
"""A prompt or a response: a text, or messages."""

_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "text", "parts")
_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "model", "bot", "chatgpt", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "ipython"), "tool"),
    "function_call": "assistant",
}
"""Names of ShareGPT and others, in the words of chat APIs; other names stay."""
_TEXT_PARTS = ("text", "input_text", "output_text")


def prompt_text(prompt: object) -> str:
    r"""The prompt as text.

    Args:
        prompt: a string, or a list of messages.

    Raises:
        ValueError: it is neither, or holds an image or the like.

    >>> prompt_text([{"role": "user", "content": "What is 7 + 5?"}])
    'What is 7 + 5?'
    >>> prompt_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}])
    'System: Be brief.\n\nUser: Why?'
    """
    if isinstance(prompt, str):
        return prompt
    messages = read_messages(prompt, "prompt")
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].text
    return turns_text(messages)


def completion_text(completion: object) -> str:
    r"""The response as text.

    Args:
        completion: a string, or a list of messages: one assistant message gives its content; after tool calls there are
            several, which are joined as in `prompt_text`.

    Raises:
        ValueError: see `prompt_text`.

    >>> completion_text([{"role": "assistant", "content": "12"}])
    '12'
    """
    if isinstance(completion, str):
        return completion
    messages = read_messages(completion, "completion")
    if len(messages) == 1:
        return messages[0].text
    return SEPARATOR.join(message.turn for message in messages)


def as_sent(value: object, name: str = "prompt", speaker: str = "user") -> Said:
    """Return what the API is sent: a text, or messages in the chat form where one text does not say the same.

    Args:
        value: a string, or a list of messages in any of the shapes that this module knows.
        name: of the field, for errors.
        speaker: whose single message is a text: `user` for a prompt, `assistant` for a response.

    Raises:
        ValueError: see `prompt_text`.

    >>> as_sent([{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Why?"}])
    [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Why?'}]
    """
    if isinstance(value, str):
        return value
    messages = read_messages(value, name)
    if len(messages) == 1 and messages[0].role == speaker and messages[0].is_plain:
        return messages[0].text
    return [message.document() for message in messages]


def said_length(said: object) -> int:
    """Return about how many characters it takes to send."""
    return len(said) if isinstance(said, str) else len(str(said))


def split_messages(messages: object) -> tuple[list[Mapping[str, Any]], str]:
    """A whole conversation as the messages before the last one, and the last one's text.

    Raises:
        ValueError: it is not a list of messages, or no prompt precedes the response.
    """
    read = read_messages(messages, "messages")
    if len(read) < 2:
        raise ValueError("messages holds one message: give the prompt's messages and then the response")
    return [message.given for message in read[:-1]], read[-1].text


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool: its name, its arguments as JSON, and the call's id ("" for none)."""

    name: str
    arguments: str
    id: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message as it was read.

    Attributes:
        role: who speaks, in today's words.
        said: its words, without its calls.
        calls: of tools.
        name: of the speaker or the tool; "" for none.
        answers: id of the call that it answers; "" for none.
        given: the message itself.
    """

    role: str
    said: str
    calls: tuple[Call, ...]
    name: str
    answers: str
    given: Mapping[str, Any]

    @property
    def text(self) -> str:
        """Its words, its calls among them."""
        return "\n".join([*([self.said] if self.said or not self.calls else []), *map(_written, self.calls)])

    @property
    def turn(self) -> str:
        """As a part of a longer prompt."""
        return f"{self.role.capitalize()}: {self.text}"

    def document(self) -> dict[str, Any]:
        """Return the message in the chat form, without the fields that it has not."""
        document: dict[str, Any] = {"role": self.role, "content": self.said}
        if self.name:
            document["name"] = self.name
        if self.calls:
            document["tool_calls"] = [
                {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        if self.answers:
            document["tool_call_id"] = self.answers
        return document

    @property
    def is_plain(self) -> bool:
        """True if role and words are all there is."""
        return not (self.calls or self.name or self.answers)


def turns_text(messages: Sequence[ChatMessage]) -> str:
    """Return messages as one text, each as `Role: content`, with a blank line between them."""
    return SEPARATOR.join(message.turn for message in messages)


def read_messages(value: object, name: str) -> list[ChatMessage]:
    """Read a list of messages.

    Args:
        value: the list, in any of the shapes that this module knows.
        name: of the field, for errors.

    Raises:
        ValueError: see `prompt_text`.
    """
    # numpy's object arrays are no Sequence, and verl hands messages over in one.
    found: Any = value
    items: list[Any] = list(found) if isinstance(value, Sequence) or hasattr(value, "tolist") else [None]
    if not all(isinstance(item, Mapping) for item in items):
        raise ValueError(f"{name} is {type(value).__name__}: give a string or a list of messages with role and content")
    if not items:
        raise ValueError(f"{name} is []: give a string, or at least one message with role and content")
    return [_message(item, where) for item, where in _named(items, name)]


def _message(item: Mapping[str, Any], name: str) -> ChatMessage:
    role = _role(item, name)
    said, calls = _content(item, name)
    return ChatMessage(role, said, calls, _word(item, "name", name), _word(item, "tool_call_id", name), item)


def _word(item: Mapping[str, Any], key: str, name: str) -> str:
    """Return an optional short field."""
    value = item.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name}.{key} is {_kind(value)}: give text, or leave it out")
    return value or ""


def _named(items: list[Any], name: str) -> list[tuple[Mapping[str, Any], str]]:
    return [(item, f"{name}[{index}]") for index, item in enumerate(items)]


def _role(message: Mapping[str, Any], name: str) -> str:
    key = next((key for key in _ROLE_KEYS if key in message), None)
    if key is None:
        raise ValueError(f"{name} has no role, but {_keys(message)}: say who speaks: system, user, assistant or tool")
    role = message[key]
    if not isinstance(role, str) or not role.strip():
        raise ValueError(f"{name}.{key} is {_kind(role)}: give system, user, assistant or tool")
    return _ROLES.get(role.strip().lower(), role.strip())


def _content(message: Mapping[str, Any], name: str) -> tuple[str, tuple[Call, ...]]:
    """Return the words of one message, those of its parts where it has parts, and its calls of tools."""
    key = next((key for key in _CONTENT_KEYS if message.get(key) is not None), None)
    calls = _calls(message.get("tool_calls"), f"{name}.tool_calls")
    if key is None and not calls:
        given = next((f"{name}.{key} is null" for key in _CONTENT_KEYS if key in message), None)
        raise ValueError(
            f"{given or f'{name} has no content, but {_keys(message)}'}: give its text, or a list of parts"
        )
    texts = [] if key is None else _texts(message[key], f"{name}.{key}")
    return "\n".join(texts), tuple(_call(call, f"{name}.tool_calls[{index}]") for index, call in enumerate(calls))


def _calls(value: object, name: str) -> Sequence[object]:
    if value is None:
        return ()
    found: Any = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(found, list | tuple):
        raise ValueError(f"{name} is {type(value).__name__}: give a list of calls, or leave it out")
    return found


def _texts(content: object, name: str) -> list[str]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list | tuple):
        raise ValueError(f"{name} has content that is {_kind(content)}: give text, or a list of parts")
    if not content:
        raise ValueError(f"{name} is []: give text, or at least one part")
    return [_part(part, f"{name}[{index}]") for index, part in enumerate(content)]


def _part(part: object, name: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"{name} holds a part that is {_kind(part)}: give text, or objects with a `type`")
    # Gemini's parts have no type.
    kind = part.get("type", "text" if "text" in part else None)
    if kind not in _TEXT_PARTS:
        raise ValueError(
            f"{name} holds a part of type {kind!r}: reward models here read text only; give the "
            "helper a prompt_text of your own that puts it into words"
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise ValueError(f"{name}.text is {_kind(text)}: give the part's text")
    return text


def _call(call: object, name: str) -> Call:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(f"{name} holds a tool call that is {_kind(call)}: give objects with `function`")
    called = function.get("name")
    if not isinstance(called, str) or not called:
        raise ValueError(f"{name} has a name that is {_kind(called)}: give the function's name")
    arguments = function.get("arguments", "")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Call(called, text, str(call.get("id") or "") if isinstance(call, Mapping) else "")


def _written(call: Call) -> str:
    return f"{call.name}({call.arguments})"


def _kind(value: object) -> str:
    """Return what a value is; of texts, and of what holds them, only the type: errors are logged, and texts are not."""
    if value is None or isinstance(value, int | float):
        return repr(value)
    return "blank" if isinstance(value, str) and not value.strip() else type(value).__name__


def _keys(message: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, message)))[:100] or "nothing"
