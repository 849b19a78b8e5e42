"""IPS, SNIPS, doubly robust: by hand, without bias, with intervals that hold the truth, and never without support."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from router_core.errors import NotFiniteError, ShapeMismatchError
from router_core.ope import (
    LoggedData,
    NoSupportError,
    available_propensities,
    doubly_robust,
    ips,
    one_reward_per_row,
    safe_interval,
    sequential_ridge,
    snips,
    stabilising_weights,
    weigh,
    with_shadows,
)
from tests.router_core.ope.bandit import BEST, VALUE, hand_log, random_log, thompson_log, truth

HAND = hand_log([0, 1, 0, 1], [1.0, 0.0, 0.0, 1.0], [[0.5, 0.5], [0.25, 0.75], [0.8, 0.2], [0.5, 0.5]])
PI = np.array([[0.5, 0.5], [1.0, 0.0], [0.4, 0.6], [0.0, 1.0]])
# Weights of the asked arms: 1, 0, 0.5, 2.


def test_ips_by_hand() -> None:
    found = ips(HAND, PI)
    assert found.value == pytest.approx((1 * 1 + 0 + 0 + 2 * 1) / 4)
    half = 1.959964 * math.sqrt(0.25**2 + 0.75**2 + 0.75**2 + 1.25**2) / 4
    assert found.ci95 == pytest.approx((0.75 - half, 0.75 + half))
    assert (found.n, found.max_weight, found.clipped, found.lost, found.dropped) == (4, 2.0, 0.0, 0.0, 0)
    assert found.ess == pytest.approx(3.5**2 / (1 + 0.25 + 4))


def test_snips_by_hand() -> None:
    found = snips(HAND, PI)
    value = 3 / 3.5
    residuals = [1 * (1 - value), 0, 0.5 * (0 - value), 2 * (1 - value)]
    half = 1.959964 * math.hypot(math.sqrt(sum(r * r for r in residuals)) / 3.5, 1 / found.ess)
    assert found.value == pytest.approx(value)
    assert found.ci95 == pytest.approx((value - half, value + half))


def test_doubly_robust_by_hand() -> None:
    q = np.array([[0.5, 0.1], [0.2, 0.3], [0.4, 0.8], [0.6, 0.9]])
    scores = [0.3 + 1 * (1 - 0.5), 0.2 + 0, 0.64 + 0.5 * (0 - 0.4), 0.9 + 2 * (1 - 0.9)]
    found = doubly_robust(HAND, PI, q, stabilise=False)
    assert found.value == pytest.approx(sum(scores) / 4)
    # Spreads Σ π²/e are 1, 4, 2, 2, and a row of spread 1 stands before them.
    h = np.array([1.0, 1.0, (6 / 3) ** -0.5, (8 / 4) ** -0.5])
    assert doubly_robust(HAND, PI, q).value == pytest.approx(float(h @ scores) / h.sum())


def test_clipping_bounds_the_weights_and_is_reported() -> None:
    found = ips(HAND, PI, clip=1.5)
    assert found.value == pytest.approx((1 + 1.5) / 4)
    assert (found.max_weight, found.clipped) == (1.5, 0.25)


def test_stabilising_weights_look_only_at_earlier_rows() -> None:
    spread = np.random.default_rng(0).gamma(1.0, size=500) + 1
    changed = spread.copy()
    changed[300:] *= 100
    assert np.array_equal(stabilising_weights(spread)[:301], stabilising_weights(changed)[:301])
    assert stabilising_weights(changed)[-1] < stabilising_weights(spread)[-1]
    # A window of 64 rows, or a quarter of those so far: 500 rows look back on 124.
    assert stabilising_weights(spread)[-1] == pytest.approx(spread[375:499].mean() ** -0.5)


def test_a_model_that_predicts_nothing_leaves_ips_and_a_perfect_one_no_variance() -> None:
    log, context = random_log(300, np.random.default_rng(1))
    pi = BEST[context]
    assert doubly_robust(log, pi, np.zeros((300, 3)), stabilise=False).value == pytest.approx(ips(log, pi).value)
    sure = LoggedData(
        log.pool, log.x, log.arm, log.propensities, log.available,
        one_reward_per_row(log.arm, VALUE[context, log.arm], 3),
    )  # fmt: skip
    found = doubly_robust(sure, pi, VALUE[context], stabilise=False)
    assert found.value == pytest.approx(float((pi * VALUE[context]).sum(axis=1).mean()), abs=1e-12)


@pytest.mark.parametrize("make", [random_log, thompson_log])
def test_estimates_have_no_bias_and_intervals_hold_the_truth(make) -> None:  # type: ignore[no-untyped-def]
    """150 logs of 250 rows. Coverage 0.95 has a standard error of 0.018 here; the safe interval holds more often."""
    rng = np.random.default_rng(2)
    wanted = {"best": BEST, "mixed": np.full((4, 3), 1 / 3)}
    values: dict[tuple[str, str], list[float]] = {}
    covered: dict[tuple[str, str], list[bool]] = {}
    for _ in range(150):
        log, context = make(250, rng)
        q = sequential_ridge(log)
        for name, pi in wanted.items():
            found = {
                "ips": ips(log, pi[context], floor=1e-6, max_lost=1.0),
                "snips": snips(log, pi[context], floor=1e-6, max_lost=1.0),
                "dr": doubly_robust(log, pi[context], q, floor=1e-6, max_lost=1.0),
            }
            for how, estimate in found.items():
                values.setdefault((name, how), []).append(estimate.value)
                low, high = estimate.ci95
                covered.setdefault((name, how), []).append(low <= truth(pi) <= high)
            low, high = safe_interval(log, pi[context])
            covered.setdefault((name, "safe"), []).append(low <= truth(pi) <= high)
    for (name, _), estimates in values.items():
        error = np.array(estimates) - truth(wanted[name])
        assert abs(error.mean()) < 3.5 * error.std() / math.sqrt(150) + 0.005
    for (_, how), hits in covered.items():
        assert np.mean(hits) >= (0.95 if how == "safe" else 0.89), (how, np.mean(hits))


def test_the_doubly_robust_estimate_is_closer_than_ips() -> None:
    rng = np.random.default_rng(3)
    errors = []
    for _ in range(60):
        log, context = random_log(500, rng)
        pi = BEST[context]
        dr = doubly_robust(log, pi, sequential_ridge(log)).value
        errors.append((ips(log, pi).value - truth(BEST), dr - truth(BEST)))
    of_ips, of_dr = np.sqrt(np.square(errors).mean(axis=0))
    assert of_dr < 0.8 * of_ips


def test_a_deterministic_log_supports_only_what_it_did() -> None:
    log = hand_log([0, 0, 1], [1.0, 0.0, 1.0], [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    other = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    for estimator in (ips, snips):
        with pytest.raises(NoSupportError, match=r"100.0% of what the target .* Log with a policy that explores"):
            estimator(log, other)
    with pytest.raises(NoSupportError):
        doubly_robust(log, other, np.zeros((3, 2)))
    assert safe_interval(log, other) == pytest.approx((0.0, 1.0))
    same = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert ips(log, same).value == pytest.approx(2 / 3)


def test_a_log_that_never_asked_what_the_target_would_gives_no_number() -> None:
    log = hand_log([0, 0], [1.0, 0.0], [[0.9, 0.1]] * 2)
    other = np.array([[0.0, 1.0]] * 2)
    for estimator in (ips, snips):
        with pytest.raises(NoSupportError, match="none of the 2 logged decisions asked"):
            estimator(log, other)
    low, high = safe_interval(log, other)
    assert low == pytest.approx(0.0, abs=1e-8)
    assert high == pytest.approx(1.0, abs=1e-8)


def test_a_little_missing_support_widens_the_interval() -> None:
    rows = 200
    log = hand_log([0] * rows, [1.0] * rows, [[0.9995, 0.0005]] * rows)
    pi = np.tile([0.98, 0.02], (rows, 1))
    found = ips(log, pi)
    assert found.lost == pytest.approx(0.02)
    low, high = found.ci95
    assert low < 0.99 < high
    assert high >= 1.0
    low, high = doubly_robust(log, pi, np.full((rows, 2), 0.5)).ci95
    assert low <= 0.98
    assert high >= 1.0


def test_an_arm_that_was_not_available_is_not_asked_of_the_target() -> None:
    log = hand_log([1, 0], [1.0, 0.0], [[0.0, 1.0, 0.0], [0.2, 0.3, 0.5]], available=[[False, True, False], [True] * 3])
    pi = np.array([[0.8, 0.2, 0.0], [1.0, 0.0, 0.0]])
    found = ips(log, pi)
    assert found.value == pytest.approx((1.0 * 1 + 5.0 * 0) / 2)
    only_first = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    dropped = ips(log, only_first)
    assert (dropped.n, dropped.dropped, dropped.value) == (1, 1, 0.0)
    with pytest.raises(NoSupportError, match="none of the 1 logged decisions"):
        ips(log.rows(slice(1)), only_first[:1])


def test_propensities_of_partial_pools_are_those_among_the_arms_that_were_left() -> None:
    means, sds = np.zeros((2, 3)), np.ones((2, 3))
    logged = np.array([[0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3]])
    available = np.array([[True] * 3, [True, False, True]])
    left = available_propensities(logged, means, sds, np.zeros((2, 3)), available)
    assert left[0].tolist() == logged[0].tolist()
    assert left[1] == pytest.approx([0.5, 0.0, 0.5])
    floors = np.array([[0.03, 0.06, 0.01]] * 2)
    left = available_propensities(logged, means, sds, floors, available)
    assert left[1] == pytest.approx([0.9 * 0.5 + 0.1 * 0.75, 0.0, 0.9 * 0.5 + 0.1 * 0.25])


def test_shadowed_instances_give_a_deterministic_log_support() -> None:
    """Arm 0 is always asked and a tenth of the rows tell of all arms: 200 such logs of 600 rows, target arm 2."""
    rng = np.random.default_rng(4)
    pi = np.tile([0.0, 0.0, 1.0], (600, 1))
    wanted = float(VALUE[:, 2].mean())
    errors, hits = [], []
    for _ in range(200):
        context = rng.integers(4, size=600)
        everything = (rng.random((600, 3)) < VALUE[context]).astype(np.float64)
        rewards = np.where((rng.random(600) < 0.1)[:, None] | (np.arange(3) == 0), everything, np.nan)
        available = np.ones((600, 3), np.bool_)
        arm = np.zeros(600, np.int64)
        e = with_shadows(np.tile([1.0, 0.0, 0.0], (600, 1)), arm, available, rewards)
        x = np.eye(4, dtype=np.float32)[context]
        log = LoggedData(("a", "b", "c"), x, arm, e, available, rewards)
        found = doubly_robust(log, pi, sequential_ridge(log))
        errors.append(found.value - wanted)
        hits.append(found.ci95[0] <= wanted <= found.ci95[1])
    assert abs(np.mean(errors)) < 3.5 * np.std(errors) / math.sqrt(200)
    assert np.mean(hits) > 0.9


def test_an_arm_that_was_always_asked_first_is_shadowed_as_often_as_the_others() -> None:
    """Four rows ask arm 2 first, two of them ask the others in the shadow; without shadows nothing is added."""
    arm, available = np.full(4, 2), np.ones((4, 3), np.bool_)
    first = np.tile([0.2, 0.2, 0.6], (4, 1))
    rewards = np.where((np.arange(4) < 2)[:, None] | (np.arange(3) == 2), 1.0, np.nan)
    assert with_shadows(first, arm, available, rewards) == pytest.approx(np.tile([0.6, 0.6, 0.8], (4, 1)))
    alone = np.where(np.arange(3) == 2, 1.0, np.nan) * np.ones((4, 1))
    assert with_shadows(first, arm, available, alone).tolist() == first.tolist()


def test_losses_and_other_rewards_widen_by_their_own_range() -> None:
    rows = 100
    log = hand_log([0] * rows, [-2.0, 2.0] * 50, [[0.9995, 0.0005]] * rows)
    low, high = ips(log, np.tile([0.97, 0.03], (rows, 1))).ci95
    assert low < -0.06
    assert high > 0.06


def test_logs_and_targets_that_cannot_be_are_refused() -> None:
    with pytest.raises(ShapeMismatchError, match="leave out decisions that asked every RM"):
        hand_log([-1], [1.0], [[0.5, 0.5]])
    with pytest.raises(NotFiniteError, match="leave out events without a reward"):
        hand_log([0], [math.nan], [[0.5, 0.5]])
    with pytest.raises(ShapeMismatchError, match="was not available"):
        hand_log([0], [1.0], [[0.5, 0.5]], available=[[False, True]])
    with pytest.raises(ShapeMismatchError, match="one row per decision"):
        ips(HAND, PI[:2])
    with pytest.raises(ShapeMismatchError, match="must hold probabilities"):
        ips(HAND, PI * 2)
    with pytest.raises(ShapeMismatchError, match="clip is 0"):
        ips(HAND, PI, clip=0.0)
    with pytest.raises(ShapeMismatchError, match="q has shape"):
        doubly_robust(HAND, PI, PI[:1])
    with pytest.raises(NoSupportError, match="none of the 0 logged decisions"):
        weigh(HAND.rows(slice(0)), PI[:0])


def test_rows_of_one_draw_count_as_one_in_every_interval() -> None:
    """Each row of a log twice, both of one draw: values and intervals of the log itself."""
    once, context = random_log(200, np.random.default_rng(4))
    pi = BEST[context]
    twice = np.repeat(np.arange(200), 2)
    shared = replace(once.rows(twice), draws=twice)
    q = sequential_ridge(once)
    pairs = [
        (ips(once, pi), ips(shared, pi[twice])),
        (snips(once, pi), snips(shared, pi[twice])),
        (
            doubly_robust(once, pi, q, stabilise=False),
            doubly_robust(shared, pi[twice], q[twice], stabilise=False),
        ),
    ]
    for single, double in pairs:
        assert double.value == pytest.approx(single.value)
        assert double.ci95 == pytest.approx(single.ci95)
        assert double.ess == pytest.approx(single.ess)
