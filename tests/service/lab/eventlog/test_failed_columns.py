"""Exported rows tell RMs that failed from RMs that were away; what that means for estimates."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from rich.console import Console

from router_core.policies import propensity_without
from service.cli.ope import print_figures
from service.lab.estimates import evaluate_log
from service.lab.eventlog.export import export_log
from service.lab.eventlog.load import EventLog, load_log, logged_data
from service.scorers.protocol import Scored
from service.stores.redis import RedisStore
from tests.support.arms import ScriptedArm
from tests.support.gateway import Gateway, open_gateway, pair, until
from tests.support.story import away_first, failed, first_arm, gone, shadowed, unasked

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

pq = pytest.importorskip("pyarrow.parquet", reason="needs reward-router[export]")

A, B, C = range(3)


class LeavingArm(ScriptedArm):
    """Calls `on_call` before it answers: what happens in the pool while an RM is asked."""

    on_call: Callable[[], None] = staticmethod(lambda: None)

    async def _take(self, items: list[tuple[str, str]], deadline: float) -> None:
        self.on_call()
        await super()._take(items, deadline)


class CuttingArm(ScriptedArm):
    """Reads all but 7 tokens of every prompt."""

    def _scored(self, items: Any) -> Scored:
        return super()._scored(items)._replace(prompt_tokens_cut=7)


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess) -> AsyncIterator[Gateway]:
    """rm-a refuses questions with a 5 in their prompt; rm-c prefers the shorter response, and feedback the longer."""
    async with open_gateway(valkey_server.url, policy="random") as opened:
        refuse_fives(opened)
        yield opened


def refuse_fives(gateway: Gateway) -> None:
    gateway.arm("rm-a").refuses = lambda text: text.startswith("Question 5")
    gateway.arm("rm-c").score_of = lambda _, response: -float(len(response))


async def asked(gateway: Gateway, *indices: int, **more: Any) -> list[str]:
    """Decisions about these pairs, with feedback for the longer response; their ids."""
    ids = []
    for index in indices:
        reply = await gateway.client.ok("/reward", {**pair(index), **more})
        ids.append(reply["decision_id"])
        await gateway.client.ok("/feedback", {"decision_id": ids[-1], "preferred": 1})
    return ids


async def shadow_of(gateway: Gateway, identity: str) -> None:
    """Until the decision was shadowed."""
    await until(lambda: gateway.decision(identity).shadows is not None, "shadowed")


async def scored_and_shadowed(gateway: Gateway, index: int) -> None:
    """A decision about the pair, shadowed, and then with feedback for the longer response."""
    reply = await gateway.client.ok("/reward", pair(index))
    await shadow_of(gateway, reply["decision_id"])
    await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})


async def exported(gateway: Gateway, path: Path) -> EventLog:
    """The gateway's log by way of a file."""
    store = RedisStore(gateway.server_url, window_seconds=60)
    await export_log(store, gateway.run, path)
    await store.close()
    return load_log(path)


@pytest.mark.parametrize("name", ["log.parquet", "log.jsonl"])
async def test_an_rm_that_failed_for_some_texts_is_the_first_choice_of_those_rows(
    gateway: Gateway, tmp_path: Path, name: str
) -> None:
    await asked(gateway, *[5, 6] * 30)
    log = await exported(gateway, tmp_path / name)
    data = logged_data(log)
    fell = [event.decision for event in log.events if failed(event.decision)]
    assert 0 < len(fell) < 30
    for decision in fell:
        assert (gone(decision), failed(decision), away_first(decision)) == ([A], [A], [])
        assert first_arm(decision) == A != decision.arm
        # The reply's propensity is that of the RM that answered, among those that were left.
        assert decision.propensity == pytest.approx(0.5, abs=1e-3)
    assert not any(failed(event.decision) for event in log.events[1::2])
    assert data.arm.tolist() == [first_arm(event.decision) for event in log.events]
    assert data.available.all()
    assert data.propensities == pytest.approx(np.full((60, 3), 1 / 3), abs=1e-3)
    assert data.reward.tolist() == [float(event.decision.arm != C) for event in log.events]


