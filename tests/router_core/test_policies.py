"""Policies: exact beliefs, the shared draw, names."""

from __future__ import annotations

import numpy as np
import pytest

from router_core.attempts import TOO_LONG, Attempt, Outcome
from router_core.errors import NotFiniteError, ShapeMismatchError, UnknownPolicyError, UnknownScaleError
from router_core.moments import Moments
from router_core.policies import (
    UWO_CHOICE_LAMBDA,
    UWO_REWARD_LAMBDA,
    AskRest,
    BayesianPolicy,
    Beliefs,
    Given,
    ScoreScale,
    combined_verdict,
    draw,
    draw_batch,
    floors_of,
    make_policy,
    propensity_without,
    vote_shares,
)
from router_core.posterior import FoldSettings, Posterior, fold, start
from router_core.prior import Hyperparameters, PriorForm, calibrated_prior, linucb_prior, no_prior, paper_prior
from router_core.records import TIE, Event, Feedback, Signal
from tests.router_core.events import context_of, make_events, unit_contexts

POOL = ("a", "b", "c")


def learned(n: int = 30, d: int = 8) -> Posterior:
    rng = np.random.default_rng(0)
    prior = paper_prior(rng.standard_normal((3, d)), Hyperparameters(3.0, 0.2, 0.7))
    return fold(start(prior, FoldSettings(8, 64)), make_events(rng, n, d, 3))


def test_bayesian_beliefs_are_the_posterior_mean_and_v_times_its_sd() -> None:
    state = learned()
    x = unit_contexts(np.random.default_rng(1), 6, 8)
    offsets = np.random.default_rng(2).random((6, 3))
    beliefs = BayesianPolicy().beliefs(x, offsets, state)
    for i in range(6):
        x64 = x[i].astype(np.float64)
        for k in range(3):
            assert beliefs.means[i, k] == pytest.approx(offsets[i, k] + state.arms[k].mean @ x64, abs=1e-12)
            # Draws read a float32 copy of the covariance.
            assert beliefs.sds[i, k] == pytest.approx(0.7 * state.arms[k].variance(x64) ** 0.5, rel=1e-5)


def test_beliefs_of_a_batch_equal_one_by_one() -> None:
    state = learned()
    x = unit_contexts(np.random.default_rng(3), 9, 8)
    offsets = np.zeros((9, 3))
    batch = BayesianPolicy().beliefs(x, offsets, state)
    for i in range(9):
        one = BayesianPolicy().beliefs(x[i : i + 1], offsets[i : i + 1], state)
        np.testing.assert_allclose(one.means, batch.means[i : i + 1], rtol=1e-12)
        np.testing.assert_allclose(one.sds, batch.sds[i : i + 1], rtol=1e-5)


def test_scalar_draws_have_the_distribution_of_weight_space_draws() -> None:
    state = learned()
    x = unit_contexts(np.random.default_rng(4), 1, 8)
    beliefs = BayesianPolicy().beliefs(x, np.zeros((1, 3)), state)
    rng = np.random.default_rng(5)
    n = 40_000
    scalar = beliefs.means + beliefs.sds * rng.standard_normal((n, 3))
    x64 = x[0].astype(np.float64)
    for k, arm in enumerate(state.arms):
        covariance = arm.covariance - arm.corrections.T @ arm.corrections
        weights = rng.multivariate_normal(arm.mean, 0.7**2 * covariance, size=n, method="cholesky")
        projected = weights @ x64
        sd = scalar[:, k].std()
        # Means differ by two standard errors of 1/sqrt(n) at most with high probability; five are allowed.
        assert abs(projected.mean() - scalar[:, k].mean()) < 5 * sd * (2 / n) ** 0.5
        assert projected.std() == pytest.approx(sd, rel=0.03)
        quantiles = np.linspace(0.05, 0.95, 10)
        np.testing.assert_allclose(
            np.quantile(projected, quantiles), np.quantile(scalar[:, k], quantiles), atol=0.05 * sd
        )


