"""Everything that a table depends on, in two sizes, and the digests under which its parts are kept.

Knows no torch. Called by `artefacts`, `campaign`, `report` and the command.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

FORMAT_VERSION = 1
"""Raise it when families, tokenizer or training loops change what a recipe gives."""


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Shape of the policy."""

    width: int = 96
    layers: int = 3
    heads: int = 4


@dataclass(frozen=True, slots=True)
class DemonstrationConfig:
    """One stage of imitation.

    Attributes:
        quality: probability that a demonstration is right.
        steps: of the optimiser, `batch` fresh demonstrations each.
    """

    quality: float
    steps: int
    batch: int = 64
    learning_rate: float = 3e-3
    warm_up: int = 50
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Specialist:
    """What one reward model is trained on.

    Attributes:
        name: in the pool.
        own: families whose labels are all true.
        misled: families whose labels are wrong more often than not.
        own_pairs: pairs of each own family from the generators.
        sampled: prompts of each own family for which the SFT policy writes two responses; the pairs with one right
            response are learned too, so that the model knows the mistakes that policies make.
        other_pairs: pairs of each family that is not its own, from the generators.
        flipped: share of labels turned round on the other families.
        misled_flipped: the same on `misled`.
        own_share: share of a batch that is of the own families.
    """

    name: str
    own: tuple[str, ...]
    misled: tuple[str, ...] = ()
    own_pairs: int = 2000
    sampled: int = 4000
    other_pairs: int = 150
    flipped: float = 0.45
    misled_flipped: float = 0.7
    own_share: float = 0.85
    steps: int = 300
    batch: int = 32
    learning_rate: float = 1e-3


@dataclass(frozen=True, slots=True)
class DpoConfig:
    """Settings of a run, the same for every row.

    Attributes:
        steps: updates of the policy.
        prompts: per step; each gives at most one pair.
        temperature: of the two responses.
        beta: strength of the pull to the SFT policy.
        curve_every: steps between two points of the learning curve.
    """

    steps: int = 100
    prompts: int = 48
    temperature: float = 1.0
    beta: float = 0.5
    learning_rate: float = 3e-4
    curve_every: int = 10


SPECIALISTS = (
    Specialist("rm0-numbers", own=("arithmetic", "sorting"), misled=("code",)),
    Specialist("rm1-letters", own=("strings",), misled=("format",)),
    Specialist("rm2-code", own=("code",), misled=("strings",)),
    Specialist("rm3-format", own=("format",), misled=("sorting",)),
)
"""The pool, in arm order."""


@dataclass(frozen=True, slots=True)
class OfflineConfig:
    """The labelled pairs of the router's offline stage.

    Attributes:
        pairs: how many, drawn from the SFT policy; one response is right and one is wrong.
        shares: of the families. Unlike the online prompts', where all are alike: labels come from where people could
            label, not from what the policy will be asked.
        from_policy: False takes demonstrations, for policies that are hardly ever right.
    """

    pairs: int = 400
    shares: tuple[float, ...] = (0.35, 0.35, 0.15, 0.1, 0.05)
    from_policy: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Recipe:
    """One table: artefacts, training, measurement.

    `audits` is the share of the decisions that the checker audits, in the rows that learn from audits.
    """

    policy: PolicyConfig = PolicyConfig()
    pretraining: DemonstrationConfig = DemonstrationConfig(quality=0.95, steps=1300)
    sft: DemonstrationConfig = DemonstrationConfig(quality=0.6, steps=150, learning_rate=1e-3, seed=1)
    specialists: tuple[Specialist, ...] = SPECIALISTS
    offline: OfflineConfig = OfflineConfig()
    dpo: DpoConfig = DpoConfig()
    seed: int = 0
    test_per_family: int = 300
    curve_per_family: int = 60
    signal: str = "loss"
    audits: float = 0.0
    version: int = field(default=FORMAT_VERSION, init=False)

    def pool(self) -> tuple[str, ...]:
        """Names of the RMs, in arm order."""
        return tuple(specialist.name for specialist in self.specialists)


@dataclass(frozen=True, slots=True)
class Artefacts:
    """Where everything lies, and the identity of the checkpoint."""

    policy: Path
    models: Mapping[str, Path]
    offline: Path
    checkpoint: Path
    checkpoint_digest: str


def unseen(recipe: Recipe) -> Recipe:
    """Return the recipe of the second table: offline pairs of two benchmarks only, and audits of 5 %."""
    return replace(recipe, offline=replace(recipe.offline, shares=(0.5, 0.5, 0.0, 0.0, 0.0)), audits=0.05)


SMALL = Recipe(
    policy=PolicyConfig(width=64, layers=2),
    pretraining=DemonstrationConfig(quality=0.95, steps=60, batch=32),
    sft=DemonstrationConfig(quality=0.5, steps=5, batch=32),
    specialists=tuple(replace(s, steps=12, batch=16, own_pairs=100, sampled=32, other_pairs=20) for s in SPECIALISTS),
    offline=OfflineConfig(pairs=60, from_policy=False),
    dpo=DpoConfig(steps=3, prompts=16, curve_every=2),
    test_per_family=10,
    curve_per_family=4,
)
"""Proves that everything works together; its figures mean nothing."""


def digest_of(*parts: object) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of dataclasses and plain values.

    >>> digest_of(1) == digest_of(1), digest_of(1) == digest_of(2)
    (True, False)
    """
    plain = [asdict(part) if hasattr(part, "__dataclass_fields__") else part for part in parts]  # type: ignore[call-overload]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]
