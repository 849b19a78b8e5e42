"""Streams: orders, phases, delays and gaps; and the simulated loss."""

from __future__ import annotations

import numpy as np
import pytest

from router_core.errors import DatasetError, FeedbackError, HyperparameterError
from router_core.replay import Delay, Scenario, SimulatedLoss, make_plan, tabulate
from tests.support.replay import POOL, pair, specialists

TABLE = tabulate(specialists(200)[0], POOL)


def test_each_repeat_meets_every_pair_once_in_another_order() -> None:
    plan = make_plan(TABLE, Scenario(repeat=3), 0)
    rounds = plan.order.reshape(3, 200)
    assert all(sorted(part) == list(range(200)) for part in rounds.tolist())
    assert len({tuple(part) for part in rounds.tolist()}) == 3


def test_what_is_switched_on_changes_nothing_else() -> None:
    plain = make_plan(TABLE, Scenario(), 7)
    other = make_plan(TABLE, Scenario(delay=Delay("geometric", 3), missing=0.5), 7)
    assert (plain.order == other.order).all()
    assert (plain.noise == other.noise).all()
    assert (plain.loss_noise == other.loss_noise).all()
    # The order is the one that a replay over HTTP and earlier versions have for this seed.
    assert plain.order.tolist() == np.random.default_rng(7).permutation(200).tolist()


def test_drift_brings_one_domain_after_another_with_soft_borders() -> None:
    kinds = np.array([name == "odd" for name in TABLE.domains])
    first_domains = set()
    for seed in range(6):
        met = kinds[make_plan(TABLE, Scenario(drift=True), seed).order]
        assert sorted(make_plan(TABLE, Scenario(drift=True), seed).order.tolist()) == list(range(200))
        begin, end = met[:70].mean(), met[-70:].mean()
        assert {round(begin), round(end)} == {0, 1}
        assert min(begin, end) < 0.05
        assert max(begin, end) > 0.95
        changes = np.flatnonzero(np.diff(met.astype(int)))
        assert len(changes) > 1, "the border is soft"
        first_domains.add(round(begin))
    assert first_domains == {0, 1}, "which domain comes first is the seed's"


def test_drift_needs_two_domains_or_subsets() -> None:
    alike = tabulate([pair(i, 0, {"left": 0, "right": 1}, domain="d", subset="s") for i in range(4)], POOL)
    with pytest.raises(DatasetError, match="domain"):
        make_plan(alike, Scenario(drift=True), 0)
    subsets = tabulate([pair(i, 0, {"left": 0, "right": 1}, domain="d", subset=f"s{i % 2}") for i in range(4)], POOL)
    assert len(make_plan(subsets, Scenario(drift=True), 0)) == 4


def test_a_constant_delay_keeps_the_order_and_shifts_it() -> None:
    plan = make_plan(TABLE, Scenario(delay=Delay("constant", 12)), 0)
    assert plan.due.tolist() == [step + 12 for step in range(200)]
    assert plan.arrivals().tolist() == list(range(200 - 12))


def test_a_batch_delay_brings_a_batch_at_its_end() -> None:
    plan = make_plan(TABLE, Scenario(delay=Delay("batch", 64)), 0)
    assert set(plan.due[:64].tolist()) == {63}
    assert set(plan.due[64:128].tolist()) == {127}
    assert plan.due[-1] >= 200, "the last batch is not full, and its feedback never comes"


def test_a_geometric_delay_has_its_mean_and_mixes_the_order() -> None:
    delays = Delay("geometric", 10).due(20_000, np.random.default_rng(0)) - np.arange(20_000)
    assert delays.min() == 0
    # Standard deviation sqrt(10 · 11) = 10.5; of the mean of 20,000 0.074: four of them.
    assert abs(delays.mean() - 10) < 0.3
    arrivals = make_plan(TABLE, Scenario(delay=Delay("geometric", 10)), 0).arrivals()
    assert (np.diff(arrivals) < 0).any()


@pytest.mark.parametrize(
    ("text", "expected"), [("0", Delay()), ("5", Delay("constant", 5)), ("geometric:3", Delay("geometric", 3))]
)
def test_delays_are_read_and_written_alike(text: str, expected: Delay) -> None:
    assert Delay.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize("text", ["-1", "soon", "geometric:", "batch:0", "uniform:3", "1.5"])
def test_other_delays_are_refused(text: str) -> None:
    with pytest.raises(FeedbackError, match="geometric:MEAN"):
        Delay.parse(text)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.333, 1.0])
def test_exactly_the_missing_share_never_arrives(share: float) -> None:
    plan = make_plan(TABLE, Scenario(missing=share), 3)
    assert len(plan.arrivals()) == 200 - round(share * 200)


def test_shadowed_steps_are_exact_and_nested() -> None:
    plan = make_plan(TABLE, Scenario(), 3)
    few, more = plan.shadowed(0.1), plan.shadowed(0.4)
    assert (few.sum(), more.sum(), plan.shadowed(1.0).sum()) == (20, 80, 200)
    assert (more | ~few).all()


def test_right_verdicts_have_the_smaller_mean_loss_and_losses_fall_along_the_stream() -> None:
    noise = np.random.default_rng(0).standard_normal(20_000)
    model = SimulatedLoss()

    def mean(right: float, progress: float) -> float:
        full = np.ones_like(noise)
        return float(model.losses(right * full, progress * full, noise).mean())

    for progress in (0.0, 1.0):
        assert mean(1.0, progress) < mean(0.5, progress) < mean(0.0, progress)
    assert mean(1.0, 1.0) < mean(1.0, 0.0)
    assert mean(0.0, 1.0) < mean(0.0, 0.0)


def test_separation_is_the_distance_of_the_margins_in_standard_deviations() -> None:
    noise = np.random.default_rng(1).standard_normal(100_000)
    ones = np.ones_like(noise)
    right, wrong = (SimulatedLoss(separation=1.5).losses(value * ones, 0 * ones, noise) for value in (1.0, 0.0))
    # loss = log(1 + exp(−β·margin)) is undone exactly.
    margins = [-np.log(np.expm1(losses)) / 0.1 for losses in (right, wrong)]
    assert (margins[0].mean() - margins[1].mean()) / 10.0 == pytest.approx(1.5)
    # P(N(0,1) < 1.5/2) = 0.773: how often a single loss is on the right side of the middle. Standard error 0.0013.
    assert np.mean(margins[0] > 0) == pytest.approx(0.773, abs=0.006)


def test_impossible_loss_models_are_refused() -> None:
    with pytest.raises(HyperparameterError, match="separation"):
        SimulatedLoss(separation=-1.0)
    with pytest.raises(HyperparameterError, match="beta"):
        SimulatedLoss(beta=0.0)
