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
from dataclasses import dataclass, replace

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
from router_core.offline.losses import balanced_couples, bradley_terry, correctness_bce
from router_core.offline.targets import score_margins, soft_targets
from router_core.offline.tune import MAX_STREAM, Stream, fit_hyperparameters, residual_variance
from router_core.prior import CALIBRATED_HYPERPARAMETERS, Hyperparameters, PriorForm
from router_core.records import LabelledPair
from router_core.replay.table import score_scale, tabulate
from router_core.torch_threads import torch_threads

_EMA = 0.98
"""Decay per step of the averaged weights that are evaluated and kept; stands in for a learning-rate schedule."""
_SCORE_SCALE = 8.0
"""Scores are scale · xᵀe with both of unit norm: without it σ(s_j − s_l) could not leave (0.12, 0.88)."""
_LIMIT = 5.0
"""`Fuse.limit`."""
_SMALLEST_DOMAIN = 40
"""Pairs that a stream of `offline.tune` needs; fewer say nothing."""
_TOLERANCE = 0.02
"""Share by which a held-out loss may exceed the lowest one and still count as equal."""
_NO_VARIANCE = 1e-6
"""A feature whose standard deviation is below this is constant for the encoder and is dropped."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of the offline fit; what was compared by grouped cross-validation is in docs/experiments.md.

    Fields:
        d: directions kept of the members' outputs beside those that the heads read.
        context: directions of the low-rank context that the online stage learns over; small, because it explores them.
        members: independent fits side by side; their mean logits route.
        member_dim: length of one member's unit vector.
        hidden: width of a member's hidden layer.
        components: leading directions kept of each dense block of the backbone, per branch.
        lambda_bt, lambda_cls: weights of the two losses; `lambda_cls = 0` is the paper's "w/o CLS".
        soft_share, soft_width: of `targets.soft_targets`; share 0 learns from verdicts alone.
        blend: share of an arm's Bradley-Terry score over the arms' mean that is added to its correctness logit before
            the calibration; ranking is what the one head learns and level what the other does.
        balanced: every couple (RM j right where l is wrong) counts alike, however often it occurs.
        dropout: on the network's input and hidden layer.
        folds: of the cross-fitting.
        max_epochs: the epoch (a pass over the pairs outside one fold) is chosen from 1 ... max_epochs.
        seed: of every random choice; equal seeds give equal checkpoints on one machine.
        hyperparameters: stored for the online stage.
        tune: fit these to the held-out predictions (`offline.tune`), which takes longer than the rest.
    """

    d: int = 8
    context: int = 8
    members: int = 6
    member_dim: int = 16
    hidden: int = 32
    components: int = 4
    lambda_bt: float = 1.0
    lambda_cls: float = 1.0
    soft_share: float = 0.5
    soft_width: float = 0.5
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
    tune: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """What models that had not seen a pair's group predicted for it, and what was true; N pairs, K arms.

    Fields: probabilities (N, K) calibrated, bt_scores (N, K), correctness (N, K) with NaN where an RM was not asked.
    """

    probabilities: NDArray[np.float64]
    bt_scores: NDArray[np.float64]
    correctness: NDArray[np.float64]


def train(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    backbone: Backbone,
    config: TrainConfig | None = None,
    features: NDArray[np.float32] | None = None,
) -> Checkpoint:
    """The checkpoint of `fit`."""
    return fit(pairs, pool, backbone, config, features)[0]


def fit(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    backbone: Backbone,
    config: TrainConfig | None = None,
    features: NDArray[np.float32] | None = None,
) -> tuple[Checkpoint, HeldOut]:
    """Fit the offline stage on labelled pairs.

    Args:
        pairs: at least `config.folds` groups of them.
        pool: names of the K arms, in the order of the checkpoint.
        backbone: frozen encoder of (prompt, response).
        config: defaults if None.
        features: `pair_features(pairs, backbone)` if at hand already.

    Returns:
        The checkpoint, with held-out `metrics` from the cross-fitting: routing accuracy of both heads, negative
        log-likelihood, expected calibration error, chosen epochs, number of pairs; and the held-out predictions.

    Raises:
        DatasetError: too few groups, or an RM without a single verdict.
        EncoderError: the backbone failed.
    """
    config = config or TrainConfig()
    if not pairs:
        raise DatasetError("pairs: there are none; training needs labelled pairs")
    correctness = pool_matrix(pairs, pool)
    z = pair_features(pairs, backbone) if features is None else features
    targets = soft_targets(correctness, score_margins(pairs, pool), config.soft_share, config.soft_width)
    with torch_threads(1):
        return _fit_checkpoint(pairs, pool, backbone, config, correctness, targets, z)


