"""Intervals: by hand, and their coverage on made data."""

from __future__ import annotations

import numpy as np
import pytest

from router_core.intervals import Z95, clustered_variance, group_index, grouped_interval, mean_interval, t95


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


def test_the_interval_covers_seeds_and_instances() -> None:
    values = np.random.default_rng(0).integers(0, 2, size=(4, 100)).astype(float)
    low, high = mean_interval(values, [""] * 100)
    by_instance = values.mean(axis=0).var(ddof=1) / 100
    by_seed = values.mean(axis=1).var(ddof=1) / 4
    assert high - values.mean() == pytest.approx(Z95 * (by_instance + by_seed) ** 0.5)
    assert values.mean() - low == pytest.approx(high - values.mean())


def test_students_quantiles() -> None:
    from scipy import stats

    for degrees in (1, 4, 17, 30):
        assert t95(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=6e-4)
    assert t95(31) == pytest.approx(1.96, abs=0.001)


def grouped(rng: np.random.Generator, n_seeds: int) -> tuple[np.ndarray, list[str]]:
    """60 groups of 1 to 6 pairs with a common part per group, and one per seed if there are several; the mean is .3."""
    sizes = rng.integers(1, 7, size=60)
    names = [str(name) for name in np.repeat(np.arange(60), sizes)]
    common = np.repeat(rng.normal(0, 0.5, 60), sizes)
    luck = rng.normal(0, 0.1, (n_seeds, 1)) if n_seeds > 1 else 0.0
    return 0.3 + common + rng.normal(0, 0.3, (n_seeds, len(names))) + luck, names


@pytest.mark.parametrize("n_seeds", [1, 8])
def test_about_nineteen_in_twenty_intervals_hold_the_mean(n_seeds: int) -> None:
    hits, normal, blind = 0, 0, 0
    for trial in range(200):
        rng = np.random.default_rng((trial, n_seeds))
        values, names = grouped(rng, n_seeds)
        low, high = grouped_interval(values, names, rng, bootstraps=200)
        hits += low <= 0.3 <= high
        low, high = mean_interval(values, names)
        normal += low <= 0.3 <= high
        half = Z95 * (values.mean(axis=0).var(ddof=1) / len(names)) ** 0.5
        blind += abs(values.mean() - 0.3) <= half
    # Standard error of 200 trials at .95: .015, three of them; a bootstrap of few groups is a little too narrow.
    assert 0.89 <= hits / 200 <= 0.995
    assert 0.89 <= normal / 200 <= 0.995
    assert blind / 200 < 0.85, "an interval that is blind to groups does not hold what it promises"


def test_the_same_generator_gives_the_same_interval() -> None:
    values, names = grouped(np.random.default_rng(0), 3)
    one, two = (grouped_interval(values, names, np.random.default_rng(1)) for _ in range(2))
    assert one == two
    assert one[0] < values.mean() < one[1]
