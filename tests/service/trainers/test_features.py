"""The table "What goes along" of docs/trainers/index.md: every cell, trainer by feature, seen at a running gateway.

Each trainer's way sends a case as that trainer does, and returns what the trainer gets. A cell that begins with "no"
says why, and the test sees that it is so.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest

from router_core.records import Instance, Message, Said
from service.trainers import nemo_gym, nemo_rl, roll, skyrl, verifiers
from service.trainers.areal import RouterRewards
from service.trainers.atropos import score_group
from service.trainers.ms_swift import RouterORM
from service.trainers.options import PREFIX, ClientOptions, from_environment
from service.trainers.rowwise import RowOptions
from service.trainers.samples import Sample, SampleScorer, scorer_from_environment
from service.trainers.trl import AsyncRouterReward
from service.trainers.values import RouterUnavailableError
from service.trainers.verl import DEADLINE_SECONDS, RouterRewardManager, coalescer_of, compute_score_async
from tests.conftest import ValkeyProcess
from tests.docs.tables import ROOT
from tests.support.arms import ScriptedArm
from tests.support.gateway import fresh_run
from tests.support.live import LiveGateway, live_gateway

Chat = list[dict[str, Any]]

USER = {"role": "user", "content": "What is 7 + 5?"}
CHAT = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "11"}]
CHAT += [{"role": "user", "content": "Sure?"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RETURNED = {"role": "tool", "content": "12", "tool_call_id": "c1"}
REFUSED = "x" * 50
"""A response that the reward model gives no reward."""


def said(*texts: str) -> list[Chat]:
    """Responses of one turn."""
    return [[{"role": "assistant", "content": text}] for text in texts]


@dataclass(frozen=True)
class Case:
    """What a trainer asks about: a prompt's messages, and each response's."""

    prompt: Chat
    responses: list[Chat]
    reference: str = "12"

    @property
    def texts(self) -> list[str]:
        """The responses, as the policy's template makes texts of them: without what closes the last turn."""
        return [templated(one)[len(HEAD) : -len(TAIL)] for one in self.responses]


@dataclass(frozen=True)
class Got:
    """What a trainer gets: a reward per response, None where it leaves that one out; and components, if any."""

    rewards: list[float | None]
    components: list[Any] | None = None


HEAD, TAIL = "<|im_start|>assistant\n", "<|im_end|>\n"


def templated(messages: Chat) -> str:
    """A conversation as ChatML has it, calls of tools as texts."""
    found = ""
    for one in messages:
        calls = "".join(f"<tool_call>{json.dumps(call['function'])}</tool_call>" for call in one.get("tool_calls", []))
        found += f"<|im_start|>{one['role']}\n{one['content']}{calls}<|im_end|>\n"
    return found


