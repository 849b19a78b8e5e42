"""Rows to instances and back: TRL's functions against the real gateway, without TRL."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.trainers.groups import by_prompt, in_pairs
from service.trainers.options import ClientOptions
from service.trainers.rowwise import SILENT_STEPS, Judged, OnMissing, RowOptions, Rows, metrics, plan
from service.trainers.trl import AsyncRouterReward, RouterReward
from service.trainers.values import (
    Feedback,
    Missing,
    RewardItem,
    RewardResult,
    RouterRefusedError,
    RouterUnavailableError,
)
from tests.conftest import ValkeyProcess, free_port
from tests.support.gateway import fresh_run
from tests.support.live import LiveGateway, live_gateway
from tests.support.rewards import scored
from tests.support.trainer_processes import opinionated_arms

PROMPTS = ["p", "p", "q", "q"]
TEXTS = ["a", "bb", "ccc", "dddd"]


@pytest.fixture(scope="module")
def gateway(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    with live_gateway(valkey_server.url, arms=opinionated_arms()) as running:
        yield running


@pytest.fixture
def options(gateway: LiveGateway) -> ClientOptions:
    return ClientOptions(url=gateway.url, run=fresh_run(), policy="single:rm-long", deadline_seconds=20)


def prefer_the_first(judged: Judged) -> Feedback | None:
    return Feedback(preferred=0) if judged.prompt == "p" else None


@given(st.lists(st.sampled_from("pqr"), max_size=40), st.integers(1, 5))
def test_every_row_is_in_one_group_of_its_prompt(prompts: list[str], longest: int) -> None:
    responses = [str(row) for row in range(len(prompts))]
    groups = by_prompt(prompts, responses, longest)
    assert sorted(row for group in groups for row in group.rows) == list(range(len(prompts)))
    for group in groups:
        assert {prompts[row] for row in group.rows} == {group.prompt}
        assert group.responses == tuple(responses[row] for row in group.rows)
        assert 1 <= len(group.rows) <= longest


def test_pairs_stay_pairs_where_a_batch_holds_a_prompt_twice() -> None:
    assert [group.rows for group in in_pairs(["p"] * 4, list("abcd"))] == [(0, 2), (1, 3)]
    with pytest.raises(ValueError, match="no pairs"):
        in_pairs(["p", "q"], ["a", "b"])


def test_rewards_come_back_in_the_rows_order_even_where_groups_are_interleaved(options: ClientOptions) -> None:
    reward = RouterReward(options)
    with reward.client:
        assert reward(["p", "q", "p", "q"], TEXTS, log_metric=lambda *_: None) == [1.0, 2.0, 3.0, 4.0]
        assert [group.rows for group, _ in reward.last] == [(0, 2), (1, 3)]
        assert reward([], [], log_metric=lambda *_: None) == []


def test_metrics_and_models_are_logged_where_the_trainer_takes_them(options: ClientOptions) -> None:
    logged: dict[str, float] = {}
    columns: dict[str, list[Any]] = {}
    reward = RouterReward(options)
    with reward.client:
        reward(PROMPTS, TEXTS, log_metric=logged.__setitem__, log_extra=columns.__setitem__)
    assert logged == {
        "reward_router/missing": 0,
        "reward_router/fallback": 0,
        "reward_router/propensity": 1.0,
        "reward_router/share/rm-long": 1.0,
        "reward_router/component/rm-long": 2.5,
    }
    assert columns == {"reward_model": ["rm-long"] * 4}


def test_the_judges_opinion_is_learned_and_no_opinion_is_not(gateway: LiveGateway, options: ClientOptions) -> None:
    reward = RouterReward(options, judge=prefer_the_first)
    with reward.client:
        reward(PROMPTS, TEXTS, log_metric=lambda *_: None)
    assert gateway.until(1, options.run)["version"] == 1


def test_the_asynchronous_function_does_the_same(gateway: LiveGateway, options: ClientOptions) -> None:
    async def step() -> list[float | None]:
        reward = AsyncRouterReward(options, judge=prefer_the_first)
        async with reward.client:
            return await reward(PROMPTS, TEXTS, log_metric=lambda *_: None)

    assert asyncio.run(step()) == [1.0, 2.0, 3.0, 4.0]
    assert gateway.until(1, options.run)["version"] == 1


def test_feedback_of_the_wrong_signal_stops_the_training(options: ClientOptions) -> None:
    reward = RouterReward(options, judge=lambda _: Feedback(loss=0.5))
    with reward.client, pytest.raises(RouterRefusedError, match="learns from the signal 'preference'"):
        reward(PROMPTS, TEXTS, log_metric=lambda *_: None)


def test_a_wrong_policy_stops_the_training(options: ClientOptions) -> None:
    reward = RouterReward(url=options.url, policy="no-such")
    with reward.client, pytest.raises(RouterRefusedError, match="no-such"):
        reward(PROMPTS, TEXTS, log_metric=lambda *_: None)


def test_a_component_is_a_reward_function_of_its_own(options: ClientOptions) -> None:
    reward = RouterReward(options)
    said, silent = reward.component("rm-long"), reward.component("rm-short")
    with reward.client:
        rewards = reward(["p", "q", "p", "q"], TEXTS, log_metric=lambda *_: None)
        assert said(["p", "q", "p", "q"], TEXTS) == rewards == [1.0, 2.0, 3.0, 4.0]
        assert silent(["p", "q", "p", "q"], TEXTS) == [None] * 4
    assert said.__name__ == "reward_router_rm-long"
    with pytest.raises(ValueError, match="behind its router"):
        said(["p"], TEXTS[:1])


@pytest.mark.parametrize("name", ["rm-lnog", "rm-long.helpful"])
def test_a_component_of_nobody_names_the_known_ones(options: ClientOptions, name: str) -> None:
    reward = RouterReward(options)
    with reward.client:
        reward(PROMPTS, TEXTS, log_metric=lambda *_: None)
        with pytest.raises(ValueError, match=r"Scorers of run .*rm-long"):
            reward.component(name)(PROMPTS, TEXTS)


def test_functions_can_be_pickled_and_have_a_name(options: ClientOptions) -> None:
    reward = pickle.loads(pickle.dumps(RouterReward(options, judge=prefer_the_first)))
    assert reward.__name__ == "reward_router"
    with reward.client:
        assert reward(PROMPTS, TEXTS, log_metric=lambda *_: None) == [1.0, 2.0, 3.0, 4.0]


def test_a_gateway_that_is_away_gives_none_to_grpo_and_stops_online_dpo() -> None:
    reward = RouterReward(url=f"http://127.0.0.1:{free_port()}", deadline_seconds=0.3)
    with reward.client:
        assert reward(PROMPTS, TEXTS, log_metric=lambda *_: None) == [None] * 4
        with pytest.raises(RouterUnavailableError, match="4 of 4 rewards are missing"):
            reward(["p", "q", "p", "q"], TEXTS)  # online DPO: no log_metric, rows (i, i + B)


def test_a_null_among_rewards_stays_none() -> None:
    planned = plan(PROMPTS, TEXTS, RowOptions())
    results: list[RewardResult] = [scored(None, 1.0), Missing("worker_rejected", "too long")]
    assert planned.finish(results) == [None, 1.0, None, None]
    assert metrics(results)["reward_router/missing"] == 1.0
    assert metrics([scored(1.0, 2.0), scored(None, 1.0)])["reward_router/missing"] == 0.5
    stopping = plan(PROMPTS, TEXTS, RowOptions(on_missing=OnMissing.RAISE))
    with pytest.raises(RouterUnavailableError, match=r"3 of 4 .*worker_rejected: too long") as stopped:
        stopping.finish(results)
    assert stopped.value.code == "worker_rejected"


@pytest.mark.parametrize("code", ["no_worker", "unavailable", "worker_rejected", "too_long", "validation"])
def test_a_code_that_is_about_one_instance_is_none(code: str) -> None:
    assert plan(["p"], ["a"], RowOptions()).finish([Missing(code, "because")]) == [None]


def test_a_code_that_concerns_the_whole_training_is_raised() -> None:
    with pytest.raises(RouterRefusedError, match="run_conflict"):
        plan(["p"], ["a"], RowOptions()).finish([Missing("run_conflict", "taken")])


def test_columns_reach_the_judge_by_row() -> None:
    seen: list[Judged] = []
    planned = plan(["p", "q", "p", "q"], TEXTS, RowOptions(rows=Rows.PAIRS))
    planned.judged(
        [scored(1.0, 2.0), scored(3.0, 4.0)],
        lambda judged: seen.append(judged),  # type: ignore[func-returns-value]
        {"answer": [1, 2, 3, 4], "constant": "x", "short": [1]},
    )
    assert [judged.columns for judged in seen] == [{"answer": (1, 3)}, {"answer": (2, 4)}]


def test_a_column_becomes_the_reference_of_its_prompt() -> None:
    planned = plan(PROMPTS, TEXTS, RowOptions(reference="answer"), {"answer": [12, 12, None, None]})
    assert [item.document().get("reference") for item in planned.items()] == ["12", None]
    with pytest.raises(ValueError, match=r"reference is 'answer'.* it has solution"):
        plan(PROMPTS, TEXTS, RowOptions(reference="answer"), {"solution": TEXTS})


def test_columns_become_the_metadata_of_their_prompt() -> None:
    columns = {"task": ["math", "math", None, None], "level": [3, 3, 1, 1]}
    planned = plan(PROMPTS, TEXTS, RowOptions(metadata=("task", "level")), columns)
    assert [item.document().get("metadata") for item in planned.items()] == [{"task": "math", "level": 3}, {"level": 1}]
    with pytest.raises(ValueError, match=r"metadata is 'kind'.* it has level, task"):
        plan(PROMPTS, TEXTS, RowOptions(metadata=("kind",)), columns)
    reward = RouterReward(url="http://127.0.0.1:1", run="r", metadata=["task"])
    assert reward._plan(PROMPTS, TEXTS, columns).metadata == [{"task": "math"}, {"task": "math"}, {}, {}]


def test_the_gateway_is_sent_reference_and_signal(gateway: LiveGateway, options: ClientOptions) -> None:
    asked: list[RewardItem] = []
    fields = {"reference": "answer", "judge": lambda judged: judged.right_over_wrong([0])}
    reward = RouterReward(replace(options, signal="reward"), **fields)
    with reward.client:
        send = reward.client.reward_many
        reward.client.reward_many = lambda items: asked.extend(items) or send(items)  # type: ignore[method-assign]
        reward(PROMPTS, TEXTS, answer=["12"] * 4, log_metric=lambda *_: None)
        assert [item.reference for item in asked] == ["12", "12"]
        assert reward.client.posterior()["signal"] == "reward"
    other = RouterReward(replace(options, signal="loss"))
    with other.client, pytest.raises(RouterRefusedError, match="opened with the signal 'reward'"):
        other(PROMPTS, TEXTS, log_metric=lambda *_: None)


def test_rows_without_completions_are_refused() -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        plan(["p", "q"], ["a"], RowOptions())


def test_several_right_responses_are_sent_over_the_wrong_ones() -> None:
    judged = Judged("p", ("a", "b", "c", "d"), {}, scored(3.0, 1.0, 1.0, None))
    # (right, wrong) pairs: 0 over 2 is right, 1 beside 2 is a tie; the fourth response has no reward.
    assert judged.right_over_wrong([0, 1]) == Feedback(reward=0.75)
    assert judged.right_over_wrong([0, 1, 2]) is None
    assert judged.right_over_wrong([]) is None


def test_a_silent_judge_shows_in_the_log(options: ClientOptions, caplog: pytest.LogCaptureFixture) -> None:
    logged: dict[str, float] = {}
    reward = RouterReward(options, judge=prefer_the_first)
    with reward.client:
        reward(PROMPTS, TEXTS, log_metric=logged.__setitem__)
        assert (logged["reward_router/feedbacks_sent"], logged["reward_router/judge_silent"]) == (1, 0.5)
        reward.judge = lambda _: None
        for _ in range(SILENT_STEPS):
            assert "the judge has said nothing" not in caplog.text
            reward(PROMPTS, TEXTS, log_metric=logged.__setitem__)
    assert (logged["reward_router/feedbacks_sent"], logged["reward_router/judge_silent"]) == (0, 1)
    assert "the judge has said nothing about any group for 10 steps" in caplog.text
