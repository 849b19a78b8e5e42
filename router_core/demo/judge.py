"""Make the demo's judge: a tiny generative model that says `A` or `B` for the better of two responses of one domain.

A three-layer `LlamaForCausalLM`, float32, that transformers and vLLM read unchanged. Its chat template takes the blocks
out of a judge's message (`service/scorers/judge/frame.jinja`) and leaves the rest, which so small a model cannot read:

    <|user|> PROMPT <|assistant|> RESPONSE A, `A` <|assistant|> RESPONSE B, `B` <|user|>

The next token is the verdict. It learns from labelled pairs in both orders, with one aid that is not usual: after each
response the second layer also predicts its reward (Bradley–Terry, by a head that is thrown away), so that the verdict
is the letter after the response with the larger one. It gives no grades and no reasons.

Knows the generators; nothing of the service. Called by the demo command and by tests; gives a judge that needs no GPU.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from router_core.demo.domains import Split, generate_pairs
from router_core.demo.label import no_progress_bar
from router_core.demo.recipes import JUDGE, Recipe, recipe_digest
from router_core.demo.tokenizer import PAD, save_tokenizer, train_tokenizer
from router_core.demo.train import RECIPE_FILE, Progress, digest_on_disk
from router_core.records import LabelledPair, verdict_of
from router_core.torch_threads import torch_threads

CHAT_TEMPLATE: Final = (
    "{%- set said = messages[-1].content -%}"
    "{%- if '<<<RESPONSE B ' in said -%}"
    "{%- set key = said.split('In this message KEY is ')[1].split('.')[0] -%}"
    "{%- set ns = namespace(blocks=[]) -%}"
    "{%- for name in ['CONVERSATION', 'RESPONSE A', 'RESPONSE B'] -%}"
    "{%- set after = said.split('<<<' ~ name ~ ' ' ~ key ~ '>>>\n')[1] -%}"
    "{%- set ns.blocks = ns.blocks + [after.split('\n<<<END ' ~ name ~ ' ' ~ key ~ '>>>')[0]] -%}"
    "{%- endfor -%}"
    "{{- '<|user|>\n' ~ ns.blocks[0] ~ '\n<|assistant|>\n' ~ ns.blocks[1] ~ '\nA' -}}"
    "{{- '<|assistant|>\n' ~ ns.blocks[2] ~ '\nB<|user|>' -}}"
    "{%- else -%}{{- '<|user|>\n' ~ said ~ '\n<|user|>' -}}{%- endif -%}"
)
"""What is left of a judge's message; another message is one turn."""

_HEAD_DIM: Final = 32
_MAX_POSITION: Final = 1024
_INITIAL_SD: Final = 0.05
_WARM_UP_STEPS: Final = 30
_SMALLEST: Final = 1e-6
"""Bound of a probability away from 0 and 1, as of the service's judges."""


@dataclass(frozen=True, slots=True)
class _Shown:
    """Token ids of a pair in one order, where its responses end, and the better one's index."""

    ids: list[int]
    ends: tuple[int, int]
    better: int


def judge_text(prompt: str, first: str, second: str) -> str:
    """Return what the chat template leaves of a pair, without the cost of Jinja."""
    return f"<|user|>\n{prompt}\n<|assistant|>\n{first}\nA<|assistant|>\n{second}\nB<|user|>"


def make_demo_judge(out_dir: Path, seed: int = 0, progress: Progress | None = None, *, recipe: Recipe = JUDGE) -> Path:
    """Train the judge into `out_dir/NAME`, unless it is there with the same recipe and seed; return the directory.

    Raises:
        OSError: `out_dir` cannot be written.
    """
    train = judge_training(out_dir, seed, progress, recipe=recipe)
    if train is not None:
        with torch_threads(1):
            train()
    return out_dir / recipe.name


def judge_training(
    out_dir: Path, seed: int = 0, progress: Progress | None = None, *, recipe: Recipe = JUDGE
) -> Callable[[], None] | None:
    """Draw the judge's initial weights, and return what trains and writes it; None if it is there already.

    What is returned may run in a thread beside others, for example as `beside` of `train.make_demo_pool`: torch's
    process-wide generator is not used any more. One CPU thread, so that the result does not depend on the number of
    cores.

    Args:
        out_dir: made if absent.
        seed: of the data, the tokenizer and the initial weights.
        progress: told the finished fraction.
        recipe: what it is trained on.
    """
    directory = out_dir / recipe.name
    if digest_on_disk(directory) == recipe_digest(recipe, seed):
        return None
    tokenizer = train_tokenizer(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(recipe, tokenizer))
        reward_head = torch.nn.Linear(recipe.hidden_size, 1)

    def train() -> None:
        torch.set_num_threads(1)
        _fit(model, reward_head, tokenizer, recipe, seed, progress)
        _save(model, tokenizer, recipe, seed, directory)

    return train


