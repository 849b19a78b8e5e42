"""verifiers, SkyRL, Atropos and NeMo Gym: their own code against a running gateway, where it has been fetched."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from service.trainers.atropos import score_group
from tests.conftest import ValkeyProcess, free_port
from tests.support.arms import ScriptedArm
from tests.support.gateway import fresh_run
from tests.support.gym_scoring import REFUSED
from tests.support.live import LiveGateway, live_gateway
from tests.support.trainer_clients import client_folder
from tests.support.trainer_processes import opinionated_arms, result_of, run_module

LENGTHS = [3.0, 7.0, 1.0]
"""What the RM that likes long responses says of `gym_scoring.RESPONSES`."""


@pytest.fixture(scope="module")
def gateway(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    [long, *others] = opinionated_arms()
    picky = ScriptedArm("rm-long", lambda prompt, text: math.nan if text == REFUSED else long.score_of(prompt, text))
    with live_gateway(valkey_server.url, arms=[picky, *others]) as running:
        yield running


def scored(framework: str, url: str, folder: str | None = None, **words: str) -> Any:
    environment = {
        "REWARD_ROUTER_CLIENT_URL": url,
        "REWARD_ROUTER_CLIENT_RUN": fresh_run(),
        "REWARD_ROUTER_CLIENT_POLICY": "single:rm-long",
    }
    clients = client_folder(folder or framework)
    done = run_module("tests.support.gym_scoring", ["--clients", clients, framework], {**environment, **words})
    return result_of(done)


def nobody() -> tuple[str, dict[str, str]]:
    """An address at which nobody listens, and little patience."""
    return f"http://127.0.0.1:{free_port()}", {"REWARD_ROUTER_CLIENT_DEADLINE_SECONDS": "0.3"}


@pytest.mark.slow
def test_verifiers_scores_traces_alone_and_together(gateway: LiveGateway) -> None:
    found = scored("verifiers", gateway.url)
    assert found["rewards"] == [0.5 * length for length in LENGTHS]
    assert [metrics["reward_router/rm-long"] for metrics in found["metrics"]] == LENGTHS
    assert found["group"] == LENGTHS
    assert len(set(found["decisions"])) == 1
    assert found["partial"] == [*LENGTHS, None]
    assert found["failed"] == [[], [], [], ["RouterUnavailableError"]]


@pytest.mark.slow
def test_verifiers_fails_a_trace_without_a_reward() -> None:
    url, words = nobody()
    found = scored("verifiers", url, **words)
    assert "gave nothing" in found["error"]
    assert found["rewards"] == [{"router": None}] * 3


@pytest.mark.slow
def test_skyrl_steps_through_single_and_several_turns(gateway: LiveGateway) -> None:
    found = scored("skyrl", gateway.url, "skyrl_gym")
    assert found["rewards"] == LENGTHS
    assert [metrics["reward_router/rm-long"] for metrics in found["metrics"]] == LENGTHS
    [first, last] = found["turns"]
    assert first == [0.0, False]
    assert last[1] is True
    # SkyRL's generator scores the end of an episode, once: the responses are "a b", what was asked, and "c".
    assert [sum(rewards) for rewards in found["generated"]["rewards"]] == [found["turns"][1][0]]
    assert found["generated"]["metrics"]


@pytest.mark.slow
def test_atropos_gets_a_groups_scores_or_none(gateway: LiveGateway) -> None:
    assert scored("atropos", gateway.url) == {"scores": [LENGTHS], "successful": [1]}
    url, words = nobody()
    assert scored("atropos", url, **words) == {"scores": [], "successful": [0]}


async def test_a_dropped_group_names_its_code(caplog: pytest.LogCaptureFixture) -> None:
    members = [[{"role": "user", "content": "p"}, {"role": "assistant", "content": text}] for text in "ab"]
    found = await score_group({"messages": members}, url=f"http://127.0.0.1:{free_port()}", deadline_seconds=0.3)
    assert found is None
    assert "for 2 have no reward: unavailable (x2)" in caplog.text


@pytest.mark.slow
def test_nemo_gym_verifies_singles_cohorts_and_compares(gateway: LiveGateway) -> None:
    found = scored("nemo_gym", gateway.url)
    for way in ("single", "cohort"):
        assert [verdict["reward"] for verdict in found[way]] == LENGTHS
        assert [verdict["reward_components"] for verdict in found[way]] == [{"rm-long": one} for one in LENGTHS]
        assert not any(verdict["mask_sample"] for verdict in found[way])
    assert len({verdict["decision_id"] for verdict in found["single"]}) == 3
    assert len({verdict["decision_id"] for verdict in found["cohort"]}) == 1
    assert found["compare"]["rewards"] == LENGTHS
    [lonely] = found["incomplete"]
    assert lonely["mask_sample"] is True
    assert "1 of 3 rollouts" in lonely["failure_reason"]


@pytest.mark.slow
def test_nemo_gym_masks_what_has_no_reward() -> None:
    url, words = nobody()
    found = scored("nemo_gym", url, **words)
    for verdict in (*found["single"], *found["cohort"]):
        assert verdict["mask_sample"] is True
        assert verdict["failure_kind"] == "judge_failed"
        assert "gave nothing" in verdict["failure_reason"]
    assert found["compare"]["rewards"] == [None] * 3
