"""Make the demo pool: train the recipes' reward models from scratch and write them as Hugging Face directories.

A model is a two-layer `LlamaForSequenceClassification` with one label, float32, that `vllm serve` and transformers read
unchanged. It learns from Bradley–Terry pairs, with two aids without which tens of seconds are too few, both stated
here because they are not usual: the embeddings of number tokens start from a code of the number's size and residues
instead of noise, and the first layer also predicts the right token where the two responses part (an auxiliary loss,
its head is the embedding table).

Knows the recipes and the generators; nothing of the service. Called by the demo command.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForSequenceClassification

from router_core.demo.domains import DOMAINS, Split, generate_pairs
from router_core.demo.label import label_pairs
from router_core.demo.recipes import RECIPES, Recipe, recipe_digest
from router_core.demo.report import PoolReport, report_pool
from router_core.demo.tokenizer import PAD, plain_text, save_tokenizer, train_tokenizer
from router_core.records import LabelledPair
from router_core.torch_threads import torch_threads

RECIPE_FILE = "recipe.json"
"""Written last: a directory that has it is complete."""

_HEAD_DIM = 32
_MAX_POSITION = 512
_PERIODS = (2, 3, 5, 7, 10, 20, 40, 100)
_LARGEST_CODED_NUMBER = 150
_NUMBER_CODE_SCALE = 0.15
_INITIAL_SD = 0.05
_WARM_UP_STEPS = 30
_BATCHES_SORTED_TOGETHER = 10

Progress = Callable[[str, float], None]
"""Called with a model's name and the finished fraction in [0, 1]; never by two threads at once."""


@dataclass(frozen=True, slots=True)
class DemoModel:
    """One reward model of the demo pool on disk. `reused` says that it was there already."""

    name: str
    domain: str
    directory: Path
    digest: str
    reused: bool


@dataclass(frozen=True, slots=True)
class _Ranked:
    """Token ids of a pair: the response that training calls better, the other, and where they part (> 0)."""

    better: list[int]
    worse: list[int]
    fork: int


def make_demo_pool(
    out_dir: Path,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    recipes: Sequence[Recipe] = RECIPES,
    workers: int = 2,
    beside: Sequence[Callable[[], None]] = (),
) -> list[DemoModel]:
    """Train every recipe's model into `out_dir/NAME`, skipping those that are there with the same recipe and seed.

    Each model is trained on one CPU thread, `workers` of them at a time, so that the result does not depend on the
    number of cores. A directory appears under its name only when it is complete.

    Args:
        out_dir: made if absent.
        seed: of the data, the tokenizer and the initial weights; same seed, same torch build, same weights.
        progress: told about every model, first with 0.0 and last with 1.0.
        recipes: the pool.
        workers: models trained at once.
        beside: other work for the same threads, such as `judge.judge_training`.

    Returns:
        One entry per recipe, in their order.

    Raises:
        OSError: `out_dir` cannot be written.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    tell = _serialised(progress)
    digests = {recipe.name: recipe_digest(recipe, seed) for recipe in recipes}
    missing = [recipe for recipe in recipes if digest_on_disk(out_dir / recipe.name) != digests[recipe.name]]
    for recipe in recipes:
        tell(recipe.name, 0.0 if recipe in missing else 1.0)
    if missing or beside:
        tokenizer = train_tokenizer(seed)
        # Initial weights come from torch's process-wide generator: drawn here, one by one, before any thread starts.
        models = [_initial_model(recipe, tokenizer, seed) for recipe in missing]

        def make(recipe: Recipe, model: LlamaForSequenceClassification) -> None:
            torch.set_num_threads(1)
            _fit(model, tokenizer, recipe, seed, tell)
            _save(model, tokenizer, recipe, seed, out_dir)
            tell(recipe.name, 1.0)

        with torch_threads(1), ThreadPoolExecutor(max_workers=workers) as pool:
            others = [pool.submit(work) for work in beside]
            list(pool.map(make, missing, models))
            for other in others:
                other.result()
    return [
        DemoModel(recipe.name, recipe.domain, out_dir / recipe.name, digests[recipe.name], recipe not in missing)
        for recipe in recipes
    ]


def evaluate(model_dirs: Sequence[Path], *, pairs_per_domain: int = 500, seed: int = 1) -> PoolReport:
    """Measure models on pairs of the stream split, whose prompts none of the demo models was trained on.

    Raises:
        DatasetError: no pairs or no models.
        OSError: a directory holds no model.
    """
    rng = np.random.default_rng(seed)
    pairs = [p for domain in DOMAINS for p in generate_pairs(domain, pairs_per_domain, rng, split=Split.STREAM)]
    return report_pool(label_pairs(pairs, model_dirs))


def _serialised(progress: Progress | None) -> Progress:
    lock = threading.Lock()

    def tell(name: str, fraction: float) -> None:
        if progress is not None:
            with lock:
                progress(name, fraction)

    return tell


def digest_on_disk(directory: Path) -> str | None:
    """Return the digest of the recipe that a model's directory was made by; None if it is not complete."""
    try:
        digest = json.loads((directory / RECIPE_FILE).read_text())["digest"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return digest if isinstance(digest, str) else None


def _initial_model(recipe: Recipe, tokenizer: Tokenizer, seed: int) -> LlamaForSequenceClassification:
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=recipe.hidden_size,
        intermediate_size=2 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.hidden_size // _HEAD_DIM,
        num_key_value_heads=recipe.hidden_size // _HEAD_DIM,
        head_dim=_HEAD_DIM,
        max_position_embeddings=_MAX_POSITION,
        initializer_range=_INITIAL_SD,
        pad_token_id=tokenizer.token_to_id(PAD),
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config)  # type: ignore[no-untyped-call]
    table = model.model.embed_tokens.weight
    with torch.no_grad():
        for number in range(_LARGEST_CODED_NUMBER):
            token = tokenizer.token_to_id(str(number))
            if token is not None:
                code = torch.tensor(_number_code(number))
                table[token, : len(code)] = _NUMBER_CODE_SCALE * code
    return model


