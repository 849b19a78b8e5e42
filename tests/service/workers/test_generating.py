"""The judge's CPU worker against transformers itself, on a tiny random model, and as a judge of the pool sees it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.scorers.health import HealthPolicy, ReplicaMonitor
from service.scorers.judge.client import JudgeConfig, JudgeScorer
from service.scorers.judge.dialogue import ChatOptions
from service.scorers.judge.health import JudgeChecks
from service.scorers.judge.rubrics import load_rubric
from service.scorers.protocol import Scored, WorkerTooLongError
from tests.service.scorers.worker_servers import Json, Serve
from tests.support.asgi import AsgiClient, Response, running

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from router_core.records import Instance  # noqa: E402
from service.errors import ConfigurationError  # noqa: E402
from service.workers.generating import GeneratingApp, load_generating_model  # noqa: E402

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
WORDS = ["</s>", "[UNK]", "A", "B", *"123456789", "hello", "user"]
LENGTH = 4096


def build(directory: Path, *, chat: bool = True) -> Path:
    """A tiny random Llama of few words, so that every label is among the alternatives."""
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="[UNK]")
    tokenizer.chat_template = CHAT if chat else None
    tokenizer.save_pretrained(directory)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("judge"))


def app(directory: Path) -> GeneratingApp:
    return GeneratingApp(load_generating_model("tiny", directory))


def request(content: str, **fields: Any) -> Json:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


async def asked(client: AsgiClient, body: Json) -> Response:
    return await client.post("/v1/chat/completions", body, **{"content-type": "application/json"})


def expected(directory: Path, content: str) -> Any:
    """Log-probabilities of the next token by transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    ids = tokenizer(f"[user]{content}>", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return model(input_ids=ids).logits[0, -1].log_softmax(-1), tokenizer


async def test_log_probabilities_are_transformers_own_in_a_batch(directory: Path) -> None:
    contents = ["A", "hello B 3 " * 9, "1 2 x"]
    async with running(app(directory)) as client:
        one = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        replies = await asyncio.gather(*(asked(client, request(content, **one)) for content in contents))
    for content, answer in zip(contents, replies, strict=True):
        reply = answer.json
        logprobs, tokenizer = expected(directory, content)
        (token,) = reply["choices"][0]["logprobs"]["content"]
        told = {one["token"]: one["logprob"] for one in token["top_logprobs"]}
        assert told == pytest.approx(
            {tokenizer.decode([place]): value for place, value in enumerate(logprobs.tolist())}, abs=1e-4
        )
        assert token["token"] == tokenizer.decode([int(logprobs.argmax())])
        assert reply["usage"]["completion_tokens"] == 1


async def test_text_is_what_transformers_generates(directory: Path) -> None:
    async with running(app(directory)) as client:
        reply = (await asked(client, request("hello", max_tokens=12, logprobs=True, top_logprobs=2))).json
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    ids = tokenizer("[user]hello>", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
    choice = reply["choices"][0]
    assert choice["message"]["content"] == tokenizer.decode(out, skip_special_tokens=True)
    assert choice["finish_reason"] == ("stop" if int(out[-1]) == 0 else "length")
    assert len(choice["logprobs"]["content"]) == len(out)


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"model": "other"}, 404, "does not exist"),
        ({"stream": True}, 400, "stream"),
        ({"n": 2}, 400, "one whole completion"),
        ({"max_tokens": 0}, 400, "at least 1"),
        ({"top_logprobs": 21}, 400, "between 0 and 20"),
        ({"messages": "hi"}, 400, "not a chat completion request"),
        ({"messages": [{"role": "user", "content": "x " * LENGTH}]}, 400, "maximum context length is 4096"),
    ],
)
async def test_what_it_cannot_do_is_refused(directory: Path, fields: Json, status: int, words: str) -> None:
    async with running(app(directory)) as client:
        reply = await asked(client, request("hi") | fields)
    assert reply.status == status
    assert words in reply.json["error"]["message"]


async def test_it_is_a_judge_of_the_pool(directory: Path, serve: Serve) -> None:
    config = JudgeConfig(
        name="j",
        urls=(serve(app(directory)),),
        options=ChatOptions("tiny", label_mass=1e-6),
        rubric=load_rubric("helpfulness"),
        verdict="logprobs",
        answer_seconds=30.0,
    )
    judge = JudgeScorer(
        config,
        monitor=lambda one: ReplicaMonitor([JudgeChecks(one)], HealthPolicy(60.0, 30.0), np.random.default_rng(0)),
    )
    await judge.check()
    instances = [Instance("Say hello.", ("Hello!", "No.")), Instance("x " * LENGTH, ("a", "b"))]
    found, long = await judge.score(instances, deadline=asyncio.get_running_loop().time() + 30)
    assert isinstance(found, Scored)
    assert isinstance(long, WorkerTooLongError)
    assert judge.status().max_model_len == LENGTH
    await judge.close()


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no chat template"):
        load_generating_model("tiny", build(tmp_path / "plain", chat=False))
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        load_generating_model("tiny", tmp_path)
