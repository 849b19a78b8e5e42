"""Transformer backbones on tiny random models, saved and loaded as real ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router_core.encoder.formatting import fit_tokens, render
from router_core.encoder.registry import load_backbone
from router_core.errors import EncoderError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]
CHAT = (
    "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} e {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)


def save(directory: Path, kind: str, chat: bool = False, positions: int = 64) -> Path:
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if kind == "bert":
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    if chat:
        fast.chat_template = CHAT
    fast.save_pretrained(directory)
    shape: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": positions,
    }
    torch.manual_seed(0)
    if kind == "bert":
        transformers.BertModel(transformers.BertConfig(**shape)).save_pretrained(directory)
    else:
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_key_value_heads=2)).save_pretrained(
            directory
        )
    return directory


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_batch_of_unequal_lengths_equals_one_by_one(tmp_path: Path, kind: str) -> None:
    backbone = load_backbone(f"torch:{save(tmp_path, kind)}")
    conversations = [("a b c", "d"), ("", "e f g h i j"), ("k", ""), ("", ""), ("l m " * 20, "n " * 30)]
    batch = backbone.embed(conversations)
    assert batch.shape == (5, backbone.dim)
    assert batch.dtype == np.float32
    np.testing.assert_allclose(batch, np.concatenate([backbone.embed([one]) for one in conversations]), atol=1e-5)
    assert backbone.embed([]).shape == (0, 16)


def test_a_sentence_encoder_gives_the_mean_and_a_causal_model_the_last_state(tmp_path: Path) -> None:
    bert = transformers.BertModel.from_pretrained(save(tmp_path / "bert", "bert")).eval()
    llama = transformers.LlamaModel.from_pretrained(save(tmp_path / "llama", "llama")).eval()
    with torch.inference_mode():
        mean = bert(torch.tensor([[1, 4, 5, 2]])).last_hidden_state.mean(1).numpy()
        last = llama(torch.tensor([[4, 5]])).last_hidden_state[:, -1].numpy()
    np.testing.assert_allclose(load_backbone(f"torch:{tmp_path / 'bert'}").embed([("a", "b")]), mean, atol=1e-5)
    np.testing.assert_allclose(load_backbone(f"torch:{tmp_path / 'llama'}").embed([("a", "b")]), last, atol=1e-5)


def test_an_over_long_text_keeps_the_end_of_the_response(tmp_path: Path) -> None:
    backbone = load_backbone(f"torch:{save(tmp_path, 'llama', positions=8)}")
    ending = "s t u v w x y z"
    kept = backbone.embed([("", ending)])
    np.testing.assert_allclose(backbone.embed([("a b c d", "q r " + ending)]), kept, atol=1e-6)
    assert np.abs(backbone.embed([("a b c d", ending + " q r")]) - kept).max() > 1e-3


def test_a_chat_template_is_used_where_there_is_one(tmp_path: Path) -> None:
    plain = load_backbone(f"torch:{save(tmp_path / 'plain', 'llama')}")
    chat = load_backbone(f"torch:{save(tmp_path / 'chat', 'llama', chat=True)}")
    np.testing.assert_allclose(chat.embed([("b c", "d")]), plain.embed([("u b c e a", "d e")]), atol=1e-5)


def test_the_loaded_spec_names_the_directory(tmp_path: Path) -> None:
    spec = f"torch:{save(tmp_path, 'bert')}"
    assert load_backbone(spec).spec == spec
    joined = load_backbone(f"surface+{spec}")
    assert joined.spec == f"surface+{spec}"
    assert joined.dim == 22 + 16


def test_a_missing_or_broken_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"config\.json does not exist"):
        load_backbone(f"torch:{tmp_path / 'absent'}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EncoderError, match="cannot load"):
        load_backbone(f"torch:{tmp_path}")


def test_cutting_takes_from_the_prompt_first() -> None:
    assert fit_tokens([1, 2, 3], [4, 5], 10) == [1, 2, 3, 4, 5]
    assert fit_tokens([1, 2, 3], [4, 5], 3) == [3, 4, 5]
    assert fit_tokens([1, 2, 3], [4, 5], 1) == [5]


def test_a_template_that_rewrites_the_text_still_keeps_the_response() -> None:
    class Rewriting:
        chat_template: str | None = "any"

        def apply_chat_template(self, conversation: list[dict[str, str]], *, tokenize: bool, **options: bool) -> str:
            return "<head>" if options.get("add_generation_prompt") else "<other>"

    assert render(Rewriting(), "p", "r") == ("<head>", "r")
