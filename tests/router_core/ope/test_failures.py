"""An RM that fails on instances of one kind: the first choice is estimated without bias, masking what failed is not."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from loadtests.ope_coverage import Logger, Population, make_logs, measure, summarise, targets, truth
from router_core.ope import Estimate, LoggedData, doubly_robust, ips, safe_interval, sequential_ridge, snips
from router_core.prior import Hyperparameters
from tests.router_core.ope.bandit import BEST, FAILS, FIRST, POOL, failing_logs, truth_of_first, value_of_first

LOGS, ROWS = 150, 400

WANTED = {"a": np.tile([1.0, 0.0, 0.0], (4, 1)), "best": BEST, "mixed": np.full((4, 3), 1 / 3)}


def estimates(log: LoggedData, pi: NDArray[np.float64]) -> dict[str, Estimate]:
    """All estimators, for a target that may lack support nowhere."""
    return {
        "ips": ips(log, pi, max_lost=1.0),
        "snips": snips(log, pi, max_lost=1.0),
        "dr": doubly_robust(log, pi, sequential_ridge(log), max_lost=1.0),
    }


@pytest.mark.parametrize("shadow", [0.0, 0.1])
def test_the_first_choice_has_no_bias_and_its_intervals_hold_the_truth(shadow: float) -> None:
    """150 logs of 400 rows. Coverage 0.95 has a standard error of 0.018 here; the safe interval holds more often.

    What follows in shadowed rows is the row's own order, which hardly differs: 0.005 is allowed for it and for SNIPS.
    """
    rng = np.random.default_rng(11)
    errors: dict[tuple[str, str], list[float]] = {}
    hits: dict[tuple[str, str], list[bool]] = {}
    for _ in range(LOGS):
        log, _, context = failing_logs(ROWS, rng, shadow)
        for name, pi in WANTED.items():
            wanted = truth_of_first(pi)
            for how, found in estimates(log, pi[context]).items():
                errors.setdefault((name, how), []).append(found.value - wanted)
                hits.setdefault((name, how), []).append(found.ci95[0] <= wanted <= found.ci95[1])
            low, high = safe_interval(log, pi[context])
            hits.setdefault((name, "safe"), []).append(low <= wanted <= high)
    for which, found in errors.items():
        assert abs(np.mean(found)) < 3.5 * np.std(found) / LOGS**0.5 + 0.005, which
    for which, covered in hits.items():
        assert np.mean(covered) >= (0.95 if which[1] == "safe" else 0.89), which


def test_masking_what_failed_is_biased_where_a_first_choice_is_not() -> None:
    """The same logs, once by the first choice and once as if what failed had been away: 150 logs of 400 rows."""
    rng = np.random.default_rng(12)
    errors: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(LOGS):
        by_first, masked, context = failing_logs(ROWS, rng)
        pi, wanted = WANTED["a"][context], truth_of_first(WANTED["a"])
        before = estimates(masked, pi)
        for how, found in estimates(by_first, pi).items():
            errors.setdefault(("a", how), []).append((found.value - wanted, before[how].value - wanted))
    for (_, how), both in errors.items():
        new, old = np.mean(both, axis=0)
        assert abs(new) < 0.01, how
        assert abs(old) > 0.05, (how, old)


def test_the_log_by_first_choice_is_that_of_the_sampler() -> None:
    log, masked, context = failing_logs(4000, np.random.default_rng(13))
    for where in range(4):
        rows = context == where
        share = np.bincount(log.arm[rows], minlength=3) / rows.sum()
        assert share == pytest.approx(FIRST[where], abs=0.05)
        for arm in range(3):
            mine = log.reward[rows & (log.arm == arm)]
            if len(mine) > 100:
                assert mine.mean() == pytest.approx(value_of_first()[where, arm], abs=0.12)
    assert (masked.available.all(axis=1) == ~(FAILS[context, 0] & (log.arm == 0))).all()


def short_sighted() -> Population:
    """60 instances; "a" is the best RM and cannot read those on which the others are worst."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 4)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    chance = np.clip(np.array([0.9, 0.5, 0.5]) + 0.4 * x[:, :1].astype(np.float64), 0.0, 1.0)
    too_long = np.zeros((60, 3), np.bool_)
    too_long[:, 0] = x[:, 0] < 0
    return Population(POOL, x, (rng.random((60, 3)) < chance).astype(np.float64), chance, too_long)


@pytest.mark.parametrize(
    "hyper", [None, Hyperparameters(lambda0=1.0, sigma2=1.0, v=1.0)], ids=["random", "learning sampler"]
)
def test_intervals_cover_what_a_log_with_failures_is_worth_and_masked_ones_do_not(
    hyper: Hyperparameters | None,
) -> None:
    """40 logs of 300 rows of the coverage benchmark; 0.95 has a standard error of 0.034 per target."""
    made, size = short_sighted(), 300
    new = measure(made, Logger("new", hyper, failing=True), 40, [size], 0, 1e-3, 0.05)[str(size)]
    old = measure(made, Logger("old", hyper, failing=True, masked=True), 40, [size], 0, 1e-3, 0.05)[str(size)]
    for how in ("ips", "snips", "dr"):
        assert summarise({"n": new})["n"][how]["coverage"] >= 0.9, how
        assert new["single:a"][how]["coverage"] >= 0.85, how
        assert abs(new["single:a"][how]["bias"]) < 0.025, how
        assert new["single:a"][how]["truth"] == old["single:a"][how]["truth"]
    for how in ("snips", "dr"):
        # What is left of the log looks as if "a" were asked where it can read: its best instances.
        assert old["single:a"][how]["bias"] > 0.2, how
        assert old["single:a"][how]["coverage"] < 0.2, how


def test_the_truth_of_a_log_with_failures_counts_what_follows() -> None:
    made = short_sighted()
    streams = make_logs(made, Logger("random", None, failing=True), 20, 200, np.random.default_rng(1))
    fell = streams.first != streams.arm
    assert made.too_long is not None
    assert (fell == (made.too_long[streams.index, 0] & (streams.first == 0))).all()
    wanted = targets(made)
    expected = np.where(made.too_long[:, 0], made.correctness[:, 1:].mean(axis=1), made.correctness[:, 0]).mean()
    assert truth(made, streams, wanted["single:a"], failing=True) == pytest.approx(expected, abs=0.02)
    assert truth(made, streams, wanted["single:b"], failing=True) == made.correctness[:, 1].mean()
