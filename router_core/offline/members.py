"""Several small networks side by side on frozen encodings: how they are fitted, and how they become a fuse with heads.

Half of them read the directions of the encodings, the others read the kinds of texts (`offline.kinds`) alone. The first
find what is peculiar to the pool, the second what all RMs of the data say, with few weights; their mean is better than
either (docs/experiments.md).

Knows encodings and targets of one set of pairs; which pairs those are, when to stop and what comes of the predictions
is the business of `offline.train`, which is the only caller besides `offline.finetune`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from router_core.encoder.base import Block
from router_core.encoder.fuse import Fuse, Kernel
from router_core.errors import DatasetError, ShapeMismatchError
from router_core.offline.calibrate import LEVEL
from router_core.offline.kernel import fit_kernel
from router_core.offline.kinds import fit_kinds
from router_core.offline.losses import balanced_couples, bradley_terry, correctness_bce
from router_core.prior import CALIBRATED_HYPERPARAMETERS, Hyperparameters

_EMA = 0.98
"""Decay per step of the averaged weights that are evaluated and kept; stands in for a learning-rate schedule."""
SCORE_SCALE = 8.0
"""Scores are scale · xᵀe with both of unit norm: without it σ(s_j − s_l) could not leave (0.12, 0.88)."""
LIMIT = 5.0
"""`Fuse.limit`."""
_NO_VARIANCE = 1e-6
"""A feature whose standard deviation is below this is constant for the encoder and is dropped."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of the offline fit; what was compared by grouped cross-validation is in docs/experiments.md.

    Fields:
        directions: directions kept of the members' outputs beside those that the heads read.
        context: directions of the low-rank context that the online stage learns over; small, because it explores them.
        members: independent fits side by side; their mean logits route.
        kind_members: how many of them read kinds of texts instead of directions; 0 fits no kinds.
        kinds: how many kinds at most.
        kind_components: as `components`, for what the kinds are made of.
        member_dim: length of one member's unit vector.
        hidden: width of a member's hidden layer.
        components: leading directions kept of each dense block of the backbone, per branch.
        lambda_bt, lambda_cls: weights of the two losses; `lambda_cls = 0` is the paper's "w/o CLS".
        soft_share, soft_width: of `targets.soft_targets`; share 0 learns from verdicts alone.
        kernel_from: pairs from which what a kernel says of similar training pairs (`offline.kernel`) is added to the
            correctness logits, where that routes well; with 64 to 256 it is as likely to lose; 0: never.
        blend: share of an arm's Bradley-Terry score over the arms' mean that is added to its correctness logit before
            the calibration; ranking is what the one head learns and level what the other does.
        balanced: every couple (RM j right where l is wrong) counts alike, however often it occurs.
        dropout: on the network's input and hidden layer.
        folds: of the cross-fitting.
        max_epochs: the epoch (a pass over the pairs outside one fold) is chosen from 1 ... max_epochs.
        seed: of every random choice; equal seeds give equal checkpoints on one machine.
        hyperparameters: stored for the online stage.
        level: prior deviation of the calibration's level (`calibrate.fit_calibration`); 0 for none.
    """

    directions: int = 8
    context: int = 8
    members: int = 6
    kind_members: int = 3
    kinds: int = 2
    kind_components: int = 8
    member_dim: int = 16
    hidden: int = 32
    components: int = 4
    lambda_bt: float = 1.0
    lambda_cls: float = 1.0
    soft_share: float = 0.5
    soft_width: float = 0.5
    kernel_from: int = 512
    blend: float = 0.75
    balanced: bool = False
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.3
    batch_size: int = 64
    max_epochs: int = 25
    folds: int = 4
    seed: int = 0
    hyperparameters: Hyperparameters = CALIBRATED_HYPERPARAMETERS
    level: float = LEVEL


class _Network(nn.Module):
    """The trainable part of M members side by side: the fuse's two layers and both heads, M leading in every tensor."""

    reads: Tensor

    def __init__(self, reads: Tensor, base_rates: Tensor, config: TrainConfig, generator: torch.Generator) -> None:
        """`reads` (M, p, 1) is 1 where a member reads an input column, and 0 elsewhere."""
        super().__init__()
        M, K = config.members, len(base_rates)
        self.register_buffer("reads", reads)

        def gaussian(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(M, rows, columns, generator=generator) / rows**0.5)

        first = torch.randn(M, reads.shape[1], config.hidden, generator=generator) * reads
        self.w1 = nn.Parameter(first / reads.sum(1, keepdim=True) ** 0.5)
        self.b1 = nn.Parameter(torch.zeros(M, 1, config.hidden))
        self.w2, self.b2 = (
            gaussian(config.hidden, config.member_dim),
            nn.Parameter(torch.zeros(M, 1, config.member_dim)),
        )
        self.arms = gaussian(config.member_dim, K)
        # Zero weights and the base rate as bias: with lambda_cls = 0 the head stays an honest constant.
        self.cls_weight = nn.Parameter(torch.zeros(M, config.member_dim, K))
        self.cls_bias = nn.Parameter(torch.logit(base_rates).expand(M, 1, K).clone())

    def forward(self, u: Tensor, dropped: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """u (M, B, p) to Bradley-Terry scores (M, B, K) and correctness logits (M, B, K)."""
        h = torch.tanh(_drop(u, dropped, generator) @ (self.w1 * self.reads) + self.b1)
        x = normalize(_drop(h, dropped, generator) @ self.w2 + self.b2, dim=2)
        return SCORE_SCALE * x @ normalize(self.arms, dim=1), SCORE_SCALE * x @ self.cls_weight + self.cls_bias


def _drop(values: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """Inverted dropout from an explicit generator; torch's own layer draws from the process-wide one."""
    if generator is None or share == 0.0:
        return values
    kept = torch.rand(values.shape, generator=generator) >= share
    return values * kept / (1 - share)


class MembersFit:
    """One fit in progress: networks, optimiser, averaged weights, generator. Each member meets the pairs in an order of
    its own.
    """

    def __init__(
        self,
        z: NDArray[np.float32],
        targets: NDArray[np.float64],
        blocks: Sequence[Block],
        config: TrainConfig,
        seed: int,
        columns: NDArray[np.float64] | None = None,
        kinds: NDArray[np.floating] | None = None,
    ) -> None:
        """Start a fit.

        Args:
            z: (N, 2 * dim) of `two_branch`.
            targets: (N, K) of the pool.
            blocks: of the backbone.
            config: of the fit.
            seed: of weights, orders and dropout.
            columns: (N, C) targets of every RM that the kinds are learned from; those of the pool if None.
            kinds: (2 * dim, r) directions that were learned from other pairs, in the place of those.
        """
        self._config, self._seed = config, seed
        self._shift, directions = input_projection(z, blocks, config.components)
        known = self._kinds(z, blocks, targets if columns is None else columns) if kinds is None else scaled(kinds, z)
        self._directions = directions.shape[1]
        self._projection = np.hstack([directions, known[:, : known.shape[1] if config.kind_members else 0]])
        self._generator = torch.Generator().manual_seed(seed)
        self._u = self._inputs(z)
        self._y = torch.as_tensor(targets, dtype=torch.float32)
        self._couples = balanced_couples(self._y) if config.balanced else None
        asked = torch.isfinite(self._y).sum(0)
        base_rates = (torch.nan_to_num(self._y).sum(0) + 0.5) / (asked + 1)
        self._network = _Network(self._reads(), base_rates, config, self._generator)
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

    def _kinds(
        self, z: NDArray[np.float32], blocks: Sequence[Block], columns: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """Projection (2 * dim, r) on the kinds of texts."""
        if not self._config.kind_members:
            return np.zeros((z.shape[1], 0), dtype=np.float32)
        return kinds_of(z, blocks, columns, self._config)

    def _reads(self) -> Tensor:
        """(M, p, 1): which inputs each member reads; the directions, and the kinds for the last members."""
        reads = torch.zeros(self._config.members, self._projection.shape[1], 1)
        reads[:, : self._directions] = 1.0
        if self._projection.shape[1] > self._directions and self._config.kind_members:
            last = slice(self._config.members - self._config.kind_members, None)
            reads[last] = 1.0 - reads[last]
        return reads

    def _inputs(self, z: NDArray[np.float32]) -> Tensor:
        return torch.as_tensor(np.clip((z - self._shift) @ self._projection, -LIMIT, LIMIT))

    def _shuffled_batches(self) -> Iterator[Tensor]:
        """Row indices (M, batch) of one batch after another, pass after pass in new orders each, without end."""
        while True:
            orders = [torch.randperm(len(self._u), generator=self._generator) for _ in range(self._config.members)]
            yield from torch.split(torch.stack(orders), self._config.batch_size, dim=1)

    def advance(self, steps: int) -> None:
        """Take `steps` optimiser steps, one batch each."""
        for rows in itertools.islice(self._batches, steps):
            scores, logits = self._network(self._u[rows], self._config.dropout, self._generator)
            self._optimiser.zero_grad()
            self._loss(scores, logits, self._y[rows]).backward()  # type: ignore[no-untyped-call]
            self._optimiser.step()
            self._steps += 1
            # A short memory at first, so that the average forgets the random start within an epoch.
            decay = min(_EMA, self._steps / (self._steps + 10))
            with torch.no_grad():
                for name, value in self._network.named_parameters():
                    self._average[name].lerp_(value, 1 - decay)

    def _loss(self, scores: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        """The members' losses summed: no member's gradient depends on how many others there are."""
        c = self._config
        flat, K = y.flatten(0, 1), y.shape[2]
        loss = c.lambda_bt * bradley_terry(scores.reshape(-1, K), flat, self._couples)
        return c.members * (loss + c.lambda_cls * correctness_bce(logits.reshape(-1, K), flat))

    def predict(self, z: NDArray[np.float32]) -> NDArray[np.float64]:
        """(2, N, K): Bradley-Terry scores and correctness logits of the averaged weights, means over the members."""
        u = self._inputs(z).expand(self._config.members, -1, -1)
        with torch.inference_mode():
            scores, logits = torch.func.functional_call(self._network, self._average, (u, 0.0, None))
        return np.stack([scores.mean(0).double().numpy(), logits.mean(0).double().numpy()])

    def kernel(self, z: NDArray[np.float32], targets: NDArray[np.float64]) -> tuple[Kernel, NDArray[np.float64]]:
        """`fit_kernel` of the pairs of this fit, on the members' inputs; with the seed of the fit."""
        kinds = self._projection.shape[1] - self._directions
        return fit_kernel(self.inputs(z), targets, kinds, np.random.default_rng(self._seed))

    def inputs(self, z: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the members read of encodings: (N, 2 * dim) to (N, p)."""
        return np.asarray(self._inputs(z).numpy(), dtype=np.float32)

    def export(self, z: NDArray[np.float32]) -> tuple[Fuse, dict[str, NDArray[np.float32]]]:
        """The averaged weights as a fuse and the heads of a checkpoint.

        The members side by side are M·m columns of which few directions matter. The rotation keeps those that a head
        reads, so that no score changes by it, and the `directions` leading ones of what is left (uncentred, so that the
        constant part stays), so that features keep their norm.
        """
        c, average = self._config, {name: value.numpy().copy() for name, value in self._average.items()}
        average["w1"] *= self._network.reads.numpy()
        fuse = Fuse(
            shift=self._shift,
            projection=self._projection,
            w1=np.ascontiguousarray(average["w1"].transpose(1, 0, 2).reshape(-1, c.members * c.hidden)),
            b1=average["b1"].reshape(-1),
            w2=average["w2"].reshape(-1, c.member_dim),
            b2=average["b2"].reshape(-1),
            limit=LIMIT,
        )
        # A mean of members is a sum over the columns of members_of, which are over √M already.
        share, K = c.members**-0.5, average["arms"].shape[2]
        arms = share * (average["arms"] / np.linalg.norm(average["arms"], axis=1, keepdims=True)).reshape(-1, K)
        weights = share * average["cls_weight"].reshape(-1, K)
        u = fuse.standardise(z)
        rotation = spanning(fuse.members_of(u).astype(np.float64), np.hstack([arms, weights]), c.directions)
        heads = {
            "bt_embeddings": np.ascontiguousarray((rotation.T @ arms).T, dtype=np.float32),
            "cls_weight": np.ascontiguousarray(SCORE_SCALE * (rotation.T @ weights).T, dtype=np.float32),
            "cls_bias": average["cls_bias"].mean(axis=(0, 1)),
        }
        context = whitening(u[:, : self._directions], c.context)
        context = np.pad(context, ((0, u.shape[1] - self._directions), (0, 0)))
        return replace(fuse, rotation=rotation.astype(np.float32), context=context), heads


def kinds_of(
    z: NDArray[np.float32], blocks: Sequence[Block], columns: NDArray[np.float64], config: TrainConfig
) -> NDArray[np.float32]:
    """Directions (2 * dim, r) of encodings z (N, 2 * dim), from every RM's targets (N, C): `kinds.fit_kinds`."""
    shift, projection = input_projection(z, blocks, config.kind_components)
    u = np.clip((z - shift) @ projection, -LIMIT, LIMIT)
    return (projection @ fit_kinds(u, columns, config.kinds)).astype(np.float32)


def scaled(kinds: NDArray[np.floating], z: NDArray[np.float32]) -> NDArray[np.float32]:
    """The directions (2 * dim, r) along which these encodings (N, 2 * dim) vary, scaled to standard deviation 1.

    Raises:
        ShapeMismatchError: the directions are of another encoder.
    """
    if len(kinds) != z.shape[1]:
        raise ShapeMismatchError(f"kinds: {len(kinds)} rows for encodings of {z.shape[1]}; give those of this encoder")
    deviations = (z @ kinds).std(axis=0)
    kept = deviations > _NO_VARIANCE
    return np.asarray(kinds[:, kept] / deviations[kept], dtype=np.float32)


def spanning(rows: NDArray[np.float64], wanted: NDArray[np.floating], more: int) -> NDArray[np.float64]:
    """Orthonormal columns that span `wanted` and the leading `more` directions of what of `rows` is left beside it.

    Args:
        rows: (N, D).
        wanted: (D, h); dependent columns count once.
        more: >= 0.

    Returns:
        (D, r), r <= min(h + more, D).
    """
    left, singular, _ = np.linalg.svd(np.asarray(wanted, dtype=np.float64), full_matrices=False)
    basis = left[:, singular > 1e-6 * singular.max(initial=0.0)]
    rest = rows - (rows @ basis) @ basis.T
    _, deviations, directions = np.linalg.svd(rest, full_matrices=False)
    count = min(more, rows.shape[1] - basis.shape[1], int((deviations > 1e-6 * np.linalg.norm(rows)).sum()))
    return np.hstack([basis, directions[:count].T])


def whitening(u: NDArray[np.float32], directions: int) -> NDArray[np.float32]:
    """Leading directions of u (N, p), each scaled to standard deviation 1: (p, q) float32, q <= `directions`."""
    _, singular, axes = np.linalg.svd((u - u.mean(axis=0)).astype(np.float64), full_matrices=False)
    deviations = singular / np.sqrt(len(u))
    kept = [i for i in range(min(directions, len(deviations))) if deviations[i] > _NO_VARIANCE]
    return np.ascontiguousarray((axes[kept] / deviations[kept, None]).T, dtype=np.float32)


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
