"""Passes: what is learned and when, what the vectorised ways compute, and which policies there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from router_core.errors import DatasetError, FeedbackError, UnknownPolicyError
from router_core.policies import Beliefs, MajorityPolicy, ScoreScale, UwoPolicy, draw, make_policy
from router_core.posterior import fold, start
from router_core.prior import Hyperparameters, Prior, PriorForm, linucb_prior, no_prior
from router_core.records import TIE, Event, Feedback, LabelledPair, Signal
from router_core.replay import Delay, Scenario, SimulatedLoss, Table, Trace, make_plan, replay, select, tabulate
from router_core.replay.figures import report
from router_core.replay.passes import Stage, combined_correctness, first_choice, fixed_pass, learns, online_pass
from tests.support.replay import POOL, pair, specialists, undecided

ARMS = ("a", "b", "c")


def noisy(n: int, seed: int = 0, d: int = 4) -> tuple[Table, np.ndarray]:
    """Three RMs, each right with another probability in each of d directions of the context."""
    rng = np.random.default_rng(seed)
    where = rng.integers(d, size=n)
    chance = rng.uniform(0.3, 0.95, size=(d, len(ARMS)))
    x = np.eye(d, dtype=np.float32)[where]
    right = rng.random((n, len(ARMS))) < chance[where]
    pairs = []
    for i in range(n):
        label = int(rng.integers(2))
        verdicts = {name: label if right[i, k] else 1 - label for k, name in enumerate(ARMS)}
        scores = {name: (rng.normal(), rng.normal()) for name in ARMS}
        pairs.append(pair(i, label, verdicts, scores=scores, domain=f"d{where[i]}"))
    return tabulate(pairs, ARMS), x


def forms(form: str | None) -> Prior:
    if form == PriorForm.LINUCB:
        return linucb_prior(len(ARMS), 4)
    rng = np.random.default_rng(5)
    means = rng.normal(size=(len(ARMS), 4)) * 0.3
    return replace(no_prior(len(ARMS), 4, Hyperparameters(2.0, 0.2, 0.4)), means=means)


def run(table: Table, x: np.ndarray, names: list[str], **given: Any) -> dict[str, Trace]:
    words: dict[str, Any] = {"priors": forms, "signal": Signal.PREFERENCE, "seeds": [0, 1]} | given
    return replay(table, x, names, **words)


def test_the_router_learns_which_specialist_to_ask() -> None:
    pairs, x = specialists(400)
    traces = run(tabulate(pairs, POOL), x, ["bayesian", "random", "single:left", "majority"], priors=undecided)
    earned = {name: float(trace.correct.mean()) for name, trace in traces.items()}
    assert earned["bayesian"] > 0.95
    assert 0.4 < earned["random"] < 0.6
    # The two always disagree: every vote is a tie.
    assert earned["single:left"] == earned["majority"] == 0.5


@pytest.mark.parametrize("signal", [Signal.REWARD, Signal.LOSS])
def test_reward_and_simulated_loss_teach_it_too(signal: Signal) -> None:
    pairs, x = specialists(600)
    [trace] = run(tabulate(pairs, POOL), x, ["bayesian"], priors=undecided, signal=signal, seeds=[3]).values()
    assert trace.passes[0].correct[-200:].mean() > (0.95 if signal is Signal.REWARD else 0.7)


def test_a_loss_without_separation_says_nothing_of_the_verdicts() -> None:
    pairs, x = specialists(300)
    table = tabulate(pairs, POOL)
    # The same pairs with the other response as the better one: everybody is wrong where he was right.
    flipped = tabulate([replace(each, label=1) for each in pairs], POOL)

    def asked(of: Table, separation: float) -> list[list[int]]:
        scenario = Scenario(loss=SimulatedLoss(separation))
        given: dict[str, Any] = {"priors": undecided, "signal": Signal.LOSS, "scenario": scenario}
        found: list[list[int]] = run(of, x, ["bayesian"], **given)["bayesian"].asked.tolist()
        return found

    assert asked(table, 0.0) == asked(flipped, 0.0)
    assert asked(table, 1.0) != asked(flipped, 1.0)


def test_every_policy_meets_the_same_order_and_the_same_seed_gives_the_same_trace() -> None:
    table, x = noisy(60)
    names = ["bayesian", "random", "majority", "laser"]
    first, again, other = run(table, x, names), run(table, x, names), run(table, x, names, seeds=[2, 3])
    for name in names:
        for one, two, three in zip(first[name].passes, again[name].passes, other[name].passes, strict=True):
            assert one.order.tolist() == two.order.tolist() != three.order.tolist()
            assert one.asked.tolist() == two.asked.tolist()
        assert first[name].passes[0].order.tolist() == first["bayesian"].passes[0].order.tolist()


def test_first_choice_is_the_head_of_draws_ranking_ties_included() -> None:
    rng = np.random.default_rng(0)
    means = rng.integers(0, 3, size=(500, 4)).astype(float)
    means[::7, 1] = -np.inf
    sds = np.where(rng.random((500, 4)) < 0.5, 0.0, 0.3)
    rng = np.random.default_rng(9)
    noise, uniforms = rng.standard_normal(means.shape), rng.random((500, 5))
    for floors in (None, np.full(means.shape, 0.1)):
        beliefs = Beliefs(means, sds, floors)
        drawn = draw(beliefs, np.random.default_rng(9)).ranking[:, 0]
        assert first_choice(beliefs, noise, uniforms).tolist() == drawn.tolist()


@pytest.mark.parametrize("name", ["random", "offline", "single:b"])
def test_policies_that_do_not_learn_give_the_same_in_one_go_as_step_by_step(name: str) -> None:
    table, x = noisy(150)
    prior = forms(None)
    stage = Stage(table, x, prior.offsets(x), make_policy(name, ARMS), prior, Signal.PREFERENCE, Scenario())
    plan = make_plan(table, Scenario(), 4)
    at_once, stepwise = fixed_pass(stage, plan, lambda _: None), online_pass(stage, plan, lambda _: None)
    assert at_once.asked.tolist() == stepwise.asked.tolist()
    assert at_once.correct.tolist() == stepwise.correct.tolist()


def by_hand(table: Table, x: np.ndarray, scenario: Scenario, seed: int) -> list[int]:
    """`bayesian`, one instance after another, the way the service does it: the reference for every delay and gap."""
    plan, prior, policy = make_plan(table, scenario, seed), forms(None), make_policy("bayesian", ARMS)
    offsets, state = prior.offsets(x), start(prior)
    waiting: list[tuple[int, int, Event]] = []
    asked = []
    for step, i in enumerate(plan.order.tolist()):
        for _, _, event in sorted((entry for entry in waiting if entry[0] < step), key=lambda entry: entry[:2]):
            state = fold(state, [event])
        waiting = [entry for entry in waiting if entry[0] >= step]
        beliefs = policy.beliefs(x[i : i + 1], offsets[i : i + 1], state)
        at = slice(step, step + 1)
        arm = int(first_choice(beliefs, plan.noise[at], plan.uniforms[at])[0])
        feedback = Feedback(Signal.PREFERENCE, float(table.labels[i]))
        event = Event(arm, x[i].tobytes(), float(offsets[i, arm]), float(table.credit[i, arm]), feedback)
        waiting.append((int(plan.due[step]), step, event))
        asked.append(arm)
    return asked


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario(),
        Scenario(delay=Delay("constant", 7)),
        Scenario(delay=Delay("geometric", 5), missing=0.3),
        Scenario(delay=Delay("batch", 16), repeat=2),
        Scenario(missing=1.0),
        Scenario(drift=True, delay=Delay("constant", 1000)),
    ],
    ids=str,
)
def test_drawing_together_between_arrivals_is_drawing_one_by_one(scenario: Scenario) -> None:
    table, x = noisy(120)
    [trace] = run(table, x, ["bayesian"], seeds=[6], scenario=scenario).values()
    assert trace.passes[0].asked.tolist() == by_hand(table, x, scenario, 6)


def test_feedback_that_never_comes_or_comes_after_the_end_teaches_nothing() -> None:
    table, x = noisy(80)
    never = run(table, x, ["bayesian"], scenario=Scenario(missing=1.0))["bayesian"]
    late = run(table, x, ["bayesian"], scenario=Scenario(delay=Delay("constant", 80)))["bayesian"]
    at_once = run(table, x, ["bayesian"])["bayesian"]
    assert never.asked.tolist() == late.asked.tolist() != at_once.asked.tolist()


def test_delay_costs_and_only_from_the_first_arrival_on_do_they_differ() -> None:
    pairs, x = specialists(200)
    table = tabulate(pairs, POOL)

    def earned(steps: int) -> Trace:
        scenario = Scenario(delay=Delay("constant", steps))
        return run(table, x, ["bayesian"], priors=undecided, seeds=range(8), scenario=scenario)["bayesian"]

    prompt, late, later = earned(0), earned(20), earned(100)
    assert prompt.correct.mean() > late.correct.mean() > later.correct.mean()
    for early, delayed in zip(late.passes, later.passes, strict=True):
        assert early.asked[:21].tolist() == delayed.asked[:21].tolist()


def test_forgetting_pays_when_the_right_arm_changes_along_the_stream() -> None:
    # The same context all along; in domain `even` left is right, in `odd` right: only forgetting can follow.
    pairs, _ = specialists(800)
    x = np.zeros((800, 2), np.float32)
    x[:, 0] = 1.0
    table = tabulate(pairs, POOL)

    def late_accuracy(gamma: float) -> float:
        def prior(_: str | None) -> Prior:
            return no_prior(2, 2, Hyperparameters(1.0, 0.1, 0.3, gamma))

        trace = run(table, x, ["bayesian"], priors=prior, seeds=range(6), scenario=Scenario(drift=True))["bayesian"]
        return float(np.mean([part.correct[-250:].mean() for part in trace.passes]))

    assert late_accuracy(0.5) > late_accuracy(1.0) + 0.1


def test_laser_asks_one_arm_per_batch_and_learns_between_batches() -> None:
    table, x = noisy(100)
    trace = run(table, x, ["laser"], scenario=Scenario(batch=16))["laser"]
    for part in trace.passes:
        batches = [part.asked[begin : begin + 16] for begin in range(0, 100, 16)]
        assert all(len(set(batch.tolist())) == 1 for batch in batches)
    alone = run(table, x, ["laser"], scenario=Scenario(batch=1))["laser"]
    assert any(len(set(part.asked[:16].tolist())) > 1 for part in alone.passes)


def test_shadowing_everything_is_learning_from_full_information() -> None:
    table, x = noisy(300)
    plain, shadowed = (run(table, x, [name], seeds=range(4))[name] for name in ("bayesian", "bayesian+shadow=1"))
    assert plain.calls_per_instance == 1.0
    assert shadowed.calls_per_instance == len(ARMS)
    assert shadowed.correct.mean() > plain.correct.mean()
    none = run(table, x, ["bayesian+shadow=0"], seeds=range(4))["bayesian+shadow=0"]
    assert none.asked.tolist() == plain.asked.tolist()


def test_a_shadow_rate_counts_its_calls() -> None:
    table, x = noisy(200)
    [trace] = run(table, x, ["bayesian+shadow=0.1"]).values()
    assert trace.calls_per_instance == pytest.approx(1 + 0.1 * 2)


def test_shadowing_is_refused_where_it_cannot_teach() -> None:
    table, x = noisy(10)
    with pytest.raises(UnknownPolicyError, match="does not learn"):
        select("offline+shadow=0.1", ARMS)
    with pytest.raises(UnknownPolicyError, match=r"share in \[0, 1\]"):
        select("bayesian+shadow=2", ARMS)
    for signal in (Signal.LOSS, Signal.REWARD):
        with pytest.raises(FeedbackError, match="preference"):
            run(table, x, ["bayesian+shadow=0.5"], signal=signal)


def test_a_model_may_have_a_plus_in_its_name() -> None:
    assert select("single:a+b", ("a+b", "c")).policy.name == "single:a+b"


def test_every_name_of_the_paper_is_a_policy() -> None:
    for name in ("uwo", "laser", "bayesian:none", "bayesian:paper", "bayesian:calibrated", "majority", "single:a"):
        assert select(name, ARMS).name == name
    assert select("bayesian:none", ARMS).policy.prior == PriorForm.NONE
    with pytest.raises(UnknownPolicyError, match="dictator"):
        select("dictator", ARMS)


def test_learning_policies_are_told_from_fixed_ones() -> None:
    taught = {name: learns(make_policy(name, ARMS)) for name in ("bayesian", "laser", "random", "offline", "uwo")}
    assert taught == {"bayesian": True, "laser": True, "random": False, "offline": False, "uwo": False}


def test_uwo_prefers_what_the_rms_agree_on() -> None:
    # Both RMs like the first response a little (mean 1, variance 0); the second has mean 1.5 and variance 2.25.
    scores = {"left": (1.0, 3.0), "right": (1.0, 0.0)}
    recorded = [pair(0, 0, {"left": 1, "right": 0}, scores=scores)]
    table = tabulate(recorded, POOL)
    one = ScoreScale(np.zeros(2), np.ones(2))
    # 1 against 1.5 − 0.5 · 2.25 = 0.375.
    assert combined_correctness(table, UwoPolicy(), one).tolist() == [1.0]
    # On a scale on which the first RM hardly counts the second one decides, for the first response again.
    assert combined_correctness(table, UwoPolicy(), ScoreScale(np.zeros(2), np.array([1e6, 1.0]))).tolist() == [1.0]
    assert combined_correctness(table, UwoPolicy(), ScoreScale(np.zeros(2), np.array([2.0, 1e6]))).tolist() == [0.0]


def test_uwo_without_recorded_scores_is_refused_and_majority_counts_verdicts() -> None:
    table = tabulate([pair(0, 1, {"left": 1, "right": TIE})], POOL)
    with pytest.raises(DatasetError, match="record scores"):
        combined_correctness(table, UwoPolicy(), ScoreScale(np.zeros(2), np.ones(2)))
    assert combined_correctness(table, MajorityPolicy(), ScoreScale(np.zeros(2), np.ones(2))).tolist() == [1.0]


def test_uwo_takes_the_streams_own_scale_where_none_is_given() -> None:
    # `left` shouts: on raw scores it decides alone. On its own scale it is one voice of two.
    rng = np.random.default_rng(1)
    recorded: list[LabelledPair] = []
    for i in range(60):
        loud, soft = rng.normal(size=2) * 1000, rng.normal(size=2)
        label = int(soft[1] > soft[0])
        verdicts = {"left": int(loud[1] > loud[0]), "right": label}
        scores = {"left": tuple(loud.tolist()), "right": tuple(soft.tolist())}
        recorded.append(pair(i, label, verdicts, scores=scores))
    table, x = tabulate(recorded, POOL), np.ones((60, 2), np.float32)
    raw = ScoreScale(np.zeros(2), np.ones(2))
    own = run(table, x, ["uwo"], priors=undecided)["uwo"].correct.mean()
    unscaled = run(table, x, ["uwo"], priors=undecided, scale=raw)["uwo"].correct.mean()
    assert own > unscaled


def test_progress_adds_up_to_the_stream() -> None:
    table, x = noisy(150)
    steps: list[int] = []
    run(table, x, ["random", "majority", "bayesian", "laser"], on_step=steps.append, scenario=Scenario(repeat=2))
    assert sum(steps) == 150 * 2 * 4 * 2


@pytest.mark.parametrize("make", [lambda: Scenario(repeat=0), lambda: Scenario(batch=0)])
def test_impossible_scenarios_are_refused(make: Callable[[], Scenario]) -> None:
    with pytest.raises(DatasetError, match="positive"):
        make()


def test_a_share_beyond_one_is_refused() -> None:
    with pytest.raises(FeedbackError, match="missing"):
        Scenario(missing=1.5)


@pytest.mark.parametrize("name", ["bayesian", "laser", "offline", "random"])
def test_an_rm_that_abstains_is_not_asked_there(name: str) -> None:
    pairs, x = specialists(200)
    silent = [replace(one, verdicts={"left": one.verdicts["left"]}, abstained=frozenset({"right"})) for one in pairs]
    table = tabulate([*pairs[:100], *silent[100:]], POOL)
    [trace] = run(table, x, [name], priors=undecided, scenario=Scenario(batch=4)).values()
    assert not np.isnan(trace.correct).any()
    assert (trace.asked[:, 100:] == 0).all()


def test_a_single_rm_is_judged_where_it_answers() -> None:
    verdicts = [{"left": 0, "right": 1}, {"left": 1, "right": 1}, {"left": 0}, {"left": 1}]
    pairs = [pair(i, 1, told) for i, told in enumerate(verdicts)]
    pairs = [replace(one, abstained=frozenset(set(POOL) - set(one.verdicts))) for one in pairs]
    table = tabulate(pairs, POOL)
    traces = run(table, np.ones((4, 2), np.float32), ["single:right", "majority"], priors=undecided)
    figures = report(traces, table)
    single = figures["policies"]["single:right"]
    assert (single["accuracy"], single["coverage"]) == (1.0, 0.5)
    # Abstaining earns an even guess where RMs are compared: .75 against .5.
    assert figures["best_single"] == {"model": "right", "accuracy": 0.75}
    majority = figures["policies"]["majority"]
    assert (majority["accuracy"], majority["calls_per_instance"]) == (0.625, 1.5)
