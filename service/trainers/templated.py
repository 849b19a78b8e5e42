r"""Text that a policy's chat template made, back to the conversation: each reward model has a template of its own.

Trainers hand over prompts (and whole conversations) as the policy reads them, special tokens included. A reward model
that got them inside its own template would read the tokens as the user's words. So texts are taken apart by the formats
of `chat_families`, and by those that an operator names. Where the prompt is known by itself, it alone decides where the
response begins, whatever the response says. Knows text only; called by the wire formats beside it.

>>> split_whole("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>").prompt
'Why?'
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from service.trainers.chat_families import FAMILIES
from service.trainers.chat_format import ChatFormat, Reading, Turn, head_pattern, without_tails
from service.trainers.conversation import Said, as_sent, prompt_text

PLAIN: Final = "plain"
"""Instead of a format's name: a prompt that shows no trace of a chat template."""
UNKNOWN: Final = "unknown"
"""Instead of a format's name: a template that no format reads, or a whole text whose prompt nothing tells."""
MESSAGES: Final = "messages"
"""Instead of a format's name: the prompt came as messages."""
RAW: Final = "raw"
"""Instead of a format's name: the caller wants the text as it is."""

SHORTEST_OVERLAP: Final = 16
"""Characters of a prompt's end that a query begins with where the prompt was cut on the left."""
MOST_OVERLAPS: Final = 64
"""Places of a prompt that are tried for that."""

_HEAD: Final = head_pattern()
_MARK: Final = (
    r"(?:<[|｜][^<>\s]{1,40}>|<[^<>\s]{1,40}[|｜]>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS)\]|</?s>"
    r"|<(?:bos|eos|sop|(?:start|end)_of_\w{1,20})>|\[gMASK\]|\[\|\w{1,20}\|\])"
)
_OPENS: Final = re.compile(r"\s*" + _MARK)
_CLOSES: Final = re.compile(_MARK + r"|(?:ASSISTANT|Assistant|### Response|### Assistant):\s*$")
_LAST: Final = 60
"""Characters at a prompt's end in which a template would have left a trace."""


@dataclass(frozen=True, slots=True)
class Split:
    """A text taken apart.

    Attributes:
        prompt: "" where it is not known.
        response: its text.
        template: name of the format that was read; else `PLAIN` or `UNKNOWN`.
        messages: the prompt's messages, where a format was read.
    """

    prompt: str
    response: str
    template: str
    messages: tuple[Mapping[str, str], ...] = ()

    @property
    def said(self) -> Said:
        """The prompt as it is sent: as messages where it has several, or one that is not the user's."""
        return as_sent(self.messages) if self.messages else self.prompt


class Templates:
    """Some chat formats, and how texts come apart by them.

    Args:
        formats: of two that explain a text equally well, the first counts.
    """

    def __init__(self, formats: Sequence[ChatFormat]) -> None:
        self.formats = tuple(formats)

    def read(self, text: str) -> Reading | None:
        """The reading that explains the most of a text; None if no format reads it."""
        readings = [reading for format_ in self.formats if (reading := format_.read(text)) is not None]
        return max(readings, key=lambda reading: reading.explained, default=None)

    def split_whole(self, text: str) -> Split:
        """A whole conversation: what follows its last header of an assistant is the response.

        A policy that goes on as the user has still written it all. Where no format reads the text, the prompt is "" and
        the response the text, without the tokens at its two ends.
        """
        reading = self.read(text)
        last = _last_assistant(reading.turns) if reading is not None else 0
        if reading is None or not last:
            return Split("", without_tails(text[_end_of_head(text) :]), UNKNOWN)
        response = without_tails(text[reading.turns[last].start :], reading.format.tails)
        messages = _messages(reading, last)
        return Split(_text(messages), reading.format.said(response), reading.format.name, messages)

    def split_prompt(self, prompt: str, response: str) -> Split:
        """Prompt and response where both are known; the response loses its end token, and nothing else.

        What the template has already put into the assistant's mouth belongs to the response, but for an empty thought.
        """
        reading = self.read(prompt)
        if reading is None:
            return Split(prompt, without_tails(response), UNKNOWN if looks_templated(prompt) else PLAIN)
        turns, format_ = reading.turns, reading.format
        response = without_tails(response, format_.tails)
        open_turn = turns[-1].role == "assistant"
        if open_turn:
            opening = turns[-1].content
            response = format_.said(opening + response if opening.strip() else response)
        messages = _messages(reading, len(turns) - open_turn)
        return Split(_text(messages), response, format_.name, messages)

    def split_query(self, query: str, prompt: str | None) -> Split:
        """A whole conversation beside its prompt; the query alone tells only where it does not hold the prompt."""
        cut = response_start(query, prompt) if prompt else None
        if prompt is None or cut is None:
            return self.split_whole(query)
        return self.split_prompt(prompt, query[cut:])


