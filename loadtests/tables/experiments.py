"""What `make tables` measures: pools, splits, streams, policies, ablations. Values; nothing here computes a figure.

Called by `work`, `offline`, `online` and the command. A *dealing* is one way of splitting the pairs, drawn from its
number, which is also the seed of the fits on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from router_core.dataset import grouped_folds, grouped_split
from router_core.offline.train import TrainConfig
from router_core.records import LabelledPair, Signal
from router_core.replay import Delay, Scenario, Shift, complete_pairs, share_split

K4 = ("internlm2-1_8b-reward", "GRM-Gemma-2B-rewardmodel-ft", "FsfairX-LLaMA3-RM-v0.1", "RM-Mistral-7B")
"""Chosen after seeing the accuracies, so that a router has room to gain."""
K6 = (*K4, "internlm2-7b-reward", "URM-LLaMa-3-8B")
"""Chosen in the same way."""

S4 = (
    "PKU-Alignment/beaver-7b-v2.0-cost",
    "Ray2333/Gemma-2B-rewardmodel-ft",
    "weqweasdas/RM-Gemma-7B",
    "hendrydong/Mistral-RM-for-RAFT-GSHF-v0",
)
S6 = (*S4, "openbmb/UltraRM-13b", "Ray2333/Gemma-2B-rewardmodel-baseline")
E5 = (
    "openbmb/Eurus-RM-7b",
    "Ray2333/Gemma-2B-rewardmodel-ft",
    "weqweasdas/RM-Gemma-7B",
    "OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5",
    "IDEA-CCNL/Ziya-LLaMA-7B-Reward",
)
X4 = (
    "OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5",
    "Qwen/Qwen1.5-MoE-A2.7B-Chat",
    "weqweasdas/RM-Gemma-7B",
    "RLHFlow/LLaMA3-iterative-DPO-final",
)
N5 = (
    "weqweasdas/RM-Mistral-7B",
    "allenai/tulu-2-dpo-70b",
    "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO",
    "HuggingFaceH4/zephyr-7b-beta",
)
T6 = (
    "infly/INF-ORM-Llama3.1-70B",
    "nicolinho/QRM-Gemma-2-27B",
    "Skywork/Skywork-Reward-Gemma-2-27B-v0.2",
    "Skywork/Skywork-Reward-Gemma-2-27B",
    "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2",
    "nicolinho/QRM-Llama3.1-8B-v2",
)
FIELD_POOLS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"S6": S6, "S4": S4, "E5": E5, "X4": X4, "N5": N5, "T6": T6}
)
"""Pools of the 85 RMs. S6, S4, E5 and X4 were chosen for room after seeing the accuracies; N5 (middling) and T6 (the
best) by the overall scores that their leaderboard published, though after the accuracies on these pairs were seen.
"""
CHOSEN_FOR_ROOM = ("K4", "K6", "S6", "S4", "E5", "X4")
ALL = "all 85"

OURS = "bayesian"
SHADOWED = "bayesian+shadow=0.1"
PAPER = "bayesian:paper"
TUNED: Mapping[str, tuple[tuple[str, Any], ...]] = MappingProxyType(
    {
        "bayesian:paper (tuned)": (("lambda0", 10.0), ("sigma2", 0.16), ("v", 1.0)),
        "bayesian:paper (tuned at home)": (("lambda0", 300.0), ("sigma2", 0.16), ("v", 0.3)),
    }
)
"""Rows of the paper's form with other scalars than the published λ₀ = σ² = v = 1. Chosen as our own were, by what they
earn on these pairs (`python -m loadtests.soundness published`): in the folds, under shift and on domains left out
together, and in the folds alone.
"""
POLICIES = (OURS, PAPER, *TUNED, "bayesian:none", "offline", "laser", "random", "majority", "uwo")
LEARNERS = ("neural", "neural:none", "dueling", "dueling:none")
"""Of `router_core.replay.learners`; they take no losses."""
FEW = (OURS, "bayesian:none", "neural", "dueling", "offline", "laser", "random", "majority", "uwo")
"""For the pools and domains that stand beside K4."""
FIELD_ROWS = (OURS, "bayesian:paper", "bayesian:none", *LEARNERS, "offline", "laser", "random", "majority")
"""For the pools of the 85 RMs, whose verdicts are recorded and no scores: no `uwo`."""

ABLATION_SEEDS, ABLATION_SHIFTS = 3, 2
"""Passes and shifted dealings of an ablation: differences are paired, so fewer do."""


SHIFT = Shift("code")
"""The offline stage sees 10 % code, the stream is 80 % code."""


@dataclass(frozen=True, slots=True)
class Fit:
    """One offline stage: encoder's spec, pool, indices of the pairs that are learned from, settings with their seed.

    `late` is an RM of which only the verdicts on `asked`, some of the rows, are known.
    """

    encoder: str
    pool: tuple[str, ...]
    rows: tuple[int, ...]
    config: TrainConfig
    late: str = ""
    asked: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Stream:
    """An offline stage, and the indices of the pairs that are streamed after it.

    `joining` is an RM beside the fit's pool that was never seen: its offsets are the others' mean.
    """

    fit: Fit
    rows: tuple[int, ...]
    joining: str = ""

    @property
    def pool(self) -> tuple[str, ...]:
        """The fit's pool, and who joins it."""
        return (*self.fit.pool, self.joining) if self.joining else self.fit.pool