def test_a_prior_without_data_keeps_the_offline_ranking() -> None:
    table = np.array([[0.2, 0.9, 0.5], [0.8, 0.1, 0.3]])
    prior = calibrated_prior(3, 4, lambda x: table[: len(x)], Hyperparameters(100.0, 0.12, 0.0))
    x = unit_contexts(np.random.default_rng(6), 2, 4)
    for name in ("bayesian", "offline"):
        beliefs = make_policy(name, POOL).beliefs(x, prior.offsets(x), start(prior))
        choices = draw(beliefs, np.random.default_rng(7))
        assert choices.ranking.tolist() == np.argsort(-table, axis=1).tolist()


def test_draw_ranks_by_draw_and_breaks_ties_evenly() -> None:
    rng = np.random.default_rng(8)
    beliefs = make_policy("majority", POOL).beliefs(np.zeros((3000, 4), np.float32), np.zeros((3000, 3)), learned(0, 4))
    choices = draw(beliefs, rng)
    first = np.bincount(choices.ranking[:, 0], minlength=3) / 3000
    # Standard error of a share of one third in 3,000 is 0.0086.
    np.testing.assert_allclose(first, 1 / 3, atol=0.04)
    varied = draw(
        make_policy("random", POOL).beliefs(np.zeros((50, 4), np.float32), np.zeros((50, 3)), learned(0, 4)), rng
    )
    ordered = np.take_along_axis(varied.draws, varied.ranking, axis=1)
    assert (np.diff(ordered, axis=1) <= 0).all()
    np.testing.assert_allclose(varied.propensities, 1 / 3, atol=1e-3)


def test_drawn_shares_are_the_logged_propensities() -> None:
    state = learned()
    x = unit_contexts(np.random.default_rng(9), 1, 8)
    many = np.repeat(x, 20_000, axis=0)
    beliefs = BayesianPolicy().beliefs(many, np.zeros((20_000, 3)), state)
    choices = draw(beliefs, np.random.default_rng(10))
    shares = np.bincount(choices.ranking[:, 0], minlength=3) / 20_000
    np.testing.assert_allclose(shares, choices.propensities[0], atol=0.02)


def test_single_asks_one_arm_and_no_other() -> None:
    policy = make_policy("single:b", POOL)
    choices = draw(
        policy.beliefs(np.zeros((2, 4), np.float32), np.zeros((2, 3)), learned(0, 4)), np.random.default_rng(0)
    )
    assert choices.ranking[:, 0].tolist() == [1, 1]
    assert np.isneginf(choices.draws[:, [0, 2]]).all()
    assert choices.propensities.tolist() == [[0, 1, 0], [0, 1, 0]]


def test_propensity_of_a_fallback_is_among_those_left() -> None:
    means, sds = np.array([0.9, 0.5, 0.5]), np.array([0.1, 0.1, 0.1])
    none, floors = np.zeros(3), np.array([0.01, 0.03, 0.06])
    assert propensity_without(means, sds, none, [0], 1) == pytest.approx(0.5, abs=1e-3)
    assert propensity_without(means, sds, none, [0, 1], 2) == 1.0
    assert propensity_without(means, sds, floors, [0], 1) == pytest.approx(0.9 * 0.5 + 0.1 / 3, abs=1e-3)
    assert propensity_without(means, sds, floors, [0, 1], 2) == pytest.approx(1.0)


def test_floors_are_in_the_shares_and_in_the_propensities() -> None:
    n = 40_000
    means, floors = np.tile([0.9, 0.5, 0.2], (n, 1)), np.tile([0.02, 0.06, 0.12], (n, 1))
    choices = draw(Beliefs(means, np.full((n, 3), 0.01), floors), np.random.default_rng(0))
    np.testing.assert_allclose(choices.propensities[0], [0.82, 0.06, 0.12], atol=1e-6)
    # Standard error of a share of .12 in 40,000 is .0016.
    np.testing.assert_allclose(np.bincount(choices.ranking[:, 0]) / n, [0.82, 0.06, 0.12], atol=0.006)
    # Without the first arm, the others follow as `propensity_without` says.
    left = choices.ranking[choices.ranking != 0].reshape(n, 2)[:, 0]
    expected = [propensity_without(means[0], np.full(3, 0.01), floors[0], [0], arm) for arm in (1, 2)]
    np.testing.assert_allclose(np.bincount(left)[1:] / n, expected, atol=0.01)


