"""What can be counted in a response, which rewards may follow besides quality; and the words that tell a prompt's kind.

Knows characters and nothing of meaning. Called by the gateway's auditor, so that the log needs no texts.
"""

from __future__ import annotations

import re

SIGNS = ("words", "list items", "refusal", "repetition")
"""Names of the counts, in order."""

KIND_WORDS = 24
"""Distinct words of a prompt that are kept."""

PROMPT_CHARACTERS = 4000
"""How much of a prompt is read for its words."""

OPENING_CHARACTERS = 300
"""Where a response that refuses says so."""

_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
_WORD = re.compile(r"[^\W\d_]{3,}")
_REFUSALS = ("as an ai", "i'm sorry", "i am sorry", "i cannot", "i can't", "i'm unable", "i am unable", "i won't")


def signs_of(response: str) -> tuple[float, ...]:
    """Return words, list items, refusal (0 or 1) and repetition of a response.

    Repetition is the share of its runs of three words that have occurred before.

    >>> signs_of("- one\\n- two"), signs_of("I cannot say.")[2], signs_of("a b c a b c a b c")[3]
    ((4.0, 2.0, 0.0, 0.0), 1.0, 0.5714285714285714)
    """
    words = response.lower().split()
    runs = list(zip(words, words[1:], words[2:], strict=False))
    opening = response[:OPENING_CHARACTERS].lower().replace("’", "'")
    refuses = any(phrase in opening for phrase in _REFUSALS)
    repeated = 1.0 - len(set(runs)) / len(runs) if runs else 0.0
    return float(len(words)), float(len(_LIST_ITEM.findall(response))), float(refuses), repeated


def words_of(prompt: str) -> list[str]:
    """Return the first distinct words of a prompt, in small letters, at most `KIND_WORDS`.

    >>> words_of("What is 7 + 5? What else?")
    ['what', 'else']
    """
    found = dict.fromkeys(_WORD.findall(prompt[:PROMPT_CHARACTERS].lower()))
    return list(found)[:KIND_WORDS]