@dataclass(frozen=True, slots=True)
class Variant:
    """One change to the online stage's prior, or to the offline fit.

    Attributes:
        title: for people.
        hyper: fields of `Hyperparameters` that are set, as pairs.
        features: the residual reads the features f in the place of the low-rank context.
        config: fields of `TrainConfig` that are set, as pairs.
    """

    title: str = "default"
    hyper: tuple[tuple[str, Any], ...] = ()
    features: bool = False
    config: tuple[tuple[str, Any], ...] = ()

    def applied(self, streams: Sequence[Stream]) -> tuple[Stream, ...]:
        """The same streams after offline stages with the changed settings."""
        changes = dict(self.config)
        return tuple(
            replace(stream, fit=replace(stream.fit, config=replace(stream.fit.config, **changes))) for stream in streams
        )


@dataclass(frozen=True, slots=True)
class Job:
    """Policies over some streams, each from a fresh start.

    Attributes:
        title: for people.
        streams: what is learned from and streamed; all for one pool.
        policies: as `replay` names them.
        signal, scenario, seeds: of the replay.
        variant: of the prior.
    """

    title: str
    streams: tuple[Stream, ...]
    policies: tuple[str, ...]
    seeds: tuple[int, ...]
    signal: Signal = Signal.PREFERENCE
    scenario: Scenario = field(default_factory=Scenario)
    variant: Variant = field(default_factory=Variant)

    @property
    def pool(self) -> tuple[str, ...]:
        """The streams' one pool."""
        return self.streams[0].pool


@dataclass(frozen=True, slots=True)
class Contrast:
    """A difference that is decided with Holm's correction for all of `PRIMARY`.

    Attributes:
        part, key: where it stands in the document: `offline` and a pool, `online` and a stream, `transfer` and a pool.
        other: the row that ours is compared with: `offline` in the part of that name, else `bayesian`.
    """

    part: str
    key: str
    other: str


PRIMARY = (
    Contrast("offline", "K9", "best single RM, in hindsight"),
    Contrast("offline", "K9", "majority"),
    Contrast("offline", "K9", "best RM per subset, learned"),
    Contrast("online", "K9, in distribution", "offline"),
    Contrast("online", "shift", "offline"),
    Contrast("transfer", "K9", "offline"),
    Contrast("transfer", "K9", "bayesian:none"),
    Contrast("transfer", "K9", "best RM of each domain, in hindsight"),
)
"""The questions of the page: does routing beat the simpler ways, and does learning online pay, at home and elsewhere?
On K9, which was not chosen for room; the shifted stream exists on K4 alone.
"""

