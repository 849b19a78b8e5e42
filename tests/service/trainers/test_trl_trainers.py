"""TRL's real trainers on a tiny random Llama against the real gateway: rewards arrive, and the run learns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ValkeyProcess
from tests.support.live import LiveGateway, live_gateway
from tests.support.trainer_processes import opinionated_arms, result_of, save_policy
from tests.support.warm_process import WarmProcess

pytest.importorskip("trl", reason="needs trl")

pytestmark = pytest.mark.slow

MODULE = "tests.support.trl_training"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmProcess]:
    with WarmProcess(MODULE, tmp_path_factory.mktemp("trl")) as process:
        yield process


@pytest.fixture(scope="module")
def preference_gateway(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    with live_gateway(valkey_server.url, arms=opinionated_arms()) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def loss_gateway(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    with live_gateway(valkey_server.url, arms=opinionated_arms(), signal="loss") as gateway:
        yield gateway


@pytest.fixture
def refusing_gateway(loss_gateway: LiveGateway) -> Iterator[LiveGateway]:
    """No RM takes one of the four prompts."""
    for arm in loss_gateway.arms:
        arm.refuses = lambda prompt: prompt.startswith("d e f")
    yield loss_gateway
    for arm in loss_gateway.arms:
        arm.refuses = lambda _: False


def arguments(kind: str, gateway: LiveGateway, run: str, policy: Path) -> list[object]:
    return [kind, "--url", gateway.url, "--run", run, "--model", policy]


@pytest.mark.parametrize("kind", ["grpo", "grpo-async", "grpo-chat", "rloo"])
def test_group_trainers_get_rewards_and_their_feedback_moves_the_posterior(
    kind: str, trl: WarmProcess, preference_gateway: LiveGateway, policy: Path
) -> None:
    run = f"{preference_gateway.run}-{kind}"
    found = result_of(trl.run(arguments(kind, preference_gateway, run, policy)))
    logged = [entry for entry in found["log"] if "rewards/reward_router/mean" in entry]
    assert len(logged) == 3
    assert all(entry["reward_router/missing"] == 0 for entry in logged)
    assert any(name.startswith("reward_router/share/rm-") for name in logged[0])
    moved = preference_gateway.until(6, run)
    assert moved["version"] == 6  # 3 steps of 4 rows: 2 prompts with 2 completions each
    assert sum(model["feedbacks"] for model in moved["models"]) == 6


@pytest.mark.parametrize("kind", ["online-dpo", "online-dpo-ipo", "online-dpo-penalty"])
def test_online_dpo_sends_the_losses_that_the_trainer_had(
    kind: str, trl: WarmProcess, loss_gateway: LiveGateway, policy: Path
) -> None:
    run = f"{loss_gateway.run}-{kind}"
    found = result_of(trl.run(arguments(kind, loss_gateway, run, policy)))
    assert_means_are_the_losses(found["steps"])
    counts = found["counts"]
    assert counts["declined"] == counts["dropped"] == 0
    assert counts["posted"] + counts["overruled"] == 12
    assert counts["posted"] > 0
    assert loss_gateway.until(counts["posted"], run)["version"] == counts["posted"]
    assert found["log"][0]["reward_router/missing"] == 0


def assert_means_are_the_losses(steps: list[dict[str, Any]]) -> None:
    assert len(steps) == 3
    for step in steps:
        assert len(step["pairs"]) == 4
        assert sum(step["pairs"]) / 4 == pytest.approx(step["loss"], abs=1e-5)


def test_a_pair_without_a_reward_is_taken_out_of_online_dpo(
    trl: WarmProcess, refusing_gateway: LiveGateway, policy: Path
) -> None:
    run = f"{refusing_gateway.run}-refused"
    found = result_of(trl.run(arguments("online-dpo", refusing_gateway, run, policy)))
    assert_means_are_the_losses(found["steps"])
    assert found["counts"]["dropped"] == 3  # one of the four prompts in each of three steps
    for step in found["steps"]:
        assert any(loss == pytest.approx(0.693147, abs=1e-5) for loss in step["pairs"])  # log 2: no difference left
    assert found["counts"]["posted"] + found["counts"]["overruled"] == 9
    assert found["log"][0]["reward_router/missing"] == 0.25


def test_online_dpo_without_the_mixin_stops_rather_than_train_on_a_false_zero(
    trl: WarmProcess, refusing_gateway: LiveGateway, policy: Path
) -> None:
    run = f"{refusing_gateway.run}-plain"
    done = trl.run(arguments("online-dpo-plain", refusing_gateway, run, policy))
    assert done.returncode == 1
    assert "2 of 8 rewards are missing" in done.stderr
    assert "would take None for a 0" in done.stderr


def test_grpo_leaves_out_what_has_no_reward_and_goes_on(
    trl: WarmProcess, refusing_gateway: LiveGateway, policy: Path
) -> None:
    run = f"{refusing_gateway.run}-grpo"
    done = trl.run([*arguments("grpo-quiet", refusing_gateway, run, policy), "--steps", "4"])
    found = result_of(done)
    missing = [entry["reward_router/missing"] for entry in found["log"] if "reward_router/missing" in entry]
    assert len(missing) == 4
    assert sum(missing) == pytest.approx(1.0)  # 2 prompts a step, and 2 of the 8 instances were of that prompt
    assert "the trainer is given None for them" in done.stderr
