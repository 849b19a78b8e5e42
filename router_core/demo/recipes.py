"""What each demo model is trained on, as data, with a digest that says whether a model on disk is still the
right one.

Knows nothing of torch. Called by `train` and by whoever wants the names of the demo pool without making it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

FORMAT_VERSION = 1
"""Raise it when the generators, the tokenizer or the training loop change what a recipe gives."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One demo model that is trained: a reward model, or the judge.

    A batch holds `batch_pairs` pairs; a share `own_share` of them comes from `own_pairs` generated pairs of `domain`,
    truly labelled. The rest comes from only `other_pairs` pairs of each other domain, of which a share `flipped_share`
    has its label turned round on purpose: the model memorises them, so elsewhere it is weak and not shy about it.
    """

    name: str
    domain: str
    steps: int
    batch_pairs: int = 32
    learning_rate: float = 2e-3
    own_pairs: int = 6000
    own_share: float = 0.88
    other_pairs: int = 200
    flipped_share: float = 0.2
    prediction_weight: float = 0.5
    hidden_size: int = 128
    layers: int = 2


RECIPES = (
    Recipe(
        name="rm-arithmetic",
        domain="arithmetic",
        steps=300,
        learning_rate=1.5e-3,
        own_share=0.92,
        prediction_weight=1.0,
    ),
    Recipe(name="rm-format", domain="format", steps=270),
    Recipe(name="rm-code", domain="code", steps=125),
)
"""The demo pool's reward models, a specialist each. Longest first, so that two workers end together."""

JUDGE = Recipe(
    name="judge-safety", domain="safety", steps=240, own_share=1.0, other_pairs=0, flipped_share=0.0, layers=3
)
"""The demo pool's judge: the specialist of the domain that no reward model knows."""


def recipe_digest(recipe: Recipe, seed: int) -> str:
    """Return the SHA-256 (hexadecimal) of the recipe, the seed and the format version."""
    payload = {"recipe": asdict(recipe), "seed": seed, "format_version": FORMAT_VERSION}
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()
