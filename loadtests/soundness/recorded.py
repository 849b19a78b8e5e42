"""Recorded pairs with the static encoder's features, and fits on parts of them. For the experiments on real data."""

from __future__ import annotations

from collections.abc import Iterable

from loadtests.soundness.report import Options
from loadtests.tables.encodings import Described, Encoded
from loadtests.tables.experiments import Fit
from loadtests.tables.work import Material, fit_tasks, run_all
from router_core.checkpoint import Checkpoint
from router_core.dataset import load_pairs
from router_core.encoder.registry import load_backbone
from router_core.offline.train import pair_features

ENCODER = "static"


def recorded(options: Options) -> Material:
    """The pairs of `options.data`, encoded."""
    pairs, backbone = load_pairs(options.data), load_backbone(ENCODER)
    described = Described(backbone.spec, backbone.dim, backbone.blocks)
    return Material(pairs, {ENCODER: Encoded(described, pair_features(pairs, backbone))})


def fitted(fits: Iterable[Fit], material: Material, options: Options) -> dict[Fit, Checkpoint]:
    """Every different fit, made once."""
    return run_all(fit_tasks(fits, material), options.workers)
