"""`reward-router train`: from labelled pairs to a checkpoint with its model card."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from router_core.checkpoint import METADATA_FILE, Checkpoint
from router_core.dataset import partly_labelled, pool_names
from router_core.encoder.base import Backbone
from router_core.offline.consensus import Consensus, estimate, with_answers
from router_core.prior import PriorForm
from router_core.records import LabelledPair
from service.cli.cache import Cache, UseCache, encodings_directory
from service.cli.data import DataReader, SkipBadRows, parse_pool
from service.errors import ConfigurationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from router_core.offline.card import Compared
    from router_core.offline.finetune import FinetuneConfig
    from router_core.offline.train import HeldOut, TrainConfig

_FINE = "Fine-tuning"
_CARD = "router_core.offline.card"
"""Written last; imported first, so that what it needs is missed before hours of training."""
MIN_PAIRS = 16
"""Labelled pairs below which nothing can be learned and held out as well."""

FEW_PAIRS = 32
"""The fewest that we measured; docs/feedback.md has the figures."""

_NEEDS_TORCH = "training needs {name!r}: pip install 'reward-router[train]'"


class Mode(StrEnum):
    """Which weights of a transformer are trained."""

    FULL = "full"
    LORA = "lora"


class Precision(StrEnum):
    """Number format of fine-tuning's passes."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


def train(
    data: Annotated[Path, typer.Argument(help="JSONL of labelled pairs with verdicts (docs/data.md).")],
    out: Annotated[Path, typer.Option(help="Directory of the checkpoint; replaced if it exists.")],
    pool: Annotated[
        str | None, typer.Option(help="RMs, comma-separated, in arm order (default: all of the data).")
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="static, minilm, smollm2-135m or torch:DIR; NAME@bf16 runs it in half precision.")
    ] = "static",
    lambda_bt: Annotated[float, typer.Option(min=0, help="Weight of the Bradley-Terry loss over RMs.")] = 1.0,
    lambda_cls: Annotated[float, typer.Option(min=0, help="Weight of the loss of 'is this RM right here'.")] = 1.0,
    no_cls: Annotated[
        bool, typer.Option("--no-cls", help="The paper's 'w/o CLS': the same as --lambda-cls 0.")
    ] = False,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Count every couple of RMs alike, however often one beats the other.")
    ] = False,
    consensus: Annotated[
        bool,
        typer.Option(
            "--consensus",
            help="Rows need no label: answers are estimated from where the RMs agree; labels that there are count.",
        ),
    ] = False,
    shipped_kinds: Annotated[
        bool,
        typer.Option(
            "--shipped-kinds/--no-shipped-kinds",
            help="With fewer than 256 pairs, start from the kinds of texts that come with the package.",
        ),
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of every random choice.")] = 0,
    cache: Cache = None,
    use_cache: UseCache = True,
    device: Annotated[str, typer.Option(help="Where transformers run, as torch names it: cpu, cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a sentence.")] = False,
    skip_bad_rows: SkipBadRows = False,
    finetune: Annotated[
        Mode | None,
        typer.Option(help="Train the transformer, too: all its weights, or adapters.", rich_help_panel=_FINE),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run whose state is in OUT.partial.", rich_help_panel=_FINE)
    ] = False,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the pairs (default: 2).", rich_help_panel=_FINE)
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Of the transformer (default: 3e-5 full, 3e-4 lora).", rich_help_panel=_FINE),
    ] = None,
    pairs_per_step: Annotated[
        int | None, typer.Option(min=1, help="Pairs of one optimiser step (default: 16).", rich_help_panel=_FINE)
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of one pass; what bounds memory (default: by device).", rich_help_panel=_FINE),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=16, help="Longest text (default: the model's, 1024).", rich_help_panel=_FINE)
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Of the adapters (default: 8).", rich_help_panel=_FINE)
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Of the passes (default: fp32).", rich_help_panel=_FINE)
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.", rich_help_panel=_FINE)
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Of a CPU (default: 1).", rich_help_panel=_FINE)] = None,
) -> None:
    """Learn from labelled pairs where each reward model is strong; `serve --checkpoint OUT` starts from it.

    With the static encoder this takes seconds on a CPU. A transformer is read once and its encodings are kept; with
    --finetune it is trained as well, and stored in the checkpoint.
    """
    tuning = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "pairs_per_step": pairs_per_step,
        "batch_tokens": batch_tokens,
        "max_tokens": max_tokens,
        "lora_rank": lora_rank,
        "precision": None if precision is None else precision.value,
        "gradient_checkpointing": gradient_checkpointing or None,
        "threads": threads,
    }
    given = {name: value for name, value in tuning.items() if value is not None}
    _check_options(given, finetune, resume, no_cls, lambda_bt, lambda_cls)
    _check_target(out)
    started = time.perf_counter()
    notes = Console(stderr=True)
    reader = DataReader(notes, skip_bad_rows)
    known = None
    if consensus:
        if finetune is not None:
            raise ConfigurationError("--consensus with --finetune: train on estimated answers without it, or label")
        pairs, known = partly_labelled(reader.rows(data))
    else:
        pairs = reader.pairs(data)
    asked = pool_names(pairs)
    _require_enough(len(pairs), notes)
    names = parse_pool(pool) or asked
    losses: dict[str, Any] = {
        "lambda_bt": lambda_bt,
        "lambda_cls": 0.0 if no_cls else lambda_cls,
        "balanced": balanced,
        "seed": seed,
    }
    if finetune is None:
        encodings = encodings_directory(cache, use=use_cache)
        checkpoint, compared = _fit_frozen(
            pairs, names, out, encoder, encodings, device, losses, shipped_kinds, notes, known
        )
    else:
        settings = {"mode": finetune.value, **losses, **given}
        checkpoint, compared = _fine_tune(pairs, names, out, encoder, device, settings, resume, notes)
    _tell(checkpoint, compared, len(pairs), out, time.perf_counter() - started, as_json)
    reader.tell()


