"""Token ids made here: equal to transformers' and the worker's own, counted, and cut only where the pool allows."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from router_core.records import Instance
from service.errors import ConfigurationError
from service.scorers.protocol import OverLong, Scored, WorkerError, WorkerRejectedError, WorkerTooLongError
from service.scorers.rm.client import ArmConfig, VllmArm
from service.scorers.rm.probe import probe
from service.scorers.rm.render import PLAIN_TEMPLATE, ChatTemplate, Prepared, RenderError, TooLongError, encode
from service.scorers.rm.tokens import INLINE_CHARACTERS, TokenRendering, load_token_rendering
from tests.service.scorers.worker_servers import Json, RunningWorker, ScriptedWorker, Serve, error, reply, soon
from tests.support.arms import score_groups, score_items
from tests.support.hub import Hub, running_hub, silent_hub

tokenizers = pytest.importorskip("tokenizers")

ITEMS = [("the quick 🙂 brown\n\n  fox", "jumps over"), ("the quick 🙂 brown\n\n  fox", "the lazy dog " * 4)]
TRIMMING = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"


def byte_tokenizer(**options: Any) -> Any:
    """One token per byte, and `<s>` and `</s>`; like Llama's it adds a BOS unless told not to."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: index + 2 for index, letter in enumerate(alphabet)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def byte_rendering(template: str = TRIMMING) -> TokenRendering:
    return TokenRendering(ChatTemplate(template, bos_token="<s>", eos_token="</s>"), byte_tokenizer())


def text_of(content: Any) -> str:
    return str(byte_tokenizer().decode(content, skip_special_tokens=False))


def fitted(rendering: TokenRendering, group: list[tuple[str, str]], limit: int, *, cut: bool = True) -> Prepared:
    (prepared,) = rendering.prepare([group], limit=limit, cut_prompt=cut)
    if isinstance(prepared, RenderError):
        raise prepared
    return prepared


def ids_of(worker: ScriptedWorker) -> list[list[int]]:
    return [ids for request in worker.requests for ids in request["input"]]


def lengths(request: Json) -> tuple[int, Any]:
    """The reward of an item is the number of its ids."""
    return 200, reply([float(len(ids)) for ids in request["input"]])


def arm_for(url: str, rendering: TokenRendering, **options: Any) -> VllmArm:
    return VllmArm(ArmConfig(name="rm", urls=(url,), rendering=rendering, **options))


def test_the_ids_are_transformers_own_without_a_second_bos(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), bos_token="<s>", eos_token="</s>")
    fast.chat_template = TRIMMING
    fast.save_pretrained(tmp_path)
    (prepared,) = load_token_rendering(str(tmp_path)).prepare([ITEMS])
    assert isinstance(prepared, Prepared)
    for (prompt, response), ids in zip(ITEMS, prepared.contents, strict=True):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        assert ids == fast.apply_chat_template(turns, return_dict=False)
        assert ids.count(0) == 1  # type: ignore[union-attr]
    assert prepared.size == sum(map(len, prepared.contents))


def test_a_tokenizer_that_truncates_or_pads_by_itself_is_told_not_to() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=500)
    rendering = TokenRendering(ChatTemplate(TRIMMING, bos_token="<s>", eos_token="</s>"), tokenizer)
    assert fitted(rendering, ITEMS, 10_000) == fitted(byte_rendering(), ITEMS, 10_000)


@pytest.mark.parametrize("prompt", ["a plain prompt, long enough", "  spaces around \n", "🙂東京é" * 4])
@pytest.mark.parametrize("room", range(2, 12))
def test_cutting_takes_the_left_of_the_prompt_and_nothing_else(prompt: str, room: int) -> None:
    rendering = byte_rendering()
    group = [(prompt, "short"), (prompt, "a response that is longer")]
    shell = len(fitted(rendering, [("", group[1][1])], 10_000).contents[0])
    prepared = fitted(rendering, group, shell + room)
    whole = fitted(rendering, group, 10_000)
    assert whole.prompt_tokens_cut == 0
    lefts = set()
    for (_, response), before, after in zip(group, whole.contents, prepared.contents, strict=True):
        text = text_of(after)
        head, tail = "<s><user>", f"</s><assistant>{response}</s>"
        assert text.startswith(head)
        assert text.endswith(tail)
        left = text[len(head) : -len(tail)]
        assert left
        assert prompt.strip().endswith(left), "whole characters, from the right"
        lefts.add(left)
        assert len(after) == len(before) - prepared.prompt_tokens_cut
    assert len(lefts) == 1, "all responses are judged on the same prompt"
    assert max(map(len, prepared.contents)) <= shell + room


