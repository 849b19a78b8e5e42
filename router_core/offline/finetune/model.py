"""The trainable whole: a transformer over both responses, the fuse's two layers, the Bradley-Terry and the CLS head.

Knows tensors, transformers modules and peft; no files of its own, no loop. The forward pass is `encoder.fuse` with
gradients, and `fuse()` gives the numpy one that the service uses. Called by `finetune.loop`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from router_core.encoder.fuse import Fuse
from router_core.encoder.torch import TorchBackbone
from router_core.errors import EncoderError
from router_core.offline.finetune.config import FinetuneConfig
from router_core.offline.members import LIMIT, SCORE_SCALE


@dataclass(frozen=True, slots=True)
class TokenisedPair:
    """Token ids of each response of one pair."""

    rows: tuple[tuple[int, ...], ...]

    @property
    def padded(self) -> int:
        """Tokens that the pair takes in a batch of its own kind: rows times the longest."""
        return len(self.rows) * max(map(len, self.rows))


def adapt(backbone: TorchBackbone, config: FinetuneConfig) -> TorchBackbone:
    """The backbone to be trained: itself, or with adapters on every linear layer and all else frozen.

    Adapters are drawn from torch's process-wide generator: the caller seeds it.

    Raises:
        EncoderError: peft is needed and not installed.
    """
    model: Any = backbone.model
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = config.backbone_dropout
    if config.mode == "lora":
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise EncoderError(
                f"LoRA needs {error.name!r}; pip install 'reward-router[train]', or train fully"
            ) from error
        settings = LoraConfig(
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank,
            lora_dropout=config.lora_dropout,
            target_modules="all-linear",
        )
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 for a property by its old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            model = get_peft_model(model, settings)
    if config.gradient_checkpointing:
        # Renamed in transformers 5.23; both recompute without re-entering autograd.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return TorchBackbone(
        model,
        backbone.tokenizer,
        backbone.spec,
        backbone.pooling,
        min(config.max_tokens or backbone.max_tokens, backbone.max_tokens),
        backbone.device,
    )


def merged(backbone: TorchBackbone, spec: str) -> TorchBackbone:
    """The trained backbone as a plain one: adapters are added into the weights they adapt."""
    model: Any = backbone.model
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    return TorchBackbone(
        model,
        backbone.tokenizer,
        spec,
        backbone.pooling,
        backbone.max_tokens,
        backbone.device,
    )


class RoutingModel(nn.Module):
    """Pairs of texts to Bradley-Terry scores (B, K) and correctness logits (B, K)."""

    shift: Tensor
    scale: Tensor

    def __init__(
        self, backbone: TorchBackbone, base_rates: Tensor, config: FinetuneConfig, generator: torch.Generator
    ) -> None:
        """`base_rates` (K,) in (0, 1): how often each RM is right, where the CLS head starts."""
        super().__init__()
        self.transformer = backbone.model
        # Not a module: the same transformer, with tokenizer and pooling.
        self._backbone = backbone
        self._config = config
        p, K = 2 * backbone.dim, len(base_rates)

        def gaussian(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) / rows**0.5)

        self.register_buffer("shift", torch.zeros(p))
        self.register_buffer("scale", torch.ones(p))
        self.w1, self.b1 = gaussian(p, config.hidden), nn.Parameter(torch.zeros(config.hidden))
        self.w2, self.b2 = gaussian(config.hidden, config.features), nn.Parameter(torch.zeros(config.features))
        self.arms = gaussian(config.features, K)
        self.cls_weight = nn.Parameter(torch.zeros(config.features, K))
        self.cls_bias = nn.Parameter(torch.logit(base_rates).float())
        self.to(backbone.device)

    def branches(self, pairs: Sequence[TokenisedPair]) -> Tensor:
        """z of `fuse.two_branch` for the pairs, float32 (B, 2 · dim), from one pass over all their responses."""
        sizes = torch.tensor([len(pair.rows) for pair in pairs], device=self.shift.device)
        owner = torch.repeat_interleave(sizes)
        with torch.autocast(
            torch.device(self._backbone.device).type,
            dtype=torch.float16 if self._config.precision == "fp16" else torch.bfloat16,
            enabled=self._config.precision != "fp32",
        ):
            h = self._backbone.pool([row for pair in pairs for row in pair.rows])
        h = h.float()
        count = sizes[:, None].float()
        mean = h.new_zeros(len(pairs), h.shape[1]).index_add(0, owner, h) / count
        deviation = torch.zeros_like(mean).index_add(0, owner, (h - mean[owner]).abs())
        return torch.cat([mean, 2 * deviation / count], dim=1)

    def forward(self, pairs: Sequence[TokenisedPair]) -> tuple[Tensor, Tensor]:
        """Scores and logits of a batch; dropout where the module is in training mode."""
        dropped = self._config.dropout if self.training else 0.0
        u = ((self.branches(pairs) - self.shift) * self.scale).clamp(-LIMIT, LIMIT)
        h = torch.tanh(nn.functional.dropout(u, dropped) @ self.w1 + self.b1)
        x = normalize(nn.functional.dropout(h, dropped) @ self.w2 + self.b2, dim=1)
        return SCORE_SCALE * x @ normalize(self.arms, dim=0), SCORE_SCALE * x @ self.cls_weight + self.cls_bias

    def standardise(self, z: Tensor) -> None:
        """Fix each column's shift and scale from z (N, 2 · dim); a column that does not move is left out."""
        deviation = z.std(0, correction=0)
        self.shift.copy_(z.mean(0))
        self.scale.copy_(torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), 0.0))

    def trained(self) -> dict[str, Tensor]:
        """What training changes or fixes, by name: trainable parameters and the two buffers. Not copies."""
        named = {name: value for name, value in self.named_parameters() if value.requires_grad}
        return {**named, "shift": self.shift, "scale": self.scale}

    def restore(self, values: dict[str, Tensor]) -> None:
        """Set what `trained` lists, by name."""
        with torch.no_grad():
            for name, value in self.trained().items():
                value.copy_(values[name])

    def fuse(self) -> Fuse:
        """The numpy encoder half."""
        return Fuse(
            shift=_array(self.shift),
            projection=np.diag(_array(self.scale)),
            w1=_array(self.w1),
            b1=_array(self.b1),
            w2=_array(self.w2),
            b2=_array(self.b2),
            limit=LIMIT,
        )

    def heads(self) -> dict[str, NDArray[np.float32]]:
        """`bt_embeddings`, `cls_weight`, `cls_bias` as a checkpoint holds them, one row per arm."""
        return {
            "bt_embeddings": np.ascontiguousarray(_array(normalize(self.arms, dim=0)).T),
            "cls_weight": np.ascontiguousarray(SCORE_SCALE * _array(self.cls_weight).T),
            "cls_bias": _array(self.cls_bias),
        }


def _array(value: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = value.detach().cpu().numpy().astype(np.float32)
    return array