VARIANTS = (
    Variant(),
    Variant("λ₀ = 50, fixed", hyper=(("lambda0", 50.0), ("adapt", False))),
    Variant("λ₀ = 1000, fixed", hyper=(("lambda0", 1000.0), ("adapt", False))),
    Variant("λ₀ adapting", hyper=(("adapt", True),)),
    Variant("novel texts not told apart", hyper=(("lambda_novel", 0.0),)),
    Variant("no floor", hyper=(("floor", 0.0),)),
    Variant("changes not watched", hyper=(("alarm_rate", 0.0),)),
    Variant("σ² = .08", hyper=(("sigma2", 0.08),)),
    Variant("σ² = .25", hyper=(("sigma2", 0.25),)),
    Variant("v = 0: no exploration", hyper=(("v", 0.0),)),
    Variant("v = .2", hyper=(("v", 0.2),)),
    Variant("v = 1: as the posterior says", hyper=(("v", 1.0),)),
    Variant("residual over the learned features f", features=True),
    Variant("verdicts only, no soft targets", config=(("soft_share", 0.0),)),
    Variant("one member instead of six", config=(("members", 1),)),
    Variant("heads not blended", config=(("blend", 0.0),)),
    Variant("offsets without a level per kind of text", config=(("level", 0.0),)),
)
"""What is taken away, one at a time; the offline changes come last, since they need fits of their own."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is done.

    Attributes:
        folds: of the cross-validation.
        long_folds: of the cross-validation with longer streams.
        dealings: of the folds for the first encoder; the other encoders take the first.
        shifts: dealings of the shifted split, and of the one with few labelled pairs.
        labelled: how many pairs are labelled there.
        streamed: share of the pairs that is streamed there.
        seeds: passes per stream.
        config: of all fits, but for their seeds.
    """

    folds: int = 5
    long_folds: int = 2
    dealings: int = 2
    shifts: int = 3
    labelled: tuple[int, ...] = (32, 64, 128, 256, 512)
    streamed: float = 0.6
    seeds: int = 5
    config: TrainConfig = field(default_factory=TrainConfig)


