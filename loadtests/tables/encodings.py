"""What each encoder makes of the pairs, from the cache; an encoder that would take too long is timed and left out.

Knows backbones and the cache. Called by the command.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router_core.encoder.base import Backbone, Block
from router_core.encoder.cache import CachedBackbone
from router_core.encoder.registry import load_backbone
from router_core.offline.train import pair_features
from router_core.records import LabelledPair

SAMPLE = 4
"""Texts that are timed, one in the middle of each quarter by length; the estimate is good to some tens of per cent."""

Conversation = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Described:
    """A backbone without its weights: what a fit on given features reads of one; small enough to send to a process."""

    spec: str
    dim: int
    blocks: tuple[Block, ...]

    def embed(self, conversations: Sequence[Conversation]) -> NDArray[np.float32]:
        """Never called: the features are at hand. Raises RuntimeError."""
        raise RuntimeError(f"encoder {self.spec!r}: the features must be given, the weights are not here")


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """An encoder and its features of all pairs, (N, 2·dim) float32."""

    backbone: Backbone
    features: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TooLong:
    """Why an encoder is not run here: minutes that its encodings would take, from a timed sample."""

    minutes: float


class _NotStoredError(Exception):
    """A text that the cache does not hold."""


class _StoredOnly:
    """Stands in a cache for its backbone, and refuses to compute."""

    def __init__(self, backbone: CachedBackbone) -> None:
        self.spec, self.dim, self.blocks, self.identity = (
            backbone.spec,
            backbone.dim,
            backbone.blocks,
            backbone.identity,
        )

    def embed(self, conversations: Sequence[Conversation]) -> NDArray[np.float32]:
        """Raises _NotStoredError."""
        raise _NotStoredError


def encode(
    pairs: Sequence[LabelledPair],
    spec: str,
    cache: Path,
    limit_minutes: float,
    tell: Callable[[int, int], None] | None = None,
) -> Encoded | TooLong:
    """Features of all pairs, or why not.

    Args:
        spec: of the encoder.
        cache: directory of stored encodings.
        limit_minutes: what is not stored is computed if it takes about so long at most.
        tell: (done, of), while texts are embedded.

    Raises:
        EncoderError: the encoder cannot be loaded.
    """
    backbone = load_backbone(spec, cache, progress=tell)
    features = stored_features(pairs, backbone, cache) if isinstance(backbone, CachedBackbone) else None
    if features is None:
        minutes = estimated_minutes(pairs, backbone)
        if minutes > limit_minutes:
            return TooLong(minutes)
        features = pair_features(pairs, backbone)
    return Encoded(Described(backbone.spec, backbone.dim, backbone.blocks), features)


def stored_features(pairs: Sequence[LabelledPair], backbone: CachedBackbone, cache: Path) -> NDArray[np.float32] | None:
    """`pair_features` from the cache alone; None if it lacks a text."""
    try:
        return pair_features(pairs, CachedBackbone(_StoredOnly(backbone), cache))
    except _NotStoredError:
        return None


def estimated_minutes(pairs: Sequence[LabelledPair], backbone: Backbone) -> float:
    """How long all texts take, from a sample that is embedded one by one."""
    texts = sorted(
        {(pair.instance.prompt, response) for pair in pairs for response in pair.instance.responses},
        key=lambda text: len(text[0]) + len(text[1]),
    )
    sample = min(SAMPLE, len(texts))
    places = ((np.arange(sample) + 0.5) * len(texts) / sample).astype(int)
    computing = backbone.wrapped if isinstance(backbone, CachedBackbone) else backbone
    computing.embed([texts[0]])
    began = time.perf_counter()
    for place in places.tolist():
        computing.embed([texts[place]])
    return (time.perf_counter() - began) / len(places) * len(texts) / 60
