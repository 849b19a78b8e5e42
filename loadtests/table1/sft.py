"""The starting policy, from scratch: first mostly right demonstrations, then ones of mixed quality.

The first part stands for pretraining, and gives the ability. The second is the supervised fine-tuning (SFT): its
demonstrators make mistakes often, so the policy learns to do each task rightly AND wrongly, which is what
online DPO has to sort out. Called by `artefacts`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from loadtests.table1.numbers import LARGEST_NUMBER
from loadtests.table1.policy import Policy, code_numbers, collate, log_probabilities
from loadtests.table1.recipe import DemonstrationConfig, PolicyConfig
from loadtests.table1.tasks import Split, demonstrate, draw_tasks
from loadtests.table1.vocabulary import Codec, build_tokenizer

_TOLD_EVERY = 200
"""Steps between two lines of progress."""


def new_policy(codec: Codec, config: PolicyConfig, seed: int) -> Policy:
    """A policy with initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = Policy(codec.size, config)
    code_numbers(policy.embed_tokens.weight, [(codec.number(n), n) for n in range(LARGEST_NUMBER + 1)])
    return policy


def train_on_demonstrations(
    policy: Policy, codec: Codec, config: DemonstrationConfig, tell: Callable[[str], None]
) -> None:
    """Maximise the likelihood of fresh demonstrations; changes the policy, deterministic by seed.

    Args:
        policy: where it starts.
        codec: its tokenizer.
        config: how good the demonstrations are, and how long.
        tell: told the loss now and then.
    """
    rng = np.random.default_rng([config.seed, 1])
    optimiser = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / config.warm_up) * (1 - 0.95 * step / config.steps)
    )
    for step in range(config.steps):
        tasks = draw_tasks(config.batch, rng, Split.SFT)
        responses = [codec.response(demonstrate(task, rng, config.quality)) for task in tasks]
        batch = collate([codec.prompt(task.prompt) for task in tasks], responses, codec.pad)
        loss = -log_probabilities(policy, batch).sum() / sum(map(len, responses))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % _TOLD_EVERY == 0:
            tell(f"  step {step + 1} of {config.steps}: loss {loss.item():.3f} per token")


def load_policy(path: Path, shape: PolicyConfig) -> Policy:
    """Read the SFT policy back."""
    policy = new_policy(Codec(build_tokenizer()), shape, 0)
    policy.load_state_dict(load_file(path))
    return policy
