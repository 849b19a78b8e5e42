"""What a fit hands over: exact heads, columns per prior form, landmarks, the rotation and the whitening."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from router_core.encoder.surface import SurfaceBackbone  # noqa: E402
from router_core.offline.kernel import GAIN  # noqa: E402
from router_core.offline.members import spanning, whitening  # noqa: E402
from router_core.offline.train import TrainConfig, fit, pair_features  # noqa: E402
from router_core.prior import CALIBRATED_HYPERPARAMETERS, PriorForm  # noqa: E402
from tests.support.offline import POOL, two_domains  # noqa: E402

FAST = TrainConfig(max_epochs=6, folds=2, directions=2, context=2, members=2, member_dim=4, hidden=8)
NEAR = replace(FAST, kernel_from=160, max_epochs=20)
"""Settings with which routing surely beats the best RM on the test pairs, so that the fit has a kernel."""


def test_the_online_stage_gets_the_settings_of_the_replays() -> None:
    checkpoint, _ = fit(two_domains(80), POOL, SurfaceBackbone(), FAST)
    assert checkpoint.hyperparameters == CALIBRATED_HYPERPARAMETERS
    assert checkpoint.prior_form is PriorForm.CALIBRATED


def test_a_checkpoint_keeps_the_heads_exact_and_says_which_columns_each_form_reads() -> None:
    pairs = two_domains(160)
    checkpoint, _ = fit(pairs, POOL, SurfaceBackbone(), NEAR)
    features, learned = checkpoint.fuse.features, checkpoint.fuse.learned
    assert features == learned + len(POOL)
    assert checkpoint.columns(PriorForm.PAPER) == (0, learned)
    assert checkpoint.columns(PriorForm.CALIBRATED) == (features, 3)
    np.testing.assert_allclose(np.linalg.norm(checkpoint.bt_embeddings, axis=1), 1.0, rtol=1e-5)
    assert checkpoint.scores is not None
    assert fit(pairs, POOL, SurfaceBackbone(), FAST)[0].fuse.kernel is None
    papers = fit(pairs, POOL, SurfaceBackbone(), replace(NEAR, lambda_cls=0.0))[0]
    assert papers.prior_form is PriorForm.PAPER
    assert papers.fuse.kernel is None


def test_offsets_are_the_networks_and_the_kernel_together() -> None:
    pairs = two_domains(160)
    checkpoint, _ = fit(pairs, POOL, SurfaceBackbone(), NEAR)
    kernel, learned = checkpoint.fuse.kernel, checkpoint.fuse.learned
    assert kernel is not None
    x = checkpoint.fuse.apply(pair_features(pairs, SurfaceBackbone()))
    said = x[:, learned : checkpoint.fuse.features]
    alone = replace(
        checkpoint, fuse=replace(checkpoint.fuse, kernel=None), cls_weight=checkpoint.cls_weight[:, :learned].copy()
    )
    features = np.delete(x, np.arange(learned, checkpoint.fuse.features), axis=1)

    def logits(p: np.ndarray) -> np.ndarray:
        return np.asarray(np.log(p) - np.log1p(-p))

    difference = logits(checkpoint.class_probabilities(x)) - logits(alone.class_probabilities(features))
    np.testing.assert_allclose(difference, checkpoint.calibration_scale * GAIN * said, atol=1e-4)
    assert np.abs(difference).max() > 0.1


def test_a_checkpoint_tells_texts_of_a_domain_that_it_never_saw_from_those_that_it_did() -> None:
    pairs = two_domains(240)
    prose = [pair for pair in pairs if pair.domain == "prose"]
    checkpoint, _ = fit(prose, POOL, SurfaceBackbone(), FAST)
    landmarks = checkpoint.landmarks
    assert landmarks is not None
    shares = {}
    for domain in ("prose", "code"):
        new = [pair for pair in two_domains(200, seed=5) if pair.domain == domain]
        x = checkpoint.fuse.apply(pair_features(new, SurfaceBackbone()))
        shares[domain] = np.mean([landmarks.is_novel(row) for row in x])
    assert shares["prose"] < 0.45 < 0.9 < shares["code"]


def test_a_rotation_spans_what_is_wanted_and_the_leading_rest() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, 6)) * [9, 1, 1, 1, 1, 0.1]
    wanted = np.zeros((6, 2))
    wanted[5] = 1.0
    rotation = spanning(rows, wanted, 1)
    assert rotation.shape == (6, 2)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(rotation @ (rotation.T @ wanted), wanted, atol=1e-12)
    assert abs(rotation[0, 1]) > 0.95


def test_whitening_gives_unit_deviations_and_drops_what_does_not_move() -> None:
    rng = np.random.default_rng(1)
    u = (rng.standard_normal((400, 3)) * [5, 0.2, 0]).astype(np.float32)
    context = whitening(u, 8)
    assert context.shape == (3, 2)
    np.testing.assert_allclose((u @ context).std(axis=0), 1.0, rtol=1e-4)