def test_a_response_that_alone_is_too_long_is_never_cut() -> None:
    with pytest.raises(TooLongError, match="a response is never cut") as caught:
        fitted(byte_rendering(), [("p", "z" * 150), ("p", "y" * 200)], 100)
    assert (caught.value.limit, caught.value.tokens > 200) == (100, True)


@pytest.mark.parametrize("cut", [True, False])
def test_responses_that_fit_are_kept(cut: bool) -> None:
    group = [("p", "y" * 200), ("p", "x"), ("p", "zz"), ("p", "w" * 300)]
    prepared = fitted(byte_rendering(), group, 100, cut=cut)
    assert [text_of(one) for one in prepared.contents] == [
        f"<s><user>p</s><assistant>{response}</s>" for response in ("x", "zz")
    ]
    shell = len(fitted(byte_rendering(), [("p", "")], 100).contents[0])
    assert prepared.too_long == {0: shell + 200, 3: shell + 300}
    assert prepared.prompt_tokens_cut == 0


def test_the_prompt_is_cut_for_those_that_fit() -> None:
    shell = len(fitted(byte_rendering(), [("", "")], 100).contents[0])
    prepared = fitted(byte_rendering(), [("p" * 50, "x" * 40), ("p" * 50, "y" * 200), ("p" * 50, "z")], shell + 60)
    assert [*prepared.too_long] == [1]
    assert prepared.prompt_tokens_cut == 50 + 40 - 60
    assert [len(one) for one in prepared.contents] == [shell + 60, shell + 60 - 39]


def test_of_a_character_of_two_tokens_no_half_is_left() -> None:
    rendering = byte_rendering()
    room = len(fitted(rendering, [("", "x")], 1000).contents[0]) + 1
    assert text_of(fitted(rendering, [("ééo", "x")], room).contents[0]) == "<s><user>o</s><assistant>x</s>"
    with pytest.raises(TooLongError):
        fitted(rendering, [("ooé", "x")], room)


def test_without_leave_nothing_is_cut() -> None:
    with pytest.raises(TooLongError, match="more than the 30 that it reads"):
        fitted(byte_rendering(), [("p" * 50, "x")], 30, cut=False)


def test_a_prompt_that_the_template_writes_twice_cannot_be_cut() -> None:
    twice = "{{ messages[0].content }}|{{ messages[0].content }}|{{ messages[1].content }}"
    with pytest.raises(TooLongError, match="cutting the prompt does not make room"):
        fitted(byte_rendering(twice), [("p" * 50, "x")], 60)


def test_one_instance_that_cannot_be_rendered_spoils_no_other() -> None:
    template = "{% if 'bad' in messages[0].content %}{{ raise_exception('bad words') }}{% endif %}" + PLAIN_TEMPLATE
    outcomes = byte_rendering(template).prepare([[("p", "r")], [("bad", "r")], [("p", "\ud800")], [("q", "r")]])
    assert [type(outcome) for outcome in outcomes] == [Prepared, RenderError, RenderError, Prepared]
    assert "bad words" in str(outcomes[1])
    assert "UTF-8" in str(outcomes[2])


def test_the_request_holds_ids_alone() -> None:
    request = json.loads(encode(byte_rendering(PLAIN_TEMPLATE), "rm", [("p", "r")]))
    assert set(request) == {"model", "input", "use_activation"}
    assert [text_of(ids) for ids in request["input"]] == ["<|user|>\np\n<|assistant|>\nr\n"]