class Plan:
    """Every stream and job over these pairs. Reads the pairs' groups, domains and gaps only."""

    def __init__(self, pairs: Sequence[LabelledPair], encoder: str, size: Size) -> None:
        self._pairs, self._encoder, self.size = pairs, encoder, size
        self._seeds = tuple(range(size.seeds))

    def folds(self, pool: Sequence[str], n_folds: int, dealing: int) -> tuple[Stream, ...]:
        """Grouped cross-validation: each fold is streamed after a fit on the others."""
        dealt = grouped_folds(self._pairs, n_folds, np.random.default_rng(dealing))
        return tuple(self._stream(pool, inside.tolist(), outside.tolist(), dealing) for inside, outside in dealt)

    def in_distribution(self, pool: Sequence[str]) -> tuple[Stream, ...]:
        """All folds of all dealings: the fits of Table 2."""
        return tuple(
            stream for dealing in range(self.size.dealings) for stream in self.folds(pool, self.size.folds, dealing)
        )

    def shifted(self, pool: Sequence[str]) -> tuple[Stream, ...]:
        """One stream per dealing of `SHIFT`."""
        streams = []
        for dealing in range(self.size.shifts):
            inside, outside = share_split(self._pairs, SHIFT, np.random.default_rng(dealing))
            streams.append(self._stream(pool, inside.tolist(), outside.tolist(), dealing))
        return tuple(streams)

    def without_a_domain(self, pool: Sequence[str]) -> tuple[Stream, ...]:
        """Per domain: learn from the others, stream it. A group that lies in several domains is streamed only."""
        streams = []
        for domain in domains_of(self._pairs):
            outside = [i for i, pair in enumerate(self._pairs) if pair.domain == domain]
            taken = {self._pairs[i].group for i in outside} - {""}
            inside = [i for i, pair in enumerate(self._pairs) if pair.domain != domain and pair.group not in taken]
            streams.append(self._stream(pool, inside, outside, 0))
        return tuple(streams)

    def few_labels(self, pool: Sequence[str]) -> dict[int, tuple[Stream, ...]]:
        """By the number of labelled pairs: one stream per dealing, the same for all numbers; fewer are part of more.

        Numbers that the pairs which are not streamed do not reach are left out.
        """
        streams: dict[int, list[Stream]] = {}
        for dealing in range(self.size.shifts):
            rng = np.random.default_rng(dealing)
            inside, outside = grouped_split(self._pairs, self.size.streamed, rng)
            groups: dict[str, list[int]] = {}
            for index in inside.tolist():
                groups.setdefault(self._pairs[index].group or f"pair {index}", []).append(index)
            members = list(groups.values())
            shuffled = [index for group in rng.permutation(len(members)) for index in members[group]]
            for number in self.size.labelled:
                if number <= len(shuffled):
                    stream = self._stream(pool, sorted(shuffled[:number]), outside.tolist(), dealing)
                    streams.setdefault(number, []).append(stream)
        return {number: tuple(found) for number, found in streams.items() if len(found) == self.size.shifts}

    def online(self, pools: Mapping[str, tuple[str, ...]]) -> dict[str, Job]:
        """The streams of the online stage, by key; the first pool's in full, of the others the first."""
        (first, pool), *others = pools.items()
        rows = (*POLICIES, *LEARNERS, SHADOWED)
        long, shifted = self.folds(pool, self.size.long_folds, 0), self.shifted(pool)

        def job(title: str, streams: tuple[Stream, ...], **changes: Any) -> Job:
            return Job(title, streams, **{"policies": rows, "seeds": self._seeds, **changes})

        loss: dict[str, Any] = {"signal": Signal.LOSS, "policies": POLICIES}
        jobs = {
            "in distribution": job(f"{first}, in distribution", self.in_distribution(pool)),
            "long": job(f"{first}, in distribution, longer streams", long),
            "shift": job(f"{first}, shifted", shifted),
            "drift": job(f"{first}, drift", long, scenario=Scenario(drift=True)),
            "shift, delay 64": job(f"{first}, shifted, delay 64", shifted, scenario=Scenario(delay=Delay(steps=64))),
            "shift, missing 30 %": job(f"{first}, shifted, 30 % missing", shifted, scenario=Scenario(missing=0.3)),
            "long, loss": job(f"{first}, in distribution, loss signal (simulated)", long, **loss),
            "shift, loss": job(f"{first}, shifted, loss signal (simulated)", shifted, **loss),
        }
        for name, names in others:
            jobs[f"{name}, in distribution"] = job(
                f"{name}, in distribution", self.in_distribution(names), policies=FEW
            )
        return jobs

    def transfer(self, pools: Mapping[str, tuple[str, ...]]) -> dict[str, Job]:
        """Leave one domain out, per pool."""
        return {
            name: Job(f"{name}, a domain never seen", self.without_a_domain(pool), FEW, self._seeds)
            for name, pool in pools.items()
        }

    def labels(self, pools: Mapping[str, tuple[str, ...]]) -> dict[str, dict[str, Job]]:
        """By pool, and by the number of labelled pairs."""
        return {
            name: {
                str(number): Job(f"{name}, {number} labelled pairs", streams, FEW, self._seeds)
                for number, streams in self.few_labels(pool).items()
            }
            for name, pool in pools.items()
        }

    def ablations(self, pool: Sequence[str]) -> dict[str, tuple[Variant, dict[str, Job]]]:
        """By title: the variant, and its jobs in distribution (first dealing) and under shift."""
        shifted = self.shifted(pool)[:ABLATION_SHIFTS]
        columns = {"in distribution": self.folds(pool, self.size.folds, 0), "shift": shifted}
        policies, seeds = ("offline", OURS), self._seeds[:ABLATION_SEEDS]
        return {
            variant.title: (
                variant,
                {
                    column: Job(
                        f"{variant.title}, {column}", variant.applied(streams), policies, seeds, variant=variant
                    )
                    for column, streams in columns.items()
                },
            )
            for variant in VARIANTS
        }

    def _stream(self, pool: Sequence[str], inside: Sequence[int], outside: Sequence[int], dealing: int) -> Stream:
        complete, _ = complete_pairs(self._pairs, pool)
        kept = set(complete.tolist())
        fit = Fit(self._encoder, tuple(pool), tuple(inside), replace(self.size.config, seed=dealing))
        return Stream(fit, tuple(i for i in outside if i in kept))


def domains_of(pairs: Sequence[LabelledPair]) -> tuple[str, ...]:
    """Every domain, in order of first appearance."""
    return tuple(dict.fromkeys(pair.domain for pair in pairs if pair.domain))
