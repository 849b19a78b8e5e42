"""The training loop: batches by length, accumulated gradients, looks at held-out pairs, states to resume from.

Knows one model, one optimiser and the folder of the run's state; nothing of checkpoints. Called by
`finetune.fine_tune`.

Every random choice is a function of (seed, step): the order of the pairs from (seed, epoch), dropout from (seed, step).
So a state holds no generator, and a run that was interrupted ends with the weights of one that was not, bit for bit
on one machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from router_core.encoder.torch import batches_by_length
from router_core.errors import NotFiniteError
from router_core.offline.finetune.config import FinetuneConfig
from router_core.offline.finetune.model import RoutingModel, TokenisedPair
from router_core.offline.losses import balanced_couples, bradley_terry, correctness_bce, informative_pairs

STATE_FILE = "state.pt"
BEST_FILE = "best.pt"
_SEED_OF_STEPS, _SEED_OF_ORDER, _SEED_OF_START = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Look:
    """One look at the held-out pairs, and where the training stood."""

    step: int
    steps: int
    training_loss: float
    held_out_loss: float


Progress = Callable[[int, int, float], None]
"""Called after each step with steps done, steps in all, and the step's loss."""


@dataclass(slots=True)
class History:
    """Where a run stands: what a state holds besides tensors."""

    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    looks: list[dict[str, float]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)

    @property
    def stale(self) -> int:
        """Looks since the best one."""
        return sum(look["step"] > self.best_step for look in self.looks)


@contextmanager
def seeded(*words: int) -> Iterator[None]:
    """torch's process-wide generators seeded from the words, and afterwards as they were before.

    Modules of transformers draw their dropout from there; nothing else of ours does.
    """
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))
        yield