def _number_code(number: int) -> list[float]:
    """Return size, logarithm and residues: [n/20 − 1, ln(n+1) − 2, cos 2πn/p, sin 2πn/p for the periods p]."""
    waves = [wave(2 * math.pi * number / period) for period in _PERIODS for wave in (math.cos, math.sin)]
    return [number / 20 - 1, math.log(number + 1) - 2, *waves]


def _ranked(pair: LabelledPair, tokenizer: Tokenizer, better: int) -> _Ranked:
    ids = [tokenizer.encode(plain_text(pair.instance.prompt, response)).ids for response in pair.instance.responses]
    good, bad = ids[better], ids[1 - better]
    # Where one response only goes on after the other ends, there is no fork; their common last newline does no harm.
    common = range(min(len(good), len(bad)))
    fork = next((i for i in common if good[i] != bad[i]), common[-1])
    return _Ranked(good, bad, fork)


def _training_pairs(
    recipe: Recipe, tokenizer: Tokenizer, rng: np.random.Generator
) -> tuple[list[_Ranked], list[_Ranked]]:
    own = generate_pairs(recipe.domain, recipe.own_pairs, rng, split=Split.MODELS)
    others = []
    for domain in DOMAINS:
        if domain != recipe.domain:
            for pair in generate_pairs(domain, recipe.other_pairs, rng, split=Split.MODELS):
                flipped = rng.random() < recipe.flipped_share
                others.append(_ranked(pair, tokenizer, 1 - pair.label if flipped else pair.label))
    return [_ranked(pair, tokenizer, pair.label) for pair in own], others


def _batches(
    own: Sequence[_Ranked], others: Sequence[_Ranked], recipe: Recipe, rng: np.random.Generator
) -> Iterator[list[_Ranked]]:
    """Yield `recipe.steps` batches, drawn with replacement.

    Several batches are drawn at once, sorted by length, cut and shuffled: a batch of like lengths has little padding.
    """
    for start in range(0, recipe.steps, _BATCHES_SORTED_TOGETHER):
        count = min(_BATCHES_SORTED_TOGETHER, recipe.steps - start)
        size = count * recipe.batch_pairs
        own_size = round(recipe.own_share * size) if others else size
        drawn = [own[i] for i in rng.integers(len(own), size=own_size)]
        drawn += [others[i] for i in rng.integers(len(others), size=size - own_size)] if others else []
        drawn.sort(key=lambda pair: max(len(pair.better), len(pair.worse)))
        for place in rng.permutation(count):
            yield drawn[place * recipe.batch_pairs : (place + 1) * recipe.batch_pairs]


def _fit(
    model: LlamaForSequenceClassification, tokenizer: Tokenizer, recipe: Recipe, seed: int, tell: Progress
) -> None:
    rng = np.random.default_rng([seed, *recipe.name.encode()])
    own, others = _training_pairs(recipe, tokenizer, rng)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / _WARM_UP_STEPS) * (1 - 0.95 * step / recipe.steps)
    )
    model.train()
    for step, batch in enumerate(_batches(own, others, recipe, rng)):
        optimiser.zero_grad()
        _loss(model, batch, recipe.prediction_weight).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        tell(recipe.name, (step + 1) / (recipe.steps + 1))
    model.train(False)


def _loss(model: LlamaForSequenceClassification, batch: Sequence[_Ranked], prediction_weight: float) -> torch.Tensor:
    """Return mean −log σ(r_better − r_worse) plus the weighted cross-entropy of the better token at the fork.

    The input needs no attention mask: padding stands on the right and attention looks left only.
    """
    sequences = [pair.better for pair in batch] + [pair.worse for pair in batch]
    width, pad = max(map(len, sequences)), model.config.pad_token_id
    ids = torch.tensor([sequence + [pad] * (width - len(sequence)) for sequence in sequences])
    output = model(input_ids=ids, output_hidden_states=True)
    better, worse = output.logits[:, 0].split(len(batch))
    rows, forks = torch.arange(len(batch)), torch.tensor([pair.fork for pair in batch])
    before_fork = functional.rms_norm(output.hidden_states[1][rows, forks - 1], (model.config.hidden_size,))
    prediction = before_fork @ model.model.embed_tokens.weight.T
    ranking_loss: torch.Tensor = -functional.logsigmoid(better - worse).mean()
    return ranking_loss + prediction_weight * functional.cross_entropy(prediction, ids[rows, forks])


def _save(
    model: LlamaForSequenceClassification, tokenizer: Tokenizer, recipe: Recipe, seed: int, out_dir: Path
) -> None:
    unfinished, final = out_dir / f".{recipe.name}.unfinished", out_dir / recipe.name
    for stale in (unfinished, final):
        if stale.exists():
            shutil.rmtree(stale)
    unfinished.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(unfinished)
    weights = unfinished / "model.safetensors"
    save_file(model.state_dict(), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes 0600, and a worker's container runs as another user
    save_tokenizer(tokenizer, unfinished)
    description = {"digest": recipe_digest(recipe, seed), "seed": seed, "recipe": asdict(recipe)}
    (unfinished / RECIPE_FILE).write_text(json.dumps(description, indent=2) + "\n")
    unfinished.rename(final)
