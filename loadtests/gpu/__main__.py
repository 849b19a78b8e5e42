"""Routed pairs/s on one GPU machine, beside what bounds it and what it is compared with, in one run.

    python -m loadtests.gpu                          # one GPU, torch and vllm installed
    python -m loadtests.gpu --toy --device cpu       # tiny models on our own CPU servers: proves that it works

Order: models are made (kept in --folder), the research pipeline's way runs in a process of its own, the stack is
started, everything is measured on it in turn, and ends. Each figure is of the same pairs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console

from loadtests.gateway import Pair, long_pairs, short_pairs
from loadtests.gpu import measure
from loadtests.gpu.measure import Bodies, Figures
from loadtests.gpu.shapes import FULL, TOY, Models, Shape, make_models
from loadtests.gpu.stack import Placement, Running, running
from loadtests.report import describe, machine, table, write_json
from service.cli.vllm_serve import find_vllm

GOAL = 350.0
"""Routed pairs/s on one H100."""

EARLIER = {
    "research way: RM, fp16, chunks of 8, responses/s": 21.7,
    "research way: encoder, fp32 padded to 1,024, encodings/s": 39.5,
    "vLLM: encode, then one RM, no gateway, pairs/s": 185.0,
}
"""Measured before on one H100, by scripts that are not kept (loadtests/README.md)."""


async def measure_all(run: Running, made: Bodies, pairs: Sequence[Pair], concurrency: Sequence[int]) -> dict[str, Any]:
    """Every figure of the running stack; servers are warmed by a first round that is not kept."""
    most, count = max(concurrency), len(pairs)
    await measure.naive(run, made, min(count, 64), 16)
    await measure.routed(run, pairs, min(count, 64), 16)
    figures: dict[str, Any] = {
        "rm": await measure.rm_ceiling(run, made, count, most),
        "encoder": await measure.encoder_ceiling(run, made, count, most),
        "naive": await measure.naive(run, made, count, most),
        "routed": {
            str(c): await measure.routed(run, pairs, count if c > 1 else min(count, 64), c) for c in concurrency
        },
        "batches": await measure.routed_batches(run, pairs, max(most // measure.CHUNK, 2)),
        "majority": await measure.routed(run, pairs, min(count, 256), most, policy="majority"),
    }
    # Once more at the end: a figure that drifts is seen.
    figures["routed_again"] = await measure.routed(run, pairs, count, most)
    return figures


def research(models: Models, pairs: Sequence[Pair], folder: Path, device: str, padded: int) -> Figures:
    """The research pipeline's way, in a process of its own."""
    path = folder / "pairs.json"
    path.write_text(json.dumps([{"prompt": p.prompt, "responses": p.responses} for p in pairs]), "utf-8")
    words = [
        sys.executable,
        "-m",
        "loadtests.gpu.research",
        "--rm",
        str(models.rms[0]),
        "--encoder",
        str(models.encoder),
    ]
    words += ["--pairs", str(path), "--device", device, "--padded", str(padded)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the research way failed: {done.stderr[-3000:]}")
    figures: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def rows(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The table: what, figure, remark."""
    found = figures["stack"]
    best = max(float(one["pairs_per_second"]) for one in _all_routed(found))
    out = [("routed pairs/s through our gateway, best", f"{best:,.1f}", _verdict(figures, best))]
    for label, one in [*((f"c = {c}", one) for c, one in found["routed"].items()), ("again", found["routed_again"])]:
        calls = f"{one['rm_calls_per_instance']:.2f} RM calls, p50 {one['p50_ms']:,.0f} ms, p99 {one['p99_ms']:,.0f} ms"
        stages = f"; encode {one['encode_ms']:,.0f} ms at {one['texts_per_encoder_request']:.1f} texts a request"
        out.append((f"  /reward, {label}, pairs/s", f"{one['pairs_per_second']:,.1f}", calls + stages))
    batches, majority = found["batches"], found["majority"]
    calls = f"{majority['rm_calls_per_instance']:.2f} RM calls"
    figures_of = [
        (
            f"  /reward/batch of {measure.CHUNK}, pairs/s",
            batches["pairs_per_second"],
            f"p50 {batches['p50_ms']:,.0f} ms",
        ),
        ("RMs alone, all at once, pairs/s", found["rm"]["rm_only_pairs_per_second"], "ceiling: no encoder, no gateway"),
        ("one RM alone, pairs/s", found["rm"]["one_rm_pairs_per_second"], ""),
        ("encoder alone, pairs/s", found["encoder"]["encoder_only_pairs_per_second"], "ceiling of any routing by x"),
        ("encoder, one pair, ms", found["encoder"]["one_pair_encoding_ms"], ""),
        (
            "naive: encode, then one RM, pairs/s",
            found["naive"]["naive_pairs_per_second"],
            "no gateway; 185 on one H100",
        ),
        ("majority vote through our gateway, pairs/s", majority["pairs_per_second"], calls),
    ]
    if figures["research"] is not None:
        way = figures["research"]
        figures_of += [
            ("research way: one RM, responses/s", way["responses_per_second"], "21.7 on one H100"),
            ("research way: encodings/s", way["encodings_per_second"], "39.5 on one H100"),
            ("research way: one pair's encodings, ms", way["one_pair_encoding_ms"], "100 on one H100"),
        ]
    return [*out, *((what, f"{value:,.1f}", remark) for what, value, remark in figures_of)]


def _all_routed(found: dict[str, Any]) -> list[dict[str, float]]:
    return [*found["routed"].values(), found["routed_again"], found["batches"]]


def _verdict(figures: dict[str, Any], best: float) -> str:
    if figures["toy"]:
        return "toy models: proves that it works, says nothing of speed"
    return f"goal {GOAL:,.0f} on one H100: {'met' if best >= GOAL else 'missed'}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--toy", action="store_true", help="tiny models and short texts")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[default: cuda]")
    parser.add_argument(
        "--vllm-command", help="how vLLM is called [default: the one found; on the CPU our own servers]"
    )
    parser.add_argument("--rms", type=int, default=4, help="reward models [default: 4]")
    parser.add_argument("--encoders", type=int, help="servers of the encoder [default: 2, toy 1]")
    parser.add_argument("--pairs", type=int, help="pairs of each measurement [default: 1024, toy 64]")
    parser.add_argument("--concurrency", default="", help="of /reward [default: 1,64,256; toy 1,16]")
    parser.add_argument("--dtype", help="of the RMs [default: bfloat16, on the CPU float32]")
    parser.add_argument("--encoder-dtype", help="of the encoder [default: as --dtype]")
    parser.add_argument("--rm-share", type=float, default=0.19, help="of GPU memory, each RM [default: 0.19]")
    parser.add_argument("--encoder-share", type=float, default=0.07, help="of GPU memory, each encoder [default: 0.07]")
    parser.add_argument("--vllm-args", default="", help="more words for each `vllm serve`")
    parser.add_argument("--skip-research", action="store_true", help="leave the research pipeline's way out")
    parser.add_argument("--folder", type=Path, default=Path(".data/gpu"), help="models and logs [default: .data/gpu]")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args(arguments)


def placement_of(options: argparse.Namespace) -> Placement:
    """Servers as the command line has them; our own ones on a CPU unless vLLM is named."""
    cpu = options.device == "cpu"
    named = tuple(shlex.split(options.vllm_command or ""))
    vllm = find_vllm(named) if named or not cpu else None
    if vllm is None and not cpu:
        raise SystemExit("no vLLM here: pip install vllm, name it with --vllm-command, or use --device cpu")
    dtype = options.dtype or ("float32" if cpu else "bfloat16")
    return Placement(
        vllm=vllm,
        device=options.device,
        dtype=dtype,
        encoder_dtype=options.encoder_dtype or dtype,
        rm_share=options.rm_share,
        encoder_share=options.encoder_share,
        encoders=options.encoders or (1 if options.toy else 2),
        arguments=tuple(shlex.split(options.vllm_args)),
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print; returns the figures."""
    options = parse(arguments)
    shape: Shape = TOY if options.toy else FULL
    count = options.pairs or (64 if options.toy else 1024)
    concurrency = [int(word) for word in (options.concurrency or ("1,16" if options.toy else "1,64,256")).split(",")]
    placement = placement_of(options)
    console, facts = Console(), machine()
    print(describe(facts))
    options.folder.mkdir(parents=True, exist_ok=True)
    pairs = short_pairs(count) if options.toy else long_pairs(count)
    with console.status("making models"):
        texts = [text for pair in [*long_pairs(1024), *short_pairs(256)] for text in (pair.prompt, *pair.responses)]
        models = make_models(options.folder / ("toy" if options.toy else "full"), shape, options.rms, texts)
    figures: dict[str, Any] = {
        "machine": facts,
        "toy": options.toy,
        "shape": shape.name,
        "pairs": count,
        "research": None,
    }
    if not options.skip_research:
        with console.status("the research pipeline's way"):
            few = pairs[: min(count, 16 if options.toy else 64)]
            figures["research"] = research(models, few, options.folder, options.device, 64 if options.toy else 1024)
    made = measure.bodies(pairs, models.rms, models.encoder)
    figures["median_tokens"] = made.tokens
    with running(models, shape, placement, options.folder, console) as run:
        figures["stack"] = uvloop.run(measure_all(run, made, pairs, concurrency))
    kind = "vLLM" if placement.vllm else "our own CPU servers"
    print(
        f"{shape.name} x {options.rms}; {kind}; {count} pairs, {made.tokens:.0f} tokens (median of prompt + response)"
    )
    table("one run", ("what", "figure", ""), rows(figures))
    write_json(options.json, {**figures, "earlier": EARLIER, "goal": GOAL})
    return figures


if __name__ == "__main__":
    main()
