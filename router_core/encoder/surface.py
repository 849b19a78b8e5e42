"""What a text looks like, in a dozen counts: length, lines, digits, code punctuation, repetition; and of a response how
it is laid out.

Knows characters and nothing of meaning; numpy only. On recorded verdicts of real reward models these counts of prompt
and response say as much about which of them is right as a sentence embedding does (docs/experiments.md), for some
tens of microseconds. Loaded by `encoder.registry` as `surface`, and as a part of `static`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from router_core.encoder.base import Block

_CHARACTER_CLASSES: tuple[str, ...] = (
    "0123456789",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "{}();=<>[]_",
    "\\$^+*/",
    ".,!?'\"",
    " \t\n\r\v\f",
)
FEATURES: tuple[str, ...] = (
    "log characters",
    "log words",
    "log lines",
    "share of digits",
    "share of capitals",
    "share of code punctuation",
    "share of mathematical signs",
    "share of prose punctuation",
    "share of white space",
    "is ASCII",
    "distinct words per word",
)
"""The columns for one text, in order; a conversation has them for the prompt, then for the response."""
LAYOUT: tuple[str, ...] = (
    "log list items",
    "log bold marks",
    "log words per sentence",
    "first person per word",
    "declines or apologises",
    "has a code block",
)
"""Further columns for the response: how it is laid out and whom it speaks of."""
OPENING_CHARACTERS = 300
"""Where a response that declines says so."""

_LIST_ITEM = re.compile(r"\n[ \t]*(?:[-*•]|\d+[.)])\s")
_SENTENCE_ENDS = (". ", ".\n", "! ", "!\n", "? ", "?\n")
_FIRST_PERSON = ("I", "my", "me", "I'm", "I've")
_DECLINES = ("as an ai", "sorry", "cannot", "can't", "unable to")


def _class_matrix() -> NDArray[np.float32]:
    """(256, classes): 1 where a Latin-1 code belongs to the class."""
    matrix = np.zeros((256, len(_CHARACTER_CLASSES)), dtype=np.float32)
    for column, characters in enumerate(_CHARACTER_CLASSES):
        matrix[[ord(c) for c in characters], column] = 1.0
    return matrix


class SurfaceBackbone:
    """Surface counts of prompt and response: (N, 28). Holds only constants, so any thread may call it."""

    def __init__(self) -> None:
        self._classes = _class_matrix()

    @property
    def spec(self) -> str:
        """`surface`."""
        return "surface"

    @property
    def dim(self) -> int:
        """Twice the number of features of one text, and the layout's."""
        return 2 * len(FEATURES) + len(LAYOUT)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One block of measured features."""
        return (Block(self.dim, dense=False),)

    def embed(self, conversations: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Features of the prompt, of the response, and its layout; each distinct prompt is measured once."""
        width = len(FEATURES)
        out = np.empty((len(conversations), self.dim), dtype=np.float32)
        prompts: dict[str, NDArray[np.float32]] = {}
        for row, (prompt, response) in zip(out, conversations, strict=True):
            seen = prompts.get(prompt)
            if seen is None:
                seen = prompts[prompt] = self.measure(prompt)
            row[:width] = seen
            row[width : 2 * width] = self.measure(response)
            row[2 * width :] = layout(response)
        return out

    def measure(self, text: str) -> NDArray[np.float32]:
        """The features of one text, (len(FEATURES),) float32; all zero but `is ASCII` for the empty text."""
        words = text.split()
        # Characters beyond Latin-1 become "?", which keeps the length; "is ASCII" tells them from real ones.
        codes = np.frombuffer(text.encode("latin-1", "replace"), dtype=np.uint8)
        shares = np.bincount(codes, minlength=256).astype(np.float32) @ self._classes / max(len(text), 1)
        out = np.empty(len(FEATURES), dtype=np.float32)
        out[:3] = np.log1p((len(text), len(words), text.count("\n")))
        out[3:9] = shares
        out[9] = float(text.isascii())
        out[10] = len(set(words)) / max(len(words), 1)
        return out


def layout(text: str) -> NDArray[np.float32]:
    """The layout of one response, (len(LAYOUT),) float32; all zero where it has no word."""
    words = text.split()
    out = np.zeros(len(LAYOUT), dtype=np.float32)
    if words:
        sentences = 1 + sum(map(text.count, _SENTENCE_ENDS))
        items = len(_LIST_ITEM.findall("\n" + text))
        opening = text[:OPENING_CHARACTERS].lower()
        out[:3] = np.log1p((items, text.count("**"), len(words) / sentences))
        out[3] = sum(map(words.count, _FIRST_PERSON)) / len(words)
        out[4] = float(any(phrase in opening for phrase in _DECLINES))
        out[5] = float("```" in text)
    return out
