"""Policies: exact beliefs, the shared draw, names."""

from __future__ import annotations

import numpy as np
import pytest

from router_core.errors import UnknownPolicyError
from router_core.policies import BayesianPolicy, draw, make_policy, propensity_without, vote_shares
from router_core.posterior import FoldSettings, Posterior, fold, start
from router_core.prior import Hyperparameters, calibrated_prior, no_prior, paper_prior
from router_core.records import TIE
from tests.router_core.events import make_events, unit_contexts

POOL = ("a", "b", "c")


def learned(n: int = 30, d: int = 8) -> Posterior:
    rng = np.random.default_rng(0)
    prior = paper_prior(rng.standard_normal((3, d)), Hyperparameters(3.0, 0.2, 0.7))
    return fold(start(prior, FoldSettings(8, 64)), make_events(rng, n, d, 3))


def test_bayesian_beliefs_are_the_posterior_mean_and_v_times_its_sd() -> None:
    state = learned()
    x = unit_contexts(np.random.default_rng(1), 6, 8)
    offsets = np.random.default_rng(2).random((6, 3))
    beliefs = BayesianPolicy().beliefs(x, offsets, state)
    for i in range(6):
        x64 = x[i].astype(np.float64)
        for k in range(3):
            assert beliefs.means[i, k] == pytest.approx(offsets[i, k] + state.arms[k].mean @ x64, abs=1e-12)
            # Draws read a float32 copy of the covariance.
            assert beliefs.sds[i, k] == pytest.approx(0.7 * state.arms[k].variance(x64) ** 0.5, rel=1e-5)


def test_beliefs_of_a_batch_equal_one_by_one() -> None:
    state = learned()
    x = unit_contexts(np.random.default_rng(3), 9, 8)
    offsets = np.zeros((9, 3))
    batch = BayesianPolicy().beliefs(x, offsets, state)
    for i in range(9):
        one = BayesianPolicy().beliefs(x[i : i + 1], offsets[i : i + 1], state)
        np.testing.assert_allclose(one.means, batch.means[i : i + 1], rtol=1e-12)
        np.testing.assert_allclose(one.sds, batch.sds[i : i + 1], rtol=1e-5)


def test_scalar_draws_have_the_distribution_of_weight_space_draws() -> None:
    state = learned()
    x = unit_contexts(np.random.default_rng(4), 1, 8)
    beliefs = BayesianPolicy().beliefs(x, np.zeros((1, 3)), state)
    rng = np.random.default_rng(5)
    n = 40_000
    scalar = beliefs.means + beliefs.sds * rng.standard_normal((n, 3))
    x64 = x[0].astype(np.float64)
    for k, arm in enumerate(state.arms):
        covariance = arm.covariance - arm.corrections.T @ arm.corrections
        weights = rng.multivariate_normal(arm.mean, 0.7**2 * covariance, size=n, method="cholesky")
        projected = weights @ x64
        sd = scalar[:, k].std()
        # Means differ by two standard errors of 1/sqrt(n) at most with high probability; five are allowed.
        assert abs(projected.mean() - scalar[:, k].mean()) < 5 * sd * (2 / n) ** 0.5
        assert projected.std() == pytest.approx(sd, rel=0.03)
        quantiles = np.linspace(0.05, 0.95, 10)
        np.testing.assert_allclose(
            np.quantile(projected, quantiles), np.quantile(scalar[:, k], quantiles), atol=0.05 * sd
        )


def test_a_prior_without_data_keeps_the_offline_ranking() -> None:
    table = np.array([[0.2, 0.9, 0.5], [0.8, 0.1, 0.3]])
    prior = calibrated_prior(3, 4, lambda x: table[: len(x)], Hyperparameters(100.0, 0.12, 0.0))
    x = unit_contexts(np.random.default_rng(6), 2, 4)
    for name in ("bayesian", "offline"):
        beliefs = make_policy(name, POOL).beliefs(x, prior.offsets(x), start(prior))
        choices = draw(beliefs, np.random.default_rng(7))
        assert choices.ranking.tolist() == np.argsort(-table, axis=1).tolist()


def test_draw_ranks_by_draw_and_breaks_ties_evenly() -> None:
    rng = np.random.default_rng(8)
    beliefs = make_policy("majority", POOL).beliefs(np.zeros((3000, 4), np.float32), np.zeros((3000, 3)), learned(0, 4))
    choices = draw(beliefs, rng)
    first = np.bincount(choices.ranking[:, 0], minlength=3) / 3000
    # Standard error of a share of one third in 3,000 is 0.0086.
    np.testing.assert_allclose(first, 1 / 3, atol=0.04)
    varied = draw(
        make_policy("random", POOL).beliefs(np.zeros((50, 4), np.float32), np.zeros((50, 3)), learned(0, 4)), rng
    )
    ordered = np.take_along_axis(varied.draws, varied.ranking, axis=1)
    assert (np.diff(ordered, axis=1) <= 0).all()
    np.testing.assert_allclose(varied.propensities, 1 / 3, atol=1e-3)


def test_drawn_shares_are_the_logged_propensities() -> None:
    state = learned()
    x = unit_contexts(np.random.default_rng(9), 1, 8)
    many = np.repeat(x, 20_000, axis=0)
    beliefs = BayesianPolicy().beliefs(many, np.zeros((20_000, 3)), state)
    choices = draw(beliefs, np.random.default_rng(10))
    shares = np.bincount(choices.ranking[:, 0], minlength=3) / 20_000
    np.testing.assert_allclose(shares, choices.propensities[0], atol=0.02)


def test_single_asks_one_arm_and_no_other() -> None:
    policy = make_policy("single:b", POOL)
    choices = draw(
        policy.beliefs(np.zeros((2, 4), np.float32), np.zeros((2, 3)), learned(0, 4)), np.random.default_rng(0)
    )
    assert choices.ranking[:, 0].tolist() == [1, 1]
    assert np.isneginf(choices.draws[:, [0, 2]]).all()
    assert choices.propensities.tolist() == [[0, 1, 0], [0, 1, 0]]


def test_propensity_of_a_fallback_is_among_those_left() -> None:
    means, sds = np.array([0.9, 0.5, 0.5]), np.array([0.1, 0.1, 0.1])
    assert propensity_without(means, sds, [0], 1) == pytest.approx(0.5, abs=1e-3)
    assert propensity_without(means, sds, [0, 1], 2) == 1.0


def test_votes_are_shared_on_a_tie() -> None:
    assert vote_shares([0, 0, 1, TIE], 2) == [0.625, 0.375]
    assert vote_shares([2], 3) == [0.0, 0.0, 1.0]
    # Equal shares are equal in every bit, whatever the order of the votes.
    shares = vote_shares([TIE, TIE, 0, TIE, 1], 3)
    assert shares[0] == shares[1]


@pytest.mark.parametrize("name", ["", "thompson", "single:", "single:z"])
def test_an_unknown_policy_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(UnknownPolicyError, match="choose one of"):
        make_policy(name, POOL)


def test_no_prior_starts_undecided() -> None:
    prior = no_prior(2, 3)
    x = unit_contexts(np.random.default_rng(11), 1, 3)
    beliefs = BayesianPolicy().beliefs(x, prior.offsets(x), start(prior))
    assert beliefs.means.tolist() == [[0.5, 0.5]]
    assert beliefs.sds[0, 0] == pytest.approx(prior.hyper.v / prior.hyper.lambda0**0.5)
