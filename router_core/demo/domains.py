"""Invented preference pairs with true labels, in four domains that a static word encoder can tell apart.

A pure function of the random generator: no file, clock, model or network. Every prompt belongs to exactly one of three
splits by a hash of its text, whatever the seed: the reward models learn on one, the router's offline stage on another,
the online stream comes from the third. Called by `train`, `label` and the demo command.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from enum import StrEnum

import numpy as np

from router_core.demo.arithmetic import draw_arithmetic
from router_core.demo.coding import draw_code
from router_core.demo.draft import Draft
from router_core.demo.formatting import draw_format
from router_core.demo.safety import draw_safety
from router_core.errors import DatasetError
from router_core.records import Instance, LabelledPair

_DRAW: dict[str, Callable[[np.random.Generator], Draft]] = {
    "arithmetic": draw_arithmetic,
    "code": draw_code,
    "format": draw_format,
    "safety": draw_safety,
}

DOMAINS = tuple(_DRAW)
"""Names of the domains, in a fixed order."""


class Split(StrEnum):
    """Who may see a prompt. Disjoint by construction, for all seeds together."""

    MODELS = "models"
    """60 % of all prompts: the reward models are trained on these."""
    OFFLINE = "offline"
    """20 %: labelled by the trained reward models, for the router's offline stage."""
    STREAM = "stream"
    """20 %: the online stream, and the pairs that accuracies are quoted on."""


def group_of(text: str) -> str:
    """Return the key of a prompt or other text: the first 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def split_of(prompt: str) -> Split:
    """Return the one split that the prompt belongs to: its hash modulo 10 (0–5, 6–7, 8–9)."""
    bucket = int(group_of(prompt), 16) % 10
    if bucket < 6:
        return Split.MODELS
    return Split.OFFLINE if bucket < 8 else Split.STREAM


def generate_pairs(
    domain: str, n: int, rng: np.random.Generator, *, split: Split = Split.OFFLINE
) -> list[LabelledPair]:
    """Draw n preference pairs of one domain and split, labels balanced in expectation.

    A prompt may occur twice (the shortest ones do in thousands of draws), in the same split always. `scores` and
    `verdicts` are empty; `label.label_pairs` fills them.

    Raises:
        DatasetError: unknown domain, or negative n.
    """
    if domain not in _DRAW:
        raise DatasetError(f"domain {domain!r} is unknown; choose one of {', '.join(DOMAINS)}")
    _check_count(n)
    return [_draw_pair(domain, i, rng, split) for i in range(n)]


def generate_stream(
    n: int,
    rng: np.random.Generator,
    weights: Mapping[str, float] | None = None,
    *,
    split: Split = Split.STREAM,
) -> list[LabelledPair]:
    """Draw n pairs whose domains are mixed at random in proportion to `weights` (equal when None).

    Raises:
        DatasetError: negative n, an unknown domain, a weight that is negative or not finite, or no weight above zero.
    """
    _check_count(n)
    shares = dict.fromkeys(DOMAINS, 1.0) if weights is None else dict(weights)
    unknown = sorted(set(shares) - set(DOMAINS))
    if unknown:
        raise DatasetError(f"weights name unknown domains {unknown}; choose from {', '.join(DOMAINS)}")
    values = np.array([shares.get(domain, 0.0) for domain in DOMAINS])
    if not np.all(np.isfinite(values)) or np.any(values < 0) or values.sum() <= 0:
        raise DatasetError(f"weights are {shares}; give finite numbers >= 0 with at least one above 0")
    order = rng.choice(len(DOMAINS), size=n, p=values / values.sum())
    return [_draw_pair(DOMAINS[int(which)], i, rng, split) for i, which in enumerate(order)]


def _check_count(n: int) -> None:
    if n < 0:
        raise DatasetError(f"n is {n}; ask for 0 pairs or more")


def _draw_pair(domain: str, index: int, rng: np.random.Generator, split: Split) -> LabelledPair:
    draft = _DRAW[domain](rng)
    while split_of(draft.prompt) is not split:
        draft = _DRAW[domain](rng)
    label = int(rng.integers(2))
    responses = (draft.right, draft.wrong) if label == 0 else (draft.wrong, draft.right)
    group = group_of(draft.prompt)
    content = group_of("\n".join((draft.prompt, *responses)))
    return LabelledPair(
        id=f"demo/{split}/{domain}/{index:06d}-{content[:8]}",
        instance=Instance(prompt=draft.prompt, responses=responses),
        label=label,
        scores={},
        verdicts={},
        domain=domain,
        subset=draft.subset,
        group=group,
    )
