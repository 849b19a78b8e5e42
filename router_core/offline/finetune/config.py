"""Settings of a fine-tuning run. Knows numbers and their domains only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from router_core.encoder.torch import CPU_BATCH_TOKENS, DEVICE_BATCH_TOKENS, DTYPES, Precision
from router_core.errors import HyperparameterError
from router_core.prior import CALIBRATED_HYPERPARAMETERS, Hyperparameters

Mode = Literal["full", "lora"]
LEARNING_RATES: dict[str, float] = {"full": 3e-5, "lora": 3e-4}
"""Adapters start from zero and are few, so they take larger steps than pretrained weights bear."""
_NOT_THE_FIT = ("hyperparameters", "save_every", "threads", "gradient_checkpointing")


@dataclass(frozen=True, slots=True)
class FinetuneConfig:
    """How backbone and heads are trained together.

    Fields:
        mode: `full` trains every weight, `lora` low-rank adapters that are merged into the weights at the end.
        epochs: passes over the training pairs; the paper's number.
        learning_rate: of the backbone at its peak; None for the mode's own.
        head_learning_rate: of fuse and heads, which start from nothing.
        warmup: share of all steps in which the rates rise from 0; they fall to 0 over the rest, both linearly.
        pairs_per_step: pairs of one optimiser step, gathered over as many passes as memory asks for.
        batch_tokens: padded tokens of one pass; None for the device's own.
        max_tokens: longest text that is read, now and whenever the result is used; None for the backbone's.
        lambda_bt, lambda_cls: weights of the two losses.
        balanced: weigh couples of RMs alike (`losses.balanced_couples`).
        lora_rank, lora_dropout: of the adapters; their scale is 2, whatever the rank.
        backbone_dropout: of the transformer's own layers, in place of its own. Most language models have none, and with
            any a CPU takes the slow way through attention: MiniLM then took 1.5 times as long.
        precision: of the passes; weights and optimiser stay in fp32.
        validation_fraction: share of the pairs, by whole groups, that choose the stopping point and the calibration.
        evaluations_per_epoch, patience: stop after `patience` looks at the held-out loss without a new lowest.
        features, context, hidden, dropout: of the fuse, as in `TrainConfig`.
        standardise_pairs: training pairs from which each column's mean and deviation are taken before the first step.
        gradient_checkpointing: compute activations twice instead of keeping them.
        save_every: optimiser steps between two states from which a run can be resumed.
        threads: of torch on a CPU. Results are equal for equal numbers of threads.
        seed: of every random choice.
        hyperparameters: stored for the online stage.
    """

    mode: Mode = "full"
    epochs: int = 2
    learning_rate: float | None = None
    head_learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    gradient_norm: float = 1.0
    pairs_per_step: int = 16
    batch_tokens: int | None = None
    max_tokens: int | None = None
    lambda_bt: float = 1.0
    lambda_cls: float = 1.0
    balanced: bool = False
    lora_rank: int = 8
    lora_dropout: float = 0.05
    backbone_dropout: float = 0.0
    precision: Precision = "fp32"
    validation_fraction: float = 0.2
    evaluations_per_epoch: int = 2
    patience: int = 3
    features: int = 16
    context: int = 8
    hidden: int = 64
    dropout: float = 0.1
    standardise_pairs: int = 64
    gradient_checkpointing: bool = False
    save_every: int = 25
    threads: int = 1
    seed: int = 0
    hyperparameters: Hyperparameters = CALIBRATED_HYPERPARAMETERS

    def __post_init__(self) -> None:
        """Raises HyperparameterError naming the field that is out of its domain."""
        if self.mode not in LEARNING_RATES:
            raise HyperparameterError(f"mode = {self.mode!r}: choose 'full' or 'lora'")
        if self.precision not in DTYPES:
            raise HyperparameterError(f"precision = {self.precision!r}: choose one of {', '.join(DTYPES)}")
        counts = (
            "epochs",
            "pairs_per_step",
            "lora_rank",
            "evaluations_per_epoch",
            "patience",
            "features",
            "context",
            "hidden",
        )
        for name in (*counts, "standardise_pairs", "save_every", "threads"):
            if getattr(self, name) < 1:
                raise HyperparameterError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("warmup", "dropout", "lora_dropout", "backbone_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise HyperparameterError(f"{name} = {getattr(self, name)}: must be at least 0 and below 1")
        if not 0.0 < self.validation_fraction < 1.0:
            raise HyperparameterError(f"validation_fraction = {self.validation_fraction}: must be inside (0, 1)")
        if min(self.lambda_bt, self.lambda_cls) < 0 or self.lambda_bt + self.lambda_cls == 0:
            raise HyperparameterError(
                f"lambda_bt = {self.lambda_bt}, lambda_cls = {self.lambda_cls}: neither below 0, one at least above 0"
            )
        if self.peak_rate <= 0 or self.head_learning_rate <= 0:
            raise HyperparameterError(
                f"learning_rate = {self.peak_rate}, head_learning_rate = {self.head_learning_rate}: give positive ones"
            )

    @property
    def peak_rate(self) -> float:
        """Learning rate of the backbone at its peak."""
        return LEARNING_RATES[self.mode] if self.learning_rate is None else self.learning_rate

    def tokens_per_pass(self, device: str) -> int:
        """Padded tokens of one pass on this device."""
        return self.batch_tokens or (CPU_BATCH_TOKENS if device == "cpu" else DEVICE_BATCH_TOKENS)

    def rate_factor(self, step: int, steps: int) -> float:
        """Share of the peak rates that step 0 ... steps − 1 uses: up over the warm-up, then down to zero.

        >>> [FinetuneConfig(warmup=0.5).rate_factor(step, 4) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
        """
        rising = round(self.warmup * steps)
        if step < rising:
            return (step + 1) / rising
        return (steps - step) / max(steps - rising, 1)

    def fit_settings(self) -> dict[str, Any]:
        """Every field that changes the result, as JSON values: what a resumed run must share with its beginning."""
        fields = asdict(replace(self, learning_rate=self.peak_rate))
        return {name: value for name, value in fields.items() if name not in _NOT_THE_FIT}
