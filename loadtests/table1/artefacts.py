"""Made once and kept by the digest of their recipe: the SFT policy, the four reward models, the offline pairs. The
router's checkpoint is trained anew each time: it takes seconds, and is what the table judges.

Called by `campaign` and the command.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from loadtests.table1.drawing import sample_pairs
from loadtests.table1.judge import Pair
from loadtests.table1.policy import Policy
from loadtests.table1.recipe import Artefacts, OfflineConfig, Recipe, Specialist, digest_of
from loadtests.table1.rewards import train_specialist
from loadtests.table1.sft import load_policy, new_policy, train_on_demonstrations
from loadtests.table1.task import Task
from loadtests.table1.tasks import Split, demonstrate, draw_tasks
from loadtests.table1.vocabulary import Codec, build_tokenizer
from router_core.checkpoint import Checkpoint
from router_core.dataset import load_pairs, write_pairs
from router_core.demo.domains import group_of
from router_core.demo.label import label_pairs
from router_core.encoder.registry import load_backbone
from router_core.offline.train import train
from router_core.records import Instance, LabelledPair
from router_core.torch_threads import torch_threads

Tell = Callable[[str], None]
_ROUND = 64
"""Prompts that are sampled together for the offline pairs."""


def make_artefacts(recipe: Recipe, folder: Path, tell: Tell, *, processes: int = 2) -> Artefacts:
    """Make what is missing, `processes` at a time, each on one thread.

    Args:
        recipe: of everything.
        folder: made if absent.
        tell: told what is being made and what was found.
        processes: at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch_threads(1):
        pretrained, policy = _make_policies(recipe, folder, tell)
    models = {s.name: folder / f"rm-{digest_of(s, policy.name, recipe.seed)}" / s.name for s in recipe.specialists}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        jobs = []
        for specialist in recipe.specialists:
            if not models[specialist.name].exists():
                tell(f"training {specialist.name}")
                where = models[specialist.name]
                jobs.append(pool.submit(make_model, specialist, pretrained, policy, recipe, where))
        for job in jobs:
            job.result()
    made_of = (policy.name, *(path.parent.name for path in models.values()))
    offline = folder / f"offline-{digest_of(recipe.offline, *made_of)}.jsonl"
    if not offline.exists():
        tell(f"labelling {recipe.offline.pairs} offline pairs")
        with torch_threads(1):
            _make_offline(recipe.offline, load_policy(policy, recipe.policy), models, offline)
    tell("training the router's checkpoint")
    checkpoint = folder / f"checkpoint-{offline.stem}"
    trained = train(load_pairs(offline), recipe.pool(), load_backbone("static"))
    trained.save(checkpoint)
    return Artefacts(policy, models, offline, checkpoint, Checkpoint.load(checkpoint).digest)


def _make_policies(recipe: Recipe, folder: Path, tell: Tell) -> tuple[Path, Path]:
    """The pretrained policy and the SFT policy that starts from it."""
    codec = Codec(build_tokenizer())
    pretrained = folder / f"pretrained-{digest_of(recipe.policy, recipe.pretraining, recipe.version)}.safetensors"
    if not pretrained.exists():
        tell("pretraining the policy")
        policy = new_policy(codec, recipe.policy, recipe.seed)
        train_on_demonstrations(policy, codec, recipe.pretraining, tell)
        _write(policy, pretrained)
    sft = folder / f"sft-{digest_of(pretrained.name, recipe.sft)}.safetensors"
    if not sft.exists():
        tell("training the SFT policy")
        policy = load_policy(pretrained, recipe.policy)
        train_on_demonstrations(policy, codec, recipe.sft, tell)
        _write(policy, sft)
    return pretrained, sft


def _write(policy: Policy, out: Path) -> None:
    """The file appears when it is complete."""
    unfinished = out.with_suffix(".unfinished")
    save_file(policy.state_dict(), unfinished)
    unfinished.rename(out)


def make_model(specialist: Specialist, pretrained: Path, policy: Path, recipe: Recipe, out: Path) -> None:
    """Train and write a reward model; the directory appears when it is complete."""
    torch.set_num_threads(1)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    start, sft = load_file(pretrained), load_policy(policy, recipe.policy)
    train_specialist(specialist, build_tokenizer(), recipe.policy, start, sft, unfinished, recipe.seed)
    unfinished.rename(out)


def _make_offline(config: OfflineConfig, policy: Policy, models: Mapping[str, Path], out: Path) -> None:
    """Pairs that the SFT policy wrote, labelled by the checker, with the verdict of every reward model."""
    rng, generator = np.random.default_rng([config.seed, 3]), torch.Generator().manual_seed(config.seed)
    codec = Codec(build_tokenizer())
    pairs: list[LabelledPair] = []
    while len(pairs) < config.pairs:
        tasks = draw_tasks(_ROUND, rng, Split.OFFLINE, config.shares)
        drafts = sample_pairs(policy, codec, tasks, 1.0, generator) if config.from_policy else _demonstrated(tasks, rng)
        for pair in drafts:
            if (truth := pair.truth()) is not None:
                pairs.append(_labelled(pair, truth, len(pairs)))
    unfinished = out.with_suffix(".unfinished")
    write_pairs(unfinished, label_pairs(pairs[: config.pairs], list(models.values())))
    unfinished.rename(out)


def _demonstrated(tasks: Sequence[Task], rng: np.random.Generator) -> list[Pair]:
    return [Pair(task, (demonstrate(task, rng, 0.5), demonstrate(task, rng, 0.5))) for task in tasks]


def _labelled(pair: Pair, truth: int, number: int) -> LabelledPair:
    family = pair.task.family
    return LabelledPair(
        id=f"table1/{family}/{number:05d}",
        instance=Instance(pair.task.prompt, pair.responses),
        label=truth,
        scores={},
        verdicts={},
        domain=family,
        subset=family,
        group=group_of(pair.task.prompt),
    )
