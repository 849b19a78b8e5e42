r"""Chat templates as the texts that stand between the turns, and conversations read back with them.

A templated conversation is words and gaps in turn: `<|im_start|>user\n`, words, `<|im_end|>\n<|im_start|>assistant\n`,
words, … A `ChatFormat` lists the gaps by the roles on their two sides, so that templates whose turns are nested (Llama
2) or without a header (DeepSeek's system prompt) need nothing special. Knows text only. Formats come from
`chat_families` and, in the gateway, from `learned`; `templated` chooses between them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Final

ANY_BEGIN: Final = "\ue000"
"""Stands in a gap for a begin-of-text token whose name is not known."""
ANY_END: Final = "\ue001"
"""Stands in a gap for an end token whose name is not known."""

BEGINS: Final = ("<|begin_of_text|>", "<bos>", "<s>", "<｜begin▁of▁sentence｜>", "<BOS_TOKEN>", "[gMASK]", "<sop>")
PADS: Final = ("<pad>", "<|pad|>", "[PAD]", "<PAD>", "<｜▁pad▁｜>")
ENDS: Final = (
    *("</s>", "<|end|>", "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>"),
    *("<|eom|>", "<end_of_turn>", "<eos>", "<turn|>", "<｜end▁of▁sentence｜>", "<|return|>", "<|END_OF_TURN_TOKEN|>"),
    *("<|END_RESPONSE|>", "[|endofturn|]", "<seed:eos>", "<|end_of_sentence|>"),
)
TAILS: Final = (*ENDS, *PADS)
"""Tokens that end a text, or pad it, in any family."""

_EMPTY_THOUGHT: Final = re.compile(r"\s*(?:<think>\s*)?</think>\s*")


@dataclass(frozen=True, slots=True)
class Gap:
    """What stands between two turns.

    Attributes:
        before: role whose words end here; "" at the beginning of the text.
        after: role whose words begin here.
        text: delimiters, white space included.
    """

    before: str
    after: str
    text: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a text that was read.

    Attributes:
        role: who speaks: `system`, `user`, `assistant`, `tool`.
        content: its words.
        start: index of the first of them in the text.
    """

    role: str
    content: str
    start: int


@dataclass(frozen=True, slots=True)
class Reading:
    """A text as one format reads it.

    Attributes:
        format: the format.
        turns: at least one.
        explained: characters of the text that were delimiters: of two formats, the one that explains more is right.
    """

    format: ChatFormat
    turns: tuple[Turn, ...]
    explained: int


