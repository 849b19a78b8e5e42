"""What is measured on the running stack: servers alone, the naive chain, the gateway.

Speaks HTTP to ports on loopback; knows nothing of how they were started. `loadtests.gpu.__main__` calls it.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.client import load, request_bytes
from loadtests.gateway import Pair
from loadtests.gpu.stack import Running
from service.encoders.reading import Reading
from service.encoders.wire import EMBEDDINGS_PATH, encode_request
from service.scorers.rm.render import Prepared
from service.scorers.rm.tokens import TokenRendering, load_token_rendering
from service.scorers.transport.http import HttpPool
from service.scorers.wire import CLASSIFY_PATH

CHUNK = 32
"""Pairs of one request where requests hold many."""

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Bodies:
    """Prebuilt request bodies for the pairs, in order.

    Attributes:
        classify: per RM, one request per pair.
        classify_chunks: per RM, one request per `CHUNK` pairs.
        embed: one request per pair.
        embed_chunks: one request per `CHUNK` pairs.
        tokens: median tokens of prompt and response, as the RMs read them.
    """

    classify: dict[str, list[bytes]]
    classify_chunks: dict[str, list[bytes]]
    embed: list[bytes]
    embed_chunks: list[bytes]
    tokens: float


def bodies(pairs: Sequence[Pair], rms: Sequence[Path], encoder: Path) -> Bodies:
    """Everything is tokenized before anything is timed."""
    conversations = [(pair.prompt, response) for pair in pairs for response in pair.responses]
    ids = Reading.load(encoder).token_ids(conversations)
    rendering = load_token_rendering(str(rms[0]))
    prepared = [one for one in rendering.prepare(_groups(pairs)) if isinstance(one, Prepared)]
    return Bodies(
        {rm.name: [_classify(rendering, rm.name, [one]) for one in prepared] for rm in rms},
        {rm.name: [_classify(rendering, rm.name, chunk) for chunk in _chunks(prepared)] for rm in rms},
        [encode_request(ids[2 * i : 2 * i + 2], None) for i in range(len(pairs))],
        [encode_request(ids[2 * i : 2 * (i + CHUNK)], None) for i in range(0, len(pairs), CHUNK)],
        float(np.median([one.size / 2 for one in prepared])),
    )


async def rm_ceiling(running: Running, made: Bodies, pairs: int, concurrency: int) -> Figures:
    """RMs alone, all at once, each pair asked of one of them, `CHUNK` pairs a request: what routing could give at most
    with an encoder that costs nothing; and one RM by itself.
    """
    names = list(running.rms)
    share = -(-pairs // (len(names) * CHUNK))
    lanes = max(concurrency // len(names), 1)
    began = time.perf_counter()
    jobs = [_load(running.rms[name], CLASSIFY_PATH, made.classify_chunks[name], share, lanes) for name in names]
    await asyncio.gather(*jobs)
    together = _pairs(made.classify_chunks[names[0]], share, pairs) * len(names) / (time.perf_counter() - began)
    count = len(made.classify_chunks[names[0]])
    _, wall = await _load(running.rms[names[0]], CLASSIFY_PATH, made.classify_chunks[names[0]], count, concurrency)
    return {"rm_only_pairs_per_second": together, "one_rm_pairs_per_second": pairs / wall}


async def encoder_ceiling(running: Running, made: Bodies, pairs: int, concurrency: int) -> Figures:
    """The encoder's servers alone, `CHUNK` pairs a request, and the time of one pair when nobody else asks."""
    ports = running.encoders
    count, lanes = -(-len(made.embed_chunks) // len(ports)), max(concurrency // len(ports), 1)
    began = time.perf_counter()
    await asyncio.gather(*(_load(port, EMBEDDINGS_PATH, made.embed_chunks, count, lanes) for port in ports))
    together = _pairs(made.embed_chunks, count, pairs) * len(ports) / (time.perf_counter() - began)
    alone, _ = await _load(ports[0], EMBEDDINGS_PATH, made.embed, min(len(made.embed), 40), 1)
    return {"encoder_only_pairs_per_second": together, "one_pair_encoding_ms": float(np.median(alone)) * 1e3}


async def naive(running: Running, made: Bodies, pairs: int, concurrency: int) -> Figures:
    """No gateway: each caller encodes a pair, then asks one RM, one request each."""
    encoders = [HttpPool(f"http://127.0.0.1:{port}", max_connections=concurrency) for port in running.encoders]
    rms = [HttpPool(f"http://127.0.0.1:{port}", max_connections=concurrency) for port in running.rms.values()]
    names = list(running.rms)
    todo = iter(range(pairs))

    async def caller() -> None:
        loop = asyncio.get_running_loop()
        for i in todo:
            encoder, body = encoders[i % len(encoders)], made.embed[i % len(made.embed)]
            await encoder.request("POST", EMBEDDINGS_PATH, body, deadline=loop.time() + 120)
            k = i % len(names)
            asked = made.classify[names[k]]
            answer = await rms[k].request("POST", CLASSIFY_PATH, asked[i % len(asked)], deadline=loop.time() + 120)
            if answer.status != 200:
                raise RuntimeError(f"{names[k]} answered {answer.status}: {answer.body[:300]!r}")

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(concurrency)))
    wall = time.perf_counter() - began
    for pool in (*encoders, *rms):
        await pool.close()
    return {"naive_pairs_per_second": pairs / wall}