def test_floors_go_to_arms_of_which_little_is_known_and_much_expected() -> None:
    floors = floors_of(np.array([[0.9, 0.8, 0.4]]), np.array([304.0, 0.0, 0.0]), 0.02)
    assert floors.sum() == pytest.approx(0.02)
    weights = np.array([16 / 320, np.exp(-1.0), np.exp(-5.0)])
    np.testing.assert_allclose(floors[0], 0.02 * weights / weights.sum())
    prior = calibrated_prior(3, 8, lambda x: np.full((len(x), 3), 0.5))
    beliefs = BayesianPolicy().beliefs(
        unit_contexts(np.random.default_rng(0), 2, 8), np.full((2, 3), 0.5), start(prior)
    )
    assert beliefs.floors is not None
    np.testing.assert_allclose(beliefs.floors, prior.hyper.floor / 3)


def test_votes_are_shared_on_a_tie() -> None:
    assert vote_shares([0, 0, 1, TIE], 2) == [0.625, 0.375]
    assert vote_shares([2], 3) == [0.0, 0.0, 1.0]
    # Equal shares are equal in every bit, whatever the order of the votes.
    shares = vote_shares([TIE, TIE, 0, TIE, 1], 3)
    assert shares[0] == shares[1]


@pytest.mark.parametrize(
    "name", ["", "thompson", "single:", "single:z", "bayesian:", "bayesian:linucb", "laser:none", "offline:none"]
)
def test_an_unknown_policy_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(UnknownPolicyError, match="choose one of"):
        make_policy(name, POOL)


def test_no_prior_starts_undecided() -> None:
    prior = no_prior(2, 3)
    x = unit_contexts(np.random.default_rng(11), 1, 3)
    beliefs = BayesianPolicy().beliefs(x, prior.offsets(x), start(prior))
    assert beliefs.means.tolist() == [[0.5, 0.5]]
    assert beliefs.sds[0, 0] == pytest.approx(prior.hyper.v / prior.hyper.lambda0**0.5)


@pytest.mark.parametrize(
    ("name", "prior", "calls", "one_arm"),
    [
        ("bayesian", None, 1, False),
        ("bayesian:paper", PriorForm.PAPER, 1, False),
        ("bayesian:calibrated", PriorForm.CALIBRATED, 1, False),
        ("bayesian:none", PriorForm.NONE, 1, False),
        ("offline", None, 1, False),
        ("offline:paper", PriorForm.PAPER, 1, False),
        ("offline:calibrated", PriorForm.CALIBRATED, 1, False),
        ("random", None, 1, False),
        ("single:b", None, 1, False),
        ("majority", None, 2, False),
        ("uwo", None, 2, False),
        ("laser", PriorForm.LINUCB, 1, True),
    ],
)
def test_every_row_of_the_tables_has_a_name(name: str, prior: PriorForm | None, calls: int, one_arm: bool) -> None:
    policy = make_policy(name, POOL)
    assert (policy.name, policy.prior, policy.one_arm_per_batch) == (name, prior, one_arm)
    assert len(policy.next_arms([1, 0], ())) == calls


UNIT = ScoreScale(np.zeros(2), np.ones(2))


def test_uwo_by_hand() -> None:
    policy = make_policy("uwo", POOL)
    # Means 2 and 1.5; variances 4 and 0.25: the agreement wins when lambda is 0.5, the mean when it is 0.1.
    rewards = np.array([[4.0, 1.0], [0.0, 2.0]])
    assert (UWO_CHOICE_LAMBDA, UWO_REWARD_LAMBDA) == (0.5, 0.1)
    assert policy.preference(rewards, UNIT).tolist() == [0.0, 1.375]
    np.testing.assert_allclose(policy.combine(rewards, UNIT), [1.6, 1.475], rtol=1e-15)
    assert combined_verdict(policy, rewards, UNIT) == 1


