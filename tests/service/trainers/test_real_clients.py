"""The trainers' own clients against the running gateway: what they send, what they make of answers, when they give up.

Their code is theirs, unchanged (`tests.support.trainer_clients`); only their pauses between tries are skipped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.arms import ScriptedArm
from tests.support.fetch_trainers import SLIME
from tests.support.gateway import until
from tests.support.live import LiveGateway, live_gateway
from tests.support.trainer_clients import ImpatientAsyncio, client_folder, loaded, source_folder

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

pytest.importorskip("aiohttp", reason="the clients of OpenRLHF and slime use it")

PROMPT = "<|im_start|>user\nWhy {}?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def gateway(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    """Three RMs whose reward is the response's length, and 100 or 200 more for the second and third."""
    arms = [
        ScriptedArm(name, lambda _, response, shift=100.0 * k: len(response) + shift)
        for k, name in enumerate(("rm-a", "rm-b", "rm-c"))
    ]
    with live_gateway(
        valkey_server.url, arms=arms, signal="reward", trainer_patience_seconds=0, api_keys=("secret",)
    ) as live:
        yield live


@pytest.fixture
def healthy(gateway: LiveGateway) -> Iterator[LiveGateway]:
    """The gateway; what a test did to its RMs is undone, and their calls are forgotten."""
    for arm in gateway.arms:
        arm.calls.clear()
    yield gateway
    for arm in gateway.arms:
        arm.available, arm.error = True, None


def url(gateway: LiveGateway, path: str, query: str = "") -> str:
    """As a trainer is told it: with the key, because it can send no header."""
    return gateway.url.replace("http://", "http://trainer:secret@") + path + query


# OpenRLHF ------------------------------------------------------------------------------------------------------------


class Tokens(list[int]):
    """Ids with what the client asks of a tensor."""

    def tolist(self) -> list[int]:
        return list(self)


class CharacterTokenizer:
    """One id per character."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[Tokens]]:
        return {"input_ids": [Tokens(map(ord, text))]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


class Engine:
    """Generates what it is told."""

    def __init__(self, response: str) -> None:
        self._response = response

    async def generate(self, prompt_ids: list[int], params: Any, multi_modal_data: Any = None) -> Any:
        output = SimpleNamespace(token_ids=[ord(c) for c in self._response], finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[output])


@pytest.fixture(scope="module")
def agent() -> Iterator[Any]:
    """`openrlhf.utils.agent`."""
    with loaded(client_folder("openrlhf"), "openrlhf.utils.agent") as module:
        module.asyncio = ImpatientAsyncio()
        yield module


async def rollout(agent: Any, endpoint: str | list[str], prompt: str, response: str) -> dict[str, Any]:
    """One sample through OpenRLHF's executor."""
    executor = agent.SingleTurnAgentExecutor(endpoint)
    params = SimpleNamespace(max_tokens=256, logprobs=None)
    output: dict[str, Any] = await executor.execute(
        prompt, "label", params, 4096, CharacterTokenizer(), Engine(response)
    )
    return output


async def test_openrlhf_gets_reward_score_and_logs(agent: Any, healthy: LiveGateway) -> None:
    output = await rollout(agent, url(healthy, "/get_reward"), PROMPT.format("1"), "Because.<|im_end|>")
    calls = {k: arm.calls for k, arm in enumerate(healthy.arms) if arm.calls}
    ((index, asked),) = calls.items()
    assert asked == [[("Why 1?", "Because.")]]
    assert output["reward"] == output["scores"] == [8.0 + 100.0 * index]
    assert output["extra_logs"]["rm_index"] == [float(index)]


async def test_openrlhf_makes_tensors_of_what_it_gets(agent: Any, healthy: LiveGateway) -> None:
    """As `samples_generator._process_response_into_experience` does; a string among them would raise."""
    torch = pytest.importorskip("torch")
    output = await rollout(agent, url(healthy, "/get_reward"), PROMPT.format("2"), "Because.")
    for value in (output["reward"], output["scores"], *output["extra_logs"].values()):
        assert torch.isfinite(torch.tensor([value])).all()


