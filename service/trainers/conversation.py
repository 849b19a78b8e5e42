r"""Chat messages as the text that the gateway takes: its API has one prompt and responses, each a string.

Knows the shapes in which trainers hold conversations: lists of `{"role", "content"}`, content as text or as parts;
ShareGPT's `{"from", "value"}`; `{"role", "text"}`; Gemini's `{"role", "parts"}`. A message that says nothing at all, or
does not say who speaks, is refused: it would be scored as an empty text. Knows no chat template: each reward model has
its own, and the gateway's workers apply it to the user turn (the prompt) and the assistant turn (the response). So:

* one user message becomes its content, untouched;
* anything longer becomes its turns, each as `Role: content`, with a blank line between them. The response follows as
  the assistant's turn in the reward model's own template, so nothing is added at the end.

Called by the helpers, each of which takes another `prompt_text` where this one does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SEPARATOR = "\n\n"

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
    messages = _messages(prompt, "prompt")
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].text
    return SEPARATOR.join(message.turn for message in messages)


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
    messages = _messages(completion, "completion")
    if len(messages) == 1:
        return messages[0].text
    return SEPARATOR.join(message.turn for message in messages)


def split_messages(messages: object) -> tuple[list[Mapping[str, Any]], str]:
    """A whole conversation as the messages before the last one, and the last one's text.

    Raises:
        ValueError: it is not a list of messages, or no prompt precedes the response.
    """
    read = _messages(messages, "messages")
    if len(read) < 2:
        raise ValueError("messages holds one message: give the prompt's messages and then the response")
    return [message.given for message in read[:-1]], read[-1].text


@dataclass(frozen=True, slots=True)
class _Message:
    """One message as it was read.

    Attributes:
        role: who speaks, in today's words.
        text: its words.
        given: the message itself.
    """

    role: str
    text: str
    given: Mapping[str, Any]

    @property
    def turn(self) -> str:
        """As a part of a longer prompt."""
        return f"{self.role.capitalize()}: {self.text}"


def _messages(value: object, name: str) -> list[_Message]:
    # numpy's object arrays are no Sequence, and verl hands messages over in one.
    found: Any = value
    items: list[Any] = list(found) if isinstance(value, Sequence) or hasattr(value, "tolist") else [None]
    if not all(isinstance(item, Mapping) for item in items):
        raise ValueError(f"{name} is {type(value).__name__}: give a string or a list of messages with role and content")
    if not items:
        raise ValueError(f"{name} is []: give a string, or at least one message with role and content")
    return [_Message(_role(item, where), _content(item, where), item) for item, where in _named(items, name)]


def _named(items: list[Any], name: str) -> list[tuple[Mapping[str, Any], str]]:
    return [(item, f"{name}[{index}]") for index, item in enumerate(items)]


def _role(message: Mapping[str, Any], name: str) -> str:
    key = next((key for key in _ROLE_KEYS if key in message), None)
    if key is None:
        raise ValueError(f"{name} has no role, but {_keys(message)}: say who speaks: system, user, assistant or tool")
    role = message[key]
    if not isinstance(role, str) or not role.strip():
        raise ValueError(f"{name}.{key} is {role!r:.50}: give system, user, assistant or tool")
    return _ROLES.get(role.strip().lower(), role.strip())


def _content(message: Mapping[str, Any], name: str) -> str:
    """Text of one message; that of its parts where it has parts, and of its calls where it calls tools."""
    key = next((key for key in _CONTENT_KEYS if message.get(key) is not None), None)
    calls = message.get("tool_calls") or ()
    if key is None and not calls:
        given = next((f"{name}.{key} is null" for key in _CONTENT_KEYS if key in message), None)
        raise ValueError(
            f"{given or f'{name} has no content, but {_keys(message)}'}: give its text, or a list of parts"
        )
    texts = [] if key is None else _texts(message[key], f"{name}.{key}")
    texts += [_call(call, f"{name}.tool_calls[{index}]") for index, call in enumerate(calls)]
    return "\n".join(texts)


def _texts(content: object, name: str) -> list[str]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list | tuple):
        raise ValueError(f"{name} has content that is {content!r:.50}: give text, or a list of parts")
    if not content:
        raise ValueError(f"{name} is []: give text, or at least one part")
    return [_part(part, f"{name}[{index}]") for index, part in enumerate(content)]


def _part(part: object, name: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"{name} holds a part that is {part!r:.50}: give text, or objects with a `type`")
    # Gemini's parts have no type.
    kind = part.get("type", "text" if "text" in part else None)
    if kind not in _TEXT_PARTS:
        raise ValueError(
            f"{name} holds a part of type {kind!r}: reward models here read text only; give the "
            "helper a prompt_text of your own that puts it into words"
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise ValueError(f"{name}.text is {text!r:.50}: give the part's text")
    return text


def _call(call: object, name: str) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(f"{name} holds a tool call that is {call!r:.50}: give objects with `function`")
    called = function.get("name")
    if not isinstance(called, str) or not called:
        raise ValueError(f"{name} has a name that is {called!r:.50}: give the function's name")
    return f"{called}({function.get('arguments', '')})"


def _keys(message: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, message)))[:100] or "nothing"