def _check_options(
    given: dict[str, Any], finetune: Mode | None, resume: bool, no_cls: bool, lambda_bt: float, lambda_cls: float
) -> None:
    without = [f"--{name.replace('_', '-')}" for name in given] + (["--resume"] if resume else [])
    if finetune is None and without:
        raise ConfigurationError(
            f"{', '.join(without)}: only for fine-tuning; add --finetune full or lora, or leave out"
        )
    if finetune is Mode.FULL and "lora_rank" in given:
        raise ConfigurationError("--lora-rank: only for --finetune lora; leave it out or train adapters")
    if lambda_bt == 0 and (no_cls or lambda_cls == 0):
        raise ConfigurationError(
            "--lambda-bt 0 without the other loss leaves nothing to learn; give one of them a weight"
        )


def _require_enough(count: int, notes: Console) -> None:
    """Say how many pairs one needs where there are few.

    Raises:
        ConfigurationError: there are too few.
    """
    if count >= FEW_PAIRS:
        return
    needed = (
        "four reward models that are good at different things needed 32 pairs to be ahead of the best of them, nine "
        "published ones 128 to 256 (docs/feedback.md, How many labelled pairs)"
    )
    if count < MIN_PAIRS:
        raise ConfigurationError(
            f"{count} pairs are too few to learn from: give at least {MIN_PAIRS}; {needed}. Until then serve without a "
            "checkpoint, or with policy majority"
        )
    notes.print(f"[yellow]note[/] {count} pairs are few: {needed}", highlight=False, soft_wrap=True)


def _check_target(out: Path) -> None:
    """Find out before an hour's training what `Checkpoint.save` would say after it."""
    if out.exists() and not (out / METADATA_FILE).is_file() and (out.is_file() or any(out.iterdir())):
        raise ConfigurationError(f"{out}: exists and is not a checkpoint; give another directory")


def _fit_frozen(
    pairs: Sequence[LabelledPair],
    names: Sequence[str],
    out: Path,
    encoder: str,
    encodings: Path | None,
    device: str,
    losses: dict[str, Any],
    kinds_shipped: bool,
    notes: Console,
    known: NDArray[np.bool_] | None = None,
) -> tuple[Checkpoint, Compared]:
    """Fit and save; `known` says which labels are, where answers are estimated, and is None where all are."""
    try:
        import_module(_CARD)
        from router_core.dataset import pool_names
        from router_core.offline.shipped import shipped_kinds
        from router_core.offline.train import TrainConfig, fit, pair_features
    except ImportError as error:
        raise ConfigurationError(_NEEDS_TORCH.format(name=error.name)) from error
    with _bar(notes) as progress:
        task = progress.add_task("embedding", total=None, visible=False)

        def embedded(done: int, of: int) -> None:
            progress.update(task, completed=done, total=of, visible=True)

        backbone = _load(encoder, encodings, device, embedded)
        config = TrainConfig(**losses)
        features = pair_features(pairs, backbone)
        found = None
        if known is not None:
            found = _agreement(pairs, features, known, config.seed, notes)
            pairs = with_answers(pairs, found)
        kinds = shipped_kinds(backbone, len(pairs), len(pool_names(pairs))) if kinds_shipped else None
        checkpoint, held_out = fit(
            pairs, names, backbone, config, features, answers=None if found is None else found.answers, kinds=kinds
        )
    if found is not None:
        checkpoint = replace(checkpoint, metrics={**checkpoint.metrics, **found.metrics()})
    if kinds is not None:
        notes.print(
            f"{len(pairs)} pairs are few: the kinds of texts are those that come with the package (docs/offline.md)"
        )
    checkpoint.save(out)
    return checkpoint, _describe(out, checkpoint, pairs, held_out, config)


