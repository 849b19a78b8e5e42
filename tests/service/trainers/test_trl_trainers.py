"""TRL's real trainers on a tiny random Llama against the real gateway: rewards arrive, and the run learns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ValkeyProcess
from tests.support.arms import ScriptedArm
from tests.support.live import LiveGateway, live_gateway

pytest.importorskip("trl", reason="needs trl")

SECONDS = 300.0
"""Longest wait for a training on a busy machine; importing TRL takes most of it."""


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    from tests.support.transformers_dirs import save_transformer

    folder = save_transformer(tmp_path_factory.mktemp("llama"), "llama", chat=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    return folder


def arms() -> list[ScriptedArm]:
    """One RM likes long responses, one short ones, one by a hash: never a tie for long."""
    return [
        ScriptedArm("rm-long", lambda _, response: float(len(response))),
        ScriptedArm("rm-short", lambda _, response: -float(len(response))),
        ScriptedArm("rm-odd", lambda prompt, response: float(sum(map(ord, prompt + response)) % 97)),
    ]


@pytest.fixture(scope="module")
def preference_gateway(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    with live_gateway(valkey_server.url, arms=arms()) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def loss_gateway(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    with live_gateway(valkey_server.url, arms=arms(), signal="loss") as gateway:
        yield gateway


def run_training(
    kind: str, gateway: LiveGateway, run: str, model: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "tests.support.trl_training", kind),
            *("--url", gateway.url, "--run", run, "--model", str(model)),
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def train(kind: str, gateway: LiveGateway, run: str, model: Path, *options: str) -> dict[str, Any]:
    done = run_training(kind, gateway, run, model, *options)
    assert done.returncode == 0, done.stderr[-4000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "grpo-async", "grpo-chat", "rloo"])
def test_group_trainers_get_rewards_and_their_feedback_moves_the_posterior(
    kind: str, preference_gateway: LiveGateway, tiny_llama: Path
) -> None:
    run = f"{preference_gateway.run}-{kind}"
    found = train(kind, preference_gateway, run, tiny_llama)
    logged = [entry for entry in found["log"] if "rewards/reward_router/mean" in entry]
    assert len(logged) == 3
    assert all(entry["reward_router/missing"] == 0 for entry in logged)
    assert any(name.startswith("reward_router/share/rm-") for name in logged[0])
    moved = preference_gateway.until(6, run)
    assert moved["version"] == 6  # 3 steps of 4 rows: 2 prompts with 2 completions each
    assert sum(model["feedbacks"] for model in moved["models"]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["online-dpo", "online-dpo-ipo", "online-dpo-penalty"])
def test_online_dpo_sends_the_losses_that_the_trainer_had(
    kind: str, loss_gateway: LiveGateway, tiny_llama: Path
) -> None:
    run = f"{loss_gateway.run}-{kind}"
    found = train(kind, loss_gateway, run, tiny_llama)
    assert len(found["steps"]) == 3
    for step in found["steps"]:
        assert len(step["pairs"]) == 4
        assert sum(step["pairs"]) / 4 == pytest.approx(step["loss"], abs=1e-5)
    counts = found["counts"]
    assert counts["declined"] == counts["dropped"] == 0
    assert counts["posted"] + counts["overruled"] == 12
    assert counts["posted"] > 0
    assert loss_gateway.until(counts["posted"], run)["version"] == counts["posted"]
