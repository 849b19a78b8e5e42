"""What the rest of the router knows of a backbone: texts in, one vector per (prompt, response) out.

Knows nothing of any concrete backbone, of groups or of training. `encoder.registry` loads concrete ones,
`encoder.fuse.PairEncoder` and the offline stage call them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from router_core.errors import EncoderError


@dataclass(frozen=True, slots=True)
class Block:
    """A run of adjacent columns of a backbone's output.

    `dense` columns are a learned embedding: only their leading directions matter, and the offline stage compresses
    them. Columns that are not dense are single measured features, each kept.
    """

    width: int
    dense: bool


class Backbone(Protocol):
    """Embeds (prompt, response) texts. Implementations are safe to call from several threads."""

    @property
    def spec(self) -> str:
        """The string from which `registry.load_backbone` makes an equal backbone."""

    @property
    def dim(self) -> int:
        """Columns of `embed`."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """What the columns are; the widths sum to `dim`."""

    def embed(self, conversations: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Embed each (prompt, response).

        A row depends on its own texts alone, up to rounding where a backbone pads batches.

        Returns:
            (N, dim) float32, finite; (0, dim) for no conversations.

        Raises:
            EncoderError: the backbone produced NaN or infinity, or cannot take the text.
        """


class ConcatBackbone:
    """Several backbones side by side: spec `A+B`, columns of A before columns of B."""

    def __init__(self, parts: Sequence[Backbone], spec: str | None = None) -> None:
        """`spec` names the whole; by default the parts' specs joined by `+`."""
        if not parts:
            raise EncoderError("parts: a concatenation needs at least one backbone")
        self._parts = tuple(parts)
        self._spec = spec if spec is not None else "+".join(part.spec for part in self._parts)
        self._blocks = tuple(block for part in self._parts for block in part.blocks)

    @property
    def spec(self) -> str:
        """The parts' specs joined by `+`, or the name given."""
        return self._spec

    @property
    def dim(self) -> int:
        """Sum of the parts' dims."""
        return sum(block.width for block in self._blocks)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The parts' blocks in order."""
        return self._blocks

    def embed(self, conversations: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """(N, dim) float32: the parts' embeddings side by side."""
        return np.concatenate([part.embed(conversations) for part in self._parts], axis=1)
