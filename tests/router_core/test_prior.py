"""Priors: the three forms, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from router_core.errors import HyperparameterError, NotFiniteError, ShapeMismatchError
from router_core.feedback import LossScale
from router_core.prior import Hyperparameters, Prior, PriorForm, calibrated_prior, linucb_prior, no_prior, paper_prior


def test_paper_prior_has_unit_means_and_no_offset() -> None:
    prior = paper_prior(np.array([[3.0, 4.0], [0.0, 2.0]]))
    assert prior.means.tolist() == [[0.6, 0.8], [0.0, 1.0]]
    assert prior.offsets(np.ones((2, 2), np.float32)).tolist() == [[0, 0], [0, 0]]
    assert prior.loss_scale is LossScale.Z
    assert (prior.hyper.lambda0, prior.hyper.sigma2, prior.hyper.v) == (1.0, 1.0, 1.0)


def test_calibrated_prior_is_a_residual_around_the_probability() -> None:
    prior = calibrated_prior(2, 3, lambda x: np.tile([0.25, 0.75], (len(x), 1)))
    assert prior.form is PriorForm.CALIBRATED
    assert prior.means.tolist() == [[0.0] * 3] * 2
    assert prior.offsets(np.ones((1, 3), np.float32)).tolist() == [[0.25, 0.75]]
    assert prior.loss_scale is LossScale.POOLED


def test_no_prior_is_an_even_chance() -> None:
    assert no_prior(3, 2).offsets(np.ones((1, 2), np.float32)).tolist() == [[0.5, 0.5, 0.5]]


def test_linucb_starts_at_the_identity_with_lasers_constants() -> None:
    prior = linucb_prior(2, 3)
    assert prior.form is PriorForm.LINUCB
    assert (prior.hyper.lambda0, prior.hyper.sigma2, prior.hyper.v, prior.hyper.gamma) == (1.0, 1.0, 0.1, 1.0)
    assert prior.offsets(np.ones((1, 3), np.float32)).tolist() == [[0.0, 0.0]]
    assert not prior.means.any()
    assert prior.loss_scale is LossScale.QUANTILE


@pytest.mark.parametrize("embeddings", [[[0.0, 0.0]], [[np.nan, 1.0]]])
def test_embeddings_without_a_direction_are_refused(embeddings: list[list[float]]) -> None:
    with pytest.raises(NotFiniteError, match="train the checkpoint again"):
        paper_prior(np.array(embeddings))


@pytest.mark.parametrize(
    ("field", "value"), [("lambda0", 0.0), ("sigma2", -1.0), ("v", -0.1), ("gamma", 0.0), ("gamma", 1.1), ("v", np.nan)]
)
def test_hyperparameters_outside_their_domain_are_refused(field: str, value: float) -> None:
    given = {"lambda0": 1.0, "sigma2": 1.0, "v": 1.0, "gamma": 1.0, field: value}
    with pytest.raises(HyperparameterError, match=field):
        Hyperparameters(**given)


def test_means_must_be_a_finite_matrix() -> None:
    with pytest.raises(ShapeMismatchError, match="give \\(K, W\\)"):
        Prior(PriorForm.NONE, np.zeros(3), Hyperparameters(1.0, 1.0, 1.0))
    with pytest.raises(NotFiniteError):
        Prior(PriorForm.NONE, np.full((1, 2), np.inf), Hyperparameters(1.0, 1.0, 1.0))
