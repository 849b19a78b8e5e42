"""The scalars of the online prior: the noise by hand, and that a replay moves a scalar only for a clear reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from router_core.encoder.surface import SurfaceBackbone  # noqa: E402
from router_core.novelty import Landmarks  # noqa: E402
from router_core.offline.members import spanning, whitening  # noqa: E402
from router_core.offline.train import TrainConfig, fit, pair_features  # noqa: E402
from router_core.offline.tune import NOVEL, Stream, choose_form, fit_hyperparameters, residual_variance  # noqa: E402
from router_core.prior import CALIBRATED_HYPERPARAMETERS, PriorForm  # noqa: E402
from router_core.replay.table import tabulate  # noqa: E402
from tests.support.offline import POOL, two_domains  # noqa: E402

FAST = TrainConfig(max_epochs=6, folds=2, d=2, context=2, members=2, member_dim=4, hidden=8)


def test_the_noise_is_the_mean_square_of_the_residuals_inside_its_bounds() -> None:
    probabilities, correctness = np.array([[0.5, 0.9], [0.5, 0.9]]), np.array([[1.0, 1.0], [0.5, np.nan]])
    assert residual_variance(probabilities, correctness) == pytest.approx((0.25 + 0.01 + 0.0) / 3)
    assert residual_variance(correctness, correctness) == 0.02
    assert residual_variance(np.ones((1, 1)), np.array([[np.nan]])) == CALIBRATED_HYPERPARAMETERS.sigma2


def test_without_streams_everything_stays_at_its_default() -> None:
    assert fit_hyperparameters(0.1, []) == (replace(CALIBRATED_HYPERPARAMETERS, sigma2=0.1), {})


def test_offsets_that_say_nothing_make_exploring_and_learning_pay() -> None:
    pairs = two_domains(160)
    table = tabulate(pairs, POOL)
    x = np.float32([[1, 0] if pair.subset == "code" else [0, 1] for pair in pairs])
    known = np.where(x[:, :1] > 0, [[0.95, 0.5]], [[0.5, 0.95]])
    hyper, accuracy = fit_hyperparameters(
        0.15, [Stream("told", table, x, known, 0, 2), Stream("untold", table, x, 1.0 - known + 0.45, 0, 2)]
    )
    assert accuracy["told"] > 0.9
    assert accuracy["untold"] > 0.75
    assert hyper.adapt
    assert hyper.gamma == 1.0


def test_the_form_that_earns_more_is_taken() -> None:
    pairs = two_domains(160)
    table = tabulate(pairs, POOL)
    x = np.float32([[1, 0] if pair.subset == "code" else [0, 1] for pair in pairs])
    good = np.where(x[:, :1] > 0, [[0.95, 0.5]], [[0.5, 0.95]])
    knowing, misled = Stream("s", table, x, good, 0, 2), Stream("s", table, x, 1.4 - good, 0, 2)
    assert choose_form(CALIBRATED_HYPERPARAMETERS, np.eye(2), [knowing])[0] is PriorForm.CALIBRATED
    # Nothing is learned online from so sure and so wrong an offset, and the embeddings know the domains.
    stubborn = replace(CALIBRATED_HYPERPARAMETERS, lambda0=1e6, adapt=False)
    form, accuracy = choose_form(stubborn, np.eye(2), [misled])
    assert form is PriorForm.PAPER
    assert accuracy["s"] > 0.6
    assert choose_form(stubborn, np.eye(2), []) == (PriorForm.CALIBRATED, {})


def test_tuning_replays_the_domains_that_were_left_out_and_says_how_it_went() -> None:
    checkpoint, held_out = fit(two_domains(160), POOL, SurfaceBackbone(), replace(FAST, tune=True))
    replayed = {name for name in checkpoint.metrics if name.startswith("replayed_accuracy")}
    streams = ("in distribution", "unseen code", "unseen prose")
    assert replayed == {f"replayed_accuracy{form} {name}" for form in ("", "_paper") for name in streams}
    sigma2 = residual_variance(held_out.probabilities, held_out.correctness)
    assert checkpoint.hyperparameters.sigma2 == pytest.approx(sigma2)


def test_a_checkpoint_keeps_the_heads_exact_and_says_which_columns_each_form_reads() -> None:
    pairs = two_domains(80)
    checkpoint, _ = fit(pairs, POOL, SurfaceBackbone(), FAST)
    features = checkpoint.fuse.features
    assert checkpoint.columns(PriorForm.PAPER) == (0, features)
    assert checkpoint.columns(PriorForm.CALIBRATED) == (features, 3)
    np.testing.assert_allclose(np.linalg.norm(checkpoint.bt_embeddings, axis=1), 1.0, rtol=1e-5)
    assert checkpoint.scores is not None
    assert fit(pairs, POOL, SurfaceBackbone(), replace(FAST, lambda_cls=0.0))[0].prior_form is PriorForm.PAPER


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


def test_the_precision_for_novel_texts_is_lowered_where_that_pays_on_novel_domains() -> None:
    pairs = two_domains(160)
    table = tabulate(pairs, POOL)
    x = np.float32([[1, 3] if pair.subset == "code" else [1, -3] for pair in pairs])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    # One RM is said to be the better one everywhere; in truth each is the better one of its own domain.
    offsets = np.tile([0.75, 0.5], (len(pairs), 1))
    elsewhere = Landmarks(np.zeros((6, 1), np.float32), 1.0)
    novel = Stream("unseen", table, x, offsets, 0, 2, elsewhere)
    assert fit_hyperparameters(0.15, [novel])[0].lambda_novel == min(NOVEL)
    known = replace(novel, landmarks=Landmarks(np.zeros((6, 1), np.float32), 9.0))
    assert fit_hyperparameters(0.15, [known])[0].lambda_novel == CALIBRATED_HYPERPARAMETERS.lambda_novel


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