class Loop:
    """One run over tokenised pairs: `train` leaves the weights with the lowest held-out loss in the model."""

    def __init__(
        self,
        model: RoutingModel,
        device: str,
        training: tuple[Sequence[TokenisedPair], Tensor],
        held_out: tuple[Sequence[TokenisedPair], Tensor],
        config: FinetuneConfig,
        work: Path,
    ) -> None:
        """`training` and `held_out` are pairs and their correctness (N, K), NaN where an RM was not asked."""
        self._model, self._device, self._config, self._work = model, device, config, work
        self._pairs, y = training
        self._held_out, held_out_y = held_out
        self._y, self._held_out_y = y.to(device), held_out_y.to(device)
        self._couples = balanced_couples(self._y) if config.balanced else None
        self._optimiser = torch.optim.AdamW(self._groups(), lr=1.0)
        # From 2¹⁰, not torch's 2¹⁶: each overflow skips a step, and a short run has none to spare.
        self._scaler = torch.amp.GradScaler(
            device.partition(":")[0], init_scale=1024.0, enabled=config.precision == "fp16"
        )
        self.history = History()

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one pass over the training pairs."""
        return math.ceil(len(self._pairs) / self._config.pairs_per_step)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run, unless it stops early."""
        return self._config.epochs * self.steps_per_epoch

    def start(self) -> None:
        """Standardise the branches with the untrained transformer."""
        rng = np.random.default_rng([self._config.seed, _SEED_OF_START])
        chosen = rng.permutation(len(self._pairs))[: self._config.standardise_pairs]
        self._model.eval()
        with torch.no_grad():
            parts = [self._model.branches([self._pairs[i] for i in rows]) for rows in self._passes(chosen)]
            self._model.standardise(torch.cat(parts))

    def resume(self) -> bool:
        """Take up the saved state, if there is one."""
        path = self._work / STATE_FILE
        if not path.is_file():
            return False
        state = torch.load(path, map_location=self._device, weights_only=True)
        self._model.restore(state["model"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._scaler.load_state_dict(state["scaler"])
        self.history = History(**state["history"])
        return True

    def train(self, progress: Progress | None = None) -> list[Look]:
        """Step until the epochs are over or the patience is; then restore the best weights."""
        c, history = self._config, self.history
        every = max(1, round(self.steps_per_epoch / c.evaluations_per_epoch))
        while history.step < self.steps and history.stale < c.patience:
            loss = self._step(history.step)
            history.step += 1
            history.recent.append(loss)
            if progress is not None:
                progress(history.step, self.steps, loss)
            if history.step % every == 0 or history.step == self.steps:
                self._look()
            if history.step % c.save_every == 0:
                self._save()
        best = torch.load(self._work / BEST_FILE, map_location=self._device, weights_only=True)
        self._model.restore(best)
        return [Look(int(look["step"]), self.steps, look["training"], look["held_out"]) for look in history.looks]

    def predict(self, pairs: Sequence[TokenisedPair]) -> tuple[Tensor, Tensor]:
        """Scores and logits (N, K) of the present weights, in the run's precision, without gradients."""
        K = self._y.shape[1]
        scores, logits = torch.empty(len(pairs), K), torch.empty(len(pairs), K)
        self._model.eval()
        with torch.no_grad():
            for rows in batches_by_length([pair.padded for pair in pairs], self._config.tokens_per_pass(self._device)):
                s, z = self._model([pairs[i] for i in rows])
                scores[rows], logits[rows] = s.cpu(), z.cpu()
        return scores, logits

    def _step(self, step: int) -> float:
        """One optimiser step on the pairs that are due, in as many passes as memory asks for; returns its loss.

        A batch's loss is a mean over pairs and over verdicts; each pass contributes its share of it, so that the
        gradient does not depend on how the batch was cut, up to rounding.
        """
        c = self._config
        self._set_rates(c.rate_factor(step, self.steps))
        batch = self._batch(step)
        y = self._y[torch.as_tensor(batch, device=self._device)]
        couples, verdicts = informative_pairs(y).clamp_min(1), torch.isfinite(y).sum().clamp_min(1)
        total = 0.0
        self._model.train()
        self._optimiser.zero_grad(set_to_none=True)
        with seeded(c.seed, _SEED_OF_STEPS, step):
            for rows in self._passes(batch):
                y = self._y[torch.as_tensor(rows, device=self._device)]
                scores, logits = self._model([self._pairs[i] for i in rows])
                bt = bradley_terry(scores, y, self._couples) * (informative_pairs(y) / couples)
                cls = correctness_bce(logits, y) * (torch.isfinite(y).sum() / verdicts)
                loss = c.lambda_bt * bt + c.lambda_cls * cls
                self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        if not math.isfinite(total):
            raise NotFiniteError(
                f"the loss of step {step + 1} is {total}; lower the learning rate ({c.peak_rate:g}) or train in bf16"
            )
        self._scaler.unscale_(self._optimiser)
        trainable = [p for p in self._model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trainable, c.gradient_norm)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        return total

    def _batch(self, step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Indices of the step's pairs: a new order every epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self._config.seed, _SEED_OF_ORDER, epoch]).permutation(len(self._pairs))
        size = self._config.pairs_per_step
        return order[position * size : (position + 1) * size]

    def _passes(self, batch: np.ndarray[Any, np.dtype[np.int64]]) -> list[list[int]]:
        lengths = [self._pairs[i].padded for i in batch]
        cuts = batches_by_length(lengths, self._config.tokens_per_pass(self._device))
        return [[int(batch[i]) for i in rows] for rows in cuts]

    def _look(self) -> None:
        scores, logits = self.predict(self._held_out)
        y = self._held_out_y.cpu()
        c, history = self._config, self.history
        couples = None if self._couples is None else self._couples.cpu()
        loss = float(c.lambda_bt * bradley_terry(scores, y, couples) + c.lambda_cls * correctness_bce(logits, y))
        history.looks.append({"step": history.step, "training": float(np.mean(history.recent)), "held_out": loss})
        history.recent.clear()
        if loss < history.best_loss or not history.best_step:
            history.best_loss, history.best_step = loss, history.step
            _write(self._work / BEST_FILE, self._model.trained())

    def _save(self) -> None:
        state = {
            "model": self._model.trained(),
            "optimiser": self._optimiser.state_dict(),
            "scaler": self._scaler.state_dict(),
            "history": asdict(self.history),
        }
        _write(self._work / STATE_FILE, state)

    def _groups(self) -> list[dict[str, Any]]:
        """Backbone and heads have their own peak rates; biases and norms do not decay, as usual."""
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, value in self._model.named_parameters():
            if value.requires_grad:
                decays = value.ndim >= 2 and name not in ("arms", "cls_weight")
                groups.setdefault((name.startswith("transformer."), decays), []).append(value)
        c = self._config
        return [
            {
                "params": values,
                "peak": c.peak_rate if backbone else c.head_learning_rate,
                "weight_decay": c.weight_decay if decays else 0.0,
            }
            for (backbone, decays), values in groups.items()
        ]

    def _set_rates(self, factor: float) -> None:
        for group in self._optimiser.param_groups:
            group["lr"] = group["peak"] * factor


def _write(path: Path, value: Any) -> None:
    """Whole or not at all: a run that is killed while it writes leaves the older file."""
    scratch = path.with_suffix(".writing")
    with scratch.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
