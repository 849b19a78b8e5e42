"""What the trainers' pages show runs: Python as it stands, command lines as far as trainers read them without a GPU.

Only the addresses, the model and the sizes are exchanged (`SMALL`).
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from service.trainers.areal import client_of
from service.trainers.options import PREFIX, VARIABLES, ClientOptions, from_environment
from service.trainers.rowwise import Judged
from service.trainers.values import Feedback, Scored
from tests.conftest import ValkeyProcess
from tests.docs.tables import ROOT
from tests.support import areal_scoring
from tests.support.live import LiveGateway, live_gateway
from tests.support.trainer_clients import client_folder
from tests.support.trainer_processes import (
    opinionated_arms,
    result_of,
    run_module,
    run_python,
    save_policy,
)

PAGES = ROOT / "docs/trainers"
GATEWAY = "http://127.0.0.1:8080"

SMALL = {
    "max_steps=100": "max_steps=2, use_cpu=True, bf16=False, report_to=[], save_strategy='no'",
    "max_completion_length=256": "max_completion_length=8",
    "max_new_tokens=64": "max_new_tokens=8",
    "max_length=512": "max_length=32",
}
"""For a tiny random Llama on a CPU."""


@pytest.fixture(scope="module")
def gateway(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    with live_gateway(valkey_server.url, arms=opinionated_arms()) as running:
        yield running


@pytest.fixture(scope="module")
def loss_gateway(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    with live_gateway(valkey_server.url, arms=opinionated_arms(), signal="loss") as running:
        yield running


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (PAGES / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)


def overrides_of(command: str) -> list[str]:
    """What a command line of verl's says about rewards."""
    return [word for word in shlex.split(command) if word.lstrip("+").startswith("reward.")]


def execute(source: str, **names: Any) -> dict[str, Any]:
    found: dict[str, Any] = dict(names)
    exec(compile(source, "page", "exec"), found)
    return found


@pytest.mark.parametrize(
    "name", ["trl", "verl", "ms-swift", "areal", "verifiers", "skyrl", "atropos", "nemo-gym", "roll"]
)
def test_each_page_has_what_one_looks_for(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text("utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    for wanted in (
        "Install",
        "The two lines to change",
        "A complete small config",
        "What is logged",
        "Troubleshooting",
    ):
        assert any(heading.startswith(wanted) for heading in headings), wanted
    assert f"({name}.md)" in (PAGES / "index.md").read_text("utf-8")


def test_the_clients_example_runs(gateway: LiveGateway, capsys: pytest.CaptureFixture[str]) -> None:
    [example] = blocks("index.md", "python")
    execute(example.replace(GATEWAY, gateway.url))
    assert capsys.readouterr().out.splitlines()[-1] == "2 learned"
    assert gateway.until(2, "my-run")["version"] == 2


def test_the_readmes_example_runs(gateway: LiveGateway, capsys: pytest.CaptureFixture[str]) -> None:
    [example] = blocks("../../README.md", "python")
    execute(example.replace(GATEWAY, gateway.url))
    assert re.fullmatch(r"\[\('rm-\w+', .*\), \('rm-\w+', .*\)\]\n", capsys.readouterr().out)
    assert gateway.until(2, "my-training-run")["version"] == 2


def test_the_table_of_options_is_the_options() -> None:
    text = (PAGES / "index.md").read_text("utf-8")
    table = text[text.index("## Options") : text.index("## No reward")]
    for name in ClientOptions.__slots__:
        assert f"`{name}`" in table, name
    assert sorted(re.findall(r"^\| `\w+` \| `(\w+)` \|", table, re.MULTILINE)) == sorted(
        PREFIX + name.upper() for name in VARIABLES
    )


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1], ids=["grpo", "online-dpo"])
def test_trls_configs_train(index: int, gateway: LiveGateway, loss_gateway: LiveGateway, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs trl")
    script, policy = blocks("trl.md", "python")[index], save_policy(tmp_path / "policy")
    serving = loss_gateway if "LossFeedbackMixin" in script else gateway
    for old, new in {GATEWAY: serving.url, "Qwen/Qwen2.5-0.5B-Instruct": str(policy), **SMALL}.items():
        script = script.replace(old, new)
    (tmp_path / "page.py").write_text(script, "utf-8")
    done = run_python([tmp_path / "page.py"], {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    run = ("grpo-1", "online-dpo-1")[index]
    assert serving.posterior(run)["run"] == run
    if index:
        posted = int(re.findall(r"LossCounts\(posted=(\d+)", done.stdout)[0])
        assert posted > 0
        assert serving.until(posted, run)["version"] == posted


def test_trls_judge_says_which_response_is_right() -> None:
    script = blocks("trl.md", "python")[0]
    function = script[script.index("def judge") : script.index("data = ")]
    judge = execute(function, Judged=Judged, Feedback=Feedback)["judge"]
    result = Scored("d1", "r", "rm-a", (0.0, 1.0), 1, 1.0, 0.5, "bayesian", 0, False, True)
    columns = {"answer": ("12", "12")}
    assert judge(Judged("p", ("it is 12", "it is 13"), columns, result)).reward == 0
    assert judge(Judged("p", ("it is 12", "12 it is"), columns, result)) is None


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1, 2], ids=["two lines", "manager", "function"])
def test_verls_overrides_give_the_rewards(index: int, gateway: LiveGateway, tmp_path: Path) -> None:
    clients, policy = client_folder("verl"), save_policy(tmp_path / "policy")
    overrides = [word.replace(GATEWAY, gateway.url) for word in overrides_of(blocks("verl.md", "bash")[index])]
    environment = {"REWARD_ROUTER_CLIENT_POLICY": "single:rm-long", "REWARD_ROUTER_CLIENT_URL": gateway.url}
    words = ["--clients", clients, "--model", policy, *overrides]
    found = result_of(run_module("tests.support.verl_scoring", words, environment))
    assert [output["reward_score"] for output in found["outputs"]] == [3.0, 7.0, 1.0]


def test_verls_data_set_gets_the_prompt() -> None:
    [example] = blocks("verl.md", "python")
    row = {"prompt": [{"role": "user", "content": "p"}], "extra_info": {"index": 1}}
    assert execute(example)["with_prompt"](row)["extra_info"] == {"index": 1, "prompt": row["prompt"]}


def test_ms_swifts_command_names_the_plugin_and_the_environment() -> None:
    [command] = blocks("ms-swift.md", "bash")
    [inner] = re.findall(r'"\$\(python (.*?)\)"', command)
    done = run_python(inner.split())
    assert Path(done.stdout.strip()).is_file()
    exported = re.findall(r"export (\w+)=", command)
    assert exported
    assert set(exported) <= {PREFIX + name.upper() for name in VARIABLES}


def test_ms_swifts_own_plugin_registers_a_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = ModuleType("swift.rewards")
    rewards.orms = {}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swift", ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.rewards", rewards)
    [example] = blocks("ms-swift.md", "python")
    execute(example)
    function = rewards.orms["reward_router"](args=None)
    result = Scored("d1", "r", "rm-a", (0.0, 1.0), 1, 1.0, 0.5, "bayesian", 0, False, True)
    assert function.judge(Judged("p", ("no", "yes"), {"solution": ("yes", "yes")}, result)).reward == 1


