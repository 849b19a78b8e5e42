"""`rendering: auto`: token ids where they are what the workers read, else conversations, and the log says why."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")
import tokenizers

from service.errors import ConfigurationError
from service.pool import ModelEntry
from service.scorers.rm.build import build_reward_model
from service.scorers.rm.client import VllmArm
from service.scorers.rm.health import HealthMonitor, HealthPolicy
from service.settings import Settings
from service.workers.cpu import cpu_app
from tests.service.scorers.worker_servers import RunningWorker, soon
from tests.service.workers.test_cpu import build
from tests.support.arms import score_items
from tests.support.gateway import until

ITEMS = [("the quick", "brown fox"), ("the quick", "lazy dog jumps"), ("Café 東京", "  x\n")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def worker(model: Path) -> Any:
    running = RunningWorker(cpu_app([model], threads=1))
    yield running.url
    running.stop(force=False)
    running.join()


@pytest.fixture(scope="module")
def other(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer but for a normalizer: it makes other ids of some texts."""
    directory = tmp_path_factory.mktemp("other")
    for file in ("tokenizer_config.json", "chat_template.jinja"):
        if (model / file).exists():
            (directory / file).write_bytes((model / file).read_bytes())
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.normalizer = tokenizers.normalizers.NFD()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def arm_of(url: str, **fields: Any) -> VllmArm:
    return build_reward_model(ModelEntry.model_validate({"name": "tiny", "urls": [url], **fields}), Settings())


async def checked(arm: VllmArm) -> HealthMonitor:
    """The arm, after the first round of probes."""
    monitor = HealthMonitor([arm], HealthPolicy(timeout_seconds=30), np.random.default_rng(0))
    await monitor.check_all()
    return monitor


def reasons(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(str(getattr(record, "fields", {}).get("reason", "")) for record in caplog.records)


async def test_ids_are_sent_where_the_worker_reads_the_same_and_rewards_are_those_of_messages(
    worker: str, model: Path
) -> None:
    arm, by_messages = arm_of(worker, rendering="auto", path=model), arm_of(worker)
    await checked(arm)
    assert arm.rendering.name == "tokens"
    wanted = await score_items(by_messages, ITEMS, deadline=soon(30))
    assert await score_items(arm, ITEMS, deadline=soon(30)) == pytest.approx(wanted, abs=1e-5)
    await arm.close()
    await by_messages.close()


async def test_an_rm_whose_workers_read_another_text_gets_conversations_and_the_log_says_why(
    worker: str, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arm, by_messages = arm_of(worker, rendering="auto", tokenizer=str(other)), arm_of(worker)
    with caplog.at_level(logging.WARNING):
        await checked(arm)
    assert (arm.rendering.name, arm.available) == ("messages", True)
    assert "the tokenizer here makes" in reasons(caplog)
    wanted = await score_items(by_messages, ITEMS, deadline=soon(30))
    assert await score_items(arm, ITEMS, deadline=soon(30)) == pytest.approx(wanted, abs=1e-5)
    strict = arm_of(worker, rendering="tokens", tokenizer=str(other))
    await checked(strict)
    assert not strict.available, "`tokens` insists"
    for one in (arm, by_messages, strict):
        await one.close()


async def test_a_replica_that_is_slower_to_find_the_same_is_used_too(
    worker: str, model: Path, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fallen = threading.Event()
    app = cpu_app([model], threads=1)

    async def held(scope: Any, receive: Any, send: Any) -> None:
        """The worker, whose answers wait until the RM is asked otherwise."""
        if scope["type"] == "http":
            await asyncio.to_thread(fallen.wait, 30)
        await app(scope, receive, send)

    slower = RunningWorker(held)
    arm = arm_of(worker, rendering="auto", tokenizer=str(other), urls=[worker, slower.url])
    with caplog.at_level(logging.WARNING):
        checking = asyncio.create_task(checked(arm))
        await until(lambda: arm.rendering.name == "messages", "the first replica's probe makes the RM fall back")
        fallen.set()
        await checking
    assert [replica.problem for replica in arm.snapshots()] == [None, None]
    assert [replica.admitted for replica in arm.replicas] == [True, True]
    assert [record.message for record in caplog.records] == ["reward model reads another text than is rendered here"]
    await arm.close()
    slower.stop(force=False)
    slower.join()


async def test_a_worker_that_is_wrong_in_any_rendering_stays_out_and_changes_nothing(worker: str, model: Path) -> None:
    arm = arm_of(worker, rendering="auto", path=model, served_name="nobody")
    await checked(arm)
    assert not arm.available
    assert arm.rendering.name == "tokens", "it may yet come right"
    assert "check the served model name" in str(arm.snapshots()[0].problem)
    await arm.close()


async def test_an_rm_that_has_been_asked_by_ids_is_never_asked_otherwise(
    worker: str, model: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = arm_of(worker, rendering="auto", path=model)
    monitor = await checked(arm)
    (replica,) = arm.replicas
    replica.proven = False
    wrong = arm_of(worker, rendering="tokens", tokenizer=str(other))
    monkeypatch.setattr(arm, "_rendering", wrong.rendering)
    await monitor.check_all()
    assert not arm.may_fall_back
    assert (arm.available, arm.rendering.name) == (False, "tokens")
    await arm.close()
    await wrong.close()


async def test_without_the_tokenizers_files_conversations_are_sent_or_the_start_is_refused(
    worker: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        arm = arm_of(worker, rendering="auto", path=tmp_path)
    assert "no tokenizer.json" in reasons(caplog)
    await checked(arm)
    assert (arm.rendering.name, arm.available) == ("messages", True)
    await arm.close()
    with pytest.raises(ConfigurationError, match=r"'tiny': rendering: tokens: .* no tokenizer\.json.*'messages'"):
        arm_of(worker, rendering="tokens", path=tmp_path)


def test_auto_needs_to_know_whose_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"`rendering: auto` and no `tokenizer`"):
        ModelEntry(name="rm", urls=("http://a:1",), rendering="auto")
