"""Transformer backbones on tiny random models, saved and loaded as real ones are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from router_core.encoder.formatting import fit_tokens, render
from router_core.encoder.registry import load_backbone
from router_core.errors import EncoderError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from tests.support.transformers_dirs import save_transformer as save  # noqa: E402


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
    assert joined.dim == 28 + 16


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


def test_half_precision_gives_nearly_the_same_vectors_as_float32(tmp_path: Path) -> None:
    spec = f"torch:{save(tmp_path, 'llama')}"
    full, half = load_backbone(spec).embed([("a b", "c d e")]), load_backbone(f"{spec}@bf16").embed([("a b", "c d e")])
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, full, atol=0.1)
    assert np.abs(half - full).max() > 1e-5
    with pytest.raises(EncoderError, match="does not exist"):
        load_backbone(f"{spec}@int4")


def test_an_identity_is_of_weights_tokenizer_precision_and_limits(tmp_path: Path) -> None:
    from router_core.encoder.torch import TorchBackbone

    one = save(tmp_path / "one", "bert")
    specs = [f"torch:{one}", f"torch:{one}@bf16", f"torch:{save(tmp_path / 'two', 'bert', seed=1)}"]
    specs += [
        f"torch:{save(tmp_path / 'short', 'bert', positions=32)}",
        f"torch:{save(tmp_path / 'c', 'bert', chat=True)}",
    ]
    identities = [load_backbone(spec).identity for spec in specs]  # type: ignore[attr-defined]
    assert len(set(identities)) == len(specs)
    copy = save(tmp_path / "copy", "bert")
    assert load_backbone(f"torch:{copy}").identity == identities[0]  # type: ignore[attr-defined]
    assert TorchBackbone.load(one, "any", max_tokens=9).identity != identities[0]


def test_a_saved_backbone_is_read_as_it_was(tmp_path: Path) -> None:
    from router_core.encoder.torch import TorchBackbone

    short = TorchBackbone.load(save(tmp_path / "one", "llama", chat=True), "any", max_tokens=7)
    short.save(tmp_path / "two")
    again = load_backbone(f"torch:{tmp_path / 'two'}")
    long = [("a b c d e f g", "h i j k l m n")]
    np.testing.assert_array_equal(again.embed(long), short.embed(long))
    assert again.identity == short.identity  # type: ignore[attr-defined]


def test_loading_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = f"torch:{save(tmp_path, 'llama')}"
    capfd.readouterr()
    load_backbone(spec)
    assert capfd.readouterr() == ("", "")


def test_a_model_that_gives_nan_is_named(tmp_path: Path) -> None:
    backbone = load_backbone(f"torch:{save(tmp_path, 'bert')}")
    with torch.no_grad():
        next(backbone.model.parameters()).fill_(float("nan"))  # type: ignore[attr-defined]
    with pytest.raises(EncoderError, match="NaN or infinity"):
        backbone.embed([("a", "b")])


def test_batches_are_by_length_and_bounded() -> None:
    from router_core.encoder.torch import batches_by_length

    lengths = np.random.default_rng(0).integers(1, 50, 200).tolist()
    batches = batches_by_length(lengths, 100)
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    for batch in batches:
        assert len(batch) * max(lengths[i] for i in batch) <= 100
    assert batches_by_length([500], 100) == [[0]]
    assert batches_by_length([], 100) == []


@pytest.mark.long  # 10 s of loading, twice: a real model of 135M weights
def test_a_model_from_a_gguf_file_can_be_saved_and_is_the_same(tmp_path: Path) -> None:
    try:
        smollm = load_backbone("smollm2-135m")
    except EncoderError as error:
        pytest.skip(str(error))
    smollm.save(tmp_path / "saved")  # type: ignore[attr-defined]
    again = load_backbone(f"torch:{tmp_path / 'saved'}")
    texts = [("What is 2 + 2?", "It is 4."), ("Hi", "hello there")]
    np.testing.assert_array_equal(again.embed(texts), smollm.embed(texts))
    assert again.identity == smollm.identity  # type: ignore[attr-defined]
