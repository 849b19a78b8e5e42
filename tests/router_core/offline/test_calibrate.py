"""Calibration: a level that one kind of text needs is found, held-out rows are not seen, figures by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from router_core.encoder.surface import SurfaceBackbone  # noqa: E402
from router_core.errors import CheckpointError, ShapeMismatchError  # noqa: E402
from router_core.offline.calibrate import (  # noqa: E402
    calibration_by_domain,
    cross_calibrated,
    fit_calibration,
    negative_log_likelihood,
    surely_gains,
    surely_worse,
)
from router_core.offline.train import TrainConfig, fit, pair_features  # noqa: E402
from tests.support.offline import POOL, two_domains  # noqa: E402

FAST = TrainConfig(max_epochs=6, folds=2, directions=2, context=2, members=2, member_dim=4, hidden=8)


def hard_and_easy(n: int = 2000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits (n, 2) that do not know that texts far along either end of one direction are hard; with contexts."""
    rng = np.random.default_rng(3)
    angle = rng.uniform(-1.2, 1.2, n)
    contexts = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    logits = rng.normal(1.5, 0.5, (n, 2))
    true = logits + 1.0 - 4.0 * np.square(contexts[:, 1])[:, None]
    return logits, (rng.random((n, 2)) < 1 / (1 + np.exp(-true))).astype(float), contexts


def test_a_level_says_less_of_hard_texts_than_of_easy_ones() -> None:
    logits, outcomes, contexts = hard_and_easy()
    fitted, average = fit_calibration(logits, outcomes, contexts), fit_calibration(logits, outcomes)
    hard = np.abs(contexts[:, 1]) > 0.8
    gaps = [
        abs((p - outcomes)[hard].mean())
        for p in (fitted.probabilities(logits, contexts), average.probabilities(logits))
    ]
    assert gaps[0] < 0.03 < 0.15 < gaps[1]
    assert average.level is None
    assert fitted.level is not None
    np.testing.assert_allclose(fitted.level, fitted.level.T)


def test_a_level_never_changes_the_order_of_the_arms() -> None:
    logits, outcomes, contexts = hard_and_easy()
    fitted = fit_calibration(logits, outcomes, contexts)
    flat = replace(fitted, level=None)
    order = fitted.probabilities(logits, contexts).argmax(axis=1)
    assert (order == flat.probabilities(logits).argmax(axis=1)).all()


def test_no_context_and_no_deviation_mean_no_level() -> None:
    logits, outcomes, contexts = hard_and_easy(200)
    assert fit_calibration(logits, outcomes, contexts[:, :0]).level is None
    assert fit_calibration(logits, outcomes, contexts, 0.0).level is None


def test_a_level_without_contexts_is_refused() -> None:
    logits, outcomes, contexts = hard_and_easy(200)
    with pytest.raises(ShapeMismatchError, match="contexts"):
        fit_calibration(logits, outcomes, contexts).probabilities(logits)
    with pytest.raises(ShapeMismatchError, match="contexts"):
        fit_calibration(logits, outcomes, contexts[:-1])


def test_a_row_is_calibrated_without_its_own_outcome() -> None:
    logits, outcomes, contexts = hard_and_easy(120)
    everything = np.arange(120)
    folds = [(everything[everything % 3 != fold], everything[everything % 3 == fold]) for fold in range(3)]
    before = cross_calibrated(logits, outcomes, contexts, folds)
    other = outcomes.copy()
    other[folds[0][1]] = 1.0 - other[folds[0][1]]
    after = cross_calibrated(logits, other, contexts, folds)
    np.testing.assert_array_equal(after[folds[0][1]], before[folds[0][1]])
    assert np.abs(after - before).max() > 0.05


def test_a_checkpoint_says_what_the_calibration_says() -> None:
    pairs = two_domains(80)
    checkpoint, _ = fit(pairs, POOL, SurfaceBackbone(), FAST)
    x = checkpoint.fuse.apply(pair_features(pairs, SurfaceBackbone()))
    level = checkpoint.calibration_level
    assert level is not None
    assert np.abs(level).max() > 0
    flat = replace(checkpoint, calibration_level=None).class_probabilities(x)
    c = x[:, checkpoint.fuse.features :].astype(np.float64)
    expected = np.log(flat / (1 - flat)) + np.einsum("ni,ij,nj->n", c, level, c)[:, None]
    got = checkpoint.class_probabilities(x)
    np.testing.assert_allclose(np.log(got / (1 - got)), expected, atol=1e-4)
    assert fit(pairs, POOL, SurfaceBackbone(), replace(FAST, level=0.0))[0].calibration_level is None
    with pytest.raises(CheckpointError, match="calibration_level"):
        replace(checkpoint, calibration_level=np.zeros((2, 3), np.float32))


def test_calibration_by_domain_by_hand() -> None:
    probabilities = np.array([[0.9, 0.5], [0.7, 0.5], [0.6, 0.8]])
    outcomes = np.array([[1.0, 0.0], [0.0, np.nan], [1.0, 1.0]])
    found = calibration_by_domain(probabilities, outcomes, np.array([0, 0, 1]), ["code", "code", "math"])
    assert set(found) == {"code", "math", ""}
    assert found["code"]["said"] == pytest.approx(0.8)
    assert found["code"]["right"] == pytest.approx(0.5)
    assert found["code"]["bias"] == pytest.approx((0.3 + 0.5) / 2)
    assert found["math"]["negative_log_likelihood"] == pytest.approx(-(np.log(0.6) + np.log(0.8)) / 2)
    everything = negative_log_likelihood(probabilities, outcomes)
    assert found[""]["negative_log_likelihood"] == pytest.approx(everything)


def test_routing_is_surely_worse_only_beyond_a_standard_error() -> None:
    right = np.tile([[1.0, 0.0]], (40, 1))
    good, bad = np.tile([[0.8, 0.4]], (40, 1)), np.tile([[0.4, 0.8]], (40, 1))
    groups = [str(i) for i in range(40)]
    assert surely_worse(bad, good, right, groups)
    assert not surely_worse(good, bad, right, groups)
    assert not surely_worse(good, good, right, groups)
    thrice, twice = good.copy(), good.copy()
    thrice[:3], twice[3:5] = bad[:3], bad[3:5]
    assert not surely_worse(thrice, twice, right, groups)
    missing = right.copy()
    missing[:, 1] = np.nan
    assert not surely_worse(bad, good, missing, groups)


def test_routing_surely_gains_only_beyond_the_best_rm() -> None:
    right = np.tile([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], (20, 1))
    groups = [str(i) for i in range(60)]
    assert surely_gains(right, right, groups)
    always = np.tile([[0.9, 0.1]], (60, 1))
    assert not surely_gains(always, right, groups)
    right[1::3, 0] = np.nan
    assert not surely_gains(np.nan_to_num(right), right, groups)