@pytest.fixture(scope="module")
def gateway(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    def length(_: str, text: str) -> float:
        return math.nan if text == REFUSED else float(len(text))

    arms = [Noting("rm-a", length), Noting("rm-b", length)]
    with live_gateway(valkey_server.url, arms=arms, trainer_patience_seconds=0, max_runs=256) as running:
        yield running


class Noting(ScriptedArm):
    """Keeps what it is asked about, as instances."""

    def __init__(self, name: str, score_of: Callable[[str, str], float]) -> None:
        super().__init__(name, score_of)
        self.asked: list[Instance] = []

    async def score(self, instances: Sequence[Instance], **words: Any) -> Any:
        self.asked.extend(instances)
        return await super().score(instances, **words)


@pytest.fixture
def options(gateway: LiveGateway, monkeypatch: pytest.MonkeyPatch) -> ClientOptions:
    for arm in gateway.arms:
        arm.asked.clear()  # type: ignore[attr-defined]
    given = ClientOptions(url=gateway.url, run=fresh_run(), policy="single:rm-a", deadline_seconds=20)
    for name in ("url", "run", "policy"):
        monkeypatch.setenv(PREFIX + name.upper(), getattr(given, name))
    return given


def asked(gateway: LiveGateway) -> list[Instance]:
    """What the scorers were asked about."""
    return [instance for arm in gateway.arms for instance in arm.asked]  # type: ignore[attr-defined]


# Ways: as each trainer sends a case -----------------------------------------------------------------------------------


async def posted(options: ClientOptions, path: str, body: Any) -> Any:
    async with httpx.AsyncClient(base_url=options.url, trust_env=False) as client:
        words = {"run": options.run, "policy": options.policy, **({"reward_key": "score"} if "remote" in path else {})}
        response = await client.post(path, json=body, params=words)
        if response.status_code == 503:
            raise RouterUnavailableError(response.text)
        response.raise_for_status()
        return response.json()


async def openrlhf(options: ClientOptions, case: Case) -> Got:
    prompt, rewards, components = templated(case.prompt) + HEAD, [], []
    for text in case.texts:
        body = {"query": [prompt + text], "prompts": [prompt], "labels": [case.reference]}
        reply = await posted(options, "/get_reward", body)
        rewards += reply["rewards"]
        components += reply["extra_logs"]["rm_component/rm-a"]
    return Got(rewards, components)


async def llamafactory(options: ClientOptions, case: Case) -> Got:
    messages = [templated(case.prompt) + HEAD + text + TAIL for text in case.texts]
    reply = await posted(options, "/v1/score/evaluation", {"model": "model", "messages": messages})
    return Got(reply["scores"], [one.get("rm-a") for one in reply["components"]])


async def slime(options: ClientOptions, case: Case) -> Got:
    bodies = [{"prompt": case.prompt, "response": text, "label": case.reference} for text in case.texts]
    replies = [await posted(options, "/remote_rm", body) for body in bodies]
    return Got([one["score"] for one in replies], [one["components"].get("rm-a") for one in replies])


async def trl(options: ClientOptions, case: Case) -> Got:
    logged: dict[str, float] = {}
    reward = AsyncRouterReward(options, row_options=RowOptions(reference="solution"))
    count = len(case.responses)
    words: dict[str, Any] = {"solution": [case.reference] * count, "log_metric": logged.__setitem__}
    rewards = await reward([case.prompt] * count, case.responses, **words)
    await reward.client.close()
    return Got(rewards, [logged.get("reward_router/component/rm-a")])


async def verl(options: ClientOptions, case: Case) -> Got:
    try:
        about = {"prompt": case.prompt}
        found = [await compute_score_async("toy", text, case.reference, about) for text in case.texts]
    finally:
        given = from_environment(os.environ, deadline_seconds=DEADLINE_SECONDS)
        await coalescer_of(given, os.getpid()).close()
    return Got([one["score"] for one in found], [json.loads(one["components"]).get("rm-a") for one in found])


async def ms_swift(options: ClientOptions, case: Case) -> Got:
    messages = [[*case.prompt, *response] for response in case.responses]
    texts, count = [response[-1]["content"] for response in case.responses], len(case.responses)
    columns: dict[str, Any] = {"solution": [case.reference] * count, "prompt_id": ["p"] * count}
    return Got(await RouterORM(options=options)(texts, messages=messages, **columns))


class Workflow:
    """Asks for the reward as AReaL's workflows do."""

    def __init__(self, reward_fn: Any) -> None:
        self.async_reward_fn = reward_fn

    async def arun_episode(self, engine: Any, data: Any) -> Any:
        prompt, response, columns = data
        return await self.async_reward_fn(prompt, response, [], [], **columns)


class Routed(RouterRewards, Workflow):
    """As a user makes a workflow; keeps what goes to AReaL's statistics."""

    logged: list[dict[str, float]]

    def record(self, sample: Sample) -> None:
        """Keep the numbers."""
        self.logged.append(sample.metrics())


async def areal(options: ClientOptions, case: Case) -> Got:
    workflow = Routed()
    workflow.logged = []
    columns = {"messages": case.prompt, "answer": case.reference}
    rewards = []
    for response in case.responses:
        prompt = templated([*case.prompt, *response[:-1]]) + HEAD
        rewards.append(await workflow.arun_episode(None, (prompt, response[-1]["content"] + TAIL, columns)))
    await workflow.async_reward_fn.close()
    return Got(rewards, [one.get("reward_router/rm-a") for one in workflow.logged])


class Trace:
    """As verifiers': messages of its own kind, and what is recorded."""

    def __init__(self, messages: Chat) -> None:
        flat = [{**one, "tool_calls": [call["function"] for call in one.get("tool_calls", [])]} for one in messages]
        self.messages = [SimpleNamespace(model_dump=lambda exclude_none, one=one: one) for one in flat]
        self.info: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self.reward: float | None = None

    def record_metrics(self, metrics: dict[str, float]) -> None:
        self.metrics |= metrics

    def record_reward(self, name: str, reward: float, weight: float) -> None:
        self.reward = reward

    def record_error(self, error: Exception) -> None:
        assert isinstance(error, RouterUnavailableError)


async def verifiers_group(options: ClientOptions, case: Case) -> Got:
    traces = [Trace([*case.prompt, *response]) for response in case.responses]
    await verifiers.score_group(SimpleNamespace(answer=case.reference), traces)
    return Got([one.reward for one in traces], [one.metrics.get("reward_router/rm-a") for one in traces])


class Episode(skyrl.RouterRewards):
    """A skyrl-gym environment that says what it is told between the turns."""

    def __init__(self, case: Case, said_between: list[dict[str, Any]]) -> None:
        turns = 1 + len(said_between)
        super().__init__(None, {"max_turns": turns, "reward_spec": {"ground_truth": case.reference}})
        self._said_between = iter(said_between)

    def observe(self, action: str) -> list[dict[str, str]]:
        return [next(self._said_between)]


async def skyrl_gym(options: ClientOptions, case: Case) -> Got:
    rewards: list[float | None] = []
    components = []
    for response in case.responses:
        # Actions are texts: what a policy calls is in them.
        actions = [templated([one])[len(HEAD) : -len(TAIL)] for one in response if one["role"] == "assistant"]
        environment = Episode(case, [one for one in response if one["role"] != "assistant"])
        history, _ = environment.init([*case.prompt])
        for action in actions:
            step = environment.step(action)
            # As SkyRL's generator does, in place.
            history += [{"role": "assistant", "content": action}, *step["observations"]]
        rewards.append(step["reward"])
        components.append(environment.get_metrics().get("reward_router/rm-a"))
    return Got(rewards, components)


def items(messages: Chat) -> list[dict[str, Any]]:
    """Messages as the Responses API has them."""
    found = []
    for one in messages:
        for call in one.get("tool_calls", []):
            found.append({"type": "function_call", "call_id": call["id"], **call["function"]})
        if one["role"] == "tool":
            found.append({"type": "function_call_output", "call_id": "c1", "output": one["content"]})
        elif one["content"]:
            found.append({"type": "message", "role": one["role"], "content": one["content"]})
    return found


async def gym_server(options: ClientOptions, case: Case) -> Got:
    scorer = SampleScorer(options)
    cohorts = nemo_gym.Cohorts(scorer, len(case.responses), 20)
    prompt = nemo_gym.input_messages(items(case.prompt))
    outputs = [nemo_gym.output_messages(items(response)) for response in case.responses]
    rollouts = (cohorts.verify("g", k, prompt, output, case.reference) for k, output in enumerate(outputs))
    verdicts = [nemo_gym.verdict_of(sample) for sample in await asyncio.gather(*rollouts)]
    await scorer.close()
    rewards = [None if one.get("mask_sample") else one["reward"] for one in verdicts]
    return Got(rewards, [one["reward_components"].get("rm-a") for one in verdicts])


async def nemo_rl_step(options: ClientOptions, case: Case) -> Got:
    # NeMo RL hands over role and content of each turn.
    chats = [[*case.prompt, *response] for response in case.responses]
    logs = [
        [{"role": one["role"], "content": templated([one]).split("\n", 1)[1][: -len(TAIL)]} for one in chat]
        for chat in chats
    ]
    samples = nemo_rl.samples_of_logs(logs, [{"ground_truth": case.reference}] * len(logs))
    return Got([one.require() for one in samples], [one.components.get("rm-a") for one in samples])


async def roll_batch(options: ClientOptions, case: Case) -> Got:
    count = len(case.responses)
    columns = {"messages": [case.prompt] * count, "ground_truth": [case.reference] * count}
    samples = roll.samples_of_batch(case.texts, columns)
    return Got([one.require() for one in samples], [one.components.get("rm-a") for one in samples])


async def atropos(options: ClientOptions, case: Case) -> Got:
    logged: dict[str, list[float]] = {}
    group: dict[str, Any] = {"messages": [[*case.prompt, *response] for response in case.responses]}
    found = await score_group(group, case.reference, metrics=logged)
    rewards = [None] * len(case.responses) if found is None else found["scores"]
    return Got(rewards, logged.get("reward_router/rm-a"))


WAYS: dict[str, Callable[[ClientOptions, Case], Any]] = {
    "TRL": trl,
    "verl": verl,
    "ms-swift": ms_swift,
    "AReaL": areal,
    "OpenRLHF": openrlhf,
    "LLaMA-Factory": llamafactory,
    "slime": slime,
    "verifiers": verifiers_group,
    "SkyRL": skyrl_gym,
    "NeMo Gym": gym_server,
    "NeMo RL": nemo_rl_step,
    "ROLL": roll_batch,
    "Atropos": atropos,
}

# Features: what a cell of the table begins with, as it is seen --------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """One trainer's way to one gateway."""

    way: Callable[[ClientOptions, Case], Any]
    options: ClientOptions
    gateway: LiveGateway

    async def send(self, case: Case) -> tuple[Got, list[Instance]]:
        """Return what the trainer gets, and what the scorers were asked about."""
        for arm in self.gateway.arms:
            arm.asked.clear()  # type: ignore[attr-defined]
        try:
            got = await self.way(self.options, case)
        finally:
            await scorer_from_environment().close()
        return got, asked(self.gateway)


def spoken(part: Said, speaker: str) -> Sequence[Message]:
    """A part of a conversation as messages."""
    return (Message(speaker, part),) if isinstance(part, str) else part


def dialogue(instance: Instance) -> list[Message]:
    """The prompt's messages, and the first response's."""
    prompt, response = instance.items()[0]
    return [*spoken(prompt, "user"), *spoken(response, "assistant")]


def heard(instance: Instance, chat: Chat) -> bool:
    """Return True if the scorer was given these turns."""
    return [(one.role, one.text) for one in dialogue(instance)] == [(one["role"], one["content"]) for one in chat]


async def messages(bench: Bench) -> str:
    _, [instance] = await bench.send(Case(CHAT, said("It is 12.")))
    return "yes" if heard(instance, [*CHAT, *said("It is 12.")[0]]) else "no"


async def several_turns(bench: Bench) -> str:
    rollout = [*said("11")[0], {"role": "user", "content": "Sure?"}, *said("It is 12.")[0]]
    _, [instance] = await bench.send(Case([USER], [rollout]))
    return "yes" if heard(instance, [USER, *rollout]) else "no"


async def tool_calls(bench: Bench) -> str:
    answer, found = said("It is 12.")[0], []
    for case in (Case([USER, CALLED, RETURNED], [answer]), Case([USER], [[CALLED, RETURNED, *answer]])):
        _, [instance] = await bench.send(case)
        found.append("add" in [call.name for one in dialogue(instance) for call in one.calls])
    return {(True, True): "prompt and response", (True, False): "prompt", (False, False): "no"}[found[0], found[1]]


async def reference(bench: Bench) -> str:
    _, [instance] = await bench.send(Case([USER], said("It is 12.")))
    assert instance.reference in ("12", None)
    return "no" if instance.reference is None else "yes"


async def components(bench: Bench) -> str:
    got, _ = await bench.send(Case([USER], said("It is 12.")))
    assert got.rewards == [9.0]
    assert got.components in ([9.0], None)
    return "no" if got.components is None else "yes"


async def masks(bench: Bench) -> str:
    try:
        got, _ = await bench.send(Case([USER], said("good", REFUSED)))
    except RouterUnavailableError:
        return "no"
    return {(4.0, None): "response", (None, None): "group"}[got.rewards[0], got.rewards[1]]


async def groups(bench: Bench) -> str:
    _, instances = await bench.send(Case([USER], said("a", "bb", "ccc", "dddd", "eeeee", "ffffff")))
    assert sum(bool(arm.asked) for arm in bench.gateway.arms) == 1  # type: ignore[attr-defined]
    return "one instance" if len(instances) == 1 else "one model"


FEATURES: dict[str, Callable[[Bench], Any]] = {
    "messages": messages,
    "several turns": several_turns,
    "tool calls": tool_calls,
    "reference": reference,
    "components": components,
    "masks": masks,
    "groups": groups,
}

PROMPTS_DROPPED = {"NeMo RL", "ROLL"}
"""Helpers that raise, by which their framework gives the prompt up: `test_batch_workers` sees it by its own code."""


def table() -> dict[str, dict[str, str]]:
    """The page's cells, by trainer and feature."""
    text = (ROOT / "docs/trainers/index.md").read_text("utf-8")
    section = re.split(r"^## ", text[text.index("## What goes along") :], flags=re.MULTILINE)[1]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    head, *rows = lines
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("trainer", WAYS)
async def test_the_table_says_what_is_seen(
    trainer: str, feature: str, options: ClientOptions, gateway: LiveGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    if feature == "groups":
        # Two arms that are drawn alike: only a memory keeps six samples with one.
        options = dataclasses.replace(options, policy="random")
        monkeypatch.setenv(PREFIX + "POLICY", "random")
    found = await FEATURES[feature](Bench(WAYS[trainer], options, gateway))
    if feature == "masks" and trainer in PROMPTS_DROPPED:
        assert found == "no"
        found = "prompt"
    assert table()[trainer][feature].partition(":")[0] == found


def test_every_cell_has_a_test_and_every_no_a_reason() -> None:
    assert set(table()) == set(WAYS)
    for row in table().values():
        assert list(row) == list(FEATURES)
        assert all(len(cell) > len("no: ") for cell in row.values() if cell.startswith("no"))


async def test_verls_manager_sends_the_ground_truth(options: ClientOptions, gateway: LiveGateway) -> None:
    torch = pytest.importorskip("torch")
    fields = {"raw_prompt": CHAT, "reward_model": {"ground_truth": "12"}}
    batch = {"responses": torch.ones(2, dtype=torch.long), "attention_mask": torch.ones(4, dtype=torch.long)}
    sample = SimpleNamespace(batch=batch, non_tensor_batch=fields)
    manager = RouterRewardManager(None, SimpleNamespace(decode=lambda ids, skip_special_tokens: "It is 12."))
    found = await manager.run_single([sample])
    await manager._coalescer.close()
    assert found["reward_score"] == 9.0
    assert asked(gateway)[-1].reference == "12"
