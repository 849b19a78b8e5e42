"""Mean word vectors from the wordllama package: some meaning in a tenth of a millisecond, without network or torch.

Knows where that package keeps its weights and tokenizer and reads them directly: importing the package itself would
configure logging and pull in a web client. Loaded by `encoder.registry` as `words` and as a part of `static`.
"""

from __future__ import annotations

import importlib.util
import re
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from router_core.encoder.base import Block
from router_core.errors import EncoderError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WORD_DIM = 64
"""Leading columns kept of each word vector. They were trained so that any prefix of 64, 128 or 256 stands alone."""
CACHE_WORDS = 65_536
"""Words whose vector is kept: 16 MiB at 64 columns. A word beyond that is computed each time, with the same result."""
_INSTALL = "install it with: pip install 'reward-router[server]'"
_WORD = re.compile(r"[^\W\d_]+")


def package_directory(package: str, install: str) -> Path:
    """Where an installed package lies, without importing it.

    Raises:
        EncoderError: it is not installed; the message ends with `install`.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise EncoderError(f"package {package!r} is not installed; {install}")
    return Path(next(iter(found.submodule_search_locations)))


class WordVectors:
    """Word to vector, by the mean of its tokens' vectors; remembers up to `capacity` words. Safe for many threads.

    A row is written before its index is published, and indices are never reused, so readers need no lock.
    """

    def __init__(self, tokenizer: Tokenizer, embedding: NDArray[np.float32], capacity: int = CACHE_WORDS) -> None:
        """`embedding` is (vocabulary, dim) float32."""
        self._tokenizer = tokenizer
        self._embedding = embedding
        self._rows = np.empty((capacity, embedding.shape[1]), dtype=np.float32)
        self._index: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def dim(self) -> int:
        """Columns of a word's vector."""
        return int(self._embedding.shape[1])

    def mean(self, text: str) -> NDArray[np.float32]:
        """Mean vector (dim,) of the text's words (runs of letters, once per occurrence); zeros if it has none."""
        counts = Counter(_WORD.findall(text))
        if not counts:
            return np.zeros(self.dim, dtype=np.float32)
        words = list(counts)
        positions = [self._index.get(word, -1) for word in words]
        rows = self._look_up(words) if -1 in positions else self._rows[positions]
        weights = np.fromiter(counts.values(), dtype=np.float32, count=len(words))
        mean: NDArray[np.float32] = (weights @ rows) / weights.sum()
        return mean

    def _look_up(self, words: list[str]) -> NDArray[np.float32]:
        rows = np.empty((len(words), self.dim), dtype=np.float32)
        missing: list[int] = []
        for i, word in enumerate(words):
            position = self._index.get(word)
            if position is None:
                missing.append(i)
            else:
                rows[i] = self._rows[position]
        encoded = self._tokenizer.encode_batch_fast([words[i] for i in missing], add_special_tokens=False)
        for i, tokens in zip(missing, encoded, strict=True):
            rows[i] = self._embedding[tokens.ids].mean(axis=0)
        with self._lock:
            for i in missing:
                position = len(self._index)
                if position < len(self._rows) and words[i] not in self._index:
                    self._rows[position] = rows[i]
                    self._index[words[i]] = position
        return rows


class WordsBackbone:
    """Mean word vector of the prompt, then of the response: (N, 2 * WORD_DIM) float32."""

    def __init__(self, vectors: WordVectors) -> None:
        self._vectors = vectors

    @classmethod
    def load(cls) -> WordsBackbone:
        """Read the weights and tokenizer that ship inside the wordllama package.

        Raises:
            EncoderError: the package or one of its files is missing.
        """
        root = package_directory("wordllama", _INSTALL)
        weights = _only(root / "weights", "*_256.safetensors")
        tokenizer = _only(root / "tokenizers", "*.json")
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise EncoderError(f"package 'tokenizers' is not installed; {_INSTALL}") from error
        embedding = load_file(weights)["embedding.weight"][:, :WORD_DIM]
        return cls(WordVectors(Tokenizer.from_file(str(tokenizer)), np.ascontiguousarray(embedding, dtype=np.float32)))

    @property
    def spec(self) -> str:
        """`words`."""
        return "words"

    @property
    def dim(self) -> int:
        """Twice the columns of a word vector."""
        return 2 * self._vectors.dim

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Prompt and response, both dense."""
        return (Block(self._vectors.dim, dense=True), Block(self._vectors.dim, dense=True))

    def embed(self, conversations: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Mean vectors; each distinct prompt is read once."""
        width = self._vectors.dim
        out = np.empty((len(conversations), 2 * width), dtype=np.float32)
        prompts: dict[str, NDArray[np.float32]] = {}
        for row, (prompt, response) in zip(out, conversations, strict=True):
            seen = prompts.get(prompt)
            if seen is None:
                seen = prompts[prompt] = self._vectors.mean(prompt)
            row[:width] = seen
            row[width:] = self._vectors.mean(response)
        return out


def _only(directory: Path, pattern: str) -> Path:
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        raise EncoderError(
            f"{directory}: {len(found)} files match {pattern!r}, expected 1; another version of wordllama? {_INSTALL}"
        )
    return found[0]