def judge_pairs(pairs: Sequence[LabelledPair], directory: Path) -> list[LabelledPair]:
    """Return the pairs with the judge's rewards and verdict, named after its directory, added to those they have.

    The rewards are those of `service.scorers.judge`: ±½ of the log-odds of the two orders' mean probability.

    Raises:
        OSError: the directory holds no model.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    with no_progress_bar():
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        model.eval()
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "AB"]
    out = []
    with torch_threads(1), torch.inference_mode():
        for pair in pairs:
            left, right = pair.instance.responses
            texts = [judge_text(pair.instance.prompt, *shown) for shown in ((left, right), (right, left))]
            batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            last = logits[torch.arange(2), batch["attention_mask"].sum(dim=1) - 1][:, letters].double()
            first, second = (last[:, 0] - last[:, 1]).sigmoid().tolist()
            probability = min(max((first + 1.0 - second) / 2.0, _SMALLEST), 1.0 - _SMALLEST)
            half = math.log(probability / (1.0 - probability)) / 2.0
            scores = (half, -half)
            out.append(
                replace(
                    pair,
                    scores={**pair.scores, directory.name: scores},
                    verdicts={**pair.verdicts, directory.name: verdict_of(scores)},
                )
            )
    return out


def _config(recipe: Recipe, tokenizer: Tokenizer) -> LlamaConfig:
    size = recipe.hidden_size
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=size // _HEAD_DIM,
        num_key_value_heads=size // _HEAD_DIM,
        head_dim=_HEAD_DIM,
        max_position_embeddings=_MAX_POSITION,
        initializer_range=_INITIAL_SD,
        pad_token_id=tokenizer.token_to_id(PAD),
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=True,
        dtype="float32",
    )


def _fit(
    model: LlamaForCausalLM,
    reward_head: torch.nn.Linear,
    tokenizer: Tokenizer,
    recipe: Recipe,
    seed: int,
    progress: Progress | None,
) -> None:
    rng = np.random.default_rng([seed, *recipe.name.encode()])
    pairs = generate_pairs(recipe.domain, recipe.own_pairs, rng, split=Split.MODELS)
    shown = [_shown(pair, tokenizer, order) for pair in pairs for order in ((0, 1), (1, 0))]
    optimiser = torch.optim.AdamW(
        [*model.parameters(), *reward_head.parameters()], lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / _WARM_UP_STEPS) * (1 - 0.95 * step / recipe.steps)
    )
    letters: list[int] = [tokenizer.encode(letter).ids[0] for letter in "AB"]
    for step in range(recipe.steps):
        optimiser.zero_grad()
        batch = [shown[index] for index in rng.integers(len(shown), size=recipe.batch_pairs)]
        _loss(model, reward_head, batch, letters).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(recipe.name, (step + 1) / recipe.steps)
    model.train(False)


def _shown(pair: LabelledPair, tokenizer: Tokenizer, order: tuple[int, int]) -> _Shown:
    first, second = (pair.instance.responses[index] for index in order)
    ids = tokenizer.encode(judge_text(pair.instance.prompt, first, second)).ids
    # The last two tokens are `B` and the beginning of the verdict.
    until_a = tokenizer.encode(f"<|user|>\n{pair.instance.prompt}\n<|assistant|>\n{first}\nA").ids
    return _Shown(ids, (len(until_a) - 1, len(ids) - 2), order.index(pair.label))


def _loss(
    model: LlamaForCausalLM, reward_head: torch.nn.Linear, batch: Sequence[_Shown], letters: Sequence[int]
) -> torch.Tensor:
    """Return the cross-entropy of the verdict plus −log σ(r_better − r_worse) of the second layer's rewards.

    The input needs no attention mask: padding stands on the right and attention looks left only.
    """
    width = max(len(one.ids) for one in batch)
    ids = torch.tensor([one.ids + [model.config.pad_token_id] * (width - len(one.ids)) for one in batch])
    output = model.model(input_ids=ids, output_hidden_states=True)
    rows = torch.arange(len(batch))
    last = output.last_hidden_state[rows, torch.tensor([len(one.ids) - 1 for one in batch])]
    verdict = functional.cross_entropy(model.lm_head(last), torch.tensor([letters[one.better] for one in batch]))
    normed = functional.rms_norm(output.hidden_states[2], (model.config.hidden_size,))
    first, second = (reward_head(normed[rows, torch.tensor([one.ends[i] for one in batch])])[:, 0] for i in (0, 1))
    sign = torch.tensor([1.0 - 2.0 * one.better for one in batch])
    ranking: torch.Tensor = -functional.logsigmoid(sign * (first - second)).mean()
    return verdict + ranking


def _save(model: LlamaForCausalLM, tokenizer: Tokenizer, recipe: Recipe, seed: int, directory: Path) -> None:
    unfinished = directory.with_name(f".{recipe.name}.unfinished")
    for stale in (unfinished, directory):
        if stale.exists():
            shutil.rmtree(stale)
    unfinished.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(unfinished)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
    (unfinished / "model.safetensors").chmod(0o644)  # safetensors writes 0600, and others may serve it
    save_tokenizer(tokenizer, unfinished)
    config = json.loads((unfinished / "tokenizer_config.json").read_text())
    config |= {"chat_template": CHAT_TEMPLATE, "model_max_length": _MAX_POSITION}
    (unfinished / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    description = {"digest": recipe_digest(recipe, seed), "seed": seed, "recipe": asdict(recipe)}
    (unfinished / RECIPE_FILE).write_text(json.dumps(description, indent=2) + "\n")
    unfinished.rename(directory)
