r"""Chat messages as the text that the gateway takes: its API has one prompt and responses, each a string.

Knows the shapes in which trainers hold conversations (lists of `{"role", "content"}`, content as text or as parts);
knows no chat template: each reward model has its own, and the gateway's workers apply it to the user turn (the prompt)
and the assistant turn (the response). So:

* one user message becomes its content, untouched;
* anything longer becomes its turns, each as `Role: content`, with a blank line between them. The response follows as
  the assistant's turn in the reward model's own template, so nothing is added at the end.

Called by the helpers, each of which takes another `prompt_text` where this one does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SEPARATOR = "\n\n"


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
    if len(messages) == 1 and messages[0].get("role") == "user":
        return _content(messages[0], "prompt")
    return SEPARATOR.join(_turn(message, "prompt") for message in messages)


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
    if not messages:
        return ""
    if len(messages) == 1:
        return _content(messages[0], "completion")
    return SEPARATOR.join(_turn(message, "completion") for message in messages)


def split_messages(messages: object) -> tuple[list[Mapping[str, Any]], str]:
    """A whole conversation as the messages before the last one, and the last one's text.

    Raises:
        ValueError: it is empty, or no list of messages.
    """
    found = _messages(messages, "messages")
    if not found:
        raise ValueError("messages is empty: there is no response to score")
    return found[:-1], _content(found[-1], "messages")


def _messages(value: object, name: str) -> list[Mapping[str, Any]]:
    # numpy's object arrays are no Sequence, and verl hands messages over in one.
    found: Any = value
    items: list[Any] = list(found) if isinstance(value, Sequence) or hasattr(value, "tolist") else [None]
    if not all(isinstance(item, Mapping) for item in items):
        raise ValueError(f"{name} is {type(value).__name__}: give a string or a list of messages with role and content")
    return items


def _turn(message: Mapping[str, Any], name: str) -> str:
    return f"{str(message.get('role', 'user')).capitalize()}: {_content(message, name)}"


def _content(message: Mapping[str, Any], name: str) -> str:
    """Text of one message; that of its parts where it has parts, and of its calls where it calls tools."""
    content = message.get("content")
    texts: list[str] = []
    if isinstance(content, str):
        texts.append(content)
    elif isinstance(content, list | tuple):
        for part in content:
            if isinstance(part, str):
                texts.append(part)
            elif not isinstance(part, Mapping):
                raise ValueError(f"{name} holds a part that is {part!r:.50}: give text, or objects with a `type`")
            elif part.get("type") == "text":
                texts.append(str(part.get("text") or ""))
            else:
                raise ValueError(
                    f"{name} holds a part of type {part.get('type')!r}: reward models here read text only; give the "
                    "helper a prompt_text of your own that puts it into words"
                )
    elif content is not None:
        raise ValueError(f"{name} has content that is {content!r:.50}: give text, or a list of parts")
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise ValueError(f"{name} holds a tool call that is {call!r:.50}: give objects with `function`")
        texts.append(f"{function.get('name')}({function.get('arguments')})")
    return "".join(texts[:1]) if len(texts) == 1 else "\n".join(texts)