async def routed(
    running: Running, pairs: Sequence[Pair], count: int, concurrency: int, policy: str | None = None
) -> Figures:
    """Pairs through `/reward`, one a request: pairs/s, latency, and RM calls per instance by the gateway's metrics."""
    extra = {} if policy is None else {"policy": policy}
    messages = [
        request_bytes("/reward", json.dumps({"prompt": p.prompt, "responses": p.responses, **extra}).encode())
        for p in pairs
    ]
    before = scrape(running.gateway)
    seconds, wall = await load(running.gateway, messages, count=count, concurrency=concurrency)
    after = scrape(running.gateway)
    called = after["calls"] - before["calls"]
    return {
        "pairs_per_second": count / wall,
        "p50_ms": float(np.median(seconds)) * 1e3,
        "p99_ms": float(np.quantile(seconds, 0.99)) * 1e3,
        "rm_calls_per_instance": called / count,
        "encode_ms": _mean_ms(before, after, "encode"),
        "worker_ms": _mean_ms(before, after, "worker"),
        "texts_per_encoder_request": (after["texts"] - before["texts"]) / max(after["batches"] - before["batches"], 1),
    }


async def routed_batches(running: Running, pairs: Sequence[Pair], concurrency: int) -> Figures:
    """Pairs through `/reward/batch`, `CHUNK` a request."""
    messages = [
        request_bytes(
            "/reward/batch",
            json.dumps({"items": [{"prompt": p.prompt, "responses": p.responses} for p in chunk]}).encode(),
        )
        for chunk in _chunks(pairs)
    ]
    seconds, wall = await load(running.gateway, messages, count=len(messages), concurrency=concurrency)
    return {"pairs_per_second": len(pairs) / wall, "p50_ms": float(np.median(seconds)) * 1e3}


def scrape(port: int) -> dict[str, float]:
    """Sums out of the gateway's metrics: RM calls, seconds and counts of stages, texts and encoder requests."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    out = {"calls": 0.0, "texts": 0.0, "batches": 0.0}
    for line in lines:
        name, _, value = line.rpartition(" ")
        if name.startswith("reward_router_worker_calls_total"):
            out["calls"] += float(value)
        elif name == "reward_router_encoder_texts_sum":
            out["texts"] = float(value)
        elif name == "reward_router_encoder_texts_count":
            out["batches"] = float(value)
        elif name.startswith("reward_router_stage_seconds_"):
            kind = name.removeprefix("reward_router_stage_seconds_").partition("{")[0]
            if kind in ("sum", "count"):
                out[f"{name.split(chr(34))[1]}_{kind}"] = float(value)
    return out


def _mean_ms(before: dict[str, float], after: dict[str, float], stage: str) -> float:
    count = after[f"{stage}_count"] - before[f"{stage}_count"]
    return (after[f"{stage}_sum"] - before[f"{stage}_sum"]) / max(count, 1) * 1e3


async def _load(
    port: int, path: str, found: Sequence[bytes], count: int, concurrency: int
) -> tuple[list[float], float]:
    messages = [request_bytes(path, body) for body in found]
    return await load(port, messages, count=count, concurrency=min(concurrency, count))


def _pairs(chunks: Sequence[bytes], count: int, pairs: int) -> int:
    """Pairs in `count` requests taken in turn from chunks of which only the last may be short."""
    whole, rest = divmod(count, len(chunks))
    return whole * pairs + min(rest * CHUNK, pairs)


def _classify(rendering: TokenRendering, model: str, prepared: Sequence[Prepared]) -> bytes:
    return rendering.body(model, [content for one in prepared for content in one.contents])


def _groups(pairs: Sequence[Pair]) -> list[list[tuple[str, str]]]:
    return [[(pair.prompt, response) for response in pair.responses] for pair in pairs]


def _chunks(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
