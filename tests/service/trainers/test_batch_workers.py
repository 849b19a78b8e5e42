"""ROLL's worker and NeMo RL's environment against a running gateway.

By the frameworks' own code where `make trainer-sources` and `make trainer-clients` have fetched it; and always on
stand-ins of their bases.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

from service.trainers.nemo_rl import component_rewards, samples_of_logs
from service.trainers.options import PREFIX
from service.trainers.roll import samples_of_batch
from service.trainers.samples import Sample, samples_of
from service.trainers.values import Missing, RouterRefusedError, RouterUnavailableError, Scored
from tests.conftest import ValkeyProcess, free_port
from tests.support.arms import ScriptedArm
from tests.support.fetch_trainers import FOLDER, NEMO_RL, ROLL, Source
from tests.support.gateway import fresh_run
from tests.support.live import LiveGateway, live_gateway
from tests.support.ray_scoring import REFUSED
from tests.support.trainer_clients import client_folder, source_folder
from tests.support.trainer_processes import opinionated_arms, result_of, run_module

TEXTS = ["a b", "c d e f", "g"]


@pytest.fixture(scope="module")
def gateway(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    [long, *others] = opinionated_arms()
    picky = ScriptedArm("rm-long", lambda prompt, text: math.nan if text == REFUSED else long.score_of(prompt, text))
    with live_gateway(valkey_server.url, arms=[picky, *others]) as running:
        yield running


@pytest.fixture
def told(gateway: LiveGateway, monkeypatch: pytest.MonkeyPatch) -> LiveGateway:
    """The gateway, named by the environment."""
    for name, value in {"URL": gateway.url, "RUN": fresh_run(), "POLICY": "single:rm-long"}.items():
        monkeypatch.setenv(PREFIX + name, value)
    return gateway


def scored(source: Source, url: str, folder: Path) -> Any:
    """What the framework's own code got."""
    client_folder("verl")
    source_folder(source)
    words = [source.name, "--clients", FOLDER, "--folder", folder]
    environment = {PREFIX + "URL": url, PREFIX + "RUN": fresh_run(), PREFIX + "POLICY": "single:rm-long"}
    return result_of(run_module("tests.support.ray_scoring", words, environment))


@pytest.mark.slow
def test_nemo_rls_rollouts_ask_our_environment(gateway: LiveGateway, tmp_path: Path) -> None:
    found = scored(NEMO_RL, gateway.url, tmp_path)
    assert found["rewards"] == [3.0, 7.0, 1.0]
    assert found["ended"] == [True] * 3
    assert found["means"]["reward_router/rm-long"] == pytest.approx(11 / 3)
    assert found["components"]["reward/rm-long"] == [3.0, 7.0, 1.0]
    assert found["components"]["reward/rm-short"] == [-3.0, -7.0, -1.0]
    # NeMo RL tries the one again on another shard, and the other a few times, and then skips the prompt.
    [away, refused] = found["away"], found["refused"]
    assert (away[0], refused[0]) == ("infra", "data")
    assert "gave nothing" in away[1]
    assert "rm-long gave no reward" in refused[1]


@pytest.mark.slow
def test_rolls_scheduler_asks_our_worker(gateway: LiveGateway, tmp_path: Path) -> None:
    found = scored(ROLL, gateway.url, tmp_path)
    assert found["rewards"] == [3.0, 7.0, 1.0]
    assert found["metrics"]["reward_router/rm-long"] == pytest.approx(11 / 3)
    assert found["prompts"] == [[[3.0, 7.0, 1.0]], ["aborted"]]
    assert found["validated"] == ["aborted", "RouterUnavailableError"]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> None:
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:depth]))
        module.__path__ = []
        if depth == len(parts):
            module.__dict__.update(names)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def unchanged(*_: Any, **__: Any) -> Any:
    return lambda function: function


def test_rows_of_one_prompt_are_one_decision(told: LiveGateway) -> None:
    columns = {"prompt": ["p", "q", "p"], "ground_truth": ["x", "y", "x"]}
    samples = samples_of_batch(TEXTS, columns)
    assert [sample.reward for sample in samples] == [3.0, 7.0, 1.0]
    assert samples[0].decision_id == samples[2].decision_id != samples[1].decision_id


def test_a_batch_without_prompts_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="give `messages` or `prompt`"):
        samples_of_batch(TEXTS, {"tag": ["x"] * 3})


def test_a_fatal_refusal_is_no_missing_reward() -> None:
    with pytest.raises(RouterRefusedError, match="no such run"):
        samples_of(Missing("not_found", "no such run"), 2)


def test_a_null_reward_names_its_failure() -> None:
    extra = {"failure": [None, "worker_rejected"], "components": {"rm-a": [1.0, None]}}
    scored = Scored("d1", "r", "rm-a", (1.0, None), None, None, 0.5, "bayesian", 0, False, True, extra)
    [first, second] = samples_of(scored, 2)
    assert (first.reward, first.components) == (1.0, {"rm-a": 1.0})
    assert (second.reward, second.failure, second.components) == (None, "worker_rejected", {})
    with pytest.raises(RouterUnavailableError, match="worker_rejected"):
        second.require()


