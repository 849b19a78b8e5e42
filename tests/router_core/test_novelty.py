"""Texts unlike the offline stage's: distances by hand, shares, and what they do to a posterior along the log."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from router_core.errors import NotFiniteError, ShapeMismatchError
from router_core.evidence import LAMBDA_GRID
from router_core.novelty import LANDMARKS, MEMORY, USUAL, Landmarks, Tally, fit_landmarks, loosened
from router_core.posterior import FoldSettings, Posterior, fold, start
from router_core.prior import Hyperparameters, Prior, calibrated_prior
from router_core.records import Event, Feedback, Signal
from router_core.snapshot import Snapshot, dump, parse

SETTINGS = FoldSettings(block_size=16, refresh_events=64)
WATCHING = Hyperparameters(lambda0=100.0, sigma2=0.2, v=0.2, adapt=True, lambda_novel=30.0)
LINE = Landmarks(np.float32([[0], [1], [2], [3], [4], [5]]), radius=4.0)
"""The fifth nearest of them lies within 4 for positions in [0, 5] only."""

Rows = NDArray[np.float32]


def contexts(positions: NDArray[np.floating]) -> Rows:
    """normalise([1; position]) of each row, as `Fuse.apply` makes them."""
    rows = np.concatenate([np.ones((len(positions), 1)), positions], axis=1)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def prior(hyper: Hyperparameters = WATCHING, landmarks: Landmarks | None = LINE) -> Prior:
    return calibrated_prior(2, 2, lambda x: np.full((len(x), 2), 0.5), hyper, landmarks)


def as_expected(positions: NDArray[np.floating], seed: int = 0) -> list[Event]:
    """One event per position: what happens is what the offsets, 1/2, say."""
    rng = np.random.default_rng(seed)
    rewards = rng.integers(0, 2, len(positions))
    arms = rng.integers(0, 2, len(positions))
    return [
        Event(int(arm), x.tobytes(), 0.5, 0, Feedback(Signal.REWARD, float(reward)))
        for x, arm, reward in zip(contexts(positions), arms, rewards, strict=True)
    ]


def near(n: int) -> NDArray[np.floating]:
    return np.random.default_rng(1).uniform(1.0, 4.0, (n, 1))


def far(n: int) -> NDArray[np.floating]:
    return np.random.default_rng(1).uniform(20.0, 30.0, (n, 1))


@pytest.mark.parametrize(("position", "novel"), [(0.1, False), (2.5, False), (4.9, False), (5.2, True), (-0.2, True)])
def test_novel_is_what_lies_farther_from_its_fifth_neighbour_than_usual(position: float, novel: bool) -> None:
    assert LINE.is_novel(contexts(np.array([[position]]))[0]) is novel


def test_only_the_last_columns_are_read_and_their_scale_does_not_matter() -> None:
    x = contexts(np.array([[2.5], [9.0]]))
    for row, novel in zip(x, (False, True), strict=True):
        assert LINE.is_novel(np.concatenate([np.float32([7, -7]), 3 * row])) is novel


def test_what_no_fuse_makes_is_novel() -> None:
    assert LINE.is_novel(np.float32([0, 0]))
    assert LINE.is_novel(np.float32([-1, 2]))


def test_as_many_new_pairs_of_the_same_kind_are_novel_as_the_radius_allows() -> None:
    rng = np.random.default_rng(0)
    landmarks = fit_landmarks(contexts(rng.standard_normal((600, 4))), [""] * 600, rng)
    assert landmarks is not None
    assert landmarks.positions.shape == (LANDMARKS, 4)
    share = np.mean([landmarks.is_novel(x) for x in contexts(rng.standard_normal((2000, 4)))])
    assert share == pytest.approx(1 - USUAL, abs=0.06)
    assert np.mean([landmarks.is_novel(x) for x in contexts(3 + rng.standard_normal((200, 4)))]) > 0.9


def test_pairs_of_one_group_are_no_neighbours_of_each_other() -> None:
    rng = np.random.default_rng(0)
    positions = np.repeat(rng.standard_normal((40, 2)), 6, axis=0)
    groups = [str(i // 6) for i in range(240)]
    alone, together = (fit_landmarks(contexts(positions), names, rng) for names in ([""] * 240, groups))
    assert alone is not None
    assert together is not None
    assert alone.radius < 1e-5 < 0.1 < together.radius


def test_too_few_pairs_or_groups_give_no_landmarks() -> None:
    rng = np.random.default_rng(0)
    assert fit_landmarks(contexts(rng.standard_normal((19, 2))), [""] * 19, rng) is None
    assert fit_landmarks(contexts(rng.standard_normal((30, 2))), ["one"] * 30, rng) is None


def test_landmarks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ShapeMismatchError, match=r"\(5, 1\)"):
        Landmarks(np.zeros((5, 1), np.float32), 1.0)
    with pytest.raises(NotFiniteError, match="nan"):
        Landmarks(np.zeros((6, 1), np.float32), float("nan"))


def test_the_excess_is_zero_as_long_as_chance_may_explain_the_share() -> None:
    # 1 − u = 1/4 and √(u(1 − u)/n) = .0433 at n = 100: .25 + 3 · .0433 = .3799.
    assert Tally(100.0, 37.0).excess() == 0.0
    assert Tally(100.0, 43.0).excess() == pytest.approx((0.43 - 0.25 - 3 * 0.0433013) / 0.75, abs=1e-6)
    assert (Tally().excess(), Tally().share, Tally(100.0, 43.0).share) == (0.0, None, 0.43)


def test_old_contexts_fade_by_exact_halves() -> None:
    assert Tally(MEMORY, 7.0).faded() == Tally(MEMORY / 2, 3.5)
    assert Tally(MEMORY - 1, 7.0).faded() == Tally(MEMORY - 1, 7.0)


@given(st.floats(1.0, 1e4), st.floats(0.0, 1.0), st.floats(1.0, 1e3))
def test_novelty_loosens_and_never_tightens(precision: float, excess: float, novel_precision: float) -> None:
    found = loosened(precision, excess, novel_precision)
    assert min(precision, novel_precision) * (1 - 1e-12) <= found <= precision * (1 + 1e-12)


def test_a_stream_of_novel_texts_holds_the_precision_down_though_feedback_is_as_expected() -> None:
    usual = fold(start(prior(), SETTINGS), as_expected(near(320)))
    novel = fold(start(prior(), SETTINGS), as_expected(far(320)))
    assert usual.tally == Tally(320.0, 0.0)
    assert novel.tally == Tally(320.0, 320.0)
    assert usual.lambda0 > 300 > 50 > novel.lambda0 > 30


def test_the_posterior_is_the_one_that_had_the_loosened_precision_from_the_start() -> None:
    events = as_expected(far(128))
    state = fold(start(prior(), SETTINGS), events)
    fixed = Hyperparameters(state.lambda0, WATCHING.sigma2, WATCHING.v)
    other = fold(start(prior(fixed), SETTINGS), events)
    assert state.lambda0 not in LAMBDA_GRID
    for ours, theirs in zip(state.arms, other.arms, strict=True):
        np.testing.assert_allclose(ours.precision, theirs.precision, rtol=1e-10)
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    "other",
    [
        prior(landmarks=None),
        prior(replace(WATCHING, lambda_novel=0.0)),
        prior(replace(WATCHING, adapt=False)),
    ],
)
def test_without_landmarks_precision_or_adapting_nothing_is_watched(other: Prior) -> None:
    plain = Prior(other.form, other.means, replace(other.hyper, lambda_novel=0.0), other.offset)
    events = as_expected(far(100))
    watched, unwatched = (fold(start(each, SETTINGS), events) for each in (other, plain))
    assert watched.tally == Tally()
    assert watched.digest() == unwatched.digest()


def test_usual_texts_leave_the_posterior_as_it_was_bit_for_bit() -> None:
    events = as_expected(near(150))
    watched, unwatched = (fold(start(prior(landmarks=each), SETTINGS), events) for each in (LINE, None))
    assert watched.lambda0 == unwatched.lambda0
    assert replace(watched, prior=unwatched.prior).digest() == unwatched.digest()


def test_the_tally_is_part_of_the_digest_where_it_is_kept_only() -> None:
    events = as_expected(near(20))
    watched, unwatched = (fold(start(prior(landmarks=each), SETTINGS), events) for each in (LINE, None))
    assert replace(watched, tally=Tally(20.0, 1.0)).digest() != watched.digest()
    assert replace(unwatched, tally=Tally(20.0, 1.0)).digest() == unwatched.digest()


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_a_log_with_novel_texts_folds_to_the_same_bits_wherever_it_is_cut(gamma: float) -> None:
    watching = prior(replace(WATCHING, gamma=gamma))
    events = as_expected(np.where(np.arange(150)[:, None] % 3, near(150), far(150)))
    whole = fold(start(watching, SETTINGS), events)
    for cut in (1, 15, 16, 17, 64, 100):
        assert fold(fold(start(watching, SETTINGS), events[:cut]), events[cut:]).digest() == whole.digest()
    at: Posterior = fold(start(watching, SETTINGS), events[:64])
    back = parse(dump(Snapshot(at, "1-1"), "run"), "run", watching, SETTINGS).posterior
    assert back.tally == at.tally != Tally()
    assert fold(back, events[64:]).digest() == whole.digest()


def test_a_snapshot_from_before_tallies_is_read_as_an_empty_one() -> None:
    plain = prior(landmarks=None)
    at = fold(start(plain, SETTINGS), as_expected(near(64)))
    data = dump(Snapshot(at, "1-1"), "run")
    header = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["reward_router"])
    assert "tally" not in header
    assert parse(data, "run", plain, SETTINGS).posterior.digest() == at.digest()