async def test_openrlhf_samples_of_one_prompt_meet_one_rm_over_two_gateways(
    agent: Any, healthy: LiveGateway, valkey_server: ValkeyProcess
) -> None:
    with live_gateway(valkey_server.url, run=healthy.run, arms=healthy.arms, signal="reward", seed=5) as other:
        urls = [url(healthy, "/get_reward"), other.url + "/get_reward"]
        for group in range(6):
            prompt = PROMPT.format(f"group {group}")
            samples = [rollout(agent, urls[i % 2], prompt, "x" * (i + 1)) for i in range(8)]
            indices = [output["extra_logs"]["rm_index"] for output in await asyncio.gather(*samples)]
            assert len({tuple(index) for index in indices}) == 1


async def test_openrlhf_tries_again_until_there_is_a_reward(agent: Any, healthy: LiveGateway) -> None:
    for arm in healthy.arms:
        arm.available = False
    agent.asyncio.pauses.clear()
    sample = asyncio.create_task(rollout(agent, url(healthy, "/get_reward"), PROMPT.format("3"), "Because."))
    await until(lambda: agent.asyncio.pauses, "its first try failed")
    for arm in healthy.arms:
        arm.available = True
    assert (await sample)["reward"][0] % 100 == 8.0


async def test_openrlhf_gives_up_without_a_reward_never_with_a_zero(agent: Any, healthy: LiveGateway) -> None:
    for arm in healthy.arms:
        arm.available = False
    agent.asyncio.pauses.clear()
    output = await rollout(agent, url(healthy, "/get_reward"), PROMPT.format("4"), "Because.")
    assert (output["reward"], output["scores"], output["extra_logs"]) == (None, None, {})
    assert agent.asyncio.pauses == [1] * 5


async def test_openrlhf_normalised_rewards_of_the_first_samples_come_at_the_next_try(
    agent: Any, healthy: LiveGateway
) -> None:
    endpoint = url(healthy, "/get_reward", f"?run={healthy.run}-n&normalize=true")
    samples = [rollout(agent, endpoint, PROMPT.format(f"n{i}"), "x" * (1 + i)) for i in range(12)]
    rewards = [output["reward"] for output in await asyncio.gather(*samples)]
    assert all(reward is not None and abs(reward[0]) < 5 for reward in rewards)


# LLaMA-Factory -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ppo_utils() -> Iterator[Any]:
    """`llamafactory.train.ppo.ppo_utils`."""
    for needed in ("torch", "transformers", "requests"):
        pytest.importorskip(needed)
    with loaded(
        client_folder("llamafactory"),
        "llamafactory.train.ppo.ppo_utils",
        anything=("llamafactory.extras", "llamafactory.extras.packages"),
    ) as module:
        import requests

        module.requests = requests
        yield module


def scored(ppo_utils: Any, gateway: LiveGateway, messages: list[str], query: str = "") -> list[float]:
    found: list[float] = ppo_utils.get_rewards_from_server(
        url(gateway, "/v1/score/evaluation", query), messages
    ).tolist()
    return found


def test_llamafactory_gets_a_tensor_of_scores(ppo_utils: Any, healthy: LiveGateway) -> None:
    texts = [PROMPT.format(i) + "x" * i + "<|im_end|>\n" for i in range(6)]
    assert scored(ppo_utils, healthy, texts, "?policy=single:rm-b") == [100.0 + i for i in range(6)]
    assert healthy.arms[1].calls == [[(f"Why {i}?", "x" * i) for i in range(6)]]


def test_llamafactory_one_prompt_meets_one_rm_in_a_batch(ppo_utils: Any, healthy: LiveGateway) -> None:
    texts = [PROMPT.format(f"lf {i % 4}") + "x" * 5 for i in range(16)]
    found = scored(ppo_utils, healthy, texts)
    assert all(len(set(found[p::4])) == 1 for p in range(4))


def test_llamafactory_ends_the_training_at_an_error(ppo_utils: Any, healthy: LiveGateway) -> None:
    """What docs/trainers/llama-factory.md says of it."""
    for arm in healthy.arms:
        arm.available = False
    with pytest.raises(KeyError, match="scores"):
        scored(ppo_utils, healthy, ["text"])


def test_llamafactory_would_end_it_at_a_null_too(ppo_utils: Any) -> None:
    with pytest.raises(TypeError):
        ppo_utils.torch.Tensor([None])