def test_rolls_worker_fills_the_batch(told: LiveGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")

    class Worker:
        def __init__(self, worker_config: Any) -> None:
            self.worker_config, self.rank_info = worker_config, SimpleNamespace(rank=0, world_size=1)

    class DataProto(SimpleNamespace):
        @classmethod
        def from_dict(cls, tensors: Any) -> DataProto:
            return cls(batch=tensors, meta_info={})

    decoder = SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: TEXTS)
    dispatch = SimpleNamespace(ONE_TO_ALL=1, DP_MP_COMPUTE=2)
    stand_in(monkeypatch, "roll.distributed.executor.worker", Worker=Worker)
    stand_in(monkeypatch, "roll.distributed.scheduler.decorator", Dispatch=dispatch, register=unchanged)
    stand_in(monkeypatch, "roll.distributed.scheduler.protocol", DataProto=DataProto)
    stand_in(monkeypatch, "roll.models.model_providers", default_tokenizer_provider=lambda model_args: decoder)
    module = importlib.import_module("service.trainers.roll_worker")
    monkeypatch.delitem(sys.modules, "service.trainers.roll_worker")
    worker = module.RouterRewardWorker(SimpleNamespace(model_args=None))
    columns = {"messages": [[{"role": "user", "content": "p"}]] * 3}
    data = DataProto(batch={"responses": torch.ones(3, 4, dtype=torch.long)}, non_tensor_batch=columns)
    found = worker.compute_rewards(data)
    assert found.batch["response_level_rewards"].tolist() == [3.0, 7.0, 1.0]
    assert found.batch["token_level_rewards"].shape == (3, 4)
    assert found.meta_info["metrics"]["reward_router/rm-long"] == pytest.approx(11 / 3)


def test_nemo_rls_environment_ends_each_episode(told: LiveGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")

    class EnvironmentReturn(NamedTuple):
        observations: Any
        metadata: Any
        next_stop_strings: Any
        rewards: Any
        terminateds: Any
        answers: Any = None

    names = {"EnvironmentInterface": object, "EnvironmentReturn": EnvironmentReturn}
    stand_in(monkeypatch, "ray", remote=lambda cls: cls)
    registry: dict[str, str] = {}
    executables = SimpleNamespace(SYSTEM="python")
    stand_in(monkeypatch, "nemo_rl.environments.interfaces", **names)
    actors, clusters = "nemo_rl.distributed.ray_actor_environment_registry", "nemo_rl.distributed.virtual_cluster"
    stand_in(monkeypatch, actors, ACTOR_ENVIRONMENT_REGISTRY=registry)
    stand_in(monkeypatch, clusters, PY_EXECUTABLES=executables)
    module = importlib.import_module("service.trainers.nemo_rl_env")
    monkeypatch.delitem(sys.modules, "service.trainers.nemo_rl_env")
    # NeMo RL refuses an actor that is not here.
    assert registry == {"service.trainers.nemo_rl_env.RouterEnvironment": "python"}
    environment = module.RouterEnvironment({"policy": "single:rm-short"})
    asked = {"role": "user", "content": "p", "token_ids": [1]}
    logs = [[asked, {"role": "assistant", "content": text}] for text in TEXTS]
    found = environment.step(logs, [None, {"ground_truth": "x"}, None])
    assert found.rewards.tolist() == [-3.0, -7.0, -1.0]
    assert found.terminateds.all()
    assert found.answers == TEXTS
    _, metrics = environment.global_post_process_and_metrics({})
    assert metrics["reward_router/rm-short"] == pytest.approx(-11 / 3)
    # Releases without NeMo RL's kinds of failures get our own error.
    with pytest.raises(RouterUnavailableError, match="rm-long gave no reward"):
        module.RouterEnvironment({"policy": "single:rm-long"}).step(
            [[asked, {"role": "assistant", "content": REFUSED}]], [None]
        )


def test_a_component_that_was_not_asked_for_names_the_policy() -> None:
    samples = [Sample(1.0, components={"rm-a": 1.0, "rm-b": 2.0}), Sample(1.0, components={"rm-a": 1.0})]
    assert component_rewards(samples[:1]) == {"reward/rm-a": [1.0], "reward/rm-b": [2.0]}
    with pytest.raises(ValueError, match=r"'rm-b' was not asked .* `majority`"):
        component_rewards(samples)


def test_a_log_without_a_reward_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    log = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    [sample] = samples_of_logs([log], [None], url=f"http://127.0.0.1:{free_port()}", deadline_seconds=0.3)
    with pytest.raises(RouterUnavailableError):
        sample.require()