def _agreement(
    pairs: Sequence[LabelledPair],
    features: NDArray[np.float32],
    known: NDArray[np.bool_],
    seed: int,
    notes: Console,
) -> Consensus:
    """Estimate the answers from all RMs of the data, and say how far to trust them."""
    witnesses = pool_names(pairs)
    found = estimate(pairs, witnesses, features, np.random.default_rng(seed), known)
    sure = float(found.answers[~known].max(axis=1).mean()) if (~known).any() else 1.0
    notes.print(
        f"{int((~known).sum())} answers estimated from the agreement of {len(witnesses)} RMs, on average with "
        f"probability {sure:.3f}. All figures below take them as true.",
        highlight=False,
    )
    if not found.labelled:
        notes.print(
            "[yellow]note[/] no row has a label: whether RMs err together cannot be told; label fifty rows drawn at "
            "random, or audit the run (docs/audits.md)",
            highlight=False,
        )
    elif found.overstated:
        notes.print(
            f"[yellow]note[/] the RMs err together: of {found.labelled} labelled rows agreement claims "
            f"{found.claimed:.3f} and {found.observed:.3f} are right; audit the run, or label more (docs/audits.md)",
            highlight=False,
        )
    return found


def _fine_tune(
    pairs: Sequence[LabelledPair],
    names: Sequence[str],
    out: Path,
    encoder: str,
    device: str,
    settings: dict[str, Any],
    resume: bool,
    notes: Console,
) -> tuple[Checkpoint, Compared]:
    try:
        import_module(_CARD)
        from router_core.offline.finetune import FinetuneConfig, fine_tune, resumable
    except ImportError as error:
        raise ConfigurationError(_NEEDS_TORCH.format(name=error.name)) from error
    config = FinetuneConfig(**settings)
    work = out.with_name(out.name + ".partial")
    if resumable(work) and not resume:
        raise ConfigurationError(f"{work}: holds an unfinished run; go on with --resume, or remove it to start anew")
    try:
        with _bar(notes) as progress:
            task = progress.add_task("fine-tuning", total=None)

            def step(done: int, of: int, loss: float) -> None:
                progress.update(task, completed=done, total=of, description=f"fine-tuning, loss {loss:.3f}")

            tuned = fine_tune(pairs, names, _load(encoder, None, device, None), config, work, resume, step)
    except KeyboardInterrupt:
        notes.print(f"stopped; what was learned is in {work}: the same command with --resume goes on", highlight=False)
        raise
    tuned.checkpoint.save(out)
    compared = _describe(out, tuned.checkpoint, pairs, tuned.held_out, config, tuned.validation)
    shutil.rmtree(work)
    return tuned.checkpoint, compared


def _load(encoder: str, encodings: Path | None, device: str, progress: Any) -> Backbone:
    from router_core.encoder.registry import load_backbone

    return load_backbone(encoder, cache=encodings, device=device, progress=progress)


def _describe(
    out: Path,
    checkpoint: Checkpoint,
    pairs: Sequence[LabelledPair],
    held_out: HeldOut,
    config: TrainConfig | FinetuneConfig,
    rows: NDArray[np.int64] | None = None,
) -> Compared:
    from router_core.offline.card import write_card

    calibrated = checkpoint.prior_form is PriorForm.CALIBRATED
    scores = held_out.probabilities if calibrated else held_out.bt_scores
    return write_card(out, checkpoint, pairs, held_out.probabilities, held_out.correctness, config, rows, scores)


@contextmanager
def _bar(notes: Console) -> Iterator[Progress]:
    """A progress bar on standard error, gone when the work is done; nothing where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as progress:
        yield progress


def _tell(checkpoint: Checkpoint, compared: Compared, pairs: int, out: Path, seconds: float, as_json: bool) -> None:
    digest = checkpoint.digest
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "out": str(out),
                    "digest": digest,
                    "seconds": seconds,
                    "compared": asdict(compared),
                    **checkpoint.metrics,
                }
            )
        )
        return
    head = "cls" if checkpoint.prior_form is PriorForm.CALIBRATED else "bt"
    Console().print(
        f"{pairs} pairs, {len(checkpoint.pool)} RMs: held-out routing accuracy "
        f"[bold]{checkpoint.metrics[f'routing_accuracy_{head}']:.3f}[/]; on the same {compared.n} pairs the best "
        f"single RM ({compared.best_single}) has {compared.best_single_accuracy:.3f}, "
        f"majority vote {compared.majority:.3f} "
        f"({seconds:.1f} s). These pairs also chose when to stop: `evaluate` says what to expect of others. "
        f"Checkpoint in {out}, digest {digest[:12]}; README.md there says more",
        highlight=False,
    )
