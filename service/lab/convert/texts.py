"""Prompts and responses as published data hold them: strings, messages, whole dialogues, lists inside strings.

Knows texts only. Called by `formats`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from router_core.records import Turns
from service.errors import ValidationError
from service.trainers.conversation import completion_text, prompt_text
from service.usecases.converse import said_of

_ASKING = ("user", "human", "system")
"""Roles that no response has."""

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_MESSAGES = re.compile(r"\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")


class UnusableError(Exception):
    """A record gives no pair; the message is a reason that is the same for every such record."""


def decoded(value: Any, of: Any = dict) -> Any:
    """A list that CSV holds as a string, of JSON or as Python writes it; anything else as it is.

    Args:
        of: what the list must hold; a text that looks like another list is a text.

    Raises:
        UnusableError: messages that are torn, as some tools print them.
    """
    if not isinstance(value, str) or not value.startswith("["):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return found if isinstance(found, list) and all(isinstance(one, of) for one in found) else value
    if _MESSAGES.match(value):
        raise UnusableError("messages are written as neither JSON nor Python")
    return value


class Prompt(NamedTuple):
    """A prompt's text, and its messages where one text of the user does not say the same."""

    text: str
    turns: Turns | None = None


def prompt_of(value: Any) -> Prompt:
    """A prompt that is a string or messages.

    Raises:
        UnusableError: it is neither, or empty.
    """
    try:
        if isinstance(value, list) and all(isinstance(one, dict) for one in value):
            text, turns = said_of(value, "prompt", "user")
        else:
            text, turns = prompt_text(value), None
    except (ValueError, ValidationError) as error:
        raise UnusableError("the prompt is neither text nor messages") from error
    return Prompt(_whole(text, "the prompt"), turns)


def response_of(value: Any) -> str:
    """The text of a response that is a string or messages.

    Raises:
        UnusableError: it is neither, or empty.
    """
    try:
        text = completion_text(value)
    except ValueError as error:
        raise UnusableError("a response is neither text nor messages") from error
    return _whole(text, "a response")


def split_turns(*conversations: Sequence[Any]) -> tuple[Prompt, tuple[str, ...]]:
    """The prompt that conversations of messages begin with alike, and the response of each.

    Raises:
        UnusableError: they begin differently, or hold no response.
    """
    shortest = min(map(len, conversations))
    shared = 0
    while shared < shortest - 1 and len({_words(one[shared]) for one in conversations}) == 1:
        shared += 1
    if not shared:
        raise UnusableError("the conversations have no prompt in common")
    if any(_words(turn)[0] in _ASKING for one in conversations for turn in one[shared:]):
        raise UnusableError("the conversations differ in more than their last response")
    return prompt_of(list(conversations[0][:shared])), tuple(response_of(list(one[shared:])) for one in conversations)


def same_turns(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """True where messages have the same roles and contents, whatever else they hold."""
    return list(map(_words, one)) == list(map(_words, other))


def is_dialogue(value: Any) -> bool:
    r"""True for a dialogue of hh-rlhf: a string of turns that begin with `\n\nHuman:` or `\n\nAssistant:`."""
    return isinstance(value, str) and bool(_HH_TURN.match(value)) and "\n\nAssistant:" in value


def dialogue_turns(text: str) -> list[dict[str, str]]:
    r"""The messages of a dialogue of hh-rlhf.

    >>> dialogue_turns("\n\nHuman: Why?\n\nAssistant: Because.")
    [{'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'Because.'}]
    """
    _, *parts = _HH_TURN.split(text)
    names = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": names[name], "content": content.strip()} for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def split_strings(chosen: str, rejected: str) -> tuple[Prompt, tuple[str, ...]]:
    """The prompt that two strings begin with alike, up to the end of a word, and the rest of each.

    Raises:
        UnusableError: they begin differently.
    """
    shared = takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
    prefix = "".join(one for one, _ in shared)
    cut = max(prefix.rfind(space) for space in (" ", "\n", "\t")) + 1
    if not prefix[:cut].strip():
        raise UnusableError("chosen and rejected have no prompt in common")
    return Prompt(prefix[:cut].rstrip()), tuple(_whole(text[cut:], "a response") for text in (chosen, rejected))


def _words(turn: Any) -> tuple[str, str]:
    """A message's role and content; without a role for anything else."""
    if not isinstance(turn, dict):
        return "", repr(turn)
    return str(turn.get("role", turn.get("from"))), json.dumps(turn.get("content", turn.get("value")), sort_keys=True)


def _whole(text: str, name: str) -> str:
    if not text.strip():
        raise UnusableError(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableError(f"{name} holds half a surrogate pair") from error
    return text