async def test_over_long_instances_are_not_sent_and_the_others_are_scored(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.answer = lengths
    arm = arm_for(serve(worker), byte_rendering(), max_model_len=60)
    outcomes = await score_groups(arm, [[("p", "a"), ("p", "bb")], [("p" * 80, "a")], [("p", "c")]], deadline=soon())
    assert [isinstance(outcome, WorkerTooLongError) for outcome in outcomes] == [False, True, False]
    assert isinstance(outcomes[1], WorkerTooLongError)
    assert outcomes[1].details["max_model_len"] == 60
    assert not outcomes[1].final
    (request,) = worker.requests
    assert len(request["input"]) == 3
    await arm.close()


@pytest.mark.parametrize(("policy", "final"), [(OverLong.REFUSE, True), (OverLong.SKIP, False)])
async def test_the_policy_says_whether_another_rm_may_be_asked(serve: Serve, policy: OverLong, final: bool) -> None:
    worker = ScriptedWorker()
    arm = arm_for(serve(worker), byte_rendering(), max_model_len=20, over_long=policy)
    with pytest.raises(WorkerTooLongError) as caught:
        await score_items(arm, [("p" * 80, "a")], deadline=soon())
    assert caught.value.final is final
    assert not worker.requests
    await arm.close()


async def test_cut_prompts_are_told_with_their_rewards(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.answer = lengths
    arm = arm_for(serve(worker), byte_rendering(), max_model_len=60, over_long=OverLong.CUT_PROMPT)
    cut, whole = await arm.score([Instance("p" * 80, ("a", "abc")), Instance("p", ("a",))], deadline=soon())
    assert isinstance(cut, Scored)
    assert isinstance(whole, Scored)
    assert (cut.rewards, whole.prompt_tokens_cut) == ([58.0, 60.0], 0)
    # One token a byte, and one for each of <s>, </s> and </s>.
    assert cut.prompt_tokens_cut == 1 + len("<user>") + 80 + 1 + len("<assistant>abc") + 1 - 60
    await arm.close()


async def test_requests_are_bounded_in_tokens_and_keep_the_responses_to_one_prompt_together(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.answer = lengths
    arm = arm_for(serve(worker), byte_rendering(), tokens_per_request=400, parallel_requests=1)
    groups = [[(f"{number}", "x" * (number * 7 % 90)), (f"{number}", "y")] for number in range(30)]
    outcomes = await score_groups(arm, groups, deadline=soon())
    prepared = byte_rendering().prepare(groups)
    assert outcomes == [[float(len(ids)) for ids in one.contents] for one in prepared if isinstance(one, Prepared)]
    requests = [request["input"] for request in worker.requests]
    assert len(requests) > 5
    assert all(sum(map(len, request)) <= 400 for request in requests)
    for one in prepared:
        assert isinstance(one, Prepared)
        first, second = one.contents
        (home,) = [request for request in requests if first in request]
        assert home[home.index(first) + 1] == second
    means = [max(map(len, request)) for request in requests]
    assert means == sorted(means, reverse=True), "the longest first"
    await arm.close()


async def test_one_instance_with_more_tokens_than_a_request_may_have_is_asked_in_several(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.answer = lengths
    arm = arm_for(serve(worker), byte_rendering(), tokens_per_request=100)
    rewards = await score_items(arm, [("p", "x" * (10 * number)) for number in range(1, 10)], deadline=soon())
    assert rewards == sorted(rewards)
    assert all(sum(map(len, r["input"])) <= 100 or len(r["input"]) == 1 for r in worker.requests)
    assert len(worker.requests) > 3
    await arm.close()


async def test_the_worker_s_own_limit_is_learned_by_the_probe_and_its_refusal_has_the_same_code(serve: Serve) -> None:
    from service.scorers.rm.health import HealthMonitor, HealthPolicy
    from tests.service.scorers.rm.test_probe_and_health import logits, np

    class Limited(ScriptedWorker):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http" and scope["path"] == "/v1/models":
                body = json.dumps({"data": [{"id": "rm", "max_model_len": 60}]}).encode()
                headers = [(b"content-length", str(len(body)).encode())]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": body})
            elif scope["type"] == "http" and scope["path"] != "/classify":
                await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
                await send({"type": "http.response.body"})
            else:
                await super().__call__(scope, receive, send)

    worker = Limited()
    worker.answer = lambda request: (400, error("too many", 400, param="input_tokens"))
    arm = arm_for(serve(worker), byte_rendering())
    assert arm.max_model_len is None
    with pytest.raises(WorkerTooLongError, match="too many"):
        await score_items(arm, [("p" * 80, "a")], deadline=soon())
    worker.answer = logits(1.5)
    await HealthMonitor([arm], HealthPolicy(), np.random.default_rng(0)).check_all()
    assert (arm.max_model_len, arm.snapshots()[0].max_model_len) == (60, 60)
    before = len(worker.requests)
    with pytest.raises(WorkerTooLongError, match="more than the 60"):
        await score_items(arm, [("p" * 80, "a")], deadline=soon())
    assert len(worker.requests) == before
    too_much = arm_for(arm.config.urls[0], byte_rendering(), max_model_len=61)
    (report,) = await probe(too_much, deadline=soon())
    assert "reads at most 60 tokens" in report.problems[0]
    await arm.close()
    await too_much.close()


async def test_long_texts_are_tokenized_off_the_event_loop(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = ScriptedWorker()
    worker.answer = lengths
    rendering = byte_rendering()
    threads: list[bool] = []
    real = rendering.prepare

    def prepare(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return real(*args, **options)

    monkeypatch.setattr(rendering, "prepare", prepare)
    arm = arm_for(serve(worker), rendering)
    await score_items(arm, [("p", "a")], deadline=soon())
    await score_items(arm, [("p", "a" * INLINE_CHARACTERS)], deadline=soon())
    assert threads == [True, False]
    await arm.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    from tests.service.workers.test_cpu import build

    return build(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def cpu_worker(model: Path) -> Any:
    from service.workers.cpu import cpu_app

    running = RunningWorker(cpu_app([model], threads=1))
    yield running.url
    running.stop(force=False)
    running.join()


async def test_a_real_worker_gives_ids_the_rewards_of_messages_and_its_probe_passes(
    cpu_worker: str, model: Path
) -> None:
    items = [("the quick", "brown fox"), ("the quick", "lazy dog jumps"), ("Café 東京", "  x\n")]
    by_messages = VllmArm(ArmConfig(name="tiny", urls=(cpu_worker,)))
    by_ids = VllmArm(ArmConfig(name="tiny", urls=(cpu_worker,), rendering=load_token_rendering(str(model))))
    (report,) = await probe(by_ids, deadline=soon(30))
    assert (report.problems, report.warnings, report.max_model_len) == ((), (), 256)
    wanted = await score_items(by_messages, items, deadline=soon(30))
    assert await score_items(by_ids, items, deadline=soon(30)) == pytest.approx(wanted, abs=1e-5)
    await by_messages.close()
    await by_ids.close()


async def test_the_probe_finds_a_second_bos_and_another_tokenizer(cpu_worker: str, model: Path) -> None:
    own = (model / "tokenizer.json").read_text("utf-8")
    twice = TokenRendering(
        ChatTemplate("{{ bos_token }}{{ bos_token }}" + PLAIN_TEMPLATE, bos_token="<s>"),
        tokenizers.Tokenizer.from_str(own),
    )
    # Another normalizer changes no letter of the tiny conversation, so that only the ids of the awkward one differ.
    other = tokenizers.Tokenizer.from_str(own)
    other.normalizer = tokenizers.normalizers.NFD()
    decomposed = TokenRendering(ChatTemplate("{{ bos_token }}" + PLAIN_TEMPLATE, bos_token="<s>"), other)
    for rendering, words in (
        (twice, "template or its special tokens differ"),
        (decomposed, "the tokenizer here makes"),
    ):
        arm = VllmArm(ArmConfig(name="tiny", urls=(cpu_worker,), rendering=rendering))
        (report,) = await probe(arm, deadline=soon(30))
        assert any(words in problem for problem in report.problems), report
        await arm.close()


async def test_many_calls_at_once_tokenize_safely(serve: Serve) -> None:
    worker = ScriptedWorker()
    worker.answer = lengths
    arm = arm_for(serve(worker), byte_rendering())
    texts = ["x" * (INLINE_CHARACTERS + number) for number in range(24)]
    outcomes = await asyncio.gather(*(score_items(arm, [("p", text)], deadline=soon(20)) for text in texts))
    first = outcomes[0][0]
    assert [outcome[0] - first for outcome in outcomes] == [float(number) for number in range(24)]
    await arm.close()


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_token_rendering(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer"):
        load_token_rendering(str(tmp_path))
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="no chat template"):
        load_token_rendering(str(tmp_path))
    template = tmp_path / "own.jinja"
    template.write_text(PLAIN_TEMPLATE)
    loaded = load_token_rendering(str(tmp_path), str(template))
    assert fitted(loaded, ITEMS, 1000) == fitted(byte_rendering(PLAIN_TEMPLATE), ITEMS, 1000)


def test_a_hub_id_is_looked_up_in_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--acme--rm"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    byte_tokenizer().save(str(snapshot / "tokenizer.json"))
    (snapshot / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TRIMMING, "bos_token": "<s>", "eos_token": {"content": "</s>"}})
    )
    loaded = load_token_rendering("acme/rm", cache_dir=tmp_path)
    assert fitted(loaded, ITEMS, 1000) == fitted(byte_rendering(), ITEMS, 1000)
    with pytest.raises(ValueError, match="neither a directory nor a model"):
        load_token_rendering("acme/none", cache_dir=tmp_path)
    pinned = load_token_rendering("acme/rm", revision="0" * 40, cache_dir=tmp_path)
    assert fitted(pinned, ITEMS, 1000) == fitted(byte_rendering(), ITEMS, 1000)
    with pytest.raises(ValueError, match="neither a directory nor a model"):
        load_token_rendering("acme/rm", revision="1" * 40, cache_dir=tmp_path)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """What an author has on the hub: a tokenizer, and weights that nobody here wants."""
    folder = tmp_path / "published"
    folder.mkdir()
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text(TRIMMING)
    (folder / "model.safetensors").write_text("large")
    return folder


def test_the_tokenizers_files_and_no_weights_are_fetched_once_and_kept(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "c" * 40
    with running_hub(Hub({("acme/rm", "main"): commit}, {"acme/rm": published}), monkeypatch) as hub:
        loaded = load_token_rendering("acme/rm", revision="main", cache_dir=tmp_path / "cache")
        assert fitted(loaded, ITEMS, 1000) == fitted(byte_rendering(), ITEMS, 1000)
        load_token_rendering("acme/rm", revision="main", cache_dir=tmp_path / "cache")
        files = [path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path]
        assert set(files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
        with pytest.raises(ValueError, match=r"'acme/none' is neither .* \(set HF_TOKEN"):
            load_token_rendering("acme/none", cache_dir=tmp_path / "cache")
    with silent_hub(monkeypatch):
        kept = load_token_rendering("acme/rm", revision="main", cache_dir=tmp_path / "cache", hub_seconds=0.2)
        assert fitted(kept, ITEMS, 1000) == fitted(byte_rendering(), ITEMS, 1000)
        with pytest.raises(ValueError, match=r"'acme/rm' is neither .* timed out"):
            load_token_rendering("acme/rm", revision="main", cache_dir=tmp_path / "empty", hub_seconds=0.2)


def test_a_pool_file_says_how_lengths_are_treated(tmp_path: Path) -> None:
    from service.pool import dump_pool, load_pool

    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    file = tmp_path / "pool.yaml"
    file.write_text(
        "over_long: cut_prompt\nmodels:\n"
        "  - {name: a, rendering: tokens, tokenizer: ., max_model_len: 9, tokens_per_request: 99}\n"
        "  - {name: b, rendering: tokens, tokenizer: acme/rm}\n"
    )
    pool = load_pool(file)
    assert (pool.over_long, pool.models[0].max_model_len) == (OverLong.CUT_PROMPT, 9)
    assert pool.models[0].tokenizer is not None
    assert Path(pool.models[0].tokenizer).samefile(tmp_path)
    assert pool.models[1].tokenizer == "acme/rm"
    again = tmp_path / "again.yaml"
    dump_pool(pool, again)
    assert load_pool(again) == pool
    for line, words in (
        ("{name: a, rendering: tokens}", "no `tokenizer`"),
        ("{name: a, tokenizer: x}", "without `rendering: tokens`"),
        ("{name: a, rendering: tokens, recorded: x.jsonl}", "recorded by its texts"),
    ):
        file.write_text(f"models:\n  - {line}\n")
        with pytest.raises(ConfigurationError, match=words):
            load_pool(file)


def test_a_refusal_for_length_is_a_refusal() -> None:
    assert issubclass(WorkerTooLongError, WorkerRejectedError)
    assert issubclass(WorkerTooLongError, WorkerError)
    assert (WorkerTooLongError.status, WorkerTooLongError.code) == (422, "too_long")
