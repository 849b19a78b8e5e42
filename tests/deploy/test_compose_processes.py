"""docker-compose.yml's profile `cpu` as processes: started in its order, asked, taught, stopped, and started again.

A wrong command, variable, mount, network or dependency in the file fails here; the last tests show that it does.
"""

from __future__ import annotations

import copy
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.compose import ROOT, ComposeStack, Config, Image, StackError, compose_config
from tests.support.compose_parts import KEY, SECRETS, ask, only

pytest.importorskip("dockerfile_parse", reason="needs reward-router[dev]")
pytest.importorskip("torch", reason="the demo's reward models need reward-router[train]")
pytest.importorskip("wordllama", reason="the demo's encoder needs reward-router[server]")

pytestmark = pytest.mark.long

FIRST_SECONDS = 900.0
"""The demo's reward models are trained in it, on a machine that may be busy."""

PAIR = {"prompt": "What is 17 + 25?", "responses": ["17 + 25 = 41", "17 + 25 = 42"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes that outlive one stack. `DEMO_POOL`, a folder that `reward-router demo` made, spares the training."""
    folder = tmp_path_factory.mktemp("compose")
    if made := os.environ.get("DEMO_POOL"):
        shutil.copytree(made, folder / "volumes" / "demo" / "demo")
    return folder


@pytest.fixture(scope="module")
def first(images: dict[str, Image], folder: Path) -> Iterator[ComposeStack]:
    """The stack as it comes up on empty volumes; the demo pool is made in it."""
    with ComposeStack(config(), folder, images, network=os.getpid() % 120) as stack:
        stack.up(FIRST_SECONDS)
        yield stack


def config() -> Config:
    """A fresh copy of the profile's configuration."""
    return copy.deepcopy(compose_config("cpu", variables=SECRETS))


def version(url: str) -> int:
    """Events that the posterior has learned from."""
    return int(ask(url, "/posterior")[1]["version"])


def test_the_whole_profile_comes_up_in_its_order_routes_a_pair_and_remembers_its_feedback(
    first: ComposeStack, images: dict[str, Image], folder: Path
) -> None:
    assert set(first.left_out) == {"grafana", "prometheus"} - {name.rpartition("/")[2] for name in images}
    assert first.order.index("demo-pool") < first.order.index("rm-code") < first.order.index("gateway")
    url = first.url("gateway")

    assert ask(url, "/reward", PAIR, key=None)[0] == 401
    status, models = ask(url, "/models")
    assert status == 200
    assert all(model["available"] for model in models)

    status, reward = ask(url, "/reward", PAIR)
    assert status == 200, reward
    assert reward["recorded"] is True
    assert reward["fallback"] is False
    assert reward["model"] == "rm-arithmetic"
    assert reward["preferred"] == 1

    assert ask(url, "/feedback", {"decision_id": reward["decision_id"], "preferred": 1})[0] == 200
    deadline = time.monotonic() + 20
    while version(url) < 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)

    # Down within the grace periods, and up again on the same volumes.
    statuses = first.down()
    assert -signal.SIGKILL not in statuses.values(), statuses
    with ComposeStack(config(), folder, images, network=os.getpid() % 120) as again:
        again.up(120)
        assert version(again.url("gateway")) == 1
        status, repeated = ask(url, "/feedback", {"decision_id": reward["decision_id"], "preferred": 1})
        assert (status, repeated["duplicate"]) == (200, True)


@pytest.mark.usefixtures("first")
def test_the_rules_container_is_the_referee_of_decisions_with_a_reference(
    images: dict[str, Image], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "volumes").mkdir()
    (tmp_path / "volumes" / "demo").symlink_to(folder / "volumes" / "demo")
    every = tmp_path / "pool.yaml"
    every.write_text((ROOT / "deploy/compose/pool.cpu.yaml").read_text().replace("rate: 0.1", "rate: 1"))
    changed = config()
    (pool,) = (it for it in changed["services"]["gateway"]["volumes"] if it["target"] == "/etc/reward-router/pool.yaml")
    pool["source"] = str(every)
    with ComposeStack(changed, tmp_path, images, network=120 + os.getpid() % 120) as stack:
        stack.up(300)
        url = stack.url("gateway")
        status, reward = ask(url, "/reward", PAIR | {"reference": PAIR["responses"][1]})
        assert status == 200, reward
        deadline = time.monotonic() + 30
        while not (audits := ask(url, "/audits")[1]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (audit,) = audits
        assert (audit["decision_id"], audit["referee"]) == (reward["decision_id"], "checker")
        assert audit["preferred"] == 1


def wrong_command(services: Config) -> None:
    services["gateway"]["command"][0] = "server"


def wrong_path(services: Config) -> None:
    services["gateway"]["command"][-1] = "/var/lib/reward-router/checkpoint"


def wrong_variable(services: Config) -> None:
    services["gateway"]["environment"]["REWARD_ROUTER_API_KEYS"] = KEY


def wrong_store(services: Config) -> None:
    services["gateway"]["environment"]["REWARD_ROUTER_STORE_URL"] = "http://redis:6379"


def wrong_mount(services: Config) -> None:
    services["gateway"]["volumes"] = services["gateway"]["volumes"][1:]


@pytest.mark.parametrize("break_it", [wrong_command, wrong_path, wrong_variable, wrong_store, wrong_mount])
@pytest.mark.usefixtures("first")
def test_a_gateway_that_is_given_something_wrong_leaves_at_once(
    break_it: Callable[[Config], None], images: dict[str, Image], folder: Path
) -> None:
    broken = only(config(), "redis", "gateway")
    break_it(broken["services"])
    with (
        ComposeStack(broken, folder, images, network=120 + os.getpid() % 120) as stack,
        pytest.raises(StackError, match="gateway left with status 2"),
    ):
        stack.up(60)


def test_a_gateway_without_the_stores_network_never_becomes_ready(images: dict[str, Image], folder: Path) -> None:
    broken = only(config(), "redis", "rm-code", "gateway")
    del broken["services"]["gateway"]["networks"]["store"]
    broken["services"]["gateway"]["healthcheck"]["start_period"] = "20s"
    with (
        ComposeStack(broken, folder, images, network=120 + os.getpid() % 120) as stack,
        pytest.raises(StackError, match="gateway is unhealthy"),
    ):
        stack.up(300)


def test_a_worker_on_another_port_than_its_health_check_asks_holds_up_the_gateway(
    images: dict[str, Image], folder: Path
) -> None:
    broken = only(config(), "redis", "rm-code", "gateway")
    worker = broken["services"]["rm-code"]
    worker["command"][-1] = "8001"
    worker["healthcheck"] = {**(images["reward-router-worker"].healthcheck or {}), "start_period": "5s"}
    with (
        ComposeStack(broken, folder, images, network=120 + os.getpid() % 120) as stack,
        pytest.raises(StackError, match="rm-code is unhealthy"),
    ):
        stack.up(300)


def test_a_health_check_that_says_the_wrong_words_fails(images: dict[str, Image], folder: Path) -> None:
    broken = only(config(), "redis")
    broken["services"]["redis"]["healthcheck"]["test"][-1] = "pong"
    broken["services"]["redis"]["healthcheck"]["start_period"] = "0s"
    with (
        ComposeStack(broken, folder, images, network=120 + os.getpid() % 120) as stack,
        pytest.raises(StackError, match="redis is unhealthy"),
    ):
        stack.up(30)


def test_a_service_that_does_not_wait_for_what_it_needs_fails(images: dict[str, Image], tmp_path: Path) -> None:
    broken = config()
    del broken["services"]["gateway"]["depends_on"]
    with (
        ComposeStack(broken, tmp_path, images, network=120 + os.getpid() % 120) as stack,
        pytest.raises(StackError, match="gateway left with status 2"),
    ):
        stack.up(60)
