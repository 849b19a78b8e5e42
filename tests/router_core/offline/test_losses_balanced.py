"""Balanced couples: each (j right where l is wrong) weighs alike in the Bradley-Terry loss."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from router_core.offline.losses import (  # noqa: E402
    MAX_COUPLE_WEIGHT,
    balanced_couples,
    bradley_terry,
    informative_pairs,
)

NAN = float("nan")


def test_couples_weigh_alike_over_all_pairs_however_unequal_their_counts() -> None:
    correctness = torch.tensor([[1.0, 0.0, 0.0]] * 6 + [[0.0, 1.0, 0.0]] * 2 + [[0.0, NAN, 1.0]])
    weights = balanced_couples(correctness)
    y = torch.nan_to_num(correctness)
    asked = torch.isfinite(correctness)
    counts = torch.einsum("nj,nl->jl", y, (1 - y) * asked)
    totals = (weights * counts)[weights > 0]
    torch.testing.assert_close(totals, totals.mean().expand_as(totals))
    assert totals.sum() == pytest.approx(float(counts.sum() - counts.diagonal().sum()))
    assert not weights.diagonal().any()


def test_a_couple_that_was_seen_once_has_a_bound() -> None:
    weights = balanced_couples(torch.tensor([[1.0, 0.0]] * 999 + [[0.0, 1.0]]))
    assert float(weights[1, 0]) == MAX_COUPLE_WEIGHT
    assert float(weights[0, 1]) == pytest.approx(500 / 999)


def test_the_gradient_of_a_rare_couple_grows() -> None:
    correctness = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    scores = torch.zeros(4, 2, requires_grad=True)
    bradley_terry(scores, correctness, balanced_couples(correctness)).backward()
    assert scores.grad is not None
    assert float(scores.grad[:, 0].sum()) == pytest.approx(0.0, abs=1e-6), "both orders pull alike"
    plain = torch.zeros(4, 2, requires_grad=True)
    bradley_terry(plain, correctness).backward()
    assert plain.grad is not None
    assert float(plain.grad[:, 0].sum()) < -0.1


def test_no_couple_gives_no_weight_and_no_loss() -> None:
    correctness = torch.tensor([[1.0, 1.0], [NAN, 0.0]])
    assert not balanced_couples(correctness).any()
    assert int(informative_pairs(correctness)) == 0
    assert float(bradley_terry(torch.ones(2, 2), correctness, balanced_couples(correctness))) == 0.0


def test_informative_pairs_are_those_the_loss_averages_over() -> None:
    correctness = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.5, 0.5], [NAN, 0.0]])
    assert int(informative_pairs(correctness)) == 2