def _fit_checkpoint(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    backbone: Backbone,
    config: TrainConfig,
    correctness: NDArray[np.float64],
    targets: NDArray[np.float64],
    z: NDArray[np.float32],
) -> tuple[Checkpoint, HeldOut]:
    """Cross-fit to choose the epochs and to calibrate, then fit on everything."""
    rng = np.random.default_rng(config.seed)
    predicted = np.zeros((config.max_epochs, 2, *correctness.shape))
    folds = grouped_folds(pairs, config.folds, rng)
    steps = math.ceil(min(len(inside) for inside, _ in folds) / config.batch_size)
    for fold, (inside, outside) in enumerate(folds):
        model = _Fit(z[inside], targets[inside], backbone.blocks, config, seed=config.seed * 1000 + fold + 1)
        for epoch in range(config.max_epochs):
            model.advance(steps)
            predicted[epoch][:, outside] = model.predict(z[outside])
    epochs = _best_epoch(predicted, correctness, config)
    bt_scores, logits = predicted[epochs - 1]
    blend = config.blend if config.lambda_bt > 0 and config.lambda_cls > 0 else 0.0
    logits = _blended(bt_scores, logits, blend)
    calibration = fit_calibration(logits, correctness)
    held_out = HeldOut(calibration.probabilities(logits), bt_scores, correctness)

    final = _Fit(z, targets, backbone.blocks, config, seed=config.seed * 1000)
    final.advance(epochs * steps)
    fuse, heads = final.export(z)
    embeddings = heads["bt_embeddings"]
    heads["cls_weight"] = heads["cls_weight"] + np.float32(blend * _SCORE_SCALE) * (
        embeddings - embeddings.mean(axis=0)
    )
    scores = score_scale(pairs, pool)
    hyperparameters = config.hyperparameters
    replayed: dict[str, float] = {}
    if config.tune and config.lambda_cls > 0:
        x, columns = fuse.apply(z), (fuse.features, fuse.dim - fuse.features)
        streams = [_stream("in distribution", pairs, pool, np.arange(len(pairs)), x, held_out.probabilities, columns)]
        for domain, rows in _domains(pairs, correctness, config):
            others = np.setdiff1d(np.arange(len(pairs)), rows)
            model = _Fit(z[others], targets[others], backbone.blocks, config, seed=config.seed * 1000 + 500)
            model.advance(epochs * steps)
            ranked, judged = model.predict(z[rows])
            offsets = calibration.probabilities(_blended(ranked, judged, blend))
            streams.append(_stream(f"unseen {domain}", pairs, pool, rows, x[rows], offsets, columns))
        sigma2 = residual_variance(held_out.probabilities, correctness)
        hyperparameters, replayed = fit_hyperparameters(sigma2, [stream for stream in streams if stream is not None])
    checkpoint = Checkpoint(
        pool=tuple(pool),
        encoder_spec=backbone.spec,
        fuse=fuse,
        bt_embeddings=embeddings,
        cls_weight=heads["cls_weight"],
        cls_bias=heads["cls_bias"],
        calibration_scale=calibration.scale.astype(np.float32),
        calibration_shift=calibration.shift.astype(np.float32),
        prior_form=PriorForm.CALIBRATED if config.lambda_cls > 0 else PriorForm.PAPER,
        hyperparameters=hyperparameters,
        metrics={
            "pairs": len(pairs),
            "epochs": epochs,
            "routing_accuracy_bt": routed_accuracy(bt_scores, correctness),
            "routing_accuracy_cls": routed_accuracy(held_out.probabilities, correctness),
            "negative_log_likelihood": negative_log_likelihood(held_out.probabilities, correctness),
            "expected_calibration_error": expected_calibration_error(held_out.probabilities, correctness),
            **{f"replayed_accuracy {name}": value for name, value in replayed.items()},
        },
        data_digest=pairs_digest(pairs),
        score_shift=scores.shift.astype(np.float32),
        score_scale=scores.scale.astype(np.float32),
    )
    return checkpoint, held_out


def _blended(bt_scores: NDArray[np.float64], logits: NDArray[np.float64], blend: float) -> NDArray[np.float64]:
    blended: NDArray[np.float64] = logits + blend * (bt_scores - bt_scores.mean(axis=1, keepdims=True))
    return blended


def _domains(
    pairs: Sequence[LabelledPair], correctness: NDArray[np.float64], config: TrainConfig
) -> list[tuple[str, NDArray[np.int64]]]:
    """Up to four domains, the largest first, that can be left out: enough pairs inside, and enough groups outside."""
    names = np.array([pair.domain for pair in pairs])
    groups = np.array([pair.group for pair in pairs])
    found = []
    for name in np.unique(names):
        rows = np.flatnonzero(names == name)
        outside = len(set(groups[names != name]))
        if name and len(rows) >= _SMALLEST_DOMAIN and outside >= _SMALLEST_DOMAIN:
            found.append((str(name), rows))
    return sorted(found, key=lambda item: -len(item[1]))[:4]


