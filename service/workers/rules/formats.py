"""The rule `format`: instructions on the form of a response that can be checked, after IFEval (arXiv 2311.07911).

Which ones hold for an instance: the rule's options for all, and the instance's metadata `format.NAME`. The reward is
the share of them that the response follows; None where there are none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from service.workers.rules.builtin import RuleOptionsError, unfenced
from service.workers.rules.child import Fact, Rule

PREFIX: Final = "format."


def _words(text: str) -> int:
    return len(re.findall(r"\w+(?:['’-]\w+)*", text))


def _sentences(text: str) -> int:
    return len([part for part in re.split(r"[.!?]+(?:\s|$)", text) if part.strip()])


def _paragraphs(text: str) -> int:
    return len([part for part in re.split(r"\n\s*\n|\n\s*\*\*\*\s*\n", text) if part.strip()])


def _bullets(text: str) -> int:
    return len(re.findall(r"^\s*[*-]\s+\S", text, re.MULTILINE))


def _is_json(text: str) -> bool:
    try:
        json.loads(unfenced(text))
    except ValueError:
        return False
    return True


def _listed(value: object) -> list[str]:
    parts = value if isinstance(value, list) else str(value).split(",")
    return [str(part).strip() for part in parts if str(part).strip()]


def _has(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


Check = Callable[[str, object], bool]
"""(response, what is asked for) to True if the response follows it."""


def _counts(count: Callable[[str], int], compare: Callable[[int, int], bool]) -> Check:
    def check(text: str, wanted: object) -> bool:
        return compare(count(text), _number(wanted))

    return check


def _truth(holds: Callable[[str], bool]) -> Check:
    """Return the check that something holds, or with `false` that it does not."""

    def check(text: str, wanted: object) -> bool:
        if not isinstance(wanted, bool):
            raise RuleOptionsError(f"{wanted!r} is asked for; use true or false")
        return holds(text) is wanted

    return check


def _number(wanted: object) -> int:
    if isinstance(wanted, bool) or not isinstance(wanted, int | float) or wanted != int(wanted) or wanted < 0:
        raise RuleOptionsError(f"{wanted!r} is asked for; use a whole number")
    return int(wanted)


def _at_least(count: int, wanted: int) -> bool:
    return count >= wanted


def _at_most(count: int, wanted: int) -> bool:
    return count <= wanted


def _equal(count: int, wanted: int) -> bool:
    return count == wanted


CHECKS: Final[Mapping[str, Check]] = MappingProxyType(
    {
        "min_words": _counts(_words, _at_least),
        "max_words": _counts(_words, _at_most),
        "min_sentences": _counts(_sentences, _at_least),
        "max_sentences": _counts(_sentences, _at_most),
        "paragraphs": _counts(_paragraphs, _equal),
        "bullets": _counts(_bullets, _equal),
        "min_highlights": _counts(lambda text: len(re.findall(r"\*[^\n*]+\*", text)), _at_least),
        "min_placeholders": _counts(lambda text: len(re.findall(r"\[[^\[\]\n]+\]", text)), _at_least),
        "min_capital_words": _counts(lambda text: len(re.findall(r"\b[A-Z]{2,}\b", text)), _at_least),
        "keywords": lambda text, wanted: all(_has(text, word) for word in _listed(wanted)),
        "forbidden_words": lambda text, wanted: not any(_has(text, word) for word in _listed(wanted)),
        "starts_with": lambda text, wanted: text.strip().startswith(str(wanted)),
        "ends_with": lambda text, wanted: text.strip().endswith(str(wanted)),
        "comma": _truth(lambda text: "," in text),
        "json": _truth(_is_json),
        "lowercase": _truth(lambda text: text == text.lower()),
        "uppercase": _truth(lambda text: text == text.upper()),
        "title": _truth(lambda text: re.search(r"<<[^\n<>]+>>", text) is not None),
        "quoted": _truth(lambda text: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"'),
        "postscript": _truth(lambda text: re.search(r"^\s*P\.\s?(P\.\s?)?S\.?", text, re.MULTILINE) is not None),
    }
)
"""Name to check."""


def format_rule(options: Mapping[str, object]) -> Rule:
    """Return the rule.

    Args:
        options: instructions that hold for all instances, by name.

    Raises:
        RuleOptionsError: one asks for what its check does not know.
    """
    for name, wanted in options.items():
        CHECKS[name]("", wanted)

    def rule(
        messages: list[dict[str, str]], response: str, reference: str | None, metadata: dict[str, Fact]
    ) -> float | None:
        wanted: dict[str, object] = dict(options)
        for key, value in metadata.items():
            if key.startswith(PREFIX):
                name = key.removeprefix(PREFIX)
                if name not in CHECKS:
                    raise RuleOptionsError(f"metadata {key} names no check; use one of {', '.join(CHECKS)}")
                wanted[name] = value
        if not wanted:
            return None
        return sum(CHECKS[name](response, value) for name, value in wanted.items()) / len(wanted)

    return rule
