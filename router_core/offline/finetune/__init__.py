"""Fine-tune a backbone together with the heads, as the paper does, and make an ordinary checkpoint of it.

Knows pairs, backbones, checkpoints and the folder in which a run keeps its state. Called by the command line. The
result holds the trained transformer in its folder `backbone`, so the running service needs nothing else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from router_core.checkpoint import Checkpoint, file_digests
from router_core.dataset import credit_matrix, grouped_folds, grouped_split, pairs_digest
from router_core.encoder.base import Backbone
from router_core.encoder.cache import CachedBackbone
from router_core.encoder.torch import TorchBackbone
from router_core.errors import CheckpointError, DatasetError, EncoderError
from router_core.offline.calibrate import (
    cross_calibrated,
    expected_calibration_error,
    fit_calibration,
    negative_log_likelihood,
)
from router_core.offline.finetune.config import FinetuneConfig, Mode
from router_core.offline.finetune.loop import Look, Loop, Progress, seeded
from router_core.offline.finetune.model import RoutingModel, TokenisedPair, adapt, merged
from router_core.offline.members import whitening
from router_core.offline.train import HeldOut, context_landmarks, learned_votes, pair_features, routed_accuracy
from router_core.prior import PriorForm
from router_core.records import LabelledPair
from router_core.replay.table import score_scale
from router_core.torch_threads import torch_threads

__all__ = ["FineTuned", "FinetuneConfig", "Look", "Mode", "fine_tune", "resumable"]

FOLDER = "backbone"
"""Folder of the trained transformer inside the checkpoint."""
CALIBRATION_FOLDS = 4
"""Folds of the held-out pairs, so that each is reported by a calibration that has not seen its group."""
_RUN_FILE = "run.json"
_SEED_OF_WEIGHTS, _SEED_OF_ADAPTERS, _SEED_OF_SPLIT = 4, 5, 6


@dataclass(frozen=True, slots=True, eq=False)
class FineTuned:
    """A fine-tuned checkpoint and what it said of the pairs that were held out.

    Fields:
        checkpoint: not yet saved; its encoder's files lie in the run's folder until it is.
        validation: indices of the pairs that were held out, ascending.
        held_out: what the saved weights, in single precision, predicted for these.
        looks: the course of the held-out loss.
    """

    checkpoint: Checkpoint
    validation: NDArray[np.int64]
    held_out: HeldOut
    looks: tuple[Look, ...]


def fine_tune(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    backbone: Backbone,
    config: FinetuneConfig,
    work: Path,
    resume: bool = False,
    progress: Progress | None = None,
) -> FineTuned:
    """Train a transformer and both heads on labelled pairs; keep the weights with the lowest held-out loss.

    Calibration and metrics come from the held-out groups. Those also chose the stopping point, so they flatter by
    what a handful of looks can; for an unbiased figure evaluate on other pairs.

    Args:
        pairs: at least two groups of them.
        pool: names of the K arms, in the order of the checkpoint.
        backbone: a transformer in single precision. It is consumed: its weights are what is trained.
        config: settings.
        work: folder for the state of the run and the trained transformer; the caller removes it when the checkpoint
            is saved. Without `resume` an older state there is discarded.
        resume: go on from the state in `work`.
        progress: called after every step.

    Raises:
        EncoderError: the backbone is no transformer, or not in single precision.
        DatasetError: no pairs, or fewer than two groups.
        CheckpointError: there is no state to resume, or it belongs to other data or settings.
        NotFiniteError: the loss is NaN or infinite.
    """
    inner = _transformer(backbone)
    if not pairs:
        raise DatasetError("pairs: there are none; training needs labelled pairs")
    correctness = credit_matrix(pairs, pool)
    facts = {
        "data": pairs_digest(pairs),
        "pool": list(pool),
        "encoder": inner.spec,
        "weights": inner.identity,
        "config": config.fit_settings(),
    }
    resumed = _open_folder(work, facts, resume)
    rng = np.random.default_rng([config.seed, _SEED_OF_SPLIT])
    inside, outside = grouped_split(pairs, config.validation_fraction, rng)
    with torch_threads(config.threads):
        trained, model, looks = _train(pairs, correctness, inside, outside, inner, config, work, resumed, progress)
        return _checkpoint(pairs, pool, correctness, outside, trained, model, config, work, looks, len(inside))


def resumable(work: Path) -> bool:
    """Does the folder hold the beginnings of a run?"""
    return (work / _RUN_FILE).is_file()


def _transformer(backbone: Backbone) -> TorchBackbone:
    inner = backbone.wrapped if isinstance(backbone, CachedBackbone) else backbone
    if not isinstance(inner, TorchBackbone):
        raise EncoderError(f"encoder {backbone.spec!r} cannot be fine-tuned; choose minilm, smollm2-135m or torch:DIR")
    if next(inner.model.parameters()).dtype != torch.float32:
        raise EncoderError(
            f"encoder {backbone.spec!r}: weights to be trained must be in single precision; leave the '@' out and give "
            "the precision of the passes instead"
        )
    return inner


def _open_folder(work: Path, facts: dict[str, Any], resume: bool) -> bool:
    """Make the folder for a new run, or check that it belongs to this one; returns whether a run goes on."""
    run = work / _RUN_FILE
    if resume:
        if not run.is_file():
            raise CheckpointError(f"{work}: holds no run to resume; start it without --resume")
        before = json.loads(run.read_text("utf-8"))
        changed = [name for name in facts if before.get(name) != facts[name] and name != "config"]
        old, new = before.get("config", {}), facts["config"]
        changed += [f"{name} ({old.get(name)!r}, now {new[name]!r})" for name in new if old.get(name) != new[name]]
        if changed:
            raise CheckpointError(f"{work}: was begun with other {', '.join(changed)}; give the same, or start anew")
        return True
    if work.exists():
        if not resumable(work) and any(work.iterdir()):
            raise CheckpointError(f"{work}: exists and is no fine-tuning run; move it away")
        shutil.rmtree(work)
    work.mkdir(parents=True)
    run.write_text(json.dumps(facts, indent=2), "utf-8")
    return False


def _train(
    pairs: Sequence[LabelledPair],
    correctness: NDArray[np.float64],
    inside: NDArray[np.int64],
    outside: NDArray[np.int64],
    backbone: TorchBackbone,
    config: FinetuneConfig,
    work: Path,
    resumed: bool,
    progress: Progress | None,
) -> tuple[TorchBackbone, RoutingModel, list[Look]]:
    with seeded(config.seed, _SEED_OF_ADAPTERS):
        adapted = adapt(backbone, config)
    y = torch.as_tensor(correctness, dtype=torch.float32)
    seen = y[inside]
    base_rates = (torch.nan_to_num(seen).sum(0) + 0.5) / (torch.isfinite(seen).sum(0) + 1)
    seed = int(np.random.SeedSequence([config.seed, _SEED_OF_WEIGHTS]).generate_state(1)[0])
    model = RoutingModel(adapted, base_rates, config, torch.Generator().manual_seed(seed))
    tokens = [
        TokenisedPair(tuple(tuple(adapted.token_ids(pair.instance.prompt, text)) for text in pair.instance.responses))
        for pair in pairs
    ]
    loop = Loop(
        model,
        adapted.device,
        ([tokens[i] for i in inside], y[inside]),
        ([tokens[i] for i in outside], y[outside]),
        config,
        work,
    )
    if not (resumed and loop.resume()):
        loop.start()
    looks = loop.train(progress)
    return merged(adapted, f"checkpoint:{FOLDER}"), model, looks


def _checkpoint(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    correctness: NDArray[np.float64],
    outside: NDArray[np.int64],
    backbone: TorchBackbone,
    model: RoutingModel,
    config: FinetuneConfig,
    work: Path,
    looks: Sequence[Look],
    training_pairs: int,
) -> FineTuned:
    """Save the transformer, predict the held-out pairs as the service will, calibrate, and describe the result."""
    shutil.rmtree(work / FOLDER, ignore_errors=True)
    backbone.save(work / FOLDER)
    fuse, heads, y = model.fuse(), model.heads(), correctness[outside]
    held_out = [pairs[i] for i in outside]
    z = pair_features(held_out, backbone)
    # From the held-out pairs: those that the transformer was fitted to lie apart more neatly than any to come.
    fuse = replace(fuse, context=whitening(fuse.standardise(z), config.context))
    contexts = fuse.apply(z)
    x = contexts[:, : fuse.features]
    logits = x @ heads["cls_weight"].T + heads["cls_bias"]
    bt_scores = np.asarray(x @ heads["bt_embeddings"].T, dtype=np.float64)
    c = contexts[:, fuse.features :]
    calibration = fit_calibration(logits, y, c)
    n_folds = min(CALIBRATION_FOLDS, len({pair.group or pair.id for pair in held_out}))
    if n_folds < 2:
        probabilities = calibration.probabilities(logits, c)
    else:
        folds = grouped_folds(held_out, n_folds, np.random.default_rng(config.seed))
        probabilities = cross_calibrated(logits, y, c, folds)
    scores = score_scale(pairs, pool)
    best = min(looks, key=lambda look: look.held_out_loss)
    learned = learned_votes(held_out, pool, probabilities, config.seed)
    checkpoint = Checkpoint(
        pool=tuple(pool),
        encoder_spec=backbone.spec,
        fuse=fuse,
        bt_embeddings=heads["bt_embeddings"],
        cls_weight=heads["cls_weight"],
        cls_bias=heads["cls_bias"],
        calibration_scale=calibration.scale.astype(np.float32),
        calibration_shift=calibration.shift.astype(np.float32),
        calibration_level=None if calibration.level is None else calibration.level.astype(np.float32),
        prior_form=PriorForm.CALIBRATED if config.lambda_cls > 0 else PriorForm.PAPER,
        hyperparameters=config.hyperparameters,
        metrics={
            "pairs": len(pairs),
            "training_pairs": training_pairs,
            "held_out_pairs": len(outside),
            "steps": best.step,
            "held_out_loss": best.held_out_loss,
            "routing_accuracy_bt": routed_accuracy(bt_scores, y),
            "routing_accuracy_cls": routed_accuracy(probabilities, y),
            "negative_log_likelihood": negative_log_likelihood(probabilities, y),
            "expected_calibration_error": expected_calibration_error(probabilities, y),
        },
        data_digest=pairs_digest(pairs),
        score_shift=scores.shift.astype(np.float32),
        score_scale=scores.scale.astype(np.float32),
        encoder_files=file_digests(work, FOLDER),
        votes=None if learned is None else learned[0],
        multipliers=None if learned is None else learned[1],
        directory=work,
        # From the held-out pairs, as the whitening and for its reason.
        landmarks=context_landmarks(held_out, contexts, fuse, np.random.default_rng(0)),
    )
    return FineTuned(checkpoint, outside, HeldOut(probabilities, bt_scores, y), tuple(looks))
