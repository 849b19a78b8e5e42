"""The demo models as files, as trained functions and as labellers. Small recipes, real training, real transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from router_core.dataset import load_pairs, write_pairs
from router_core.demo import train
from router_core.demo.domains import DOMAINS, generate_pairs, generate_stream
from router_core.demo.label import label_pairs, score_texts
from router_core.demo.recipes import JUDGE, RECIPES, Recipe, recipe_digest
from router_core.demo.report import report_pool
from router_core.demo.tokenizer import plain_text, train_tokenizer
from router_core.demo.train import DemoModel, evaluate, make_demo_pool
from router_core.records import TIE

TINY = tuple(
    Recipe(name=f"rm-tiny-{domain}", domain=domain, steps=3, batch_pairs=4, own_pairs=20, other_pairs=5, hidden_size=32)
    for domain in ("code", "safety")
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[DemoModel]:
    return make_demo_pool(tmp_path_factory.mktemp("pool"), seed=3, recipes=TINY)


def test_model_directory_is_what_a_reward_model_server_reads(pool: list[DemoModel]) -> None:
    directory = pool[0].directory
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0"}
    assert config["pad_token_id"] == AutoTokenizer.from_pretrained(directory).pad_token_id
    weights = load_file(directory / "model.safetensors")
    assert weights["score.weight"].shape == (1, 32)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert (directory / "model.safetensors").stat().st_mode & 0o044 == 0o044


@pytest.mark.parametrize("text", ["a b", "  two\n\nlines ", "naïve 漢字 🙂", "{% raw %}<|user|>", ""])
def test_chat_template_is_the_plain_format_and_adds_no_token(pool: list[DemoModel], text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pool[0].directory)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes " + text}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == f"<|user|>\n{text}\n<|assistant|>\nyes {text}\n" == plain_text(text, "yes " + text)
    plain_ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert tokenizer(rendered, add_special_tokens=True)["input_ids"] == plain_ids
    assert tokenizer.apply_chat_template(messages, return_dict=False) == plain_ids
    assert tokenizer.decode(plain_ids) == rendered


def test_files_give_the_ids_that_training_used(pool: list[DemoModel]) -> None:
    trained, loaded = train_tokenizer(3), AutoTokenizer.from_pretrained(pool[0].directory)
    for pair in generate_stream(50, np.random.default_rng(0)):
        text = plain_text(pair.instance.prompt, pair.instance.responses[0])
        assert loaded(text)["input_ids"] == trained.encode(text).ids


def test_loaded_model_repeats_the_logits_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer feeds right-padded ids without a mask, the labeller masked ones through the files: same logits."""
    texts = [
        plain_text(p.instance.prompt, r)
        for p in generate_stream(20, np.random.default_rng(1))
        for r in p.instance.responses
    ]
    seen: list[float] = []
    save = train._save

    def save_and_score(model, tokenizer, *rest):  # type: ignore[no-untyped-def]
        rows = [tokenizer.encode(text).ids for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [model.config.pad_token_id] * (width - len(row)) for row in rows])
        with torch.inference_mode():
            seen.extend(model(input_ids=ids).logits[:, 0].tolist())
        save(model, tokenizer, *rest)

    monkeypatch.setattr(train, "_save", save_and_score)
    [made] = make_demo_pool(tmp_path, recipes=TINY[:1])
    model = AutoModelForSequenceClassification.from_pretrained(made.directory)
    tokenizer = AutoTokenizer.from_pretrained(made.directory)
    np.testing.assert_allclose(score_texts(texts, model, tokenizer), seen, atol=1e-5)
    assert np.std(seen) > 1e-3


def test_batch_scores_equal_scores_one_by_one(pool: list[DemoModel]) -> None:
    pairs = generate_stream(30, np.random.default_rng(2))
    directories = [model.directory for model in pool]
    together, alone = label_pairs(pairs, directories), label_pairs(pairs, directories, batch_size=1)
    for left, right in zip(together, alone, strict=True):
        for name in left.scores:
            np.testing.assert_allclose(left.scores[name], right.scores[name], atol=1e-5)


def test_same_seed_trains_the_same_weights_and_another_seed_others(pool: list[DemoModel], tmp_path: Path) -> None:
    again = make_demo_pool(tmp_path / "again", seed=3, recipes=TINY, workers=1)
    other = make_demo_pool(tmp_path / "other", seed=4, recipes=TINY[:1])
    for left, right in zip(pool, again, strict=True):
        for file in ("model.safetensors", "tokenizer.json", "config.json", "recipe.json"):
            assert (left.directory / file).read_bytes() == (right.directory / file).read_bytes()
    weights = (pool[0].directory / "model.safetensors").read_bytes()
    assert (other[0].directory / "model.safetensors").read_bytes() != weights