def test_areals_workflow_is_the_one_that_areals_code_runs_in_our_tests() -> None:
    name, config, *_ = blocks("areal.md", "python")
    path, _ = areal_scoring.WAYS["workflow"]
    assert execute(name)["workflow"] == path
    given = SimpleNamespace(gconfig=object(), tokenizer_path="policy")
    trainer = Recorder()
    execute(config)["train"](trainer, given)
    assert trainer.given["workflow"] == path
    arguments = trainer.given["workflow_kwargs"]
    assert set(arguments) == {"gconfig", "tokenizer", "enable_thinking", "reward_options"}
    assert from_environment({}, **arguments["reward_options"]).run == "areal-1"


class Recorder:
    """A trainer that notes what it is to train."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def train(self, **given: Any) -> None:
        self.given = given


def test_areals_functions_give_a_reward(gateway: LiveGateway, capsys: pytest.CaptureFixture[str]) -> None:
    *_, name, own = blocks("areal.md", "python")
    module, _, function = execute(name)["reward_fn"].rpartition(".")
    assert callable(getattr(__import__(module, fromlist=[function]), function))
    found = execute(own.replace(GATEWAY, gateway.url))
    client_of(found["reward_fn"].options, os.getpid()).close()
    assert isinstance(float(capsys.readouterr().out), float)


LOADED = {
    "verifiers": """
from verifiers.v1.utils.loaders import load_plugged_fn
load_plugged_fn("router", config.rewards["router"], "reward")
assert issubclass(BestOf, vf.Env)
""",
    "skyrl": """
from skyrl_gym.envs.registration import make
env = make("reward_router", extras={})
env.init("Why?")
assert env.step("So.")["done"]
assert Doubting(extras={"max_turns": 2}).observe("So.")
""",
    "atropos": """
import asyncio
said = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
assert len(asyncio.run(scored({"messages": [said, said]}, "So."))["scores"]) == 2
""",
    "nemo-gym": """
import yaml
[inner] = yaml.safe_load(CONFIG)["router"]["resources_servers"].values()
from service.trainers.nemo_gym_server import RouterConfig
config = RouterConfig(host="127.0.0.1", port=1, name="router", **inner)
assert (config.run, config.num_rollouts_per_prompt) == ("nemo-1", 8)
""",
}
"""What shows that the blocks of a page did what it says. NeMo RL's block is run by `tests.support.ray_scoring`."""


@pytest.mark.slow
@pytest.mark.parametrize(("page", "folder"), [(name, name.replace("-", "_")) for name in LOADED])
def test_the_frameworks_snippets_run(page: str, folder: str, gateway: LiveGateway) -> None:
    clients = client_folder({"skyrl": "skyrl_gym"}.get(folder, folder))
    config = "".join(blocks(f"{page}.md", "yaml"))
    lines = [
        "import sys",
        "from tests.support.gym_scoring import REMOTE",
        "from tests.support.stubs import Stubs",
        "sys.meta_path.insert(0, Stubs(REMOTE))",
        f"sys.path.append({str(clients)!r})",
        f"CONFIG = {config!r}",
        "__name__ = 'page'",
        *(block for block in blocks(f"{page}.md", "python") if "nemo_rl" not in block),
        LOADED[page],
    ]
    environment = {PREFIX + "URL": gateway.url, "PYTHONPATH": str(ROOT)}
    done = run_python(["-c", "\n".join(lines).replace(GATEWAY, gateway.url)], environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_rolls_configuration_names_what_rolls_code_runs_in_our_tests() -> None:
    run = (ROOT / "tests/support/ray_scoring.py").read_text("utf-8")
    for block in blocks("roll.md", "yaml"):
        config = yaml.safe_load(block)
        [worker] = config["rewards"].values()
        assert f'"{worker["worker_cls"]}"' in run
        assert f'"{config["user_defined_rollout_loop_cls"]}"' in run
