"""What a text looks like, in a dozen counts: length, lines, digits, code punctuation, repetition; and of a response how
it is laid out.

Knows characters and nothing of meaning; numpy only. On recorded verdicts of real reward models these counts of prompt
and response say as much about which of them is right as a sentence embedding does (docs/experiments.md), for some
tens of microseconds. Loaded by `encoder.registry` as `surface`, and as a part of `static`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import log1p

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
        if not conversations:
            return np.empty((0, self.dim), dtype=np.float32)
        prompts = {prompt: row for row, prompt in enumerate(dict.fromkeys([prompt for prompt, _ in conversations]))}
        responses = [response for _, response in conversations]
        words = [text.split() for text in (*prompts, *responses)]
        measured = self._measure([*prompts, *responses], words)
        out = np.empty((len(conversations), self.dim), dtype=np.float32)
        width = len(FEATURES)
        out[:, :width] = measured[[prompts[prompt] for prompt, _ in conversations]]
        out[:, width : 2 * width] = measured[len(prompts) :]
        out[:, 2 * width :] = [
            _layout(response, said) for response, said in zip(responses, words[len(prompts) :], strict=True)
        ]
        return out

    def measure(self, text: str) -> NDArray[np.float32]:
        """The features of one text, (len(FEATURES),) float32; all zero but `is ASCII` for the empty text."""
        measured: NDArray[np.float32] = self._measure([text], [text.split()])[0]
        return measured

    def _measure(self, texts: Sequence[str], words: Sequence[list[str]]) -> NDArray[np.float32]:
        """The features of T texts and their words, (T, len(FEATURES))."""
        counts = np.empty((len(texts), 256), dtype=np.float32)
        for row, text in zip(counts, texts, strict=True):
            # Characters beyond Latin-1 become "?", which keeps the length; "is ASCII" tells them from real ones.
            row[:] = np.bincount(np.frombuffer(text.encode("latin-1", "replace"), dtype=np.uint8), minlength=256)
        lengths = np.array([max(len(text), 1) for text in texts], dtype=np.float32)
        out = np.empty((len(texts), len(FEATURES)), dtype=np.float32)
        out[:, :3] = [
            (log1p(len(text)), log1p(len(said)), log1p(text.count("\n")))
            for text, said in zip(texts, words, strict=True)
        ]
        out[:, 3:9] = counts @ self._classes / lengths[:, None]
        out[:, 9] = [text.isascii() for text in texts]
        out[:, 10] = [len(set(said)) / max(len(said), 1) for said in words]
        return out


def layout(text: str) -> tuple[float, ...]:
    """The layout of one response, as `LAYOUT` names it; all zero where it has no word."""
    return _layout(text, text.split())


def _layout(text: str, words: list[str]) -> tuple[float, ...]:
    if not words:
        return (0.0,) * len(LAYOUT)
    sentences = 1 + sum([text.count(end) for end in _SENTENCE_ENDS])
    opening = text[:OPENING_CHARACTERS].lower()
    return (
        log1p(len(_LIST_ITEM.findall("\n" + text))),
        log1p(text.count("**")),
        log1p(len(words) / sentences),
        sum([words.count(word) for word in _FIRST_PERSON]) / len(words),
        float(any(phrase in opening for phrase in _DECLINES)),
        float("```" in text),
    )
