"""`reward-router train`: from labelled pairs to a checkpoint."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from service.errors import ConfigurationError


def train(
    data: Annotated[Path, typer.Argument(help="JSONL of labelled pairs with each RM's scores (docs/data.md).")],
    out: Annotated[Path, typer.Option(help="Directory of the checkpoint; replaced if it exists.")],
    pool: Annotated[
        str | None, typer.Option(help="RMs, comma-separated, in arm order [default: all of the data].")
    ] = None,
    encoder: Annotated[str, typer.Option(help="static, minilm, smollm2-135m or torch:DIR.")] = "static",
    seed: Annotated[int, typer.Option(help="Seed of the fit.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a sentence.")] = False,
) -> None:
    """Learn from labelled pairs where each reward model is strong; `serve --checkpoint OUT` starts from it.

    With the static encoder this takes seconds on a CPU.
    """
    from router_core.dataset import load_pairs, pool_names
    from router_core.encoder.registry import load_backbone

    try:
        from router_core.offline.train import TrainConfig
        from router_core.offline.train import train as fit
    except ImportError as error:
        raise ConfigurationError(f"training needs torch ({error}): pip install 'reward-router[train]'") from error
    started = time.perf_counter()
    pairs = load_pairs(data)
    names = parse_pool(pool) or pool_names(pairs)
    checkpoint = fit(pairs, names, load_backbone(encoder), TrainConfig(seed=seed))
    digest = checkpoint.save(out)
    seconds = time.perf_counter() - started
    if as_json:
        typer.echo(json.dumps({"out": str(out), "digest": digest, "seconds": seconds, **checkpoint.metrics}))
        return
    accuracy = checkpoint.metrics["routing_accuracy_cls"]
    Console().print(
        f"{len(pairs)} pairs, {len(names)} RMs: held-out routing accuracy [bold]{accuracy:.3f}[/] "
        f"(d={checkpoint.d}, {seconds:.1f} s). Checkpoint in {out}, digest {digest[:12]}",
        highlight=False,
    )


def parse_pool(text: str | None) -> tuple[str, ...]:
    """Names of a comma-separated list; empty for none."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())