def test_uwo_sees_the_rms_on_one_scale() -> None:
    policy = make_policy("uwo", POOL)
    scale = ScoreScale(np.array([100.0, 0.0, -1.0]), np.array([50.0, 1.0, 2.0]))
    # Normalised: (1, 0), (0, 1), (1, 0).
    rewards = np.array([[150.0, 100.0], [0.0, 1.0], [1.0, -1.0]])
    np.testing.assert_allclose(policy.combine(rewards, scale), [2 / 3 - 0.1 * 2 / 9, 1 / 3 - 0.1 * 2 / 9])
    assert combined_verdict(policy, rewards, scale) == 0
    # Two of them, when the third did not answer.
    left = policy.preference(rewards[1:], scale.rows([1, 2]))
    np.testing.assert_allclose(left, [0.5 - 0.125, 0.5 - 0.125])
    assert combined_verdict(policy, rewards[1:], scale.rows([1, 2])) == TIE


def test_uwo_without_a_scale_normalises_inside_the_group() -> None:
    policy = make_policy("uwo", POOL)
    rewards = np.array([[1000.0, 2000.0, 3000.0], [0.1, 0.3, 0.2]])
    z = (rewards - rewards.mean(1, keepdims=True)) / rewards.std(1, keepdims=True)
    np.testing.assert_allclose(policy.combine(rewards, None), z.mean(0) - 0.1 * z.var(0))
    # One response has nothing to be compared with; RMs that see no difference prefer nothing.
    with pytest.raises(UnknownScaleError, match="send pairs or groups first"):
        policy.combine(np.array([[5.0], [-7.0]]), None)
    assert combined_verdict(policy, np.array([[2.0, 2.0], [1.0, 1.0]]), None) == TIE


def test_majority_combines_to_the_shares_of_the_votes_whatever_the_scale() -> None:
    policy = make_policy("majority", POOL)
    rewards = np.array([[9.0, 0.0], [0.1, 0.2], [0.3, 0.3]])
    for scale in (None, ScoreScale(np.arange(3.0), np.ones(3))):
        assert policy.combine(rewards, scale).tolist() == vote_shares([0, 1, TIE], 2) == [0.5, 0.5]
        assert combined_verdict(policy, rewards, scale) == TIE
        assert combined_verdict(policy, rewards[:1], scale) == 0


def test_the_one_rm_that_was_asked_is_the_reward_of_a_one_call_policy() -> None:
    answer = Attempt(1, 1, Outcome.ANSWERED, rewards=[0.3, -0.2], verdict=0)
    for name in ("bayesian", "laser", "single:a", "random"):
        policy = make_policy(name, POOL)
        assert policy.conclude([Attempt(0, 0, Outcome.FAILED), answer], no_scale) == Given(1, [0.3, -0.2], 0)


def test_the_answer_about_most_responses_is_the_reward() -> None:
    few = Attempt(0, 0, Outcome.ANSWERED, rewards=[np.nan, 0.1, np.nan], failures=[TOO_LONG, "", TOO_LONG])
    most = Attempt(1, 1, Outcome.ANSWERED, rewards=[0.3, 0.1, np.nan], verdict=0, failures=["", "", TOO_LONG])
    other = Attempt(2, 2, Outcome.FAILED, "worker_timeout")
    policy = make_policy("bayesian", POOL)
    assert [*policy.next_arms([0, 1, 2], [few])] == [1]  # type: ignore[attr-defined]
    assert [*policy.next_arms([0, 1, 2], [few, most])] == [2]  # type: ignore[attr-defined]
    assert [*policy.next_arms([0, 1, 2], [few, most, other])] == []  # type: ignore[attr-defined]
    assert policy.conclude([few, most, other], no_scale).arm == 1
    late = Attempt(0, 0, Outcome.ANSWERED, rewards=[np.nan, 0.1, 0.2], verdict=2, failures=["rule_timeout", "", ""])
    assert [*policy.next_arms([0, 1], [late])] == []  # type: ignore[attr-defined]


