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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from router_core.checkpoint import Checkpoint
from router_core.combine import Multipliers, Practice, Votes
from router_core.dataset import credit_matrix, grouped_folds, pairs_digest, pool_names
from router_core.encoder.base import Backbone
from router_core.encoder.fuse import Fuse, two_branch
from router_core.errors import DatasetError
from router_core.novelty import Landmarks, fit_landmarks
from router_core.offline.calibrate import (
    cross_calibrated,
    expected_calibration_error,
    fit_calibration,
    handicap,
    handicapped,
    negative_log_likelihood,
    surely_gains,
    surely_worse,
)
from router_core.offline.kernel import GAIN
from router_core.offline.losses import bradley_terry, correctness_bce
from router_core.offline.members import SCORE_SCALE, MembersFit, TrainConfig
from router_core.offline.targets import score_margins, soft_targets
from router_core.offline.votes import Judged, fit_votes, recorded_answers
from router_core.prior import PriorForm
from router_core.records import LabelledPair
from router_core.replay.table import score_scale
from router_core.torch_threads import torch_threads

__all__ = ["HeldOut", "TrainConfig", "fit", "pair_features", "routed_accuracy", "train"]

_TOLERANCE = 0.02
"""Share by which a held-out loss may exceed the lowest one and still count as equal."""


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """What models that had not seen a pair's group predicted for it, and what was true; N pairs, K arms.

    The calibration of a pair's probabilities has not seen its group either.

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
    kinds: NDArray[np.floating] | None = None,
    answers: NDArray[np.float64] | None = None,
) -> Checkpoint:
    """The checkpoint of `fit`."""
    return fit(pairs, pool, backbone, config, features, kinds, answers)[0]


def fit(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    backbone: Backbone,
    config: TrainConfig | None = None,
    features: NDArray[np.float32] | None = None,
    kinds: NDArray[np.floating] | None = None,
    answers: NDArray[np.float64] | None = None,
) -> tuple[Checkpoint, HeldOut]:
    """Fit the offline stage on labelled pairs.

    Args:
        pairs: at least `config.folds` groups of them.
        pool: names of the K arms, in the order of the checkpoint.
        backbone: frozen encoder of (prompt, response).
        config: defaults if None.
        features: `pair_features(pairs, backbone)` if at hand already.
        kinds: (2 * dim, r) kinds of texts learned elsewhere (`members.kinds_of`); None: those of these pairs.
        answers: (N, n) probability that each response is the best, where labels are estimates
            (`consensus`); an RM's correctness is then an expectation. None: the labels are right.

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
    correctness = _expected(pairs, answers, lambda labelled: credit_matrix(labelled, pool))
    z = pair_features(pairs, backbone) if features is None else features
    targets = _expected(pairs, answers, lambda labelled: _targets(labelled, pool, config))
    columns = _expected(pairs, answers, lambda labelled: _targets(labelled, pool_names(pairs), config))
    with torch_threads(1):
        return _fit_checkpoint(pairs, pool, backbone, config, correctness, targets, columns, z, kinds)


