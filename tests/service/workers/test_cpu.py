"""The CPU worker against transformers itself, on a tiny random model: ids, text, messages, batches, refusals."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.service.scorers.worker_servers import Json, RunningWorker, soon
from tests.support.arms import score_items

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from service.errors import ConfigurationError  # noqa: E402
from service.scorers.protocol import WorkerRejectedError  # noqa: E402
from service.scorers.rm.client import ArmConfig, VllmArm  # noqa: E402
from service.scorers.rm.probe import probe  # noqa: E402
from service.scorers.rm.render import PLAIN_TEMPLATE, PlainTemplate, TemplateRendering, load_rendering  # noqa: E402
from service.scorers.transport.http import HttpPool  # noqa: E402
from service.scorers.wire import sigmoid  # noqa: E402
from service.workers.cpu import BATCH_TOKENS, batches, cpu_app, forward, load_model  # noqa: E402

TOLERANCE = 1e-5
TEXTS = ["a", "the quick brown fox", "jumps over", "the lazy dog " * 9, "x y z " * 20]
MAX_LENGTH = 256


def build(directory: Path, *, kind: str = "Llama", bos: bool = True, **config: Any) -> Path:
    """A tiny random reward model and byte-level tokenizer; with `bos`, text gets a BOS unless told otherwise."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    if bos:
        core.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = "{{ bos_token }}" + PLAIN_TEMPLATE
    tokenizer.save_pretrained(directory)
    torch.manual_seed(7)
    settings = {
        "vocab_size": core.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_LENGTH,
        "num_labels": 1,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        **config,
    }
    model = getattr(transformers, f"{kind}ForSequenceClassification")(
        getattr(transformers, f"{kind}Config")(**settings)
    )
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def worker(directory: Path) -> Any:
    # Workers that other tests killed in this process were not told to end their threads.
    before = set(threading.enumerate())
    running = RunningWorker(cpu_app([directory], threads=1))
    yield running.url
    running.stop(force=False)
    running.join()
    assert "infer" not in {thread.name for thread in set(threading.enumerate()) - before}


