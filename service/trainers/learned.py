"""Chat formats learned from chat templates themselves.

Conversations of made-up words are rendered, with and without a system prompt, a tool's turn, several turns and the
beginning of an answer; what stands around the words are the template's gaps. Knows formats and how templates are
rendered (`workers.render`); called by `service.gateway` for the templates that an operator names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

from service.scorers.rm.render import ChatTemplate, RenderError, load_chat_template
from service.trainers.chat_format import ANY_BEGIN, ANY_END, ENDS, ChatFormat, Gap
from service.trainers.templated import Templates

Roles = tuple[str, ...]
Gaps = dict[tuple[str, str], list[str]]

CONVERSATIONS: Final[tuple[Roles, ...]] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant", "user", "assistant", "user"),
    ("user", "assistant", "tool", "assistant", "user"),
)
MODES: Final[tuple[Mapping[str, object], ...]] = (
    {},
    {"enable_thinking": True, "thinking": True},
    {"enable_thinking": False, "thinking": False},
)
"""Variables that decide in today's templates with what an answer begins."""

_MARK: Final = re.compile(r"<[^<>\s]{1,60}>|\[[^\[\]\s]{1,60}\]|\S?[" + ANY_BEGIN + ANY_END + "]")
_THOUGHT: Final = re.compile(r"</?think>")
_UNFINISHED: Final = re.compile(r"[<\[][^<>\[\]]*$")
_MOST_ROLE_WORDS: Final = 2
"""Words between two special tokens that can be a role; more of them are what the template itself tells the policy."""


def load_chat_format(path: Path) -> ChatFormat:
    """The format of a tokenizer's directory, or of a file that holds a chat template.

    Raises:
        ValueError: there is no template, or it does not tell where an answer begins.
        OSError: the file cannot be read.
    """
    if path.is_dir():
        return learn(str(path), load_chat_template(path))
    return learn(str(path), ChatTemplate(path.read_text("utf-8"), bos_token=ANY_BEGIN, eos_token=ANY_END))


def learn(name: str, template: ChatTemplate) -> ChatFormat:
    """The format of a template.

    Args:
        name: of the format.
        template: rendered some dozen times.

    Raises:
        ValueError: nothing stands before an answer, or a conversation cannot be read back.
    """
    gaps, endings = _observe(template)
    learned: list[Gap] = []
    answers: list[str] = []
    for (before, after), texts in _without_merged(gaps).items():
        if after == "assistant":
            texts, marks = _common(texts)
            answers += marks
        for text in texts:
            learned += _parted(before, after, text.removeprefix(template.bos_token) if not before else text)
    if not any(gap.after == "assistant" and gap.text.strip() for gap in learned):
        raise ValueError("the chat template puts nothing before an answer, so that no answer can be found by it")
    begins = tuple(token for token in (template.bos_token,) if token not in ("", ANY_BEGIN))
    format_ = ChatFormat(
        name,
        tuple(dict.fromkeys(learned)),
        begins,
        _ends(endings, gaps, template.eos_token),
        tuple(dict.fromkeys(answers)),
    )
    _check(format_, template)
    return format_


def _observe(template: ChatTemplate) -> tuple[Gaps, list[str]]:
    """All gaps of all conversations that the template takes, and what it writes behind a last answer."""
    gaps: Gaps = {}
    endings: list[str] = []
    for roles in CONVERSATIONS:
        for variables in MODES:
            for begun in (False, True):
                pieces = _pieces(template, roles, variables, begun=begun)
                if pieces is None:
                    continue
                sides = [*pairwise(("", *roles)), *([(roles[-1], "assistant")] if begun else [])]
                # A template that pays no heed to `add_generation_prompt` ends with the last turn's own end.
                for side, text in zip(sides, pieces if roles[-1] == "user" else pieces[:-1], strict=False):
                    if text not in gaps.setdefault(side, []):
                        gaps[side].append(text)
                if roles[-1] == "assistant" and not begun:
                    endings.append(pieces[-1])
    return gaps, endings


def _pieces(template: ChatTemplate, roles: Roles, variables: Mapping[str, object], *, begun: bool) -> list[str] | None:
    """What stands before, between and behind the words of a conversation; None if they do not come back in order."""
    words = [f"Wort{k}q{role}" for k, role in enumerate(roles)]
    rendered = _rendered(template, list(zip(roles, words, strict=True)), variables, begun=begun)
    if rendered is None:
        return None
    pieces, rest = [], rendered
    for word in words:
        piece, found, rest = rest.partition(word)
        if not found or word in rest:
            return None
        pieces.append(piece)
    return [*pieces, rest]


