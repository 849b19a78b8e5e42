"""A whole training by ms-swift's own launcher against a running gateway that audits: the run learns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests.training import learned, train_ms_swift
from loadtests.training_rules import beginning, length, letters, signs
from tests.conftest import ValkeyProcess
from tests.support.arms import ScriptedArm
from tests.support.live import LiveGateway, live_gateway
from tests.support.trainer_clients import client_folder


def scripted(name: str) -> ScriptedArm:
    rule = {"beginning": beginning, "length": length, "signs": signs}[name]
    return ScriptedArm(name, lambda prompt, response: rule([], response, None, {}))


@pytest.fixture
def auditing(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    arms = [scripted(name) for name in ("beginning", "length", "signs")]
    with live_gateway(valkey_server.url, arms=arms, audit={"referee": "beginning", "rate": 1.0}) as gateway:
        yield gateway


@pytest.mark.long
async def test_ms_swifts_launcher_trains_and_the_audits_teach(auditing: LiveGateway, tmp_path: Path) -> None:
    client_folder("swift")
    trained = train_ms_swift(auditing.url, "swift", tmp_path, steps=2)
    assert len(trained.rewards) == 2
    assert all(len(texts) == 32 for texts in trained.completions)
    report, posterior, asked = await learned(auditing.url, "swift")
    assert sum(asked.values()) == 8
    assert report["audits"] == posterior["version"] == 8
    assert any(model["mean_norm"] > 0 for model in posterior["models"])


def test_the_rules_of_the_toy_training() -> None:
    shares = [rule([], "ab1234", None, {}) for rule in (letters, beginning, signs)]
    assert shares == pytest.approx([1 / 3, 1 / 2, 2 / 3])
    assert length([], "ab1", None, {}) == 3.0