def _stream(
    name: str,
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    rows: NDArray[np.int64],
    x: NDArray[np.float32],
    offsets: NDArray[np.float64],
    columns: tuple[int, int],
) -> Stream | None:
    """The pairs that every RM has judged, at most `MAX_STREAM`; None where there are too few."""
    complete = [i for i, row in enumerate(rows) if all(arm in pairs[row].verdicts for arm in pool)]
    if len(complete) < _SMALLEST_DOMAIN:
        return None
    kept = np.sort(np.random.default_rng(0).permutation(complete)[:MAX_STREAM])
    return Stream(name, tabulate([pairs[rows[i]] for i in kept], pool), x[kept], offsets[kept], *columns)


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


def _best_epoch(predicted: NDArray[np.float64], correctness: NDArray[np.float64], config: TrainConfig) -> int:
    """The last epoch whose held-out loss is within `_TOLERANCE` of the lowest.

    The loss is flat for long, so that its lowest point is a matter of luck, and later members differ more, which is
    what makes their mean good.
    """
    y = torch.as_tensor(correctness)
    losses = np.array(
        [
            config.lambda_bt * float(bradley_terry(torch.as_tensor(scores), y))
            + config.lambda_cls * float(correctness_bce(torch.as_tensor(logits), y))
            for scores, logits in predicted
        ]
    )
    return int(np.flatnonzero(losses <= losses.min() * (1 + _TOLERANCE))[-1]) + 1


class _Network(nn.Module):
    """The trainable part of M members side by side: the fuse's two layers and both heads, M leading in every tensor."""

    def __init__(self, p: int, base_rates: Tensor, config: TrainConfig, generator: torch.Generator) -> None:
        super().__init__()
        M, K = config.members, len(base_rates)

        def gaussian(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(M, rows, columns, generator=generator) / rows**0.5)

        self.w1, self.b1 = gaussian(p, config.hidden), nn.Parameter(torch.zeros(M, 1, config.hidden))
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
        h = torch.tanh(_drop(u, dropped, generator) @ self.w1 + self.b1)
        x = normalize(_drop(h, dropped, generator) @ self.w2 + self.b2, dim=2)
        return _SCORE_SCALE * x @ normalize(self.arms, dim=1), _SCORE_SCALE * x @ self.cls_weight + self.cls_bias


def _drop(values: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """Inverted dropout from an explicit generator; torch's own layer draws from the process-wide one."""
    if generator is None or share == 0.0:
        return values
    kept = torch.rand(values.shape, generator=generator) >= share
    return values * kept / (1 - share)


class _Fit:
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
    ) -> None:
        self._config = config
        self._shift, self._projection = input_projection(z, blocks, config.components)
        self._generator = torch.Generator().manual_seed(seed)
        self._u = self._inputs(z)
        self._y = torch.as_tensor(targets, dtype=torch.float32)
        self._couples = balanced_couples(self._y) if config.balanced else None
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
        return torch.as_tensor(np.clip((z - self._shift) @ self._projection, -_LIMIT, _LIMIT))

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

    def export(self, z: NDArray[np.float32]) -> tuple[Fuse, dict[str, NDArray[np.float32]]]:
        """The averaged weights as a fuse and the heads of a checkpoint.

        The members side by side are M·m columns of which few directions matter. The rotation keeps those that a head
        reads, so that no score changes by it, and the `d` leading ones of what is left (uncentred, so that the constant
        part stays), so that features keep their norm.
        """
        c, average = self._config, {name: value.numpy().copy() for name, value in self._average.items()}
        fuse = Fuse(
            shift=self._shift,
            projection=self._projection,
            w1=np.ascontiguousarray(average["w1"].transpose(1, 0, 2).reshape(-1, c.members * c.hidden)),
            b1=average["b1"].reshape(-1),
            w2=average["w2"].reshape(-1, c.member_dim),
            b2=average["b2"].reshape(-1),
            limit=_LIMIT,
        )
        # A mean of members is a sum over the columns of members_of, which are over √M already.
        share, K = c.members**-0.5, average["arms"].shape[2]
        arms = share * (average["arms"] / np.linalg.norm(average["arms"], axis=1, keepdims=True)).reshape(-1, K)
        weights = share * average["cls_weight"].reshape(-1, K)
        u = fuse.standardise(z)
        rotation = spanning(fuse.members_of(u).astype(np.float64), np.hstack([arms, weights]), c.d)
        heads = {
            "bt_embeddings": np.ascontiguousarray((rotation.T @ arms).T, dtype=np.float32),
            "cls_weight": np.ascontiguousarray(_SCORE_SCALE * (rotation.T @ weights).T, dtype=np.float32),
            "cls_bias": average["cls_bias"].mean(axis=(0, 1)),
        }
        return replace(fuse, rotation=rotation.astype(np.float32), context=whitening(u, c.context)), heads


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
