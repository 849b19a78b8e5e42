"""Texts are read without torch exactly as the backbone reads them, and an altered export is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from router_core.encoder.export import REFERENCE_TEXTS, export
from router_core.encoder.torch import TorchBackbone
from service.encoders.reading import Reading
from service.errors import ConfigurationError
from tests.service.encoders.conftest import Exported
from tests.support.transformers_dirs import save_transformer

TEXTS = [
    ("a b", "c"),
    ("", ""),
    ("a " * 100, "b " * 100),
    ("a " * 100, "b"),
    ("  spaces  ", "\n\ttabs\n"),
    ("x y z", ""),
    ("ünïcode 日本", "🙂"),
    *REFERENCE_TEXTS,
]


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("chat", [False, True])
def test_token_ids_are_those_of_the_backbone_whatever_the_model(kind: str, chat: bool, tmp_path: Path) -> None:
    source = save_transformer(tmp_path / "source", kind, chat=chat)
    backbone = TorchBackbone.load(source, "torch:somewhere")
    export(backbone, tmp_path / "out")
    reading = Reading.load(tmp_path / "out")
    assert (reading.spec, reading.dim, reading.max_tokens) == ("torch:somewhere", backbone.dim, backbone.max_tokens)
    assert reading.blocks == backbone.blocks
    assert reading.token_ids(TEXTS) == [backbone.token_ids(*text) for text in TEXTS]
    assert reading.token_ids([]) == []


def test_an_exported_directory_is_a_transformers_directory_with_the_same_states(exported: Exported) -> None:
    again = TorchBackbone.load(exported.directory, "torch:again")
    assert again.pooling == exported.backbone.pooling
    np.testing.assert_array_equal(again.embed(TEXTS), exported.backbone.embed(TEXTS))
    references = Reading.load(exported.directory).references
    np.testing.assert_allclose(again.embed_ids(references.ids), references.states, rtol=0, atol=2e-6)


def test_pooling_is_written_in_the_words_that_vllm_reads_and_nothing_is_normalised(tmp_path: Path) -> None:
    for kind, mode in (("llama", "pooling_mode_lasttoken"), ("bert", "pooling_mode_mean_tokens")):
        export(TorchBackbone.load(save_transformer(tmp_path / f"{kind}-in", kind), "x"), tmp_path / kind)
        modes = json.loads((tmp_path / kind / "1_Pooling" / "config.json").read_text())
        assert [name for name, value in modes.items() if value is True] == [mode]
        modules = [
            module["type"].rpartition(".")[2] for module in json.loads((tmp_path / kind / "modules.json").read_text())
        ]
        assert modules == ["Transformer", "Pooling"]


def test_an_altered_chat_template_is_refused(exported: Exported, tmp_path: Path) -> None:
    copy = shutil.copytree(exported.directory, tmp_path / "copy")
    template = copy / "chat_template.jinja"
    template.write_text("x " + template.read_text())
    with pytest.raises(ConfigurationError, match="reference text 0 has other token ids here"):
        Reading.load(copy)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "reward_router.json").unlink(), "reward-router encoder export"),
        (lambda folder: (folder / "reward_router.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "reward_router.json").write_text('{"max_tokens": 3}'), "version None"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
        (lambda folder: (folder / "references.npy").write_bytes(b"x"), "lacks what an exported encoder holds"),
    ],
)
def test_a_spoiled_directory_is_refused_with_a_remedy(
    spoil: object, words: str, exported: Exported, tmp_path: Path
) -> None:
    copy = shutil.copytree(exported.directory, tmp_path / "copy")
    spoil(copy)  # type: ignore[operator]
    with pytest.raises(ConfigurationError, match=words):
        Reading.load(copy)


def test_a_gateway_without_torch_reads_texts(exported: Exported) -> None:
    program = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)
sys.meta_path.insert(0, Blocked())
from pathlib import Path
import service.gateway
from service.encoders.load import RemoteOptions, load_remote_encoder
encoder = load_remote_encoder(
    "vllm:http://127.0.0.1:9", None, Path({str(exported.directory)!r}), RemoteOptions(1.0, 1.0, None, 0)
)
print(encoder.d)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "128"
