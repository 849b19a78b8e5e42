"""Does the prior precision move where feedback is rare? λ₀ adapting from the 8th event on, and from the 64th only.

The offline stage learns from maths and chat; code and adversarial instructions are streamed, and 5 % of the instances
get feedback: 46 events, fewer than one block. What is compared is the accuracy of `bayesian` on the same streams, with
the same noise in its draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.soundness.report import Options, Report
from loadtests.tables.experiments import K4
from router_core.checkpoint import Checkpoint
from router_core.dataset import load_pairs, pool_names
from router_core.encoder.registry import load_backbone
from router_core.offline.train import pair_features, train
from router_core.posterior import FoldSettings
from router_core.prior import Prior, calibrated_prior
from router_core.records import LabelledPair, Signal
from router_core.replay import Scenario, domain_split, replay, tabulate
from router_core.torch_threads import torch_threads

Array = NDArray[np.float64]

OFFLINE, STREAM = ("math", "chat"), ("code", "adversarial-if")
MISSING = 0.95
"""Share of the instances without feedback."""

PASSES = 30

SETTINGS = {"from the 64th event": FoldSettings(first_adaptation=64), "from the 8th": FoldSettings()}


def adaptation(options: Options) -> Report:
    """Accuracy per pool with late and with early adaptation, and their difference."""
    passes, pairs = options.seeds or PASSES, load_pairs(options.data)
    figures: dict[str, Any] = {}
    for name, pool in {"K4": K4, "K9": pool_names(pairs)}.items():
        late, early = _accuracies(pairs, pool, passes)
        gain = early - late
        figures[name] = {
            **dict(zip(SETTINGS, (float(late.mean()), float(early.mean())), strict=True)),
            "gain": float(gain.mean()),
            "standard error": float(gain.std(ddof=1) / np.sqrt(passes)),
        }
    rows = [
        (pool, *(round(found[name], 4) for name in SETTINGS), f"{found['gain']:+.4f} ± {found['standard error']:.4f}")
        for pool, found in figures.items()
    ]
    return Report(
        title=f"λ₀ where 5 % of the instances have feedback, {passes} passes",
        columns=("pool", *SETTINGS, "gain"),
        rows=tuple(rows),
        notes=("Accuracy of `bayesian`; the gain with its standard error over passes. Promise: no loss.",),
        figures=figures,
    )


def _accuracies(pairs: Sequence[LabelledPair], pool: Sequence[str], passes: int) -> tuple[Array, ...]:
    """Accuracy per pass (S,) with each of `SETTINGS`."""
    inside, outside = domain_split(pairs, OFFLINE, STREAM, np.random.default_rng(0))
    learned, streamed = [pairs[i] for i in inside], [pairs[i] for i in outside]
    backbone = load_backbone("static")
    with torch_threads(1):
        checkpoint = train(learned, pool, backbone)
        x = checkpoint.fuse.apply(pair_features(streamed, backbone))
    prior, table = _prior(checkpoint), tabulate(streamed, pool)
    found = []
    for settings in SETTINGS.values():
        traces = replay(
            table,
            x,
            ["bayesian"],
            priors=lambda _: prior,
            signal=Signal.PREFERENCE,
            seeds=range(passes),
            settings=settings,
            scenario=Scenario(missing=MISSING),
        )
        found.append(np.array([one.correct.mean() for one in traces["bayesian"].passes]))
    return tuple(found)


def _prior(checkpoint: Checkpoint) -> Prior:
    """The calibrated prior as a gateway builds it."""
    first, d = checkpoint.columns(checkpoint.prior_form)
    probabilities, hyper = checkpoint.class_probabilities, checkpoint.hyperparameters
    prior = calibrated_prior(len(checkpoint.pool), d, probabilities, hyper, checkpoint.landmarks)
    return prior.reading(first, checkpoint.d)
