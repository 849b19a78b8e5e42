"""Rules that score the toy training of `loadtests.training`: its scorers and its referee. Run by rule workers."""

from __future__ import annotations

from collections.abc import Mapping

Messages = list[dict[str, str]]
Facts = Mapping[str, object]


def share_of_letters(text: str) -> float:
    """Return the share of a text's characters that are ASCII letters or spaces; 0 for an empty one."""
    return sum(one.isascii() and (one.isalpha() or one == " ") for one in text) / max(len(text), 1)


def letters(messages: Messages, response: str, reference: str | None, metadata: Facts) -> float:
    """The referee: the share of letters in the whole response."""
    return share_of_letters(response)


def beginning(messages: Messages, response: str, reference: str | None, metadata: Facts) -> float:
    """The share of letters in the first half: mostly right."""
    return share_of_letters(response[: len(response) // 2 + 1])


def length(messages: Messages, response: str, reference: str | None, metadata: Facts) -> float:
    """The number of characters: has little to do with letters."""
    return float(len(response))


def signs(messages: Messages, response: str, reference: str | None, metadata: Facts) -> float:
    """The share of what is no letter: always wrong."""
    return 1.0 - share_of_letters(response)
