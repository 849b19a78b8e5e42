"""What a response takes up of its prompt: shared content words, shared word pairs.

Knows letters and nothing of meaning; numpy only. RMs that like polished text are wrong where the polished response
answers another question, and this is where such pairs show (docs/experiments.md). Loaded by `encoder.registry` as
`relation`, and as a part of `static`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from router_core.encoder.base import Block

FEATURES: tuple[str, ...] = (
    "share of the prompt's content words in the response",
    "share of the response's content words in the prompt",
    "share of the prompt's word pairs in the response",
)
"""The columns, in order. A content word is a distinct lower-case run of at least `CONTENT_LETTERS` letters; a word pair
is two runs of letters that follow each other."""
CONTENT_LETTERS = 4
"""Shorter words are mostly grammar."""
_WORD = re.compile(r"[^\W\d_]+")


class RelationBackbone:
    """Overlap of prompt and response: (N, 3). Holds nothing, so any thread may call it."""

    @property
    def spec(self) -> str:
        """`relation`."""
        return "relation"

    @property
    def dim(self) -> int:
        """Number of features."""
        return len(FEATURES)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One block of measured features."""
        return (Block(self.dim, dense=False),)

    def embed(self, conversations: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Shares of each (prompt, response); each distinct prompt is read once."""
        out = np.empty((len(conversations), self.dim), dtype=np.float32)
        prompts: dict[str, tuple[set[str], set[tuple[str, str]]]] = {}
        for row, (prompt, response) in zip(out, conversations, strict=True):
            read = prompts.get(prompt)
            if read is None:
                read = prompts[prompt] = _read(prompt)
            (content, couples), (said, said_couples) = read, _read(response)
            shared = len(content & said)
            row[0] = shared / max(len(content), 1)
            row[1] = shared / max(len(said), 1)
            row[2] = len(couples & said_couples) / max(len(couples), 1)
        return out


def _read(text: str) -> tuple[set[str], set[tuple[str, str]]]:
    """Content words and word pairs of a text."""
    words = _WORD.findall(text.lower())
    return {word for word in words if len(word) >= CONTENT_LETTERS}, set(pairwise(words))
