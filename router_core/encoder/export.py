"""A transformer backbone as a directory that vLLM can serve, with what the gateway needs to read texts as it does.

Knows torch backbones, files and a few fixed texts; no server and no network. `reward-router encoder export` calls it;
`service.encoders.reading` reads what it writes. Imported only where torch is.

The directory:

    config.json, *.safetensors    the weights; `vllm serve` and transformers read them
    tokenizer*.json, …            the tokenizer and its chat template
    modules.json, 1_Pooling/      how states become one vector, in the words that vLLM reads; nothing is normalised
    reward_router.json            spec, width, longest text, pooling, and the token ids of the reference texts
    references.npy                the states of those texts, which a server must repeat

`write_reading` writes all but weights and pooling: megabytes, and all that a gateway needs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from router_core.encoder.formatting import READING_FILE, READING_VERSION, REFERENCES_FILE
from router_core.encoder.torch import TorchBackbone

REFERENCE_TEXTS: Final = (
    ("What is 17 * 23?", "17 * 23 = 391."),
    ("Write a function that sorts a list.", "def sort(xs):\n    return sorted(xs)\n"),
    ("Wie heißt die Hauptstadt von Frankreich?", "Paris — naturally.\n\n* It lies on the Seine. 日本語も。"),
    ("Tell me a story about a lighthouse. " * 6, "Once upon a time a lighthouse kept watch over a quiet bay. " * 6),
    ("", ""),
)
"""What a server is tried with: sums, code, other scripts, a longer text, and nothing at all."""


def write_reading(backbone: TorchBackbone, directory: Path, files: str = "") -> None:
    """Write the tokenizer, how the backbone reads, and the references.

    `files` names the checkpoint's fine-tuned weights, where they are its own.

    Raises:
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    backbone.tokenizer.save_pretrained(directory)
    ids = [backbone.token_ids(prompt, response) for prompt, response in REFERENCE_TEXTS]
    reading: dict[str, Any] = {
        "version": READING_VERSION,
        "spec": backbone.spec,
        "dim": backbone.dim,
        "identity": backbone.identity,
        "files": files,
        "pooling": backbone.pooling,
        "max_tokens": backbone.max_tokens,
        "padding": int(backbone.tokenizer.pad_token_id or 0),
        "references": [
            {"prompt": prompt, "response": response, "ids": row}
            for (prompt, response), row in zip(REFERENCE_TEXTS, ids, strict=True)
        ],
    }
    (directory / READING_FILE).write_text(json.dumps(reading, ensure_ascii=False, indent=1) + "\n", "utf-8")
    # One by one, so that no reference depends on how others were padded.
    states = np.concatenate([backbone.embed([text]) for text in REFERENCE_TEXTS])
    np.save(directory / REFERENCES_FILE, states, allow_pickle=False)


def export(backbone: TorchBackbone, directory: Path, files: str = "") -> None:
    """Write everything: what `vllm serve DIRECTORY --runner pooling --convert embed` serves, and the reading.

    Raises:
        OSError: the directory cannot be written.
    """
    backbone.save(directory)
    _write_pooling(directory, backbone.pooling, backbone.dim)
    write_reading(backbone, directory, files)


def serve_command(directory: Path, precision: str = "fp32", max_tokens: int = 1024) -> Sequence[str]:
    """The `vllm serve` command for an exported directory."""
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision]
    words = (
        f"vllm serve {directory} --runner pooling --convert embed --dtype {dtype} --max-model-len {max_tokens}"
        " --host 127.0.0.1"
    )
    return words.split()


def _write_pooling(directory: Path, pooling: str, dim: int) -> None:
    """The layout of sentence-transformers, which vLLM follows: pooling, and no normalisation after it."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (directory / "modules.json").write_text(json.dumps(modules, indent=1) + "\n", "utf-8")
    modes = {
        "word_embedding_dimension": dim,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_lasttoken": pooling == "last",
    }
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(modes, indent=1) + "\n", "utf-8")