@pytest.fixture(scope="module")
def reference(directory: Path) -> Any:
    """transformers' own logit of one list of ids, and the tokenizer."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    def logit(ids: list[int]) -> float:
        with torch.inference_mode():
            return float(model(input_ids=torch.tensor([ids])).logits[0, 0])

    return logit, tokenizer


async def classify(url: str, **request: Any) -> tuple[int, Json]:
    pool = HttpPool(url)
    body = json.dumps({"model": "tiny", **request}).encode()
    response = await pool.request("POST", "/classify", body, deadline=soon(30))
    await pool.close()
    return response.status, json.loads(response.body)


async def rewards(url: str, **request: Any) -> list[float]:
    status, body = await classify(url, use_activation=False, **request)
    assert status == 200, body
    return [row["probs"][0] for row in body["data"]]


async def test_rewards_equal_transformers_for_ids_texts_and_messages(worker: str, reference: Any) -> None:
    logit, tokenizer = reference
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    wanted = [logit(row) for row in ids]
    assert len({round(value, 3) for value in wanted}) == len(TEXTS)
    assert await rewards(worker, input=ids) == pytest.approx(wanted, abs=TOLERANCE)
    assert await rewards(worker, input=TEXTS) == pytest.approx(wanted, abs=TOLERANCE)
    for row, text, value in zip(ids, TEXTS, wanted, strict=True):
        assert await rewards(worker, input=row) == pytest.approx([value], abs=TOLERANCE)
        assert await rewards(worker, input=text) == pytest.approx([value], abs=TOLERANCE)
    bare = [logit(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    assert await rewards(worker, input=TEXTS, add_special_tokens=False) == pytest.approx(bare, abs=TOLERANCE)
    messages = [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "brown fox"}]
    templated = logit(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
    assert await rewards(worker, messages=messages) == pytest.approx([templated], abs=TOLERANCE)


async def test_the_default_answer_is_the_sigmoid(worker: str) -> None:
    (raw,) = await rewards(worker, input="a")
    _, body = await classify(worker, input="a")
    assert body["data"][0]["probs"] == [pytest.approx(sigmoid(raw))]
    assert body["usage"]["prompt_tokens"] == 2


async def test_concurrent_requests_are_batched_without_changing_their_rewards(worker: str, reference: Any) -> None:
    logit, tokenizer = reference
    texts = [("word " * (number % 17 + 1)).strip() for number in range(80)]
    found = await asyncio.gather(*(rewards(worker, input=[text]) for text in texts))
    wanted = [[logit(tokenizer(text)["input_ids"])] for text in texts]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, abs=TOLERANCE)


async def test_the_client_gets_the_same_rewards_in_both_renderings_and_passes_the_probe(
    worker: str, directory: Path
) -> None:
    items = [("the quick", "brown fox"), ("the quick", "lazy dog jumps"), ("the", "")]
    found = []
    for rendering in (load_rendering("messages"), load_rendering("template", str(directory))):
        arm = VllmArm(ArmConfig(name="tiny", urls=(worker,), rendering=rendering))
        (report,) = await probe(arm, deadline=soon(30))
        assert (report.problems, report.warnings) == ((), ())
        found.append(await score_items(arm, items, deadline=soon(30)))
        await arm.close()
    assert found[0] == pytest.approx(found[1], abs=TOLERANCE)


async def test_the_probe_sees_a_template_that_differs_from_the_model_s_own(worker: str) -> None:
    arm = VllmArm(ArmConfig(name="tiny", urls=(worker,), rendering=TemplateRendering(PlainTemplate())))
    (report,) = await probe(arm, deadline=soon(30))
    assert "template or its special tokens differ" in report.problems[0]
    await arm.close()


async def test_over_long_input_is_refused_and_never_cut(worker: str) -> None:
    fits, too_long = [5] * MAX_LENGTH, [5] * (MAX_LENGTH + 1)
    assert len(await rewards(worker, input=fits)) == 1
    status, body = await classify(worker, input=[[5], too_long])
    assert (status, body["error"]["param"]) == (400, "input_tokens")
    assert f"maximum context length is {MAX_LENGTH} tokens" in body["error"]["message"]
    arm = VllmArm(ArmConfig(name="tiny", urls=(worker,)))
    with pytest.raises(WorkerRejectedError, match="maximum context length"):
        await score_items(arm, [("p", "q " * 600)], deadline=soon(30))
    await arm.close()


@pytest.mark.parametrize(
    ("request_body", "words"),
    [
        ({"input": [[]]}, "empty"),
        ({"input": "", "add_special_tokens": False}, "empty"),
        ({"input": [[5, 100_000]]}, "out of vocabulary"),
        ({"input": [-1]}, "out of vocabulary"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text parts only"),
    ],
)
async def test_input_that_cannot_be_scored_is_a_400(worker: str, request_body: Json, words: str) -> None:
    status, body = await classify(worker, **request_body)
    assert status == 400
    assert words in body["error"]["message"]


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
@pytest.mark.parametrize("pad", [0, 2, None])
def test_a_padded_batch_equals_one_by_one_whatever_the_pad_token(tmp_path: Path, kind: str, pad: int | None) -> None:
    loaded = load_model("m", build(tmp_path / "m", kind=kind, pad_token_id=pad))
    rows = [[1, 9, 40, 7], [1, 5], [2, 0, 7, 9, 33, 2], [8, 2, 2], [7] * 30]
    with torch.inference_mode():
        alone = [float(loaded.model(input_ids=torch.tensor([row])).logits[0, 0]) for row in rows]
    assert [logit for (logit,) in forward(loaded, rows)] == pytest.approx(alone, abs=TOLERANCE)


async def test_a_regression_model_gives_raw_rewards_whatever_the_request_says(tmp_path: Path) -> None:
    running = RunningWorker(cpu_app({"tiny": build(tmp_path / "m", problem_type="regression")}))
    (raw,) = await rewards(running.url, input="the lazy dog")
    _, body = await classify(running.url, input="the lazy dog")
    assert body["data"][0]["probs"] == [raw]
    running.stop(force=False)
    running.join()


async def test_a_model_of_several_labels_gives_all(tmp_path: Path) -> None:
    made = build(tmp_path / "three", num_labels=3)
    running = RunningWorker(cpu_app({"tiny": made}))
    answers = [
        (await classify(running.url, input=["the lazy dog", "a fox"], use_activation=flag))[1]["data"][0]
        for flag in (False, True)
    ]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(made).eval()
    ids = transformers.AutoTokenizer.from_pretrained(made)("the lazy dog", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0]
    assert [one["num_classes"] for one in answers] == [3, 3]
    assert answers[0]["probs"] == pytest.approx(logits.tolist(), abs=TOLERANCE)
    assert answers[1]["probs"] == pytest.approx(logits.softmax(-1).tolist(), abs=TOLERANCE)
    running.stop(force=False)
    running.join()


def test_models_that_are_no_reward_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        cpu_app([tmp_path / "nothing"])
    with pytest.raises(ConfigurationError, match="at least one model"):
        cpu_app([])


def test_batches_are_length_sorted_complete_and_bounded() -> None:
    lengths = [(7 * number) % 400 + 1 for number in range(500)]
    cut = batches(lengths)
    assert sorted(index for batch in cut for index in batch) == list(range(500))
    assert [lengths[index] for batch in cut for index in batch] == sorted(lengths)
    assert all(len(batch) * max(lengths[index] for index in batch) <= BATCH_TOKENS for batch in cut)
    assert batches([BATCH_TOKENS * 2]) == [[0]]
