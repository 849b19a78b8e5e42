"""Intervals: by hand, and their coverage on made data."""

from __future__ import annotations

import numpy as np
import pytest

from router_core.intervals import (
    Z95,
    accuracy_interval,
    clustered_variance,
    effective_groups,
    group_index,
    mean_spread,
    paired_difference,
    t95,
)


def test_groups_are_numbered_and_the_nameless_stand_alone() -> None:
    assert group_index(["b", "", "b", "", "a"]).tolist() == [0, 1, 0, 2, 3]


def test_groups_of_one_give_the_usual_variance_of_a_mean() -> None:
    values = np.array([0.0, 1.0, 1.0, 1.0, 0.5])
    assert clustered_variance(values, [""] * 5) == pytest.approx(values.var(ddof=1) / 5)


def test_copies_in_a_group_say_nothing_new() -> None:
    values = np.array([0.0, 1.0, 1.0, 0.0])
    names = ["a", "b", "c", "d"]
    assert clustered_variance(np.repeat(values, 3), list(np.repeat(names, 3))) == pytest.approx(
        clustered_variance(values, names)
    )
    assert clustered_variance(values, ["one"] * 4) == 0.0


def test_the_spread_covers_seeds_and_instances() -> None:
    values = np.random.default_rng(0).integers(0, 2, size=(4, 100)).astype(float)
    by_instance = values.mean(axis=0).var(ddof=1) / 100
    by_seed = values.mean(axis=1).var(ddof=1) / 4
    variance, degrees = mean_spread(values, [""] * 100)
    assert variance == pytest.approx(by_instance + by_seed)
    assert degrees == pytest.approx(variance**2 / (by_instance**2 / 99 + by_seed**2 / 3))


def test_a_difference_has_students_interval_and_two_pairs_more() -> None:
    values = np.array([1.0, -1.0, 0.0, 1.0])
    found = paired_difference(values, [""] * 4)
    assert found.value == 0.25
    assert found.deviation == pytest.approx((values.var(ddof=1) / 4 + 2 / 36) ** 0.5)
    assert found.ci95[1] - found.value == pytest.approx(3.182 * found.deviation)


def test_where_no_pair_differs_the_interval_still_has_a_width() -> None:
    low, high = paired_difference(np.zeros(33), [""] * 33).ci95
    assert low == -high
    assert high > 0.08


def test_one_large_group_counts_for_little_more_than_one() -> None:
    assert effective_groups(["a"] * 90 + ["b", "c"]) < 1.1
    assert mean_spread(np.ones((1, 92)), ["a"] * 90 + ["b", "c"])[1] == 1.0


def test_students_quantiles() -> None:
    from scipy import stats

    for degrees in (1, 4, 17, 30):
        assert t95(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=6e-4)
    for degrees in (6.5, 31, 60, 1e6):
        assert t95(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=4e-3)
    assert t95(0.2) == t95(1)


def grouped(rng: np.random.Generator, n_seeds: int) -> tuple[np.ndarray, list[str]]:
    """60 groups of 1 to 6 pairs with a common part per group, and one per seed if there are several; the mean is .3."""
    sizes = rng.integers(1, 7, size=60)
    names = [str(name) for name in np.repeat(np.arange(60), sizes)]
    common = np.repeat(rng.normal(0, 0.5, 60), sizes)
    luck = rng.normal(0, 0.1, (n_seeds, 1)) if n_seeds > 1 else 0.0
    return 0.3 + common + rng.normal(0, 0.3, (n_seeds, len(names))) + luck, names


@pytest.mark.parametrize("n_seeds", [1, 8])
def test_about_nineteen_in_twenty_intervals_hold_the_mean(n_seeds: int) -> None:
    hits, blind = 0, 0
    for trial in range(200):
        rng = np.random.default_rng((trial, n_seeds))
        values, names = grouped(rng, n_seeds)
        low, high = paired_difference(values, names).ci95
        hits += low <= 0.3 <= high
        half = Z95 * (values.mean(axis=0).var(ddof=1) / len(names)) ** 0.5
        blind += abs(values.mean() - 0.3) <= half
    # Standard error of 200 trials at .95: .015, three of them.
    assert 0.905 <= hits / 200 <= 0.995
    assert blind / 200 < 0.85, "an interval that is blind to groups does not hold what it promises"


def test_thirty_three_groups_are_enough() -> None:
    """33 pairs of which .94 are right, and 33 of which a tenth differ; the bootstrap of these covers .86."""
    accuracy, difference = 0, 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        low, high = accuracy_interval((rng.random((1, 33)) < 0.94).astype(float), [""] * 33)
        accuracy += low <= 0.94 <= high
        values = rng.choice([1.0, -1.0, 0.0], size=33, p=[0.08, 0.02, 0.9])
        low, high = paired_difference(values, [""] * 33).ci95
        difference += low <= 0.06 <= high
    # Few values of the accuracy are possible, so coverage jumps with the truth.
    assert accuracy / 400 >= 0.92
    assert difference / 400 >= 0.94
