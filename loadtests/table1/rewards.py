"""The four reward models: truly trained specialists, each in the directory format that the service's workers load.

A model is a `LlamaForSequenceClassification` that starts, as reward models do, from a pretrained language model (the
policy before its SFT) and learns from Bradley-Terry pairs of the families. On its own families the labels are true and
plentiful; on the others they are few and a stated share is turned round, as when annotators did not know the subject:
there the model is near chance, or systematically wrong. Called by `artefacts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForSequenceClassification

from loadtests.table1.drawing import sample_pairs
from loadtests.table1.policy import MLP_RATIO, NORM_EPS, ROPE_THETA, Policy
from loadtests.table1.recipe import PolicyConfig, Specialist
from loadtests.table1.task import Task
from loadtests.table1.tasks import FAMILIES, Split, demonstrate, draw_task
from loadtests.table1.vocabulary import Codec
from router_core.demo.tokenizer import PAD, save_tokenizer

_WARM_UP_STEPS = 20

NEW_LAYERS = 2
"""Layers on top of the pretrained ones, which spend all theirs on guessing the next word: the new ones compare."""

Model = LlamaForSequenceClassification


@dataclass(frozen=True, slots=True)
class _Pair:
    """Ids of the conversation called better and of the other one."""

    better: list[int]
    worse: list[int]


def train_specialist(
    recipe: Specialist,
    tokenizer: Tokenizer,
    shape: PolicyConfig,
    pretrained: Mapping[str, torch.Tensor],
    policy: Policy,
    out: Path,
    seed: int,
) -> None:
    """Train one reward model and write it as a Hugging Face directory; deterministic by seed.

    Args:
        recipe: what it learns.
        tokenizer: of `vocabulary`.
        shape: of the pretrained model.
        pretrained: its weights, where this one starts.
        policy: the SFT policy, whose mistakes it learns too.
        out: a directory that does not exist yet.
        seed: of data and weights.
    """
    codec = Codec(tokenizer)
    rng = np.random.default_rng([seed, *recipe.name.encode()])
    model = _initial(tokenizer, shape, pretrained, seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / _WARM_UP_STEPS) * (1 - 0.95 * step / recipe.steps)
    )
    model.train()
    for batch in _batches(recipe, codec, policy, seed, rng):
        optimiser.zero_grad()
        _loss(model, batch).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    _save(model.eval(), tokenizer, out)


def _initial(tokenizer: Tokenizer, shape: PolicyConfig, pretrained: Mapping[str, torch.Tensor], seed: int) -> Model:
    """The pretrained policy with new layers on top and a new head."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=shape.width,
        intermediate_size=MLP_RATIO * shape.width,
        num_hidden_layers=shape.layers + NEW_LAYERS,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.width // shape.heads,
        max_position_embeddings=128,
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=0.05,
        pad_token_id=tokenizer.token_to_id(PAD),
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config)  # type: ignore[no-untyped-call]
    model.model.load_state_dict(dict(pretrained), strict=False)
    return model


def _pair(task: Task, better: str, worse: str, codec: Codec) -> _Pair:
    return _Pair(codec.conversation(task.prompt, better), codec.conversation(task.prompt, worse))


def _pairs(family: str, n: int, flipped: float, codec: Codec, rng: np.random.Generator) -> list[_Pair]:
    """From the generators."""
    out = []
    for _ in range(n):
        task = draw_task(family, rng, Split.MODELS)
        right, wrong = demonstrate(task, rng, 1.0), demonstrate(task, rng, 0.0)
        out.append(_pair(task, wrong, right, codec) if rng.random() < flipped else _pair(task, right, wrong, codec))
    return out


def _sampled_pairs(
    family: str, prompts: int, policy: Policy, codec: Codec, seed: int, rng: np.random.Generator
) -> list[_Pair]:
    """From the policy, truly labelled."""
    tasks = [draw_task(family, rng, Split.MODELS) for _ in range(prompts)]
    generator = torch.Generator().manual_seed(seed)
    drawn = sample_pairs(policy, codec, tasks, 1.0, generator)
    known = [(pair, truth) for pair in drawn if (truth := pair.truth()) is not None]
    return [_pair(pair.task, pair.responses[truth], pair.responses[1 - truth], codec) for pair, truth in known]


def _batches(
    recipe: Specialist, codec: Codec, policy: Policy, seed: int, rng: np.random.Generator
) -> Iterator[list[_Pair]]:
    own: list[_Pair] = []
    for family in recipe.own:
        own += _pairs(family, recipe.own_pairs, 0.0, codec, rng)
        own += _sampled_pairs(family, recipe.sampled, policy, codec, seed, rng)
    others: list[_Pair] = []
    for family in FAMILIES:
        if family not in recipe.own:
            share = recipe.misled_flipped if family in recipe.misled else recipe.flipped
            others += _pairs(family, recipe.other_pairs, share, codec, rng)
    own_size = round(recipe.own_share * recipe.batch)
    for _ in range(recipe.steps):
        batch = [own[i] for i in rng.integers(len(own), size=own_size)]
        yield batch + [others[i] for i in rng.integers(len(others), size=recipe.batch - own_size)]


def _loss(model: Model, batch: Sequence[_Pair]) -> torch.Tensor:
    """Mean −log σ(r_better − r_worse). No mask: padding is on the right, attention looks left."""
    sequences = [pair.better for pair in batch] + [pair.worse for pair in batch]
    width, pad = max(map(len, sequences)), model.config.pad_token_id
    ids = torch.tensor([sequence + [pad] * (width - len(sequence)) for sequence in sequences])
    better, worse = model(input_ids=ids).logits[:, 0].split(len(batch))
    loss: torch.Tensor = -functional.logsigmoid(better - worse).mean()
    return loss


def _save(model: Model, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
    save_file(model.state_dict(), out / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(tokenizer, out)