# slime ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def rm_hub() -> Any:
    """`slime.rollout.rm_hub`, with slime's own samples; its rules for maths and quizzes are stood for."""
    pytest.importorskip("torch")
    helpers = ("deepscaler", "f1", "gpqa", "math_dapo_utils", "math_utils")
    stubs = ["slime.utils.http_utils", *(f"slime.rollout.rm_hub.{helper}" for helper in helpers)]
    with loaded(source_folder(SLIME), "slime.rollout.rm_hub", anything=stubs) as module:
        module.asyncio = ImpatientAsyncio()
        yield module
        if module._shared_session is not None:
            await module._shared_session.close()


def arguments(endpoint: str, reward_key: str | None = None) -> SimpleNamespace:
    """What slime's command line gives: `--rm-type remote_rm --rm-url ENDPOINT`."""
    return SimpleNamespace(rm_type="remote_rm", rm_url=endpoint, custom_rm_path=None, reward_key=reward_key)


def sample(rm_hub: Any, prompt: Any, response: str) -> Any:
    return rm_hub.Sample(prompt=prompt, response=response, label="42")


async def test_slime_the_answer_is_the_reward(rm_hub: Any, healthy: LiveGateway) -> None:
    args = arguments(url(healthy, "/remote_rm", "?policy=single:rm-c"))
    for prompt in ("Why?", [{"role": "user", "content": "Why?"}]):
        assert await rm_hub.async_rm(args, sample(rm_hub, prompt, "Because.")) == 208.0
    assert await rm_hub.async_rm(args, sample(rm_hub, PROMPT.format("1"), "Because.<|im_end|>")) == 208.0


async def test_slime_reads_its_reward_key_from_an_object(rm_hub: Any, healthy: LiveGateway) -> None:
    args = arguments(url(healthy, "/remote_rm", "?policy=single:rm-a&reward_key=score"), "score")
    asked = sample(rm_hub, "Why?", "Because.")
    asked.reward = await rm_hub.async_rm(args, asked)
    assert asked.get_reward_value(args) == 8.0
    feedback = {"decision_id": asked.reward["decision_id"], "reward": 0.5}
    async with rm_hub._get_shared_session().post(url(healthy, "/feedback"), json=feedback) as response:
        assert response.status == 200


async def test_slime_without_the_key_in_the_url_stops_at_the_number(rm_hub: Any, healthy: LiveGateway) -> None:
    """What docs/trainers/slime.md says of it."""
    args = arguments(url(healthy, "/remote_rm"), "score")
    asked = sample(rm_hub, "Why?", "Because.")
    asked.reward = await rm_hub.async_rm(args, asked)
    with pytest.raises(TypeError, match="'float' object is not subscriptable"):
        asked.get_reward_value(args)


async def test_slime_a_group_at_once_meets_one_rm(rm_hub: Any, healthy: LiveGateway) -> None:
    args = arguments(url(healthy, "/remote_rm"))
    for group in range(6):
        samples = [sample(rm_hub, f"slime {group}", "x" * 3) for _ in range(16)]
        assert len(set(await rm_hub.batched_async_rm(args, samples))) == 1


async def test_slime_tries_again_until_there_is_a_reward(rm_hub: Any, healthy: LiveGateway) -> None:
    for arm in healthy.arms:
        arm.available = False
    asking = asyncio.create_task(rm_hub.async_rm(arguments(url(healthy, "/remote_rm")), sample(rm_hub, "again", "xx")))
    await until(lambda: rm_hub.asyncio.pauses, "its first try failed")
    for arm in healthy.arms:
        arm.available = True
    assert await asking % 100 == 2.0


async def test_slime_gives_up_by_raising_never_with_a_zero(rm_hub: Any, healthy: LiveGateway) -> None:
    import aiohttp

    for arm in healthy.arms:
        arm.available = False
    with pytest.raises(aiohttp.ClientResponseError) as raised:
        await rm_hub.async_rm(arguments(url(healthy, "/remote_rm")), sample(rm_hub, "never", "xx"))
    assert raised.value.status == 503
    assert len(rm_hub.asyncio.pauses) == 9
