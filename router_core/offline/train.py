"""Train fuse, arm embeddings and correctness heads on a frozen backbone, and pack them as a checkpoint.

Knows how to fit; the losses, the calibration and the split by groups are elsewhere. Called by the command line, tests
and `offline.evaluate.cross_validate`. A fit takes seconds on a CPU, because the texts are embedded once and only a
small network is trained.

With a few thousand labelled pairs a single validation split is noisy, so the number of epochs and the calibration come
from cross-fitting: every pair is predicted by a model that has not seen its group, the epoch with the lowest held-out
loss is taken, and the final model is fitted on all pairs for as many steps. Steps, not epochs: the calibration is made
for weights that have grown for so long, and would make a model that was trained for longer over-confident.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from router_core.checkpoint import Checkpoint
from router_core.dataset import grouped_folds, pairs_digest, pool_matrix
from router_core.encoder.base import Backbone, Block
from router_core.encoder.fuse import Fuse, two_branch
from router_core.errors import DatasetError
from router_core.offline.calibrate import expected_calibration_error, fit_calibration, negative_log_likelihood
from router_core.offline.losses import bradley_terry, correctness_bce
from router_core.prior import CALIBRATED_HYPERPARAMETERS, Hyperparameters
from router_core.records import LabelledPair
from router_core.torch_threads import torch_threads

_EMA = 0.98
"""Decay per step of the averaged weights that are evaluated and kept; stands in for a learning-rate schedule."""
_SCORE_SCALE = 8.0
"""Scores are scale · xᵀe with both of unit norm: without it σ(s_j − s_l) could not leave (0.12, 0.88)."""
_NO_VARIANCE = 1e-6
"""A feature whose standard deviation is below this is constant for the encoder and is dropped."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of the offline fit; what was compared by grouped cross-validation is in docs/experiments.md.

    Fields:
        d: length of a context. Small, because the online stage explores d directions per arm.
        hidden: width of the hidden layer.
        components: leading directions kept of each dense block of the backbone, per branch.
        lambda_bt, lambda_cls: weights of the two losses; `lambda_cls = 0` is the paper's "w/o CLS".
        dropout: on the network's input and hidden layer.
        folds: of the cross-fitting.
        max_epochs: the epoch (a pass over the pairs outside one fold) is chosen from 1 ... max_epochs.
        seed: of every random choice; equal seeds give equal checkpoints on one machine.
        hyperparameters: stored for the online stage.
    """

    d: int = 16
    hidden: int = 32
    components: int = 8
    lambda_bt: float = 1.0
    lambda_cls: float = 1.0
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.3
    batch_size: int = 64
    max_epochs: int = 40
    folds: int = 4
    seed: int = 0
    hyperparameters: Hyperparameters = CALIBRATED_HYPERPARAMETERS


def train(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    backbone: Backbone,
    config: TrainConfig | None = None,
    features: NDArray[np.float32] | None = None,
) -> Checkpoint:
    """Fit the offline stage on labelled pairs.

    Args:
        pairs: at least `config.folds` groups of them.
        pool: names of the K arms, in the order of the checkpoint.
        backbone: frozen encoder of (prompt, response).
        config: defaults if None.
        features: `pair_features(pairs, backbone)` if at hand already.

    Returns:
        The checkpoint, with held-out `metrics` from the cross-fitting: routing accuracy of both heads, negative
        log-likelihood, expected calibration error, chosen epochs, number of pairs.

    Raises:
        DatasetError: too few groups, or an RM without a single verdict.
        EncoderError: the backbone failed.
    """
    config = config or TrainConfig()
    if not pairs:
        raise DatasetError("pairs: there are none; training needs labelled pairs")
    correctness = pool_matrix(pairs, pool)
    z = pair_features(pairs, backbone) if features is None else features
    with torch_threads(1):
        return _fit_checkpoint(pairs, pool, backbone, config, correctness, z)


def _fit_checkpoint(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    backbone: Backbone,
    config: TrainConfig,
    correctness: NDArray[np.float64],
    z: NDArray[np.float32],
) -> Checkpoint:
    """Cross-fit to choose the epochs and to calibrate, then fit on everything."""
    rng = np.random.default_rng(config.seed)
    held_out = np.zeros((config.max_epochs, 2, *correctness.shape))
    folds = grouped_folds(pairs, config.folds, rng)
    steps = math.ceil(min(len(inside) for inside, _ in folds) / config.batch_size)
    for fold, (inside, outside) in enumerate(folds):
        model = _Fit(z[inside], correctness[inside], backbone.blocks, config, seed=config.seed * 1000 + fold + 1)
        for epoch in range(config.max_epochs):
            model.advance(steps)
            held_out[epoch][:, outside] = model.predict(z[outside])
    epochs = _best_epoch(held_out, correctness, config)
    bt_scores, logits = held_out[epochs - 1]
    calibration = fit_calibration(logits, correctness)
    probabilities = calibration.probabilities(logits)

    final = _Fit(z, correctness, backbone.blocks, config, seed=config.seed * 1000)
    final.advance(epochs * steps)
    arms = final.average["arms"]
    return Checkpoint(
        pool=tuple(pool),
        encoder_spec=backbone.spec,
        fuse=final.fuse(),
        bt_embeddings=np.ascontiguousarray((arms / np.linalg.norm(arms, axis=0)).T),
        cls_weight=np.ascontiguousarray(_SCORE_SCALE * final.average["cls_weight"].T),
        cls_bias=final.average["cls_bias"],
        calibration_scale=calibration.scale.astype(np.float32),
        calibration_shift=calibration.shift.astype(np.float32),
        hyperparameters=config.hyperparameters,
        metrics={
            "pairs": len(pairs),
            "epochs": epochs,
            "routing_accuracy_bt": routed_accuracy(bt_scores, correctness),
            "routing_accuracy_cls": routed_accuracy(probabilities, correctness),
            "negative_log_likelihood": negative_log_likelihood(probabilities, correctness),
            "expected_calibration_error": expected_calibration_error(probabilities, correctness),
        },
        data_digest=pairs_digest(pairs),
    )


def pair_features(pairs: Sequence[LabelledPair], backbone: Backbone) -> NDArray[np.float32]:
    """Embed every pair once: z of `two_branch`, (N, 2 * backbone.dim) float32."""
    conversations = [(pair.instance.prompt, text) for pair in pairs for text in pair.instance.responses]
    return two_branch(backbone.embed(conversations), [len(pair.instance.responses) for pair in pairs])


def routed_accuracy(scores: NDArray[np.floating], correctness: NDArray[np.float64]) -> float:
    """Mean correctness of the highest-scored RM among those that were asked; the first of equals.

    Args:
        scores: (N, K).
        correctness: (N, K), NaN where the RM was not asked; rows without any RM are left out.
    """
    asked = ~np.isnan(correctness)
    some = asked.any(axis=1)
    chosen = np.where(asked, scores, -np.inf)[some].argmax(axis=1)
    return float(correctness[some][np.arange(len(chosen)), chosen].mean())


def input_projection(
    z: NDArray[np.float32], blocks: Sequence[Block], components: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Shift and projection of `Fuse`: standardise measured columns, whiten dense blocks on their leading directions.

    A dense block's components share the block's weight: they are scaled to standard deviation sqrt(1/2), so that many
    of them do not drown the measured features.

    Args:
        z: (N, 2 * dim), both branches of `two_branch`.
        blocks: of the backbone; the same layout holds for each branch.
        components: at most this many directions per dense block and branch.

    Returns:
        shift (2 * dim,), projection (2 * dim, p), float32. Constant columns get no component.
    """
    mean = z.mean(axis=0)
    centred = (z - mean).astype(np.float64)
    columns: list[NDArray[np.float64]] = []
    start = 0
    for block in [*blocks, *blocks]:
        part = slice(start, start + block.width)
        start += block.width
        if block.dense:
            _, singular, directions = np.linalg.svd(centred[:, part], full_matrices=False)
            deviations = singular / np.sqrt(len(z))
            kept = [(directions[i], deviations[i] * np.sqrt(2)) for i in range(min(components, len(singular)))]
        else:
            kept = list(zip(np.eye(block.width), centred[:, part].std(axis=0), strict=True))
        for direction, deviation in kept:
            if deviation > _NO_VARIANCE:
                column = np.zeros(z.shape[1])
                column[part] = direction / deviation
                columns.append(column)
    if not columns:
        raise DatasetError("pairs: their features are all equal, so there is nothing to route by; give different texts")
    return mean.astype(np.float32), np.stack(columns, axis=1).astype(np.float32)


