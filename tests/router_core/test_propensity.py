"""Propensities against exact integrals and against counted draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from router_core.propensity import argmax_propensities, normal_cdf


def dense(means: np.ndarray, sds: np.ndarray) -> np.ndarray:
    """P(argmax) by 20,001 trapezoids in each arm's own scale: exact to 1e-8 where scales are alike, 1e-4 elsewhere."""
    z = np.linspace(-8, 8, 20001)
    out = []
    for k in range(len(means)):
        weight = norm.pdf(z) * (z[1] - z[0])
        for j in range(len(means)):
            if j != k:
                weight = weight * norm.cdf((means[k] + sds[k] * z - means[j]) / sds[j])
        out.append(weight.sum())
    return np.array(out)


def test_normal_cdf_is_scipys() -> None:
    z = np.linspace(-9, 9, 4001)
    np.testing.assert_allclose(normal_cdf(z), norm.cdf(z), atol=7.5e-8)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.floats(-2.5, 0.5), st.booleans())
def test_within_one_thousandth_of_the_integral(seed: int, k: int, log_scale: float, alike: bool) -> None:
    rng = np.random.default_rng(seed)
    means = rng.standard_normal(k)
    sds = 10**log_scale * (np.ones(k) if alike else 10 ** rng.uniform(-1.5, 1.5, k))
    got = argmax_propensities(means[None], sds[None])[0]
    assert got.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(got, dense(means, sds), atol=1e-3)


@pytest.mark.parametrize("k", [13, 40, 85])
def test_many_arms_of_very_different_scales_keep_the_bound(k: int) -> None:
    rng = np.random.default_rng(k)
    for lowest, highest in ((0.3, 0.95), (0.6, 0.62)):
        means, sds = rng.uniform(lowest, highest, k), 10 ** rng.uniform(-3, -0.5, k)
        z = np.unique((means[:, None] + sds[:, None] * np.linspace(-6, 6, 400)).ravel())
        logs = norm.logcdf((z - means[:, None]) / sds[:, None])
        others = np.exp(logs.sum(axis=0) - logs)
        exact = ((others[:, 1:] + others[:, :-1]) * np.diff(np.exp(logs), axis=1)).sum(axis=1) / 2
        got = argmax_propensities(means[None], sds[None])[0]
        np.testing.assert_allclose(got, exact, atol=1e-3)


def test_many_point_masses_share_or_yield() -> None:
    means = np.full(20, 0.5)
    means[3:5] = 0.8
    got = argmax_propensities(means[None], np.zeros((1, 20)))[0]
    assert got[3:5].tolist() == pytest.approx([0.5, 0.5])
    assert got.sum() == pytest.approx(1.0)


def test_agrees_with_the_share_of_a_million_draws() -> None:
    rng = np.random.default_rng(0)
    means, sds = np.array([0.7, 0.72, 0.6, 0.75]), np.array([0.05, 0.02, 0.1, 0.01])
    draws = means + sds * rng.standard_normal((1_000_000, 4))
    shares = np.bincount(draws.argmax(axis=1), minlength=4) / len(draws)
    # Standard error of a share is at most 5e-4; four of them, and the quadrature's 1e-3.
    np.testing.assert_allclose(argmax_propensities(means[None], sds[None])[0], shares, atol=3e-3)


def test_batch_equals_one_by_one_even_when_rows_take_different_grids() -> None:
    rng = np.random.default_rng(1)
    means = rng.standard_normal((40, 5))
    sds = 10 ** rng.uniform(-3, 0, (40, 5))
    batch = argmax_propensities(means, sds)
    single = np.concatenate([argmax_propensities(means[i : i + 1], sds[i : i + 1]) for i in range(40)])
    np.testing.assert_allclose(batch, single, atol=1e-12)


def test_point_masses_go_to_the_largest_and_share_when_equal() -> None:
    means = np.array([[0.1, 0.9, 0.3], [0.5, 0.5, 0.2]])
    got = argmax_propensities(means, np.zeros_like(means))
    np.testing.assert_allclose(got[0], [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(got[1], [0.5, 0.5, 0], atol=1e-3)


def test_arms_that_cannot_be_drawn_have_none() -> None:
    got = argmax_propensities(np.array([[0.0, -np.inf, 0.0, 0.0]]), np.ones((1, 4)))
    np.testing.assert_allclose(got[0], [1 / 3, 0, 1 / 3, 1 / 3], atol=1e-3)
    assert argmax_propensities(np.array([[-np.inf, 2.0]]), np.ones((1, 2))).tolist() == [[0.0, 1.0]]


def test_one_arm_is_certain() -> None:
    assert argmax_propensities(np.array([[3.0]]), np.array([[0.1]])).tolist() == [[1.0]]
