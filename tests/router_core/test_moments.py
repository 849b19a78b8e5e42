"""Running moments of scores: right, the same bits wherever the log is cut, and never a scale that is not known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.errors import NotFiniteError
from router_core.moments import KNOWN_SCORES, MEMORY_SCORES, Moments, ScoreScales
from router_core.records import MAX_ABS_SCORE

SCORES = st.lists(st.floats(-MAX_ABS_SCORE, MAX_ABS_SCORE), min_size=1, max_size=20)
ANYTHING = st.floats()
"""NaN, infinities and the largest numbers included."""
ENTRIES = st.lists(st.tuples(st.integers(0, 2), SCORES), max_size=30)


def folded(state: ScoreScales, entries: list[tuple[int, list[float]]]) -> ScoreScales:
    for arm, scores in entries:
        state = state.observe(f"{state.count + 1}-0", [(arm, Moments.of(scores))])
    return state


def empty() -> ScoreScales:
    return ScoreScales(0, "0-0", (Moments(),) * 3)


@given(ENTRIES, st.integers(0, 30))
def test_a_log_folds_to_the_same_bits_wherever_it_is_cut(entries: list[tuple[int, list[float]]], cut: int) -> None:
    assert folded(folded(empty(), entries[:cut]), entries[cut:]) == folded(empty(), entries)


@given(st.lists(SCORES, min_size=1, max_size=20))
def test_moments_are_those_of_all_scores_together(entries: list[list[float]]) -> None:
    state = Moments()
    for scores in entries:
        state = state.merge(Moments.of(scores))
    everything = np.concatenate([np.array(scores) for scores in entries])
    size = max(np.abs(everything).max(), 1.0)
    assert state.count == len(everything)
    assert state.mean == pytest.approx(everything.mean(), abs=1e-9 * size)
    assert state.squares == pytest.approx(np.square(everything - everything.mean()).sum(), abs=1e-6 * size * size)


@given(SCORES)
def test_normalised_scores_keep_their_order_and_are_finite(scores: list[float]) -> None:
    z = Moments.of(scores).normalise(scores)
    known = [value for value in z if value is not None]
    assert len(known) in (0, len(scores))
    assert all(math.isfinite(value) for value in known)
    if known:
        ranked = [value for _, value in sorted(zip(scores, known, strict=True))]
        assert ranked == sorted(known)


def test_old_scores_fade_so_that_the_scale_follows_a_drift() -> None:
    state = Moments()
    for _ in range(200):
        state = state.merge(Moments.of([0.0] * 999 + [1.0]))
    assert state.count == pytest.approx(MEMORY_SCORES)
    for _ in range(400):
        state = state.merge(Moments.of([5.0] * 500 + [7.0] * 500))
    assert state.mean == pytest.approx(6.0, abs=0.05)
    assert state.sd == pytest.approx(1.0, abs=0.1)


def test_a_scale_is_unknown_until_there_is_spread_or_enough_that_is_alike() -> None:
    state = Moments()
    assert state.sd is None
    for count in range(1, int(KNOWN_SCORES)):
        state = state.merge(Moments.of([3.0]))
        assert (state.count, state.sd, state.normalise([3.0])) == (count, None, [None])
    state = state.merge(Moments.of([3.0]))
    assert (state.sd, state.normalise([3.0, 4.0])) == (0.0, [0.0, 1.0])


@given(
    st.lists(
        st.one_of(SCORES.map(Moments.of), st.builds(Moments, ANYTHING, ANYTHING, ANYTHING)).map(lambda m: [(0, m)]),
        max_size=30,
    )
)
def test_no_entry_makes_a_state_that_scores_cannot_have(entries: list[list[tuple[int, Moments]]]) -> None:
    state = ScoreScales(0, "0-0", (Moments(),))
    for seen in entries:
        state = state.observe("1-0", seen)
        (moments,) = state.arms
        assert moments.possible
        assert moments.count <= MEMORY_SCORES
        assert all(z is None or math.isfinite(z) for z in moments.normalise([-MAX_ABS_SCORE, 0.0, MAX_ABS_SCORE]))
    assert state.count == len(entries)


@given(st.lists(SCORES, min_size=1, max_size=20))
def test_moments_of_scores_within_the_bound_are_always_possible(entries: list[list[float]]) -> None:
    state = Moments()
    for scores in entries:
        assert Moments.of(scores).possible
        state = state.merge(Moments.of(scores))
        assert state.possible


@pytest.mark.parametrize(
    ("arm", "absurd"),
    [
        (0, Moments(2.0, 1e300, 0.0)),
        (0, Moments(2.0, 0.0, 1e300)),
        (0, Moments(2.0, 0.0, -1.0)),
        (0, Moments(math.inf, 0.0, 1.0)),
        (0, Moments(-2.0, 0.0, 1.0)),
        (0, Moments(2.0, math.nan, math.nan)),
        (1, Moments(2.0, 0.0, 2.0)),
        (-1, Moments(2.0, 0.0, 2.0)),
    ],
)
def test_an_absurd_entry_has_a_place_in_the_log_and_changes_no_scale(arm: int, absurd: Moments) -> None:
    before = ScoreScales(1, "1-0", (Moments.of([1.0, 3.0]),))
    assert before.observe("2-0", [(arm, absurd)]) == ScoreScales(2, "2-0", before.arms)


@given(st.floats().filter(lambda score: not abs(score) <= MAX_ABS_SCORE))
def test_a_score_beyond_the_bound_has_no_place_on_a_scale(score: float) -> None:
    assert Moments.of([1.0, 3.0]).normalise([score, 3.0]) == [None, 1.0]
    with pytest.raises(NotFiniteError, match="finite"):
        Moments.of([1.0, score])


@pytest.mark.parametrize("scores", [[math.nan], [math.inf, 1.0], [1e200, -1e200], [1e7, 1e7]])
def test_what_has_no_finite_moments_is_refused(scores: list[float]) -> None:
    with pytest.raises(NotFiniteError, match="finite"):
        Moments.of(scores)


@given(st.floats(-1e6, 1e6), st.integers(1, 9), st.integers(4, 9))
def test_an_rm_that_always_says_the_same_is_at_zero(score: float, size: int, entries: int) -> None:
    moments = Moments()
    for _ in range(entries):
        moments = moments.merge(Moments.of([score] * size))
    assert moments.squares == 0.0
    assert moments.normalise([score]) == [0.0]
