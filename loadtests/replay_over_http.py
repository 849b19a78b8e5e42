"""Recorded pairs through a running gateway with one recorded worker per RM, beside the same replay in process.

    python -m loadtests.replay_over_http [DATA] [--pool NAMES] [--seeds N] [--json OUT]

One grouped half of the data trains the checkpoint, the other half is the stream. Both replays use the same checkpoint,
the same orders and the same policies; they differ in HTTP, the store, the learner's small delay, and the draws.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from router_core.dataset import grouped_split, load_pairs, pool_names
from router_core.encoder.registry import load_backbone
from router_core.offline.train import pair_features, train
from router_core.prior import PriorForm
from router_core.records import LabelledPair, Signal
from router_core.replay import replay, score_scale, summarise, tabulate
from service.cli.processes import ProcessGroup, free_port
from service.cli.replay_http import replay_over_http
from service.cli.serve import read_settings
from service.cli.up import WORKER_SECONDS, running_stack
from service.pool import ModelEntry, PoolFile
from service.priors import build_prior
from service.settings import EMBEDDED

DEFAULT_DATA = os.environ.get("RB9_DEV", "../shared/data/rb9_dev.jsonl")
POLICIES = ("bayesian", "bayesian:none", "offline", "laser", "random", "majority", "uwo")


def main() -> None:
    """Run both and print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=DEFAULT_DATA, type=Path)
    parser.add_argument("--pool", help="RMs, comma-separated [default: all of the data]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pairs = load_pairs(arguments.data)
    pool = tuple(arguments.pool.split(",")) if arguments.pool else pool_names(pairs)
    figures = compare(arguments.data, pairs, pool, range(arguments.seeds), arguments.concurrency)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


def compare(
    data: Path, pairs: Sequence[LabelledPair], pool: Sequence[str], seeds: Sequence[int], concurrency: int
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
        POLICIES,
        priors=lambda form: build_prior(
            read_settings(), checkpoint, len(pool), checkpoint.d, None if form is None else PriorForm(form)
        ),
        signal=Signal.PREFERENCE,
        seeds=seeds,
        scale=score_scale([pairs[i] for i in inside], pool),
    )
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoint"
        checkpoint.save(directory)
        with ProcessGroup(Path(folder) / "workers") as workers:
            entries = _start_workers(workers, data, pool)
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
                        stream, table, POLICIES, seeds, stack.url, Signal.PREFERENCE, concurrency, None, lambda _: None
                    )
                )
    shown = RichTable(title=f"{len(stream)} pairs streamed, {len(pool)} recorded workers, {len(seeds)} seeds")
    for column in ("policy", "in process", "95% interval", "over HTTP", "95% interval"):
        shown.add_column(column, justify="left" if column == "policy" else "right")
    figures: dict[str, object] = {"n": len(stream), "pool": list(pool), "seeds": len(seeds)}
    for name in POLICIES:
        here, there = summarise(in_process[name], table), summarise(over_http[name], table)
        shown.add_row(
            name,
            f"{here.accuracy:.3f}",
            "{:.3f} – {:.3f}".format(*here.ci95),
            f"{there.accuracy:.3f}",
            "{:.3f} – {:.3f}".format(*there.ci95),
        )
        figures[name] = {
            "in_process": {"accuracy": here.accuracy, "ci95": here.ci95},
            "over_http": {"accuracy": there.accuracy, "ci95": there.ci95},
        }
    console.print(shown)
    return figures


def _start_workers(workers: ProcessGroup, data: Path, pool: Sequence[str]) -> tuple[ModelEntry, ...]:
    """One recorded worker process per RM."""
    entries = []
    for name in pool:
        port = free_port(0)
        child = f"worker-{name}"
        workers.start(child, ["worker", "--recorded", str(data), "--model", name, "--port", str(port)])
        entries.append(ModelEntry(name=name, urls=(f"http://127.0.0.1:{port}",), rendering="template"))
    for entry in entries:
        workers.wait_until_ready(f"{entry.urls[0]}/health", f"worker-{entry.name}", WORKER_SECONDS, lambda: None)
    return tuple(entries)


if __name__ == "__main__":
    main()