async def test_who_read_a_part_earns_what_was_taken_instead(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    async with open_gateway(valkey_server.url, policy="random", shadow_rate=1.0) as gateway:
        gateway.arm("rm-a").too_long = lambda response: response == "bbb"
        gateway.arm("rm-c").score_of = lambda _, response: -float(len(response))
        for index in range(24):
            group = {"prompt": f"question {index}", "responses": ["a", "bbb", "cccc"]}
            reply = await gateway.client.ok("/reward", group)
            await shadow_of(gateway, reply["decision_id"])
            await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 2})
        log = await exported(gateway, tmp_path / "log.parquet")
    data = logged_data(log)
    assert {event.decision.arm for event in log.events} == {B, C}
    assert set(data.arm.tolist()) == {A, B, C}
    # It would have put both that it read in the right order, and nobody was given that.
    assert data.rewards[:, A].tolist() == [float(event.decision.arm == B) for event in log.events]
    assert (data.rewards[:, B].tolist(), data.rewards[:, C].tolist()) == ([1.0] * 24, [0.0] * 24)


async def test_estimates_count_what_the_fallback_earned(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    """300 even draws of a run whose draws are the same each time. rm-a first: half the texts fall to rm-b or rm-c."""
    async with open_gateway(valkey_server.url, run="failed-columns", policy="random") as gateway:
        refuse_fives(gateway)
        for _ in range(3):
            results = (await gateway.client.ok("/reward/batch", {"items": [pair(5), pair(6)] * 50}))["results"]
            items = [{"decision_id": result["decision_id"], "preferred": 1} for result in results]
            await gateway.client.ok("/feedback/batch", {"items": items})
        log = await exported(gateway, tmp_path / "log.parquet")
    truth = {"single:rm-a": 0.75, "single:rm-b": 1.0, "single:rm-c": 0.0, "random": (0.75 + 1.0 + 0.0) / 3}
    policies = evaluate_log(log, list(truth), None)["policies"]
    for name, value in truth.items():
        for how in ("ips", "snips", "dr"):
            low, high = policies[name][how]["ci95"]
            assert low - 0.01 <= value <= high + 0.01, (name, how)
        assert policies[name]["safe95"][0] <= value <= policies[name]["safe95"][1]


async def test_an_rm_that_is_away_is_out_of_the_choice_and_one_that_failed_is_not(
    gateway: Gateway, tmp_path: Path
) -> None:
    gateway.arm("rm-b").available = False
    await asked(gateway, *[5] * 24)
    log = await exported(gateway, tmp_path / "log.parquet")
    data = logged_data(log)
    found = {(d.arm, tuple(failed(d)), tuple(away_first(d))) for d in (event.decision for event in log.events)}
    assert found == {(C, (), (B,)), (C, (A,), (B,))}
    assert {tuple(sorted(gone(event.decision))) for event in log.events} == {(B,), (A, B)}
    assert data.available.tolist() == [[True, False, True]] * 24
    assert data.propensities == pytest.approx(np.tile([0.5, 0.0, 0.5], (24, 1)), abs=1e-3)
    for event, propensities in zip(log.events, data.propensities, strict=True):
        draw = np.array(event.decision.means), np.array(event.decision.sds), np.zeros(3)
        first = propensity_without(*draw, away_first(event.decision), first_arm(event.decision))
        assert propensities[first_arm(event.decision)] == pytest.approx(first)


async def test_what_leaves_or_comes_back_after_the_first_call_was_or_was_not_a_choice(
    valkey_server: ValkeyProcess, tmp_path: Path
) -> None:
    arms = [LeavingArm("rm-a"), ScriptedArm("rm-b"), ScriptedArm("rm-c")]
    async with open_gateway(valkey_server.url, arms=arms, policy="random") as gateway:
        gateway.arm("rm-b").available = False
        refuse_fives(gateway)

        def swap() -> None:
            gateway.arm("rm-b").available, gateway.arm("rm-c").available = True, False

        arms[A].on_call = swap
        # Where rm-b was drawn before rm-a, nobody is left when it has come back; where after it, rm-b answers.
        for _ in range(200):
            gateway.arm("rm-b").available, gateway.arm("rm-c").available = False, True
            response = await gateway.client.post("/reward", pair(5))
            if response.status == 200 and response.json["model"] == "rm-b":
                break
        identity = response.json["decision_id"]
        await gateway.client.ok("/feedback", {"decision_id": identity, "preferred": 1})
        log = await exported(gateway, tmp_path / "log.parquet")
    # rm-a was chosen of rm-a and rm-c, failed, and rm-b had come back then.
    last = log.events[-1].decision
    assert (last.arm, failed(last), away_first(last)) == (B, [A], [B])
    data = logged_data(log)
    assert data.arm[-1] == A
    assert data.available[-1].tolist() == [True, False, True]
    assert data.propensities[-1] == pytest.approx([0.5, 0.0, 0.5], abs=1e-3)


async def test_failures_stand_in_the_order_of_asking(gateway: Gateway, tmp_path: Path) -> None:
    gateway.arm("rm-b").refuses = lambda text: text.startswith("Question 5")
    await asked(gateway, *[5] * 100)
    log = await exported(gateway, tmp_path / "log.jsonl")
    assert {tuple(failed(event.decision)) for event in log.events} == {(), (A,), (B,), (A, B), (B, A)}
    assert {event.decision.arm for event in log.events} == {C}


async def test_singles_that_follow_a_draw_fail_over_from_its_first_choice(gateway: Gateway, tmp_path: Path) -> None:
    gateway.arm("rm-a").refuses = lambda text: text == "refused"
    drawn = ""
    for index in range(100):
        reply = await gateway.client.ok("/reward", {"prompt": f"p{index}", "responses": ["x"]})
        if (drawn := reply["model"]) == "rm-a":
            break
    assert drawn == "rm-a"
    follower = await gateway.client.ok("/reward", {"prompt": f"p{index}", "responses": ["refused"]})
    assert follower["fallback"]
    assert follower["sticky"]
    stored = gateway.decision(follower["decision_id"])
    assert (failed(stored), away_first(stored), first_arm(stored)) == ([A], [], A)


async def test_a_shadowed_row_knows_what_every_first_choice_would_have_given(
    valkey_server: ValkeyProcess, tmp_path: Path
) -> None:
    async with open_gateway(valkey_server.url, policy="random", shadow_rate=1.0) as gateway:
        refuse_fives(gateway)
        for index in [5, 6] * 20:
            await scored_and_shadowed(gateway, index)
        log = await exported(gateway, tmp_path / "log.parquet")
    data = logged_data(log)
    assert data.propensities == pytest.approx(np.ones((40, 3)))
    assert data.rewards[1::2].tolist() == [[1.0, 1.0, 0.0]] * 20
    for event, rewards in zip(log.events[0::2], data.rewards[0::2], strict=True):
        # rm-a fails here, asked or shadowed: what answers instead is what the row's own draw had next.
        assert rewards.tolist() == [float(event.decision.arm == B), 1.0, 0.0]
    assert {event.decision.arm for event in log.events[0::2]} == {B, C}


async def test_that_an_instance_was_shadowed_is_noted_though_nobody_answered(
    valkey_server: ValkeyProcess, tmp_path: Path
) -> None:
    async with open_gateway(valkey_server.url, models=("rm-a", "rm-b"), policy="random", shadow_rate=1.0) as gateway:
        gateway.arm("rm-a").refuses = lambda _: True
        # So many that each of the two is asked first at least once: else nobody could say how often it is shadowed.
        for index in range(32):
            await scored_and_shadowed(gateway, index)
        log = await exported(gateway, tmp_path / "log.parquet")
    assert all(shadowed(event.decision) == [] for event in log.events)
    data = logged_data(log)
    assert data.rewards.tolist() == [[1.0, 1.0]] * 32
    assert data.propensities == pytest.approx(np.ones((32, 2)))


async def test_an_rm_that_left_before_its_shadow_is_not_taken_for_one_that_failed(
    valkey_server: ValkeyProcess, tmp_path: Path
) -> None:
    arms = [LeavingArm("rm-a"), ScriptedArm("rm-b"), LeavingArm("rm-c")]
    async with open_gateway(valkey_server.url, arms=arms, policy="random", shadow_rate=1.0) as gateway:
        gateway.arm("rm-b").score_of = lambda _, response: -float(len(response))

        def leave() -> None:
            gateway.arm("rm-b").available = False

        arms[A].on_call = arms[C].on_call = leave  # type: ignore[attr-defined]
        for index in range(40):
            gateway.arm("rm-b").available = True
            await scored_and_shadowed(gateway, index)
        log = await exported(gateway, tmp_path / "log.parquet")
    data = logged_data(log)
    for event, rewards in zip(log.events, data.rewards, strict=True):
        own = event.decision.arm == B
        assert unasked(event.decision) == ([] if own else [B])
        # rm-b is always wrong; nobody knows it where it was not asked, and nobody takes another one's answer for its.
        assert rewards.tolist() == pytest.approx([1.0, 0.0 if own else np.nan, 1.0], nan_ok=True)
    assert data.propensities == pytest.approx(np.tile([1.0, 1 / 3, 1.0], (40, 1)), abs=1e-3)
    assert evaluate_log(log, ["single:rm-b"], None)["policies"]["single:rm-b"]["snips"]["value"] < 0.2


async def test_an_rm_that_left_after_another_one_failed_has_told_nothing(
    valkey_server: ValkeyProcess, tmp_path: Path
) -> None:
    arms = [LeavingArm("rm-a"), ScriptedArm("rm-b"), ScriptedArm("rm-c")]
    async with open_gateway(valkey_server.url, arms=arms, policy="random", shadow_rate=1.0) as gateway:
        refuse_fives(gateway)

        def leave() -> None:
            gateway.arm("rm-c").available = False

        arms[A].on_call = leave
        for _ in range(60):
            gateway.arm("rm-c").available = True
            reply = await gateway.client.ok("/reward", pair(5))
            identity = reply["decision_id"]
            # Also rm-a's shadow call of another row makes rm-c leave: it must be over before the next row.
            await shadow_of(gateway, identity)
            if failed(gateway.decision(identity)):
                break
        await gateway.client.ok("/feedback", {"decision_id": identity, "preferred": 1})
        log = await exported(gateway, tmp_path / "log.jsonl")
    [decision] = [event.decision for event in log.events]
    assert (decision.arm, failed(decision), away_first(decision), sorted(gone(decision))) == (B, [A], [], [A, C])
    assert logged_data(log).rewards[0].tolist() == pytest.approx([1.0, 1.0, np.nan], nan_ok=True)


async def test_preferences_about_single_responses_are_no_rows(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    async with open_gateway(valkey_server.url, policy="random", shadow_rate=1.0, sticky_seconds=0) as gateway:
        single = {"prompt": "p", "responses": ["a"]}
        for request in (single, *map(pair, range(20)), single):
            reply = await gateway.client.ok("/reward", request)
            identity = reply["decision_id"]
            if len(request["responses"]) > 1:
                await shadow_of(gateway, identity)
            await gateway.client.ok("/feedback", {"decision_id": identity, "preferred": 0})
        data = logged_data(await exported(gateway, tmp_path / "log.parquet"))
    assert data.propensities == pytest.approx(np.ones((20, 3)))


async def test_cut_prompts_stand_in_the_log(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    arms = [CuttingArm("rm-a"), ScriptedArm("rm-b")]
    async with open_gateway(valkey_server.url, arms=arms) as gateway:
        for name in ("rm-a", "rm-b"):
            reply = await gateway.client.ok("/reward", {**pair(), "policy": f"single:{name}"})
            assert reply.get("truncated") == ({"prompt_tokens_cut": 7} if name == "rm-a" else None)
            await gateway.client.ok("/feedback", {"decision_id": reply["decision_id"], "preferred": 1})
        log = await exported(gateway, tmp_path / "log.parquet")
    assert [event.decision.attempts[0].prompt_tokens_cut for event in log.events] == [7, 0]
    rows = pq.read_table(tmp_path / "log.parquet")["attempts"].to_pylist()
    assert [attempts[0]["prompt_tokens_cut"] for attempts in rows] == [7, 0]


async def test_the_command_says_how_many_rows_fell_back(gateway: Gateway, tmp_path: Path) -> None:
    await asked(gateway, *[5] * 20)
    log = await exported(gateway, tmp_path / "log.parquet")
    fell = sum(bool(failed(event.decision)) for event in log.events)
    output = StringIO()
    print_figures(evaluate_log(log, ["random"], None), Console(file=output, width=400))
    assert f"{fell} rows asked an RM first that gave no reward" in output.getvalue()
