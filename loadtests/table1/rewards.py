"""The four reward models: truly trained specialists, each in the directory format that the service's workers load.

A model is a two-layer `LlamaForSequenceClassification` that learns from Bradley-Terry pairs of the families.
On its own families the labels are true and plentiful; on the others they are few and a stated share is turned round, as
when annotators did not know the subject: there the model is near chance, or systematically wrong.
As in the demo pool, the first layer also learns to predict the right token where the two responses part: without that
aid, minutes are too few to learn sums. Called by `artefacts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForSequenceClassification

from loadtests.table1.drawing import sample_pairs
from loadtests.table1.numbers import LARGEST_NUMBER
from loadtests.table1.policy import Policy, code_numbers
from loadtests.table1.recipe import Specialist
from loadtests.table1.task import Task
from loadtests.table1.tasks import FAMILIES, Split, demonstrate, draw_task
from loadtests.table1.vocabulary import Codec
from router_core.demo.tokenizer import PAD, save_tokenizer

_HEAD_DIM = 32
_WARM_UP_STEPS = 30
_PREDICTION_WEIGHT = 1.0


@dataclass(frozen=True, slots=True)
class _Pair:
    """Ids of the response called better, of the other one, and where they part."""

    better: list[int]
    worse: list[int]
    fork: int


def train_specialist(
    recipe: Specialist, tokenizer: Tokenizer, policy: Policy, out: Path, seed: int, progress: Callable[[float], None]
) -> None:
    """Train one reward model and write it as a Hugging Face directory; deterministic by seed.

    Args:
        recipe: what it learns.
        tokenizer: of `vocabulary`.
        policy: the SFT policy, whose mistakes it learns too.
        out: a directory that does not exist yet.
        seed: of data and weights.
        progress: told the finished share.
    """
    codec = Codec(tokenizer)
    rng = np.random.default_rng([seed, *recipe.name.encode()])
    model = _initial(recipe, tokenizer, codec, seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / _WARM_UP_STEPS) * (1 - 0.95 * step / recipe.steps)
    )
    model.train()
    for step, batch in enumerate(_batches(recipe, codec, policy, seed, rng)):
        optimiser.zero_grad()
        _loss(model, batch).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        progress((step + 1) / recipe.steps)
    _save(model.eval(), tokenizer, out)


def _initial(recipe: Specialist, tokenizer: Tokenizer, codec: Codec, seed: int) -> LlamaForSequenceClassification:
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=recipe.width,
        intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.width // _HEAD_DIM,
        num_key_value_heads=recipe.width // _HEAD_DIM,
        head_dim=_HEAD_DIM,
        max_position_embeddings=128,
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
    code_numbers(model.model.embed_tokens.weight, [(codec.number(n), n) for n in range(LARGEST_NUMBER + 1)])
    return model


def _pair(task: Task, better: str, worse: str, codec: Codec) -> _Pair:
    a, b = codec.conversation(task.prompt, better), codec.conversation(task.prompt, worse)
    return _Pair(a, b, next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y))


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


def _loss(model: LlamaForSequenceClassification, batch: Sequence[_Pair]) -> torch.Tensor:
    """Mean −log σ(r_better − r_worse) plus the cross-entropy of the better token at the fork.

    No mask: padding is on the right, attention looks left.
    """
    sequences = [pair.better for pair in batch] + [pair.worse for pair in batch]
    width, pad = max(map(len, sequences)), model.config.pad_token_id
    ids = torch.tensor([sequence + [pad] * (width - len(sequence)) for sequence in sequences])
    output = model(input_ids=ids, output_hidden_states=True)
    better, worse = output.logits[:, 0].split(len(batch))
    rows, forks = torch.arange(len(batch)), torch.tensor([pair.fork for pair in batch])
    before = functional.rms_norm(output.hidden_states[1][rows, forks - 1], (model.config.hidden_size,))
    prediction = functional.cross_entropy(before @ model.model.embed_tokens.weight.T, ids[rows, forks])
    loss: torch.Tensor = -functional.logsigmoid(better - worse).mean() + _PREDICTION_WEIGHT * prediction
    return loss


def _save(model: LlamaForSequenceClassification, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
    save_file(model.state_dict(), out / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(tokenizer, out)