BUILT_IN: Final = Templates(FAMILIES)
split_whole = BUILT_IN.split_whole
split_prompt = BUILT_IN.split_prompt


def response_start(query: str, prompt: str) -> int | None:
    """Index in the query at which the prompt ends; None if it does not begin with it.

    Tokenizers may have changed white space and begin tokens on the way, and trainers cut long prompts on the left: then
    the query begins with the prompt's end.
    """
    if query.startswith(prompt):
        return len(prompt)
    skipped = _end_of_head(query)
    while query.startswith("\ufffd", skipped):
        skipped += 1
    wanted = "".join(prompt[_end_of_head(prompt) :].split())
    given = "".join(query[skipped:].split())
    length = len(wanted) if given.startswith(wanted) else _overlap(wanted, given)
    if not length:
        return None
    for word in re.finditer(r"\S+", query[skipped:]):
        size = word.end() - word.start()
        if length <= size:
            return skipped + word.start() + length + _shared_blanks(query[skipped + word.start() + length :], prompt)
        length -= size
    return None


def looks_templated(prompt: str) -> bool:
    """Tell if a prompt begins or ends as chat templates do."""
    return _OPENS.match(prompt) is not None or _CLOSES.search(prompt[-_LAST:]) is not None


def _overlap(prompt: str, query: str) -> int:
    """Length of the longest end of the prompt that the query begins with; 0 if it is too short to tell."""
    probe = query[:SHORTEST_OVERLAP]
    if len(probe) < SHORTEST_OVERLAP:
        return 0
    at = prompt.find(probe)
    for _ in range(MOST_OVERLAPS):
        if at < 0:
            return 0
        if query.startswith(prompt[at:]):
            return len(prompt) - at
        at = prompt.find(probe, at + 1)
    return 0


def _shared_blanks(rest: str, prompt: str) -> int:
    """White space at the beginning of the rest that is still the prompt's."""
    blanks, ending = rest[: len(rest) - len(rest.lstrip())], prompt[len(prompt.rstrip()) :]
    return max((n for n in range(min(len(blanks), len(ending)) + 1) if blanks[:n] == ending[:n]), default=0)


def _end_of_head(text: str) -> int:
    found = _HEAD.match(text)
    return found.end() if found and found[0].strip() else 0


def _last_assistant(turns: Sequence[Turn]) -> int:
    return max((k for k, turn in enumerate(turns) if turn.role == "assistant"), default=0)


def _messages(reading: Reading, count: int) -> tuple[Mapping[str, str], ...]:
    """Return the first turns as messages; a system prompt without words is none."""
    said = [(turn.role, _words(reading.format, turn)) for turn in reading.turns[:count]]
    return tuple({"role": role, "content": words} for role, words in said if role != "system" or words)


def _text(messages: Sequence[Mapping[str, str]]) -> str:
    return prompt_text(messages) if messages else ""


def _words(format_: ChatFormat, turn: Turn) -> str:
    words = without_tails(turn.content, format_.tails)
    if turn.role == "system":
        return words.strip()
    return format_.said(words) if turn.role == "assistant" else words
