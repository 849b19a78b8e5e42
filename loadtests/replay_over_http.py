"""Recorded pairs through a running gateway with one recorded worker per RM, beside the same replay in process.

    python -m loadtests.replay_over_http [DATA] [--pool NAMES] [--policies NAMES] [--seeds N] [--json OUT]

One grouped half of the data trains the checkpoint, the other half is the stream. Both replays use the same checkpoint,
the same orders and the same policies; they differ in HTTP, the store, the learner's small delay, and the draws. What
`evaluate --checkpoint` makes of the same half, without learning, stands in the first column; below the table the time
of a draw that replies tell (`timings.draw_ms`). RMs that gave verdicts alone score 1 for the response that they prefer.
More than 12 RMs share one worker process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from router_core.combine import wanted_combined
from router_core.dataset import grouped_split, load_pairs, pool_names, write_pairs
from router_core.encoder.registry import load_backbone
from router_core.offline.table import judge_checkpoint
from router_core.offline.train import pair_features, train
from router_core.prior import PriorForm
from router_core.records import TIE, LabelledPair, Signal
from router_core.replay import complete_pairs, replay, score_scale, summarise, tabulate
from service.cli.processes import ProcessGroup, free_port
from service.cli.up import WORKER_SECONDS, running_stack
from service.lab.replaying.over_http import replay_over_http
from service.pool import ModelEntry, PoolFile
from service.priors import build_prior
from service.settings import EMBEDDED, read_settings

DEFAULT_DATA = os.environ.get("RB9_DEV", "../shared/data/rb9_dev.jsonl")
POLICIES = (
    "bayesian",
    "cascade:1.5",
    "cascade:2",
    "stacked",
    "bayesian:none",
    "offline",
    "laser",
    "random",
    "majority",
    "uwo",
)


MOST_WORKERS = 12


def main() -> None:
    """Run both and print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=DEFAULT_DATA, type=Path)
    parser.add_argument("--pool", help="RMs, comma-separated [default: all of the data]")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pairs = load_pairs(arguments.data)
    pool = tuple(arguments.pool.split(",")) if arguments.pool else pool_names(pairs)
    complete, _ = complete_pairs(pairs, pool)
    policies = tuple(arguments.policies.split(","))
    chosen = [_scored(pairs[i], pool) for i in complete]
    figures = compare(chosen, pool, policies, range(arguments.seeds), arguments.concurrency)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


def compare(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    policies: Sequence[str],
    seeds: Sequence[int],
    concurrency: int,
) -> dict[str, object]:
    """Train on one half, stream the other in both ways."""
    console = Console()
    inside, outside = grouped_split(pairs, 0.5, np.random.default_rng(0))
    backbone = load_backbone("static")
    features = pair_features(pairs, backbone)
    checkpoint = train([pairs[i] for i in inside], pool, backbone, features=features[inside])
    stream = [pairs[i] for i in outside]
    table = tabulate(stream, pool)
    in_process = replay(
        table,
        checkpoint.fuse.apply(features[outside]),
        policies,
        priors=lambda form: build_prior(
            read_settings(), checkpoint, len(pool), checkpoint.d, None if form is None else PriorForm(form)
        ),
        signal=Signal.PREFERENCE,
        seeds=seeds,
        scale=score_scale([pairs[i] for i in inside], pool),
        combination=checkpoint.combination,
    )
    judged = judge_checkpoint(checkpoint, stream, features[outside], checkpoint.scores, wanted_combined(policies))
    draw_ms: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoint"
        checkpoint.save(directory)
        with ProcessGroup(Path(folder) / "workers") as workers:
            recorded = Path(folder) / "pairs.jsonl"
            write_pairs(recorded, stream)
            entries = _start_workers(workers, recorded, pool)
            with running_stack(
                PoolFile(name="recorded", models=entries),
                directory,
                data_dir=Path(folder),
                host="127.0.0.1",
                port=0,
                worker_port=0,
                store_url=EMBEDDED,
                console=console,
            ) as stack:
                over_http = asyncio.run(
                    replay_over_http(
                        stream,
                        table,
                        policies,
                        seeds,
                        stack.url,
                        Signal.PREFERENCE,
                        concurrency,
                        None,
                        lambda _: None,
                        lambda _, reply: draw_ms.append(reply["timings"]["draw_ms"]),
                    )
                )
    shown = RichTable(title=f"{len(stream)} pairs streamed, {len(pool)} recorded workers, {len(seeds)} seeds")
    for column in (
        "policy",
        "evaluate",
        "calls",
        "in process",
        "95% interval",
        "calls",
        "over HTTP",
        "95% interval",
        "calls",
    ):
        shown.add_column(column, justify="left" if column == "policy" else "right")
    figures: dict[str, object] = {"n": len(stream), "pool": list(pool), "seeds": len(seeds)}
    for name in policies:
        here, there = summarise(in_process[name], table), summarise(over_http[name], table)
        # Routing without feedback is what `evaluate` calls `offline`.
        row = name if name in judged.rows else "offline"
        offline = {"accuracy": float(judged.rows[row].mean()), "calls": judged.calls[row]}
        shown.add_row(
            name,
            f"{offline['accuracy']:.3f}",
            f"{offline['calls']:.2f}",
            *[
                cell
                for one in (here, there)
                for cell in (
                    f"{one.accuracy:.3f}", "{:.3f} – {:.3f}".format(*one.ci95), f"{one.calls_per_instance:.2f}"
                )
            ],
        )  # fmt: skip
        figures[name] = {
            "evaluate": offline,
            **{
                way: {"accuracy": one.accuracy, "ci95": one.ci95, "calls": one.calls_per_instance}
                for way, one in (("in_process", here), ("over_http", there))
            },
        }
    middle, late = np.percentile(draw_ms, [50, 99])
    shown.caption = f"a draw over HTTP: median {middle:.2f} ms, 99 in 100 within {late:.2f} ms"
    figures["draw_ms"] = {"p50": float(middle), "p99": float(late)}
    console.print(shown)
    return figures


def _scored(pair: LabelledPair, pool: Sequence[str]) -> LabelledPair:
    """The pair with scores of every RM: 1 and 0 from a verdict alone, ½ each from a tie."""
    scores = dict(pair.scores)
    for name in pool:
        if name not in scores:
            verdict, n = pair.verdicts[name], len(pair.instance.responses)
            scores[name] = tuple(0.5 if verdict == TIE else float(i == verdict) for i in range(n))
    return replace(pair, scores=scores)


def _start_workers(workers: ProcessGroup, recorded: Path, pool: Sequence[str]) -> tuple[ModelEntry, ...]:
    """One recorded worker process per RM, or one for all where they are many."""
    groups = [[name] for name in pool] if len(pool) <= MOST_WORKERS else [list(pool)]
    entries = {}
    for number, names in enumerate(groups):
        port, words = free_port(0), [word for name in names for word in ("--model", name)]
        workers.start(f"worker-{number}", ["worker", "--recorded", str(recorded), *words, "--port", str(port)])
        for name in names:
            entries[name] = ModelEntry(name=name, urls=(f"http://127.0.0.1:{port}",), rendering="template")
    for number, names in enumerate(groups):
        url = entries[names[0]].urls[0]
        workers.wait_until_ready(f"{url}/health", f"worker-{number}", WORKER_SECONDS, lambda: None)
    return tuple(entries[name] for name in pool)


if __name__ == "__main__":
    main()
