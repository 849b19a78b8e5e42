"""Online DPO of one policy against one judge (arXiv 2305.18290; online: arXiv 2402.04792).

Each step: prompts, two responses each from the current policy, a verdict on each pair, one update on
−log σ(β[(log π/π₀)(chosen) − (log π/π₀)(rejected)]), π₀ the frozen SFT policy; then the per-pair losses, as they were
before the update, go back to the judge. Called by `campaign`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from loadtests.table1.drawing import sample_pairs
from loadtests.table1.judge import Judge, Pair, Verdict
from loadtests.table1.measure import accuracy
from loadtests.table1.policy import Batch, Policy, collate, log_probabilities
from loadtests.table1.recipe import DpoConfig
from loadtests.table1.task import Task
from loadtests.table1.tasks import Split, draw_tasks
from loadtests.table1.vocabulary import Codec


@dataclass(slots=True)
class History:
    """What happened in a run.

    Attributes:
        pairs: per judged pair: step, family, asked RM, whether the verdict was right (None: tie, or no right answer
            among the two or only right ones), loss (None: tie).
        curve: (step, accuracy per family).
        calls: RM calls.
        seconds: wall time of the training, without what the curve took.
    """

    pairs: list[tuple[int, str, str, bool | None, float | None]] = field(default_factory=list)
    curve: list[tuple[int, Mapping[str, float]]] = field(default_factory=list)
    calls: int = 0
    seconds: float = 0.0


def train_online(
    start: Policy, codec: Codec, judge: Judge, config: DpoConfig, seed: int, curve_tasks: Sequence[Task]
) -> tuple[Policy, History]:
    """Run online DPO.

    Args:
        start: the SFT policy, which stays as it is.
        codec: its tokenizer.
        judge: gives the verdicts.
        config: the settings.
        seed: of prompts and samples; equal for all rows that are compared.
        curve_tasks: prompts of the learning curve.

    Returns:
        The trained policy and what happened.
    """
    policy, history = copy.deepcopy(start), History()
    rng, generator = np.random.default_rng([seed, 11]), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(policy.parameters(), lr=config.learning_rate)
    for step in range(config.steps):
        if step % config.curve_every == 0:
            _measure(policy, codec, curve_tasks, step, history)
        began = time.perf_counter()
        tasks = draw_tasks(config.prompts, rng, Split.ONLINE)
        pairs = sample_pairs(policy, codec, tasks, config.temperature, generator)
        verdicts = judge.judge(pairs)
        losses = _update(policy, start, codec, pairs, verdicts, config, optimiser)
        told = [i for i, loss in enumerate(losses) if loss is not None]
        judge.learn([pairs[i] for i in told], [verdicts[i] for i in told], [losses[i] or 0.0 for i in told])
        history.seconds += time.perf_counter() - began
        history.calls += sum(verdict.calls for verdict in verdicts)
        history.pairs += [_record(step, *row) for row in zip(pairs, verdicts, losses, strict=True)]
    _measure(policy, codec, curve_tasks, config.steps, history)
    return policy, history


def _measure(policy: Policy, codec: Codec, tasks: Sequence[Task], step: int, history: History) -> None:
    history.curve.append((step, accuracy(policy, codec, tasks, temperature=1.0, seed=step)))


def _record(
    step: int, pair: Pair, verdict: Verdict, loss: float | None
) -> tuple[int, str, str, bool | None, float | None]:
    truth = pair.truth()
    right = None if truth is None or verdict.preferred is None else verdict.preferred == truth
    return (step, pair.task.family, verdict.model, right, loss)


def _update(
    policy: Policy,
    reference: Policy,
    codec: Codec,
    pairs: Sequence[Pair],
    verdicts: Sequence[Verdict],
    config: DpoConfig,
    optimiser: torch.optim.Optimizer,
) -> list[float | None]:
    """One step on the pairs with a verdict; their losses before it, None for the others."""
    kept = [i for i, verdict in enumerate(verdicts) if verdict.preferred is not None]
    out: list[float | None] = [None] * len(pairs)
    if not kept:
        return out
    batch = _conversations(codec, [pairs[i] for i in kept])
    with torch.no_grad():
        before = log_probabilities(reference, batch)
    ratio = (log_probabilities(policy, batch) - before).view(-1, 2)
    chosen = torch.tensor([verdicts[i].preferred or 0 for i in kept])
    losses = dpo_losses(ratio, chosen, config.beta)
    optimiser.zero_grad()
    losses.mean().backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimiser.step()
    for i, loss in zip(kept, losses.tolist(), strict=True):
        out[i] = loss
    return out


def dpo_losses(ratio: Tensor, chosen: Tensor, beta: float) -> Tensor:
    """−log σ(β(ratio[chosen] − ratio[other])) per pair.

    Args:
        ratio: (B, 2) log π/π₀ of both responses.
        chosen: (B,) index of the preferred one.
        beta: β.

    >>> dpo_losses(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), 0.5).item()  # −log σ(1)
    0.3132616877555847
    """
    rows = torch.arange(len(ratio))
    return -functional.logsigmoid(beta * (ratio[rows, chosen] - ratio[rows, 1 - chosen]))


def _conversations(codec: Codec, pairs: Sequence[Pair]) -> Batch:
    prompts = [codec.prompt(pair.task.prompt) for pair in pairs for _ in range(2)]
    responses = [codec.response(response) for pair in pairs for response in pair.responses]
    return collate(prompts, responses, codec.pad)