def _rendered(
    template: ChatTemplate, turns: Sequence[tuple[str, str]], variables: Mapping[str, object], *, begun: bool
) -> str | None:
    """The conversation as text. Templates of models that see take content as parts only."""
    parts = [(role, [{"type": "text", "text": content}]) for role, content in turns]
    for form in (turns, parts):
        try:
            text = template.render_turns(form, add_generation_prompt=begun, variables=variables)
        except RenderError:
            continue
        if all(content in text for _, content in turns):
            return text
    return None


def _without_merged(gaps: Gaps) -> Gaps:
    """Without the system prompt, where the template makes it a part of the user's words."""
    merged = any(not text.strip() for (before, _), texts in gaps.items() if before == "system" for text in texts)
    return {side: texts for side, texts in gaps.items() if not (merged and "system" in side)}


def _common(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """What all beginnings of an answer share, and what finished answers have behind it, but for empty thoughts."""
    if len({text.strip() for text in texts}) == 1:
        return [max(texts, key=len)], []
    shared = _shared(min(texts), max(texts))
    if shared not in texts:
        shared = _UNFINISHED.sub("", shared)
    if not shared.strip():
        return list(texts), []
    marks = [text.removeprefix(shared) for text in texts]
    # White space that some answers begin with belongs to the gap, where it may be missing.
    shared += max((mark[: len(mark) - len(mark.lstrip())] for mark in marks), key=len)
    return [shared], [mark for mark in marks if _MARK.search(mark) and not _THOUGHT.search(mark)]


def _shared(one: str, other: str) -> str:
    """The beginning that two texts share; that of the first and the last of a sorted list is shared by all."""
    length = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _parted(before: str, after: str, text: str) -> Iterator[Gap]:
    """The gaps that one text is: what a template itself says in it is a system prompt between two gaps."""
    if before not in ("", "system") or not _MARK.search(text):
        yield Gap(before, after, text)
        return
    delimiters, spoken = [""], False
    at = 0
    for mark in [*_MARK.finditer(text), None]:
        words = text[at : mark.start() if mark else len(text)]
        if len(words.split()) > _MOST_ROLE_WORDS and (mark is not None or after == "system") and (before or at):
            # A role on a line of its own, as in `<|im_start|>system`, still belongs to the delimiter.
            role, line_end, _ = words.partition("\n")
            delimiters[-1] += role + line_end if at and len(role.split()) <= 1 else ""
            delimiters.append("")
            spoken = True
        else:
            delimiters[-1] += words
        if mark is not None:
            delimiters[-1] += mark[0]
            at = mark.end()
    if not spoken:
        yield Gap(before, after, text)
        return
    stops = [before, *(["system"] * (len(delimiters) - 1)), after]
    for (one, other), delimiter in zip(pairwise(stops), delimiters, strict=True):
        if delimiter.strip():
            yield Gap(one, other, delimiter)


def _ends(endings: Sequence[str], gaps: Gaps, eos: str) -> tuple[str, ...]:
    """Tokens that end a response; where the template has none, a policy stops by beginning the next turn."""
    tokens = [mark for ending in endings for mark in _MARK.findall(ending)]
    if not tokens:
        tokens = [mark[0] for text in gaps.get(("assistant", "user"), ()) if (mark := _MARK.search(text))]
    known = [token for token in (*tokens, eos) if token and ANY_END not in token]
    if any(ANY_END in token for token in (*tokens, eos)):
        known += ENDS
    return tuple(dict.fromkeys(known))


def _check(format_: ChatFormat, template: ChatTemplate) -> None:
    """Read a conversation back.

    Raises:
        ValueError: it is another one then.
    """
    turns = [("user", "Wie?"), ("assistant", "So."), ("user", "Warum?")]
    templates = Templates([format_])
    for variables in MODES:
        prompt = _rendered(template, turns, variables, begun=True)
        if prompt is None:
            continue
        split = templates.split_prompt(prompt.replace(ANY_BEGIN, "<s>").replace(ANY_END, "</s>"), "Darum.")
        if not split.prompt.endswith("User: Wie?\n\nAssistant: So.\n\nUser: Warum?") or "Darum." not in split.response:
            raise ValueError(
                f"the chat template's own conversation cannot be read back: its prompt became {split.prompt!r:.200}"
            )
        return
    raise ValueError("the chat template takes no conversation of user and assistant")