def _best_epoch(held_out: NDArray[np.float64], correctness: NDArray[np.float64], config: TrainConfig) -> int:
    y = torch.as_tensor(correctness)
    losses = [
        config.lambda_bt * float(bradley_terry(torch.as_tensor(scores), y))
        + config.lambda_cls * float(correctness_bce(torch.as_tensor(logits), y))
        for scores, logits in held_out
    ]
    return int(np.argmin(losses)) + 1


class _Network(nn.Module):
    """The trainable part: the fuse's two layers and both heads."""

    def __init__(self, p: int, base_rates: Tensor, config: TrainConfig, generator: torch.Generator) -> None:
        super().__init__()
        K = len(base_rates)

        def gaussian(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) / rows**0.5)

        self.w1, self.b1 = gaussian(p, config.hidden), nn.Parameter(torch.zeros(config.hidden))
        self.w2, self.b2 = gaussian(config.hidden, config.d), nn.Parameter(torch.zeros(config.d))
        self.arms = gaussian(config.d, K)
        # Zero weights and the base rate as bias: with lambda_cls = 0 the head stays an honest constant.
        self.cls_weight = nn.Parameter(torch.zeros(config.d, K))
        self.cls_bias = nn.Parameter(torch.logit(base_rates))

    def forward(self, u: Tensor, dropped: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """u (B, p) to Bradley-Terry scores (B, K) and correctness logits (B, K)."""
        h = torch.tanh(_drop(u, dropped, generator) @ self.w1 + self.b1)
        x = normalize(_drop(h, dropped, generator) @ self.w2 + self.b2, dim=1)
        return _SCORE_SCALE * x @ normalize(self.arms, dim=0), _SCORE_SCALE * x @ self.cls_weight + self.cls_bias


def _drop(values: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """Inverted dropout from an explicit generator; torch's own layer draws from the process-wide one."""
    if generator is None or share == 0.0:
        return values
    kept = torch.rand(values.shape, generator=generator) >= share
    return values * kept / (1 - share)


class _Fit:
    """One fit in progress: network, optimiser, averaged weights, generator."""

    def __init__(
        self,
        z: NDArray[np.float32],
        correctness: NDArray[np.float64],
        blocks: Sequence[Block],
        config: TrainConfig,
        seed: int,
    ) -> None:
        self._config = config
        self._shift, self._projection = input_projection(z, blocks, config.components)
        self._generator = torch.Generator().manual_seed(seed)
        self._u = self._inputs(z)
        self._y = torch.as_tensor(correctness, dtype=torch.float32)
        asked = torch.isfinite(self._y).sum(0)
        base_rates = (torch.nan_to_num(self._y).sum(0) + 0.5) / (asked + 1)
        self._network = _Network(self._u.shape[1], base_rates, config, self._generator)
        self._average = {name: value.detach().clone() for name, value in self._network.named_parameters()}
        heads = ("arms", "cls_weight", "cls_bias", "b1", "b2")
        named = dict(self._network.named_parameters())
        self._optimiser = torch.optim.AdamW(
            [
                {"params": [p for n, p in named.items() if n not in heads], "weight_decay": config.weight_decay},
                {"params": [p for n, p in named.items() if n in heads], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
        )
        self._steps = 0
        self._batches = self._shuffled_batches()

    def _inputs(self, z: NDArray[np.float32]) -> Tensor:
        return torch.as_tensor(np.clip((z - self._shift) @ self._projection, -5.0, 5.0))

    def _shuffled_batches(self) -> Iterator[Tensor]:
        """Row indices of one batch after another, pass after pass in a new order each, without end."""
        while True:
            order = torch.randperm(len(self._u), generator=self._generator)
            yield from torch.split(order, self._config.batch_size)

    def advance(self, steps: int) -> None:
        """Take `steps` optimiser steps, one batch each."""
        c = self._config
        for rows in itertools.islice(self._batches, steps):
            scores, logits = self._network(self._u[rows], c.dropout, self._generator)
            y = self._y[rows]
            loss = c.lambda_bt * bradley_terry(scores, y) + c.lambda_cls * correctness_bce(logits, y)
            self._optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimiser.step()
            self._steps += 1
            # A short memory at first, so that the average forgets the random start within an epoch.
            decay = min(_EMA, self._steps / (self._steps + 10))
            with torch.no_grad():
                for name, value in self._network.named_parameters():
                    self._average[name].lerp_(value, 1 - decay)

    def predict(self, z: NDArray[np.float32]) -> NDArray[np.float64]:
        """(2, N, K): Bradley-Terry scores and correctness logits of the averaged weights."""
        with torch.inference_mode():
            scores, logits = torch.func.functional_call(self._network, self._average, (self._inputs(z), 0.0, None))
        return np.stack([scores.double().numpy(), logits.double().numpy()])

    @property
    def average(self) -> dict[str, NDArray[np.float32]]:
        """The averaged weights by name, as copies."""
        return {name: value.numpy().copy() for name, value in self._average.items()}

    def fuse(self) -> Fuse:
        """The encoder half of the averaged weights."""
        average = self.average
        return Fuse(
            shift=self._shift,
            projection=self._projection,
            w1=average["w1"],
            b1=average["b1"],
            w2=average["w2"],
            b2=average["b2"],
        )