def _expected(
    pairs: Sequence[LabelledPair],
    answers: NDArray[np.float64] | None,
    value: Callable[[Sequence[LabelledPair]], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """Return Σ_i P(i is best) value(pairs, labelled i), (N, K)."""
    if answers is None:
        return value(pairs)
    last = [len(pair.instance.responses) - 1 for pair in pairs]
    total = np.zeros(())
    for i in range(answers.shape[1]):
        as_if = value([replace(pair, label=min(i, end)) for pair, end in zip(pairs, last, strict=True)])
        total = total + answers[:, i, None] * as_if
    return total


def _targets(pairs: Sequence[LabelledPair], names: Sequence[str], config: TrainConfig) -> NDArray[np.float64]:
    correctness = credit_matrix(pairs, names)
    return soft_targets(correctness, score_margins(pairs, names), config.soft_share, config.soft_width)


def _fit_checkpoint(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    backbone: Backbone,
    config: TrainConfig,
    correctness: NDArray[np.float64],
    targets: NDArray[np.float64],
    columns: NDArray[np.float64],
    z: NDArray[np.float32],
    kinds: NDArray[np.floating] | None,
) -> tuple[Checkpoint, HeldOut]:
    """Cross-fit to choose the epochs and to calibrate, then fit on everything."""
    rng = np.random.default_rng(config.seed)
    predicted, similar = np.zeros((config.max_epochs, 2, *correctness.shape)), np.zeros(correctness.shape)
    kernel = config.lambda_cls > 0 and 0 < config.kernel_from <= len(pairs)
    folds = grouped_folds(pairs, config.folds, rng)
    steps = math.ceil(min(len(inside) for inside, _ in folds) / config.batch_size)
    for fold, (inside, outside) in enumerate(folds):
        model = MembersFit(
            z[inside], targets[inside], backbone.blocks, config, config.seed * 1000 + fold + 1, columns[inside], kinds
        )
        for epoch in range(config.max_epochs):
            model.advance(steps)
            predicted[epoch][:, outside] = model.predict(z[outside])
        if kernel:
            near, means = model.kernel(z[inside], targets[inside])
            similar[outside] = means + near.apply(model.inputs(z[outside]))
    epochs = _best_epoch(predicted, correctness, config)
    bt_scores, logits = predicted[epochs - 1]
    blend = config.blend if config.lambda_bt > 0 and config.lambda_cls > 0 else 0.0
    logits = _blended(bt_scores, logits, blend)
    final = MembersFit(z, targets, backbone.blocks, config, config.seed * 1000, columns, kinds)
    final.advance(epochs * steps)
    fuse, heads = final.export(z)
    embeddings = heads["bt_embeddings"]
    heads["cls_weight"] = heads["cls_weight"] + np.float32(blend * SCORE_SCALE) * (embeddings - embeddings.mean(axis=0))
    # The columns that the level reads are not trained on verdicts, so held-out pairs may have them of the final fuse.
    c = fuse.apply(z)[:, fuse.features :]
    groups = [pair.group for pair in pairs]
    probabilities = cross_calibrated(logits, correctness, c, folds, config.level)
    if kernel:
        with_it = cross_calibrated(logits + GAIN * similar, correctness, c, folds, config.level)
        worse = surely_worse(with_it, probabilities, correctness, groups)
        if not worse and surely_gains(with_it, correctness, groups):
            logits, probabilities = logits + GAIN * similar, with_it
            near, means = final.kernel(z, targets)
            fuse = replace(fuse, kernel=near)
            own = np.float32(GAIN) * np.eye(len(pool), dtype=np.float32)
            heads["cls_weight"] = np.hstack([heads["cls_weight"], own])
            heads["cls_bias"] = (heads["cls_bias"] + GAIN * means).astype(np.float32)
    contexts = fuse.apply(z)
    calibration = fit_calibration(logits, correctness, c, config.level)
    given_up = handicap(probabilities, correctness, groups)
    held_out = HeldOut(handicapped(probabilities, given_up), bt_scores, correctness)
    scale = score_scale(pairs, pool)
    landmarks = context_landmarks(pairs, contexts, fuse, np.random.default_rng(config.seed))
    learned = learned_votes(pairs, pool, held_out.probabilities, config.seed)
    checkpoint = Checkpoint(
        pool=tuple(pool),
        encoder_spec=backbone.spec,
        fuse=fuse,
        bt_embeddings=embeddings,
        cls_weight=heads["cls_weight"],
        cls_bias=heads["cls_bias"],
        calibration_scale=calibration.scale.astype(np.float32),
        calibration_shift=(calibration.shift + given_up).astype(np.float32),
        calibration_level=None if calibration.level is None else calibration.level.astype(np.float32),
        prior_form=PriorForm.CALIBRATED if config.lambda_cls > 0 else PriorForm.PAPER,
        hyperparameters=config.hyperparameters,
        metrics={
            "pairs": len(pairs),
            "epochs": epochs,
            "routing_accuracy_bt": routed_accuracy(bt_scores, correctness),
            "routing_accuracy_cls": routed_accuracy(held_out.probabilities, correctness),
            "negative_log_likelihood": negative_log_likelihood(held_out.probabilities, correctness),
            "expected_calibration_error": expected_calibration_error(held_out.probabilities, correctness),
        },
        data_digest=pairs_digest(pairs),
        score_shift=scale.shift.astype(np.float32),
        score_scale=scale.scale.astype(np.float32),
        landmarks=landmarks,
        votes=None if learned is None else learned[0],
        multipliers=None if learned is None else learned[1],
        practice=None if learned is None else learned[2],
    )
    return checkpoint, held_out


def learned_votes(
    pairs: Sequence[LabelledPair], pool: Sequence[str], offsets: NDArray[np.float64], seed: int
) -> tuple[Votes, Multipliers, Practice] | None:
    """`fit_votes` of these pairs as a checkpoint holds it; offsets (N, K) of fits that had not seen a pair's group."""
    labels = np.array([pair.label for pair in pairs], dtype=np.int64)
    judged = Judged(offsets, recorded_answers(pairs, pool), labels, [pair.group for pair in pairs])
    fitted = fit_votes(judged, np.random.default_rng(seed))
    if fitted is None:
        return None
    votes, multipliers, practice = fitted
    return votes.rounded(), multipliers.rounded(), practice.rounded()


def context_landmarks(
    pairs: Sequence[LabelledPair], x: NDArray[np.float32], fuse: Fuse, rng: np.random.Generator
) -> Landmarks | None:
    """Where the pairs lie, from their contexts x (N, d); None without a low-rank context, or with too few pairs."""
    if fuse.context is None:
        return None
    return fit_landmarks(x[:, fuse.features :], [pair.group for pair in pairs], rng)


def _blended(bt_scores: NDArray[np.float64], logits: NDArray[np.float64], blend: float) -> NDArray[np.float64]:
    blended: NDArray[np.float64] = logits + blend * (bt_scores - bt_scores.mean(axis=1, keepdims=True))
    return blended


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
