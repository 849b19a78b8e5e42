r"""Text that a policy's chat template made, back to the conversation: each reward model has a template of its own.

Trainers hand over prompts (and whole conversations) as the policy reads them, special tokens included. A reward model
that got them inside its own template would read the tokens as the user's words. So the usual templates are recognised
by their headers and taken apart; a text that begins with none of them is left as it is. Knows text only; called by the
wire formats beside it.

>>> split_whole("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>")
('Why?', 'Because.')
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from service.trainers.conversation import prompt_text

Turn = dict[str, str]


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """One family of templates.

    Attributes:
        name: of the family.
        header: what begins a turn; its group `role` names who speaks.
        ends: tokens that end a turn.
    """

    name: str
    header: re.Pattern[str]
    ends: tuple[str, ...]


FORMATS: Final = (
    ChatFormat("chatml", re.compile(r"<\|im_start\|>(?P<role>\w+)\n"), ("<|im_end|>", "<|endoftext|>")),
    ChatFormat(
        "llama3",
        re.compile(r"<\|start_header_id\|>(?P<role>\w+)<\|end_header_id\|>\n\n"),
        ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
    ),
    ChatFormat("gemma", re.compile(r"<start_of_turn>(?P<role>\w+)\n"), ("<end_of_turn>", "<eos>")),
    ChatFormat("deepseek", re.compile(r"<｜(?P<role>User|Assistant)｜>"), ("<｜end▁of▁sentence｜>",)),
    ChatFormat("mistral", re.compile(r"(?P<role>\[INST\]|\[/INST\]) ?"), ("</s>",)),
    ChatFormat("zephyr", re.compile(r"<\|(?P<role>system|user|assistant)\|>\n?"), ("</s>", "<|end|>")),
)

_ROLES: Final = {"model": "assistant", "[inst]": "user", "[/inst]": "assistant", "human": "user"}
_BEGINS: Final = ("<|begin_of_text|>", "<bos>", "<s>", "<｜begin▁of▁sentence｜>")
_PADS: Final = ("<pad>", "<|pad|>", "[PAD]")
_ENDS: Final = tuple(sorted({end for format_ in FORMATS for end in format_.ends}))
TAILS: Final = (*_ENDS, *_PADS)
"""Tokens that end a turn, or pad it."""
_HEAD: Final = re.compile(r"^\s*(?:(?:" + "|".join(map(re.escape, (*_BEGINS, *_PADS, "<|endoftext|>"))) + r")\s*)+")


def turns_of(text: str) -> list[Turn] | None:
    """The turns of a templated text; None if it begins with the header of no known template."""
    body = _HEAD.sub("", text)
    for format_ in FORMATS:
        if format_.header.match(body):
            return _turns(body, format_)
    return None


def _turns(body: str, format_: ChatFormat) -> list[Turn]:
    headers = list(format_.header.finditer(body))
    stops = [header.start() for header in headers[1:]] + [len(body)]
    turns = []
    for header, stop in zip(headers, stops, strict=True):
        role = header["role"].lower()
        turns.append({"role": _ROLES.get(role, role), "content": without_ends(body[header.end() : stop])})
    return turns


def without_ends(text: str) -> str:
    r"""Without the special tokens that end a turn, and what pads it.

    >>> without_ends("12<|im_end|>\n<|endoftext|>"), without_ends("12 ")
    ('12', '12 ')
    """
    # A pattern that is sought from every position takes minutes for a response of newlines only.
    kept, found = len(text.rstrip()), False
    while text.endswith(TAILS, 0, kept):
        kept -= next(len(tail) for tail in TAILS if text.endswith(tail, 0, kept))
        while kept and text[kept - 1].isspace():
            kept -= 1
        found = True
    return text[:kept] if found else text


def split_whole(text: str) -> tuple[str, str]:
    """(prompt, response) of a whole conversation: the last turn is the response, if it is the assistant's.

    Where that cannot be told the prompt is "" and the response the raw text.
    """
    turns = turns_of(text)
    if turns is None or len(turns) < 2 or turns[-1]["role"] != "assistant":
        return "", without_ends(_HEAD.sub("", text))
    return prompt_text(turns[:-1]), turns[-1]["content"]


def split_prompt(prompt: str, response: str) -> tuple[str, str]:
    """(prompt, response) where both are known: the prompt's template is taken apart, the response loses its end token.

    What the template has already put into the assistant's mouth belongs to the response.
    """
    turns = turns_of(prompt)
    response = without_ends(response)
    if turns is None:
        return prompt, response
    if turns[-1]["role"] == "assistant":
        opening = turns.pop()["content"]
        response = opening + response if opening.strip() else response
    return (prompt_text(turns) if turns else ""), response
