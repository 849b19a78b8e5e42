"""Raw feedback to learned reward: the three signals, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from router_core.errors import FeedbackError
from router_core.feedback import (
    LOSS_FORGETTING,
    LOSS_HISTORY,
    LOSS_WARM_UP,
    LossScale,
    SignalAccumulator,
    SignalStatistics,
    validate,
)
from router_core.records import Feedback, Signal


def test_a_preference_teaches_the_credit() -> None:
    signal = SignalAccumulator(SignalStatistics.empty(1))

    def reward(credit: float | None) -> float | None:
        return signal.observe(0, Feedback(Signal.PREFERENCE, 1.0), credit=credit)

    assert (reward(1.0), reward(0.0), reward(0.5), reward(None)) == (1.0, 0.0, 0.5, None)
    stats = signal.freeze()
    assert (stats.count.tolist(), stats.reward_count.tolist()) == ([4.0], [3.0])
    assert stats.mean_reward().tolist() == [0.5]


def test_reward_is_taken_as_it_is() -> None:
    signal = SignalAccumulator(SignalStatistics.empty(2))
    assert signal.observe(1, Feedback(Signal.REWARD, 0.25), credit=None) == 0.25
    means = signal.freeze().mean_reward()
    assert math.isnan(means[0])
    assert means[1] == 0.25


def losses(
    values: list[float], *, unit: bool, arm: int = 0, signal: SignalAccumulator | None = None
) -> list[float | None]:
    scale = LossScale.UNIT_Z if unit else LossScale.Z
    signal = signal or SignalAccumulator(SignalStatistics.empty(2), scale)
    return [signal.observe(arm, Feedback(Signal.LOSS, v), credit=None) for v in values]


def test_the_first_losses_of_an_arm_only_warm_up() -> None:
    out = losses([1.0, 2.0, 1.0, 2.0, 1.5, 1.5], unit=False)
    assert out[:LOSS_WARM_UP] == [None] * LOSS_WARM_UP
    # Mean 1.5 of the first five: an average loss is worth z = 0.
    assert out[-1] == pytest.approx(0.0)


def test_z_is_the_distance_below_the_mean_in_standard_deviations() -> None:
    warm = [1.0, 2.0, 1.0, 2.0, 1.5]
    mean, sd = 1.5, math.sqrt(np.mean(np.square(warm)) - 1.5**2)
    assert losses([*warm, 1.2], unit=False)[-1] == pytest.approx((mean - 1.2) / sd)
    assert losses([*warm, 1.2], unit=True)[-1] == pytest.approx(((mean - 1.2) / sd + 2) / 4)


@pytest.mark.parametrize(("loss", "z", "unit"), [(-100.0, 2.0, 1.0), (100.0, -2.0, 0.0)])
def test_z_is_clipped(loss: float, z: float, unit: float) -> None:
    warm = [1.0, 2.0, 1.0, 2.0, 1.5]
    assert losses([*warm, loss], unit=False)[-1] == z
    assert losses([*warm, loss], unit=True)[-1] == unit


def test_equal_losses_are_average() -> None:
    assert losses([0.7] * 8, unit=True)[-1] == pytest.approx(0.5, abs=1e-6)


def test_arms_have_averages_of_their_own() -> None:
    signal = SignalAccumulator(SignalStatistics.empty(2))
    losses([1.0, 2.0, 1.0, 2.0, 1.5, 1.4], unit=False, arm=0, signal=signal)
    assert losses([10.0] * LOSS_WARM_UP, unit=False, arm=1, signal=signal) == [None] * LOSS_WARM_UP
    assert signal.freeze().loss_mean[1] == pytest.approx(10.0)


def test_averages_become_the_papers_moving_average_once_the_window_is_full() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(300).tolist()
    signal = SignalAccumulator(SignalStatistics.empty(1))
    losses(values, unit=False, signal=signal)
    expected = float(np.mean(values[:100]))
    for value in values[100:]:
        expected = 0.99 * expected + 0.01 * value
    assert signal.freeze().loss_mean[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("signal", "value"),
    [
        (Signal.LOSS, math.nan),
        (Signal.LOSS, math.inf),
        (Signal.REWARD, 1.5),
        (Signal.REWARD, -0.1),
        (Signal.PREFERENCE, 0.5),
        (Signal.PREFERENCE, -1.0),
    ],
)
def test_values_outside_the_signals_domain_are_refused(signal: Signal, value: float) -> None:
    with pytest.raises(FeedbackError, match="send"):
        validate(Feedback(signal, value))


def test_values_inside_pass() -> None:
    for feedback in (Feedback(Signal.LOSS, -3.0), Feedback(Signal.REWARD, 1.0), Feedback(Signal.PREFERENCE, 2.0)):
        assert validate(feedback) is feedback


def quantile_rewards(values: list[float], arms: list[int] | None = None) -> list[float | None]:
    signal = SignalAccumulator(SignalStatistics.empty(2), LossScale.QUANTILE)
    by = arms or [0] * len(values)
    return [signal.observe(arm, Feedback(Signal.LOSS, v), credit=None) for arm, v in zip(by, values, strict=True)]


def test_quantile_rewards_are_the_place_between_the_20th_and_the_80th_percentile() -> None:
    values = [4.0, 3.0, 1.0, 0.0, 2.0, 0.5, 3.5, -10.0, 50.0, 1.7]
    out = quantile_rewards(values)
    assert out[: LOSS_WARM_UP - 1] == [None] * (LOSS_WARM_UP - 1)
    # Of 0 .. 4 the percentiles of -loss are -3.2 and -0.8: the loss 2 lies half way.
    assert out[4] == pytest.approx(0.5)
    for n in range(LOSS_WARM_UP, len(values)):
        low, high = np.quantile(np.negative(values[: n + 1]), [0.2, 0.8])
        assert out[n] == pytest.approx(np.clip((-values[n] - low) / (high - low), 0, 1), abs=1e-12)
    assert (out[7], out[8]) == (1.0, 0.0)


def test_quantiles_are_of_all_arms_and_of_the_last_losses_only() -> None:
    rng = np.random.default_rng(0)
    values = [100.0] * 300 + rng.random(LOSS_HISTORY).tolist() + [0.3]
    out = quantile_rewards(values, [i % 2 for i in range(len(values))])
    low, high = np.quantile(np.negative(values[-LOSS_HISTORY:]), [0.2, 0.8])
    assert out[-1] == pytest.approx((-0.3 - low) / (high - low))


def test_equal_losses_have_the_quantile_reward_one_half() -> None:
    assert quantile_rewards([0.7] * 7)[LOSS_WARM_UP - 1 :] == [0.5, 0.5, 0.5]
    # All the others equal: only the place above or below them is known.
    assert quantile_rewards([0.7] * 20 + [0.6])[-1] == 1.0
    assert quantile_rewards([0.7] * 20 + [0.8])[-1] == 0.0


def test_only_the_quantile_scale_keeps_a_history_and_it_is_bounded() -> None:
    for scale, kept in ((LossScale.Z, 0), (LossScale.UNIT_Z, 0), (LossScale.QUANTILE, LOSS_HISTORY)):
        signal = SignalAccumulator(SignalStatistics.empty(1), scale)
        losses([float(i) for i in range(LOSS_HISTORY + 40)], unit=True, signal=signal)
        assert len(signal.freeze().loss_history) == kept


def test_preferences_need_no_scaling_whatever_the_loss_scale() -> None:
    signal = SignalAccumulator(SignalStatistics.empty(1), LossScale.QUANTILE)
    assert signal.observe(0, Feedback(Signal.PREFERENCE, 1.0), credit=1.0) == 1.0
    assert signal.observe(0, Feedback(Signal.REWARD, 0.25), credit=None) == 0.25


def pooled(values: list[tuple[int, float, float]]) -> list[float | None]:
    """Rewards of (arm, loss, offset) under `LossScale.POOLED`."""
    signal = SignalAccumulator(SignalStatistics.empty(2), LossScale.POOLED)
    return [signal.observe(arm, Feedback(Signal.LOSS, v), credit=None, offset=o) for arm, v, o in values]


def test_pooled_losses_compare_the_arms_around_the_asked_ones_offset() -> None:
    warm = [(i % 2, 1.0 + i % 2, 0.75) for i in range(LOSS_WARM_UP + 1)]
    *first, low, high = pooled([*warm, (0, 1.0, 0.75), (1, 2.0, 0.25)])
    assert first[:LOSS_WARM_UP] == [None] * LOSS_WARM_UP
    # Mean 1.5, sd 0.5 over six losses: z = +1 for a loss of 1.
    assert low == pytest.approx(0.75 + 0.25 - LOSS_FORGETTING)
    assert high is not None
    assert high < 0.25


def test_an_average_loss_costs_every_offset_the_same() -> None:
    warm = [(i % 2, float(i % 2), 0.5) for i in range(20)]
    for offset in (0.1, 0.99):
        assert pooled([*warm, (0, 0.5, offset)])[-1] == pytest.approx(offset - LOSS_FORGETTING)


def test_pooled_averages_continue_where_they_were_frozen() -> None:
    losses = [(i % 2, float(np.sin(i)), 0.5) for i in range(30)]
    whole = SignalAccumulator(SignalStatistics.empty(2), LossScale.POOLED)
    first = SignalAccumulator(SignalStatistics.empty(2), LossScale.POOLED)
    for arm, loss, offset in losses[:11]:
        first.observe(arm, Feedback(Signal.LOSS, loss), credit=None, offset=offset)
    rest = SignalAccumulator(first.freeze(), LossScale.POOLED)
    for arm, loss, offset in losses:
        whole.observe(arm, Feedback(Signal.LOSS, loss), credit=None, offset=offset)
    for arm, loss, offset in losses[11:]:
        rest.observe(arm, Feedback(Signal.LOSS, loss), credit=None, offset=offset)
    assert rest.freeze().pooled.tobytes() == whole.freeze().pooled.tobytes()
