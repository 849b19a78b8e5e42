"""How strong the prior should be: the evidence against brute force, and what it does to a posterior along the log."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from router_core.errors import ShapeMismatchError
from router_core.evidence import (
    BETTER_GAIN,
    LAMBDA_GRID,
    LEVEL_GRID,
    level_precisions,
    log_evidence,
    most_probable_precision,
)
from router_core.posterior import FoldSettings, Posterior, fold, start
from router_core.prior import Hyperparameters, Prior, calibrated_prior
from router_core.records import Event, Feedback, Signal
from router_core.snapshot import Snapshot, dump, parse
from tests.router_core.events import make_events, unit_contexts

SETTINGS = FoldSettings(block_size=16, refresh_events=64)
ADAPTING = Hyperparameters(lambda0=100.0, sigma2=0.2, v=0.2, adapt=True)


def prior(d: int = 3, hyper: Hyperparameters = ADAPTING) -> Prior:
    return calibrated_prior(2, d, lambda x: np.full((len(x), 2), 0.5), hyper)


def rewards_of_truth(rng: np.random.Generator, n: int, shift: float) -> list[Event]:
    """Arm 0 is right with probability 1/2 + shift, arm 1 with 1/2 − shift, where both have offset 1/2."""
    events = []
    for x in unit_contexts(rng, n, 3) * np.float32([1, 0.2, 0.2]):
        arm = int(rng.integers(2))
        reward = float(rng.random() < 0.5 + (shift if arm == 0 else -shift) * np.sign(x[0]))
        events.append(Event(arm, x.tobytes(), 0.5, 0, Feedback(Signal.REWARD, reward)))
    return events


def test_the_evidence_is_the_density_of_the_targets_up_to_a_constant() -> None:
    rng = np.random.default_rng(0)
    x, t, sigma2 = rng.standard_normal((9, 3)), rng.standard_normal(9), 0.3
    grid = np.array([0.5, 2.0, 40.0])
    ours = log_evidence(x.T @ x / sigma2, x.T @ t / sigma2, grid)
    true = [multivariate_normal(np.zeros(9), sigma2 * np.eye(9) + x @ x.T / lam).logpdf(t) for lam in grid]
    np.testing.assert_allclose(ours - ours[0], np.array(true) - true[0], rtol=1e-9)


def test_all_arms_choose_together_and_no_data_choose_the_first_of_equals() -> None:
    grams, informations = np.zeros((2, 3, 3)), np.zeros((2, 3))
    assert most_probable_precision(grams, informations) == LAMBDA_GRID[0]
    grams[0], informations[1] = 50 * np.eye(3), 0.0
    assert most_probable_precision(grams, informations) == LAMBDA_GRID[-1]


def test_feedback_as_expected_raises_the_precision_and_feedback_against_it_lowers_it() -> None:
    rng = np.random.default_rng(1)
    trusted = fold(start(prior(), SETTINGS), rewards_of_truth(rng, 640, 0.0))
    doubted = fold(start(prior(), SETTINGS), rewards_of_truth(rng, 640, 0.4))
    assert trusted.lambda0 > 300 > 30 > doubted.lambda0


def test_the_posterior_is_the_one_that_had_the_chosen_precision_from_the_start() -> None:
    events = rewards_of_truth(np.random.default_rng(2), 128, 0.4)
    state = fold(start(prior(), SETTINGS), events)
    fixed = Hyperparameters(state.lambda0, ADAPTING.sigma2, ADAPTING.v)
    other = fold(start(prior(hyper=fixed), SETTINGS), events)
    for ours, theirs in zip(state.arms, other.arms, strict=True):
        np.testing.assert_allclose(ours.precision, theirs.precision, rtol=1e-10)
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-8)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_an_adapting_log_folds_to_the_same_bits_wherever_it_is_cut(gamma: float) -> None:
    rng = np.random.default_rng(3)
    hyper = Hyperparameters(100.0, 0.2, 0.2, gamma, adapt=True)
    events = make_events(rng, 150, 3, 2, offset=0.5)
    whole = fold(start(prior(hyper=hyper), SETTINGS), events)
    for cut in (1, 7, 8, 9, 15, 16, 17, 64, 100):
        assert fold(fold(start(prior(hyper=hyper), SETTINGS), events[:cut]), events[cut:]).digest() == whole.digest()
    at: Posterior = fold(start(prior(hyper=hyper), SETTINGS), events[:64])
    back = parse(dump(Snapshot(at, "1-1"), "run"), "run", prior(hyper=hyper), SETTINGS).posterior
    assert back.lambda0 == at.lambda0 != 100.0
    assert fold(back, events[64:]).digest() == whole.digest()


def test_a_level_is_found_by_the_arms_own_data_alone() -> None:
    rng = np.random.default_rng(6)
    x = np.concatenate([np.ones((40, 1)), rng.standard_normal((40, 3))], axis=1) / 2
    targets = 0.3 + 0.4 * rng.standard_normal(40)
    gram, information = x.T @ x / 0.16, x.T @ targets / 0.16
    nothing = np.zeros((4, 4)), np.zeros(4)
    alone = level_precisions(gram[None], information[None], 1e4)
    assert alone[0] < 20
    grams, informations = np.stack([gram, nothing[0]]), np.stack([information, nothing[1]])
    assert level_precisions(grams, informations, 1e4).tolist() == [alone[0], 1e4]
    # Three observations of 0.1 are too few to tell, and ones around 0 say nothing.
    few = x[:3].T @ x[:3] / 0.16, x[:3].T @ np.full(3, 0.1) / 0.16
    assert level_precisions(few[0][None], few[1][None], 1e4).tolist() == [1e4]
    assert level_precisions(gram[None], (x.T @ (targets - 0.3) / 0.16)[None], 1e4).tolist() == [1e4]
    # A fall of the level needs more than a rise of the same size.
    little = x[:20].T @ x[:20] / 0.16, x[:20].T @ np.full(20, 0.25) / 0.16
    assert level_precisions(little[0][None], little[1][None], 1e4)[0] < 1e4
    assert level_precisions(little[0][None], -little[1][None], 1e4).tolist() == [1e4]


def test_the_level_has_the_evidence_of_a_regression() -> None:
    rng = np.random.default_rng(7)
    x, t, precision = rng.standard_normal((30, 3)) / 2, 0.5 + 0.3 * rng.standard_normal(30), 50.0
    x[:, 0] = 0.5
    chosen = level_precisions((x.T @ x / 0.16)[None], (x.T @ t / 0.16)[None], precision)[0]

    def density(level: float) -> float:
        prior_covariance = np.diag([1 / level, 1 / precision, 1 / precision])
        covariance = 0.16 * np.eye(30) + x @ prior_covariance @ x.T
        return float(multivariate_normal(np.zeros(30), covariance).logpdf(t))

    assert density(chosen) - density(precision) > BETTER_GAIN
    assert density(chosen) == max(density(level) for level in LEVEL_GRID)


def test_the_precision_moves_at_the_eighth_event() -> None:
    events = rewards_of_truth(np.random.default_rng(5), 16, 0.5)
    before, after = (fold(start(prior()), events[:n]) for n in (7, 8))
    assert (before.lambda0, after.lambda0) == (100.0, pytest.approx(LAMBDA_GRID[0]))
    late = fold(start(prior(), FoldSettings(first_adaptation=64)), events)
    assert late.lambda0 == 100.0


def test_adaptation_doubles_its_distance_up_to_a_block() -> None:
    settings = FoldSettings(block_size=16, refresh_events=64, first_adaptation=3)
    assert [n for n in range(1, 50) if settings.adapts_at(n)] == [3, 6, 12, 16, 32, 48]
    with pytest.raises(ShapeMismatchError, match="first_adaptation is 0"):
        FoldSettings(first_adaptation=0)


def test_a_posterior_reads_its_own_columns_of_a_longer_context() -> None:
    rng = np.random.default_rng(4)
    events = make_events(rng, 40, 3, 2, offset=0.5)
    wide = [
        Event(e.arm, np.float32([9, 9, *np.frombuffer(e.x, "<f4"), 9]).tobytes(), e.offset, e.credit, e.feedback)
        for e in events
    ]
    narrow_state = fold(start(prior(), SETTINGS), events)
    wide_state = fold(start(prior().reading(2, 6), SETTINGS), wide)
    assert (wide_state.n_weights, wide_state.prior.d) == (3, 6)
    assert wide_state.digest() == narrow_state.digest()