def test_finished_models_are_kept_and_changed_recipes_or_broken_directories_made_again(tmp_path: Path) -> None:
    first = make_demo_pool(tmp_path, recipes=TINY)
    stamps = {model.name: (model.directory / "model.safetensors").stat().st_mtime_ns for model in first}
    assert [model.reused for model in first] == [False, False]
    assert [model.reused for model in make_demo_pool(tmp_path, recipes=TINY)] == [True, True]

    changed = (replace(TINY[0], steps=4), TINY[1])
    assert [model.reused for model in make_demo_pool(tmp_path, recipes=changed)] == [False, True]
    assert (first[0].directory / "model.safetensors").stat().st_mtime_ns != stamps["rm-tiny-code"]
    assert (first[1].directory / "model.safetensors").stat().st_mtime_ns == stamps["rm-tiny-safety"]

    (first[1].directory / "recipe.json").write_text("{")
    assert [model.reused for model in make_demo_pool(tmp_path, recipes=changed)] == [True, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rm-tiny-code", "rm-tiny-safety"]


def test_progress_rises_from_nothing_to_done_for_each_model(tmp_path: Path) -> None:
    told: dict[str, list[float]] = {}
    make_demo_pool(tmp_path, progress=lambda name, done: told.setdefault(name, []).append(done), recipes=TINY)
    assert set(told) == {recipe.name for recipe in TINY}
    for fractions in told.values():
        assert fractions == sorted(fractions)
        assert (fractions[0], fractions[-1]) == (0.0, 1.0)


def test_digest_depends_on_recipe_and_seed() -> None:
    digests = {recipe_digest(recipe, seed) for recipe in RECIPES for seed in (0, 1)}
    assert len(digests) == 2 * len(RECIPES)


def test_labelled_pairs_survive_the_data_file_and_keep_earlier_scores(pool: list[DemoModel], tmp_path: Path) -> None:
    pairs = generate_stream(12, np.random.default_rng(5))
    labelled = label_pairs(label_pairs(pairs, [pool[0].directory]), [pool[1].directory])
    assert write_pairs(tmp_path / "pairs.jsonl", labelled) == 12
    assert load_pairs(tmp_path / "pairs.jsonl") == labelled
    for pair in labelled:
        assert set(pair.scores) == {model.name for model in pool}
        for name, (left, right) in pair.scores.items():
            assert pair.verdicts[name] == (TIE if left == right else int(right > left))


def test_directories_of_one_name_are_refused(pool: list[DemoModel]) -> None:
    with pytest.raises(ValueError, match="share a name"):
        label_pairs([], [pool[0].directory, Path("elsewhere") / pool[0].name])


def test_a_short_training_makes_a_model_that_knows_its_domain(tmp_path: Path) -> None:
    """Safety is learned in 60 small steps; 100 unseen pairs, chance is 0.5 with a standard error of 0.05."""
    recipe = Recipe(name="rm", domain="safety", steps=60, batch_pairs=16, own_pairs=600, other_pairs=0, hidden_size=64)
    [model] = make_demo_pool(tmp_path, recipes=[recipe])
    labelled = label_pairs(generate_pairs("safety", 100, np.random.default_rng(0)), [model.directory])
    assert report_pool(labelled).overall["rm"] > 0.75


@pytest.mark.long  # trains the demo's models
def test_the_real_pool_leaves_room_for_a_router(tmp_path: Path) -> None:
    """500 unseen pairs per domain: a share near 0.9 has a standard error of 0.013, one near 0.6 of 0.022."""
    models = make_demo_pool(tmp_path, seed=0)
    report = evaluate([model.directory for model in models], pairs_per_domain=500, seed=9)
    assert {model.domain for model in models} == set(DOMAINS) - {JUDGE.domain}
    for model in models:
        for domain, accuracy in report.accuracy[model.name].items():
            assert (accuracy >= 0.88) if domain == model.domain else (0.4 <= accuracy <= 0.78), (model.name, domain)
    assert report.overall[report.best_single] <= 0.75
    assert report.majority <= 0.85
    assert report.oracle >= report.best_per_domain >= 0.75