@dataclass(frozen=True)
class ChatFormat:
    """One chat template.

    Attributes:
        name: of the family, or the path it was learned from.
        gaps: see `Gap`. A blank one, from "" to `system`, says that the system prompt has no header: it is read only
            behind a begin-of-text token.
        begins: tokens that may stand before the first gap, beside the usual ones.
        ends: tokens with which a policy ends its response.
        answers: texts that a policy writes between its thoughts and its answer.
    """

    name: str
    gaps: tuple[Gap, ...]
    begins: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    def read(self, text: str) -> Reading | None:
        """The turns of a text; None if it does not begin as this template does."""
        head = self._head.match(text)
        at = head.end() if head else 0
        first = self._next("").match(text, at)
        if first is not None:
            role, start, explained = self._role_of("", first), first.end(), len(first[0])
        elif self._headless and head and self._begin.search(head[0]):
            role, start, explained = "system", at, 0
        else:
            return None
        turns: list[Turn] = []
        while (found := self._next(role).search(text, start)) is not None:
            turns.append(Turn(role, text[start : found.start()], start))
            role, start, explained = self._role_of(role, found), found.end(), explained + len(found[0])
        if first is None and not turns:
            return None
        turns.append(Turn(role, text[start:], start))
        return Reading(self, tuple(turns), explained)

    def said(self, content: str) -> str:
        """An assistant's words: the answer, where the policy marks it; without an empty thought before it."""
        for mark in self.answers:
            before, found, after = content.partition(mark)
            content = after if found else before
        thought = _EMPTY_THOUGHT.match(content)
        return content[thought.end() :] if thought else content

    @cached_property
    def tails(self) -> tuple[str, ...]:
        """Tokens that end a response in this format, or pad it."""
        return (*self.ends, *PADS)

    @cached_property
    def _headless(self) -> bool:
        return any(not gap.before and not gap.text.strip() for gap in self.gaps)

    @cached_property
    def _begin(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, (*self.begins, *BEGINS))))

    @cached_property
    def _head(self) -> re.Pattern[str]:
        return head_pattern(self.begins)

    @cached_property
    def _steps(self) -> dict[str, tuple[tuple[str, ...], re.Pattern[str]]]:
        """Per role: the roles that may follow it, and a pattern with one group for each."""
        steps = {}
        for role in {"", *(gap.after for gap in self.gaps)}:
            gaps = [gap for gap in self.gaps if gap.before == role and gap.text.strip()]
            gaps.sort(key=lambda gap: (len(gap.text.strip()), len(gap.text)), reverse=True)
            pattern = "|".join(f"({_pattern(gap.text, self.begins)})" for gap in gaps) or r"(?!)"
            steps[role] = (
                tuple(gap.after for gap in gaps),
                re.compile(self._first_characters(gaps) + f"(?:{pattern})"),
            )
        return steps

    def _first_characters(self, gaps: list[Gap]) -> str:
        """A look ahead that rules out most places of a text at once; "" where a gap may begin with anything."""
        optional = (ANY_BEGIN, ANY_END, *self.begins, *BEGINS)
        if not gaps or any(gap.text.strip().startswith(optional) for gap in gaps):
            return ""
        first = {character for gap in gaps for character in gap.text[: len(gap.text) - len(gap.text.lstrip()) + 1]}
        return "(?=[" + "".join(sorted(map(re.escape, first))) + "])"

    def _next(self, role: str) -> re.Pattern[str]:
        return self._steps[role][1]

    def _role_of(self, before: str, found: re.Match[str]) -> str:
        return self._steps[before][0][(found.lastindex or 1) - 1]


def head_pattern(begins: tuple[str, ...] = ()) -> re.Pattern[str]:
    """Finds the begin-of-text tokens and the padding that a text begins with."""
    tokens = sorted({*begins, *BEGINS, *PADS, "<|endoftext|>", "</s>"}, key=len, reverse=True)
    return re.compile(r"\s*(?:(?:" + "|".join(map(re.escape, tokens)) + r")\s*)*")


def without_tails(text: str, tails: tuple[str, ...] = TAILS) -> str:
    r"""Without the tokens that end a turn, and what pads it.

    >>> without_tails("12<|im_end|>\n<|endoftext|>"), without_tails("12 ")
    ('12', '12 ')
    """
    # A pattern that is sought from every position takes minutes for a response of newlines only.
    kept, found = len(text.rstrip()), False
    while text.endswith(tails, 0, kept):
        kept -= next(len(tail) for tail in tails if text.endswith(tail, 0, kept))
        while kept and text[kept - 1].isspace():
            kept -= 1
        found = True
    return text[:kept] if found else text


def _pattern(gap: str, begins: tuple[str, ...]) -> str:
    """A gap as a pattern that forgives what tokenizers do to white space, and begin tokens that were left out.

    White space at the two sides may be missing. It is never `\\s*` on the left, which would make a search through a
    text of newlines quadratic.
    """
    core = gap.strip()
    lead = gap[: len(gap) - len(gap.lstrip())]
    trail = gap[len(gap.rstrip()) :]
    words = r"\s*".join(re.escape(word) for word in core.split())
    for begin in (*begins, *BEGINS):
        if begin in core and begin != core:
            words = words.replace(re.escape(begin), rf"(?:{re.escape(begin)})?\s*")
    words = words.replace(ANY_BEGIN, rf"(?:{_any(BEGINS)})?\s*").replace(ANY_END, rf"(?:{_any(ENDS)})?\s*")
    guard = r"(?!\w)" if core[-1].isalnum() else ""
    return _optional(lead) + words + guard + _optional(trail)


def _any(tokens: tuple[str, ...]) -> str:
    return "|".join(map(re.escape, tokens))


def _optional(blanks: str) -> str:
    return "".join(re.escape(blank) + "?" for blank in blanks)