def test_who_reads_fewer_is_not_drawn_but_alone() -> None:
    one = Beliefs(np.array([[0.9, 0.5, -np.inf]]), np.zeros((1, 3)), np.array([[0.1, 0.1, 0.0]]))
    kept = one.reading_most(np.array([[1, 2, 3]]))
    assert kept.floors is not None
    assert (kept.means.tolist(), kept.floors.tolist()) == ([[-np.inf, 0.5, -np.inf]], [[0.0, 0.1, 0.0]])
    alone = Beliefs(np.array([[0.9, -np.inf, -np.inf]]), np.zeros((1, 3)))
    assert alone.reading_most(np.array([[0, 2, 2]])).means.tolist() == [[0.9, -np.inf, -np.inf]]


def no_scale(*_: object) -> ScoreScale:
    """The scale of a plan that needs none."""
    raise AssertionError("one answer needs no scale")


def test_a_one_call_plan_asks_the_next_best_after_a_failure_and_stops_at_an_answer() -> None:
    policy, order = make_policy("bayesian", ("a", "b", "c")), [2, 0, 1]
    story: list[Attempt] = []
    assert list(policy.next_arms(order, story)) == [2]
    story += [Attempt(2, 0, Outcome.AWAY), Attempt(1, 0, Outcome.ABSENT)]
    assert list(policy.next_arms(order, story)) == [0]
    story.append(Attempt(0, 0, Outcome.FAILED))
    # What was absent in an earlier turn may be back.
    assert list(policy.next_arms(order, story)) == [1]
    assert list(policy.next_arms(order, [*story, Attempt(1, 1, Outcome.ANSWERED)])) == []
    assert list(policy.next_arms(order, [*story, Attempt(1, 1, Outcome.FAILED)])) == []


def test_a_shadow_asks_everyone_who_was_neither_asked_nor_known_to_be_away() -> None:
    before = [Attempt(0, 0, Outcome.AWAY), Attempt(3, 0, Outcome.ABSENT), Attempt(1, 0, Outcome.ANSWERED)]
    plan = AskRest(before)
    assert list(plan.next_arms(range(5), ())) == [2, 4]
    assert list(plan.next_arms(range(5), [Attempt(2, 0, Outcome.FAILED)])) == []


def test_moments_tell_the_scale_of_the_rms_that_answered() -> None:
    rng = np.random.default_rng(0)
    seen = rng.normal([[5.0], [-3.0]], [[2.0], [0.1]], (2, 11))
    scale = ScoreScale.of_moments([Moments.of(row.tolist()) for row in seen], seen[:, :2])
    assert scale is not None
    np.testing.assert_allclose(scale.shift, seen.mean(axis=1))
    np.testing.assert_allclose(scale.scale, seen.std(axis=1))


def test_an_rm_without_spread_is_normalised_inside_the_group() -> None:
    group = np.array([[1.0, 3.0], [10.0, 20.0]])
    scale = ScoreScale.of_moments([Moments.of([7.0, 9.0]), Moments.of([4.0] * 9)], group)
    assert scale is not None
    assert (scale.shift.tolist(), scale.scale.tolist()) == ([8.0, 15.0], [1.0, 5.0])
    assert ScoreScale.of_moments([Moments(), Moments.of([4.0])], group[:, :1]) is None


def test_scales_that_cannot_be_are_refused() -> None:
    with pytest.raises(NotFiniteError, match="positive"):
        ScoreScale(np.zeros(2), np.array([1.0, 0.0]))
    with pytest.raises(ShapeMismatchError, match="give \\(K,\\)"):
        ScoreScale(np.zeros(2), np.ones(3))
    with pytest.raises(ShapeMismatchError, match="RMs that answered"):
        UNIT.normalise(np.zeros((3, 2)))


def linucb_events(n: int, d: int, arms: int) -> list[Event]:
    rng = np.random.default_rng(12)
    x = unit_contexts(rng, n, d)
    rewards = [Feedback(Signal.REWARD, float(rng.random())) for _ in range(n)]
    return [Event(int(rng.integers(arms)), x[i].tobytes(), 0.0, 0, rewards[i], f"d{i}") for i in range(n)]


