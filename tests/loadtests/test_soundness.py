"""The experiments on promises: what they simulate or replay is what they say, on data small enough to see through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from loadtests.soundness.calibration import FIGURES, WAYS, _by_domain
from loadtests.soundness.recorded import ENCODER
from loadtests.soundness.tuning import CANDIDATES, PAPER, RULES, SEEDS, Half, Values
from loadtests.tables.encodings import Described, Encoded
from loadtests.tables.experiments import Plan, Size
from loadtests.tables.work import Material, fit_tasks, run_all
from router_core.encoder.surface import SurfaceBackbone
from router_core.offline.train import TrainConfig, fit, pair_features
from router_core.replay import tabulate
from tests.support.offline import POOL, two_domains

FAST = TrainConfig(max_epochs=6, folds=2, members=1, directions=4, context=2, hidden=8)


@pytest.fixture(scope="module")
def kinds() -> list[list[Half]]:
    """One stream of either kind; the checkpoint is not looked at."""
    pairs, backbone = two_domains(60), SurfaceBackbone()
    checkpoint, held_out = fit(pairs, POOL, backbone, FAST)
    x = checkpoint.fuse.apply(pair_features(pairs, backbone))
    half = Half(tabulate(pairs, POOL), x, held_out.probabilities, checkpoint)
    return [[half], [half]]


def earned(lift: float, seed: int) -> Values:
    """Right in four of five pairs, and `lift` more often than that."""
    rng = np.random.default_rng(seed)
    return [[(rng.random((len(SEEDS), 60)) < 0.8 + lift).astype(float)] for _ in range(2)]


def test_noise_moves_the_old_rule_and_not_the_new_one(kinds: list[list[Half]]) -> None:
    moved = dict.fromkeys(RULES, 0)
    for trial in range(20):
        titles = ("", *CANDIDATES, PAPER)
        values = {title: earned(0.0, 100 * trial + number) for number, title in enumerate(titles)}
        for name, rule in RULES.items():
            moved[name] += bool(rule(values, kinds))
    assert moved["by seeds"] >= 8
    assert moved["by groups"] <= 3


def test_a_clear_gain_moves_both_rules(kinds: list[list[Half]]) -> None:
    values = {title: earned(0.0, number) for number, title in enumerate(("", *CANDIDATES))}
    values["v = .3"] = [[np.ones((len(SEEDS), 60))] for _ in range(2)]
    for rule in RULES.values():
        assert "v = .3" in rule(values, kinds)


def test_calibration_judges_every_pair_by_a_fit_that_has_not_seen_it() -> None:
    pairs, backbone = two_domains(90), SurfaceBackbone()
    described = Described(ENCODER, backbone.dim, backbone.blocks)
    material = Material(pairs, {ENCODER: Encoded(described, pair_features(pairs, backbone))})
    streams = Plan(pairs, ENCODER, Size(folds=3, config=replace(FAST, level=WAYS["with"]))).folds(POOL, 3, 0)
    found = _by_domain(streams, run_all(fit_tasks((s.fit for s in streams), material), 1), material)
    assert list(found) == ["code", "prose", "mean of domains", "all"]
    assert found["all"]["n"] == 90
    for name in FIGURES:
        mean = (found["code"][name] + found["prose"][name]) / 2
        assert found["mean of domains"][name] == pytest.approx(mean)
