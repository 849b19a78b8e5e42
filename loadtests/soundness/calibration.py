"""Do offsets mean what they say on every kind of text? With the calibration's level and without, on pairs not seen.

Each pair is judged by a fit, calibration included, that has not seen its group (`folds`), or nothing of its domain
(`unseen`). `Without` is one temperature and a bias per RM, right on average, as the offsets were before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from loadtests.soundness.recorded import ENCODER, fitted, recorded
from loadtests.soundness.report import Options, Report
from loadtests.tables.experiments import K4, Plan, Size, Stream
from loadtests.tables.work import Material
from router_core.checkpoint import Checkpoint
from router_core.dataset import pool_matrix, pool_names
from router_core.offline.calibrate import LEVEL, calibration_by_domain

DEALINGS = 2
WAYS = {"without": 0.0, "with": LEVEL}
FIGURES = ("bias", "negative_log_likelihood", "expected_calibration_error")


def calibration(options: Options) -> Report:
    """Per pool, split and domain: what was said of the RM that is routed to, how often it was right, and the fit."""
    material = recorded(options)
    plan = Plan(material.pairs, ENCODER, Size(dealings=options.seeds or DEALINGS))
    pools = {"K4": K4, "K9": pool_names(material.pairs)}
    streams = {
        (name, split): dealt
        for name, pool in pools.items()
        for split, dealt in (("folds", plan.in_distribution(pool)), ("unseen", plan.without_a_domain(pool)))
    }
    ways = {(key, way): _changed(dealt, level) for key, dealt in streams.items() for way, level in WAYS.items()}
    checkpoints = fitted((stream.fit for dealt in ways.values() for stream in dealt), material, options)
    found = {key: _by_domain(dealt, checkpoints, material) for key, dealt in ways.items()}
    rows = [
        _row(name, split, domain, found[(name, split), "without"][domain], found[(name, split), "with"][domain])
        for name, split in streams
        for domain in found[(name, split), "with"]
    ]
    figures: dict[str, Any] = {}
    for (key, way), by_domain in found.items():
        figures.setdefault(", ".join(key), {})[way] = by_domain
    return Report(
        title=f"offsets per kind of text, with a level in the context and without, {plan.size.dealings} dealings",
        columns=("pool", "split", "domain", "right", "said", "bias per RM", "NLL", "ECE"),
        rows=tuple(rows),
        notes=(
            "Said and right: of the RM that is routed to. Without → with the level; right is the same for both.",
            "Promise: said is right per domain on pairs of the same kinds; no promise on unseen domains.",
            "In `all` domains that err to either side cancel; `mean of domains` is the mean of the rows above it.",
        ),
        figures=figures,
    )


def _changed(streams: Sequence[Stream], level: float) -> tuple[Stream, ...]:
    return tuple(
        replace(stream, fit=replace(stream.fit, config=replace(stream.fit.config, level=level))) for stream in streams
    )


def _by_domain(streams: Sequence[Stream], checkpoints: Mapping[Any, Checkpoint], material: Material) -> dict[str, Any]:
    """`calibration_by_domain` of all streams together, `mean of domains` added, "" as "all"."""
    said, right, chosen, domains = [], [], [], []
    for stream in streams:
        checkpoint, rows = checkpoints[stream.fit], list(stream.rows)
        pairs = [material.pairs[i] for i in rows]
        said.append(checkpoint.class_probabilities(checkpoint.fuse.apply(material.encoded[ENCODER].features[rows])))
        chosen.append(said[-1].argmax(axis=1))
        right.append(pool_matrix(pairs, stream.fit.pool))
        domains += [pair.domain for pair in pairs]
    found = calibration_by_domain(np.concatenate(said), np.concatenate(right), np.concatenate(chosen), domains)
    everything = found.pop("")
    off = float(np.mean([abs(part["said"] - part["right"]) for part in found.values()]))
    means = {name: float(np.mean([part[name] for part in found.values()])) for name in FIGURES}
    return {**found, "mean of domains": {"said − right": off, **means}, "all": everything}


def _row(pool: str, split: str, domain: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    def both(name: str) -> str:
        return f"{before[name]:.3f} → {now[name]:.3f}"

    told = ("", f"off by {both('said − right')}") if "said" not in now else (f"{now['right']:.3f}", both("said"))
    return (pool, split, domain, *told, *map(both, FIGURES))
