"""What it gains that a batch is encoded and asked about in pieces, by the speed of encoder and RMs, in one run.

    python -m loadtests.pipeline [--json OUT] [--rounds N] [--pieces 0,128]

The real gateway (`service.app.create_app`, real embedded store) once with every `batch_piece_responses` of `--pieces`;
they take turns. RMs are four stub workers, each a device that takes what it is asked in turn at a steady rate; the
encoder is such a device too, or computes in the gateway. So nothing but the order of waiting differs, and no GPU is
needed; what a GPU shared by encoder and RMs gains is less.

Measured for each: pairs/s of `/reward/batch`, one batch at a time and two, and how long a single `/reward` takes that
comes beside the batches.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import uvloop

from loadtests.client import load, request_bytes
from loadtests.gateway import Pair, long_pairs
from loadtests.report import describe, machine, table, write_json
from loadtests.scene import scene
from loadtests.stub import MODELS
from service.pool import ModelEntry, PoolFile, dump_pool

SINGLE_PAUSE_SECONDS = 0.02
"""Between two single requests beside the batches."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Speeds of encoder and RMs, and what is sent.

    Attributes:
        name: for the table.
        encoder: see `loadtests.stub`.
        pairs_per_second: of each of the RMs.
        batch: pairs of one request.
        requests: of them, per turn and batch at a time.
    """

    name: str
    encoder: str
    pairs_per_second: float
    batch: int
    requests: int


SETTINGS = (
    Setting("encoder served, 272 pairs/s; 4 RMs of 90", "served:272:64", 90, 1024, 1),
    Setting("the same, batches of 256", "served:272:64", 90, 256, 3),
    Setting("the same, 4 RMs of 340", "served:272:64", 340, 1024, 1),
    Setting("static encoder in the gateway; 4 RMs of 340", "static", 340, 1024, 2),
    Setting("encoder of no cost; 4 RMs of 340", "hash:64", 340, 1024, 2),
)
"""272 and 340 pairs/s are what one H100 gave for an encoder of 135M and for an RM of 0.6B."""


@dataclass(slots=True)
class Taken:
    """The figures of one gateway in all its turns.

    Attributes:
        alone: pairs/s with one batch at a time, per turn.
        paired: with two.
        singles: seconds of single requests beside the batches.
    """

    alone: list[float]
    paired: list[float]
    singles: list[float]

    def summary(self) -> dict[str, float]:
        """Medians."""
        return {
            "pairs_per_second": median(self.alone),
            "pairs_per_second_of_two": median(self.paired),
            "single_p50_ms": median(self.singles) * 1e3,
            "single_p95_ms": float(np.quantile(self.singles, 0.95)) * 1e3,
        }


async def measure(port: int, setting: Setting, batches: Sequence[bytes], single: bytes, taken: Taken) -> None:
    """One turn of one gateway."""
    for concurrency, into in ((1, taken.alone), (2, taken.paired)):
        count = setting.requests * concurrency
        ended = asyncio.Event()
        beside = asyncio.create_task(_singles(port, single, ended)) if concurrency == 1 else None
        _, wall = await load(port, batches, count=count, concurrency=concurrency)
        ended.set()
        if beside is not None:
            taken.singles.extend(await beside)
        into.append(count * setting.batch / wall)


async def _singles(port: int, message: bytes, ended: asyncio.Event) -> list[float]:
    seconds: list[float] = []
    while not ended.is_set():
        await asyncio.sleep(SINGLE_PAUSE_SECONDS)
        seconds.extend((await load(port, [message], count=1, concurrency=1))[0])
    return seconds


def batch_messages(pairs: Sequence[Pair], size: int) -> list[bytes]:
    """`/reward/batch` requests of `size` pairs each."""
    documents = [
        {"items": [{"prompt": pair.prompt, "responses": pair.responses} for pair in pairs[start : start + size]]}
        for start in range(0, len(pairs) - size + 1, size)
    ]
    return [request_bytes("/reward/batch", json.dumps(document).encode()) for document in documents]


async def run(rounds: int, pieces: Sequence[int], settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Measure every setting; everything that is started is ended."""
    pairs = long_pairs(max(setting.batch for setting in settings))
    single = request_bytes("/reward", pairs[0].reward())
    cores = sorted(os.sched_getaffinity(0))
    pinned = (cores[0], cores[-1]) if len(cores) > 1 else None
    out = []
    for setting in settings:
        with scene(pinned) as place:
            folder, children = place.folder, place.children
            children.start("stub", "stub", "/health", *_words(pairs_per_second=setting.pairs_per_second), tested=False)
            pool = folder / "pool.yaml"
            urls = (f"http://127.0.0.1:{children.ports['stub']}",)
            models = tuple(ModelEntry(name=name, urls=urls, rendering="template") for name in MODELS)
            dump_pool(PoolFile(name="bench", models=models), pool)
            taken = {piece: Taken([], [], []) for piece in pieces}
            for piece in pieces:
                run = f"piece{piece}"
                words = _words(pool=pool, store=place.store_url, run=run, encoder=setting.encoder, piece=piece)
                children.start(f"piece{piece}", "gateway", "/readyz", *words, tested=True)
            batches = batch_messages(pairs, setting.batch)
            for piece in pieces:
                # The first batch opens connections, and loads what is loaded late.
                await load(children.ports[f"piece{piece}"], batches, count=1, concurrency=1)
            for _ in range(rounds):
                for piece in pieces:
                    await measure(children.ports[f"piece{piece}"], setting, batches, single, taken[piece])
        out.append({"setting": setting.name, "pieces": {piece: taken[piece].summary() for piece in pieces}})
    return out


def _words(**options: object) -> list[str]:
    return list(chain.from_iterable((f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.pipeline", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each gateway [default: 3]")
    parser.add_argument("--pieces", default="0,128", help="values of batch_piece_responses [default: 0,128]")
    parser.add_argument("--only", default="", help="settings whose name holds this")
    options = parser.parse_args(arguments)
    pieces = [int(piece) for piece in options.pieces.split(",")]
    facts, began = machine(), time.perf_counter()
    print(describe(facts))
    settings = [setting for setting in SETTINGS if options.only in setting.name]
    figures = uvloop.run(run(options.rounds, pieces, settings))
    print(f"{options.rounds} interleaved rounds, {time.perf_counter() - began:.0f} s; piece 0: the whole batch at once")
    table(
        "/reward/batch, and single requests beside it",
        ("what", "piece", "pairs/s", "times", "pairs/s, 2 at a time", "times", "single p50 ms", "p95 ms"),
        [
            (
                row["setting"] if piece == pieces[0] else "",
                str(piece),
                f"{own['pairs_per_second']:,.0f}",
                f"{own['pairs_per_second'] / row['pieces'][pieces[0]]['pairs_per_second']:.2f}",
                f"{own['pairs_per_second_of_two']:,.0f}",
                f"{own['pairs_per_second_of_two'] / row['pieces'][pieces[0]]['pairs_per_second_of_two']:.2f}",
                f"{own['single_p50_ms']:.1f}",
                f"{own['single_p95_ms']:.1f}",
            )
            for row in figures
            for piece, own in row["pieces"].items()
        ],
    )
    write_json(options.json, {"machine": facts, "settings": figures})


if __name__ == "__main__":
    main()
