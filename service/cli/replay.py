"""`reward-router replay`: recorded pairs through the policies, in process or through a running gateway over HTTP."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from router_core.checkpoint import Checkpoint
from router_core.dataset import grouped_folds, load_pairs, pool_names
from router_core.encoder.fuse import Fuse, PairEncoder
from router_core.encoder.registry import load_backbone
from router_core.prior import Prior
from router_core.records import LabelledPair, Signal
from router_core.replay import Table, Trace, parse_policy, report, tabulate
from router_core.replay import replay as replay_in_process
from service.cli.http import GatewayClient
from service.cli.serve import read_settings
from service.cli.train import parse_pool
from service.errors import ConfigurationError
from service.wiring import build_prior

DEFAULT_POLICIES = "bayesian,offline,random,majority"

Advance = Callable[[int], None]


def replay(
    data: Annotated[Path, typer.Argument(help="JSONL of labelled pairs with each RM's scores (docs/data.md).")],
    pool: Annotated[
        str | None, typer.Option(help="RMs, comma-separated, in arm order [default: all of the data].")
    ] = None,
    policies: Annotated[
        str,
        typer.Option(
            help="Comma-separated; `singles` stands for single:MODEL of every RM; `bayesian:FORM` sets the prior."
        ),
    ] = DEFAULT_POLICIES,
    signal: Annotated[
        Signal, typer.Option(help="Feedback that is sent: preference, or reward (was the asked RM right).")
    ] = (Signal.PREFERENCE),
    seeds: Annotated[int, typer.Option(min=1, help="Passes per policy; a seed fixes the order and the draws.")] = 3,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint whose prior is used. Not trained on DATA, please.")
    ] = None,
    encoder: Annotated[str, typer.Option(help="Encoder where there is no checkpoint, and for --folds.")] = "static",
    folds: Annotated[
        int, typer.Option(help="Grouped cross-validation: train on the other folds, stream each fold. 0: off.")
    ] = 0,
    url: Annotated[
        str | None, typer.Option(help="Replay through this running gateway, over HTTP with feedback.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="With --url: instances in flight.")] = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many pairs.")] = None,
    api_key: Annotated[str | None, typer.Option(help="With --url: API key.", envvar="REWARD_ROUTER_API_KEY")] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file; `-` for standard output.")
    ] = None,
) -> None:
    """What would each policy have earned on these recorded pairs?

    Prints accuracy (was the reward's verdict right) with a 95% interval, RM calls per instance and regret per policy.
    """
    pairs = load_pairs(data)[:limit]
    names = parse_pool(pool) or pool_names(pairs)
    table = tabulate(pairs, names)
    wanted = _policy_names(policies, names)
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as progress:
        task = progress.add_task("replay", total=len(pairs) * len(wanted) * seeds)

        def advance(done: int) -> None:
            progress.advance(task, done)

        if url is not None:
            _check_remote(wanted)
            traces = asyncio.run(
                replay_over_http(pairs, table, wanted, range(seeds), url, signal, concurrency, api_key, advance)
            )
        elif folds:
            traces = cross_validated(pairs, table, wanted, range(seeds), encoder, folds, signal, advance)
        else:
            x, priors = _contexts_and_priors(pairs, names, checkpoint, encoder)
            traces = replay_in_process(
                table, x, wanted, priors=priors, signal=signal, seeds=range(seeds), on_step=advance
            )
    figures = report(traces, table)
    if json_out is not None and str(json_out) == "-":
        typer.echo(json.dumps(figures))
        return
    if json_out is not None:
        json_out.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    print_report(figures)


def print_report(figures: dict[str, Any], console: Console | None = None) -> None:
    """The table that people read."""
    table = RichTable(title=f"{figures['n']} pairs")
    for column, justify in (
        ("policy", "left"),
        ("accuracy", "right"),
        ("95% interval", "right"),
        ("calls", "right"),
        ("regret", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, row in sorted(figures["policies"].items(), key=lambda item: -item[1]["accuracy"]):
        low, high = row["ci95"]
        table.add_row(
            name,
            f"{row['accuracy']:.3f}",
            f"{low:.3f} – {high:.3f}",
            f"{row['calls_per_instance']:g}",
            f"{row['regret']:.3f}",
        )
    best = figures["best_single"]
    table.add_section()
    table.add_row(
        f"best single: {best['model']}",
        f"{best['accuracy']:.3f}",
        "",
        "1",
        f"{figures['oracle'] - best['accuracy']:.3f}",
    )
    table.add_row("oracle", f"{figures['oracle']:.3f}", "", "", "0.000")
    (console or Console()).print(table)


def cross_validated(
    pairs: Sequence[LabelledPair],
    table: Table,
    policies: Sequence[str],
    seeds: Sequence[int],
    encoder: str,
    folds: int,
    signal: Signal,
    advance: Advance,
) -> dict[str, Trace]:
    """Train on all folds but one, stream that one, for each fold; groups are never split.

    Every policy starts each fold afresh, so the online stage sees N/folds instances at most.
    """
    try:
        from router_core.offline.train import pair_features, train
    except ImportError as error:
        raise ConfigurationError(f"--folds needs torch ({error}): pip install 'reward-router[train]'") from error
    backbone = load_backbone(encoder)
    features = pair_features(pairs, backbone)
    correct = {name: np.empty((len(seeds), len(pairs))) for name in policies}
    asked = {name: np.empty((len(seeds), len(pairs)), np.int64) for name in policies}
    calls = {}
    for inside, outside in grouped_folds(pairs, folds, np.random.default_rng(0)):
        checkpoint = train([pairs[i] for i in inside], table.pool, backbone, features=features[inside])
        part = Table(table.pool, table.verdicts[outside], table.labels[outside], table.correctness[outside])
        traces = replay_in_process(
            part,
            checkpoint.fuse.apply(features[outside]),
            policies,
            priors=_priors_of(checkpoint, len(table.pool), checkpoint.d),
            signal=signal,
            seeds=seeds,
            on_step=advance,
        )
        for name, trace in traces.items():
            correct[name][:, outside], asked[name][:, outside] = trace.correct, trace.asked
            calls[name] = trace.calls_per_instance
    return {name: Trace(correct[name], asked[name], calls[name]) for name in policies}


async def replay_over_http(
    pairs: Sequence[LabelledPair],
    table: Table,
    policies: Sequence[str],
    seeds: Sequence[int],
    url: str,
    signal: Signal,
    concurrency: int,
    api_key: str | None,
    advance: Advance,
    observe: Callable[[int, dict[str, Any]], None] | None = None,
) -> dict[str, Trace]:
    """Every policy and seed as a fresh run of the gateway: POST /reward, then POST /feedback, pair by pair.

    Args:
        pairs: the stream.
        table: the same, as arrays in the gateway's arm order.
        policies: names as the gateway knows them.
        seeds: each fixes the order of one pass.
        url: the gateway.
        signal: the gateway's signal.
        concurrency: instances in flight.
        api_key: of the gateway.
        advance: told of each instance done.
        observe: told the index and the reply of each instance.
    """
    traces = {}
    suffix = secrets.token_hex(4)
    async with GatewayClient(url, api_key=api_key, connections=concurrency) as client:
        for position, name in enumerate(policies):
            policy, _ = parse_policy(name, table.pool)
            passes = []
            for seed in seeds:
                run = f"replay-{suffix}-{position}-{seed}"
                order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
                passes.append(
                    await _http_pass(client, pairs, table, order, run, name, signal, concurrency, advance, observe)
                )
            traces[name] = Trace(
                np.stack([correct for correct, _ in passes]),
                np.stack([asked for _, asked in passes]),
                float(len(table.pool) if policy.asks_all else 1),
            )
    return traces


async def _http_pass(
    client: GatewayClient,
    pairs: Sequence[LabelledPair],
    table: Table,
    order: Sequence[int],
    run: str,
    policy: str,
    signal: Signal,
    concurrency: int,
    advance: Advance,
    observe: Callable[[int, dict[str, Any]], None] | None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """One policy over the stream in one order, in a run of its own: correct (N,), asked (N,)."""
    correct, asked = np.empty(len(pairs)), np.empty(len(pairs), np.int64)
    arms = {name: k for k, name in enumerate(table.pool)}
    waiting = iter(order)

    async def drain() -> None:
        for i in waiting:
            reply = await _score_and_teach(client, pairs[i], run, policy, signal)
            asked[i] = arms.get(reply["model"], -1)
            preferred = reply["preferred"]
            correct[i] = 0.5 if preferred is None else float(preferred == pairs[i].label)
            if observe is not None:
                observe(i, reply)
            advance(1)

    await asyncio.gather(*(drain() for _ in range(concurrency)))
    return correct, asked


async def _score_and_teach(client: GatewayClient, pair: LabelledPair, run: str, policy: str, signal: Signal) -> Any:
    instance = pair.instance
    reply = await client.post(
        "/reward", {"prompt": instance.prompt, "responses": instance.responses, "run": run, "policy": policy}
    )
    feedback: dict[str, Any] = {"decision_id": reply["decision_id"], "run": run}
    if signal is Signal.PREFERENCE:
        feedback["preferred"] = pair.label
    elif signal is Signal.REWARD:
        preferred = reply["preferred"]
        feedback["reward"] = 0.5 if preferred is None else float(preferred == pair.label)
    else:
        raise ConfigurationError("signal is 'loss': recorded pairs hold no DPO loss; replay 'preference' or 'reward'")
    await client.post("/feedback", feedback)
    return reply


def _check_remote(policies: Sequence[str]) -> None:
    """A gateway has one prior, so a policy with a prior of its own cannot be replayed through it."""
    for name in policies:
        if parse_policy(name, [name.removeprefix("single:")])[1] is not None:
            raise ConfigurationError(
                f"policy {name!r} names a prior, which a gateway fixes at its start (--prior): leave it out, or replay "
                "without --url"
            )


def _policy_names(text: str, pool: Sequence[str]) -> list[str]:
    names: list[str] = []
    for name in parse_pool(text):
        names.extend([f"single:{model}" for model in pool] if name == "singles" else [name])
    for name in names:
        parse_policy(name, pool)
    return names


def _contexts_and_priors(
    pairs: Sequence[LabelledPair], names: Sequence[str], directory: Path | None, encoder: str
) -> tuple[NDArray[np.float32], Callable[[str | None], Prior]]:
    checkpoint = None if directory is None else Checkpoint.load(directory).select_pool(names)
    backbone = load_backbone(encoder if checkpoint is None else checkpoint.encoder_spec)
    fuse = Fuse.identity(backbone.dim) if checkpoint is None else checkpoint.fuse
    x = PairEncoder(backbone, fuse).encode([pair.instance for pair in pairs])
    return x, _priors_of(checkpoint, len(names), fuse.dim)


def _priors_of(checkpoint: Checkpoint | None, n_arms: int, dim: int) -> Callable[[str | None], Prior]:
    def prior(form: str | None) -> Prior:
        return build_prior(read_settings(prior=form or "auto"), checkpoint, n_arms, dim)

    return prior
