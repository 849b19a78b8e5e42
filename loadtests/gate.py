"""What it saves that `gate:RULE,RM` asks the rule first, and what it costs, beside asking both at once.

    python -m loadtests.gate [--passing P ...] [--rounds N] [--json OUT]

The rule `exact` in a real worker, and a stub RM of a steady speed, as of one GPU, behind one real gateway. Each
instance has four responses; in a share of the instances one of them passes the rule. `sum:RULE,RM` asks the same two
side by side, as `gate` would without a plan of its own. Printed: RM calls per instance, p50 of one caller, and
instances/s of 16 callers, for whom the RM is the bottleneck. What is compared takes turns. Loopback only; takes about a
minute.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.client import load, request_bytes
from loadtests.report import describe, machine, table, use_one_blas_thread, write_json
from loadtests.scene import rule_worker, scene
from loadtests.stub import MODELS
from service.pool import ModelEntry, PoolFile, dump_pool
from service.scorers.rule.entry import RuleEntry

RULE, RM = "exact", MODELS[0]
POLICIES = {"rule first": f"gate:{RULE},{RM}", "both at once": f"sum:{RULE}=1,{RM}=1"}
RESPONSES = 4
RM_PAIRS_PER_SECOND = 200.0
"""Speed of the RM: 100 instances of four responses a second, 10 ms each."""

REQUESTS, CALLERS = 200, 16


def instances(count: int, passing: float) -> list[dict[str, Any]]:
    """Questions with a reference; one response equals it in a share `passing` of them."""
    rng = np.random.default_rng(3)
    out = []
    for number in range(count):
        responses = [f"It is {number + wrong}." for wrong in range(2, 2 + RESPONSES)]
        if rng.random() < passing:
            responses[int(rng.integers(RESPONSES))] = f"It is {number + 1}."
        out.append({"prompt": f"What is {number} + 1?", "responses": responses, "reference": f"It is {number + 1}."})
    return out


async def measure(port: int, passing: float, rounds: int) -> dict[str, dict[str, float]]:
    """Return the figures of each policy at one share of instances that pass."""
    items = instances(REQUESTS, passing)
    found: dict[str, dict[str, list[float]]] = {name: {"calls": [], "p50": [], "rate": []} for name in POLICIES}
    for _ in range(rounds):
        for name, policy in POLICIES.items():
            messages = [request_bytes("/reward", json.dumps({**item, "policy": policy}).encode()) for item in items]
            replies: list[bytes] = []
            alone, _ = await load(port, messages, count=REQUESTS // 2, concurrency=1)
            _, seconds = await load(port, messages, count=REQUESTS, concurrency=CALLERS, keep=replies)
            asked = [
                attempt["model"]
                for reply in replies
                for attempt in json.loads(reply.partition(b"\r\n\r\n")[2])["attempts"]
            ]
            found[name]["calls"].append(asked.count(RM) / len(replies))
            found[name]["p50"].append(1e3 * float(np.median(alone)))
            found[name]["rate"].append(REQUESTS / seconds)
    return {name: {key: statistics.median(values) for key, values in one.items()} for name, one in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.gate", description=__doc__)
    parser.add_argument("--passing", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    use_one_blas_thread()
    facts = machine()
    print(describe(facts))
    rule = RuleEntry(name=RULE, kind="rule", builtin="exact", processes=2)
    with scene() as place, rule_worker(place.folder, rule) as rule_url:
        children = place.children
        speed = ("--pairs-per-second", f"{RM_PAIRS_PER_SECOND:g}")
        children.start("stub", "stub", "/v1/models", *speed, tested=False)
        rm = ModelEntry(name=RM, urls=(f"http://127.0.0.1:{children.ports['stub']}",), rendering="template")
        pool = place.folder / "pool.yaml"
        dump_pool(PoolFile(name="gate", models=(rm, rule.served_at([rule_url]))), pool)
        words = ("--pool", str(pool), "--store", place.store_url, "--run", "gate", "--encoder", "hash:64")
        children.start("gateway", "gateway", "/readyz", *words, tested=True)
        figures = {
            f"{share:g}": asyncio.run(measure(children.ports["gateway"], share, options.rounds))
            for share in options.passing
        }
    rows: list[Sequence[object]] = [
        (f"{100 * float(share):g} %, {name}", one["calls"], one["p50"], one["rate"])
        for share, both in figures.items()
        for name, one in both.items()
    ]
    columns = ("instances of which a response passes", "RM calls per instance", "p50, ms", "instances/s, 16 callers")
    table(f"A gate, medians of {options.rounds} rounds", columns, rows)
    write_json(options.json, {"machine": facts, "figures": figures})


if __name__ == "__main__":
    main()