def test_laser_is_linucb_by_explicit_matrices() -> None:
    events = linucb_events(23, 3, 2)
    policy = make_policy("laser", ("a", "b"))
    prior = linucb_prior(2, 3)
    state = fold(start(prior, FoldSettings(4, 12)), events)
    x = unit_contexts(np.random.default_rng(13), 5, 3)
    beliefs = policy.beliefs(x, prior.offsets(x), state)
    assert not beliefs.sds.any()
    for k in range(2):
        A, b = np.eye(3), np.zeros(3)
        for event in events:
            if event.arm == k:
                A += np.outer(context_of(event), context_of(event))
                b += event.feedback.value * context_of(event)
        theta = np.linalg.solve(A, b)
        for i, row in enumerate(x.astype(np.float64)):
            bound = theta @ row + 0.1 * np.sqrt(row @ np.linalg.solve(A, row))
            assert beliefs.means[i, k] == pytest.approx(bound, abs=1e-6)


def test_laser_by_hand() -> None:
    # x = e1, reward 1 for arm 0: A = diag(2, 1), theta = (1/2, 0), bound 1/2 + 0.1/sqrt 2; arm 1: 0 + 0.1.
    x = np.array([[1.0, 0.0]], dtype=np.float32)
    prior = linucb_prior(2, 2)
    state = fold(start(prior), [Event(0, x[0].tobytes(), 0.0, 0, Feedback(Signal.REWARD, 1.0))])
    policy = make_policy("laser", ("a", "b"))
    beliefs = policy.beliefs(x, prior.offsets(x), state)
    np.testing.assert_allclose(beliefs.means, [[0.5 + 0.1 / 2**0.5, 0.1]], rtol=1e-6)
    choices = draw(beliefs, np.random.default_rng(0))
    assert choices.ranking.tolist() == [[0, 1]]
    assert choices.propensities.tolist() == [[1.0, 0.0]]


def test_laser_asks_one_rm_per_batch_by_the_mean_of_its_contexts() -> None:
    state = fold(start(linucb_prior(3, 6)), linucb_events(60, 6, 3))
    policy = make_policy("laser", POOL)
    seen = set()
    for seed in range(20):
        x = unit_contexts(np.random.default_rng(seed), 7, 6)
        choices = draw_batch(policy, x, np.zeros((7, 3)), state, np.random.default_rng(0))
        assert len({tuple(row) for row in choices.ranking.tolist()}) == 1
        mean = x.mean(axis=0, keepdims=True)
        expected = policy.beliefs(mean, np.zeros((1, 3)), state).means
        np.testing.assert_allclose(choices.means, np.repeat(expected, 7, axis=0), atol=1e-6)
        assert choices.ranking[0, 0] == expected.argmax()
        assert choices.propensities[:, choices.ranking[0, 0]].tolist() == [1.0] * 7
        seen.add(int(choices.ranking[0, 0]))
    assert len(seen) > 1, "batches of other contexts ask other RMs"


def test_laser_breaks_ties_evenly_and_says_so_in_its_propensity() -> None:
    state = start(linucb_prior(3, 4))
    x = unit_contexts(np.random.default_rng(0), 2, 4)
    rng = np.random.default_rng(1)
    draws = [draw_batch(make_policy("laser", POOL), x, np.zeros((2, 3)), state, rng) for _ in range(300)]
    assert all(one.ranking[0].tolist() == one.ranking[1].tolist() for one in draws)
    np.testing.assert_allclose(draws[0].propensities, 1 / 3, atol=1e-9)
    counts = np.bincount([one.ranking[0, 0] for one in draws], minlength=3)
    # 300 draws at 1/3 have a standard deviation of 8.2; five of them are 41.
    assert (abs(counts - 100) < 41).all()


def test_all_other_policies_draw_per_instance_whatever_came_together() -> None:
    state = learned()
    x = unit_contexts(np.random.default_rng(14), 40, 8)
    one = draw(BayesianPolicy().beliefs(x, np.zeros((40, 3)), state), np.random.default_rng(3))
    two = draw_batch(BayesianPolicy(), x, np.zeros((40, 3)), state, np.random.default_rng(3))
    assert np.array_equal(one.draws, two.draws)
    assert len(set(two.ranking[:, 0].tolist())) > 1
