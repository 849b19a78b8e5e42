"""How long a draw and an update take, beside a plain re-implementation of what the released research code does.

    python -m loadtests.posterior [--json OUT] [--quick]

One thread. The candidates take turns within one run; medians, and ratios of medians, are printed. Runs `router_core`
alone, under the gateway's allocator settings.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.report import describe, machine, table, use_one_blas_thread, write_json
from router_core.policies import BayesianPolicy, draw
from router_core.posterior import FoldSettings, Posterior, fold, start
from router_core.prior import no_prior
from router_core.records import Event, Feedback, Signal
from service.memory import keep_freed_memory

SEED = 20251002

TAIL = 32
"""Events of each arm that no block has absorbed yet: half a block, what a draw meets on average."""

GOALS = {
    "choose one pair": 0.30,
    "choose, per pair of 256": 0.05,
    "update, one event": 1.0,
    "update, per event of 64 at once": 0.1,
}
"""Milliseconds at d = 576, K = 4."""

Action = Callable[[], object]


@dataclass(frozen=True, slots=True)
class ResearchRouter:
    """The released code's arithmetic, written plainly: w ~ N(μ_k, Σ_k) through a full eigendecomposition, θ_k = xᵀw.

    Attributes:
        precision: (K, d, d).
        information: (K, d).
        covariance: (K, d, d).
        mean: (K, d).
    """

    precision: NDArray[np.float64]
    information: NDArray[np.float64]
    covariance: NDArray[np.float64]
    mean: NDArray[np.float64]

    def choose(self, x: NDArray[np.float64], rng: np.random.Generator) -> int:
        """The arm with the largest draw. x: (d,)."""
        draws = []
        for mean, covariance in zip(self.mean, self.covariance, strict=True):
            values, vectors = np.linalg.eigh(covariance)
            noise = rng.standard_normal(len(x))
            weights = mean + vectors @ (np.sqrt(np.maximum(values, 0.0)) * noise)
            draws.append(float(x @ weights))
        return int(np.argmax(draws))

    def update(self, arm: int, x: NDArray[np.float64], target: float, sigma2: float) -> None:
        """Λ += xxᵀ/σ², b += r x/σ², Σ = Λ⁻¹ by explicit inversion, μ = Σb. x: (d,)."""
        self.precision[arm] += np.outer(x, x) / sigma2
        self.information[arm] += target * x / sigma2
        self.covariance[arm] = np.linalg.inv(self.precision[arm])
        self.mean[arm] = self.covariance[arm] @ self.information[arm]

    @classmethod
    def of(cls, posterior: Posterior) -> ResearchRouter:
        """The same knowledge as ours has."""
        arms = posterior.arms
        return cls(
            np.stack([arm.precision for arm in arms]),
            np.stack([arm.information for arm in arms]),
            np.stack([arm.covariance for arm in arms]),
            np.stack([arm.mean for arm in arms]),
        )


def medians(actions: Mapping[str, tuple[Action, int, float]], rounds: int) -> dict[str, float]:
    """Milliseconds per unit: the median over rounds in which every action takes its turn.

    Args:
        actions: name -> (what to do, how often in a round, units per call).
        rounds: how many.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action, _, _ in actions.values():
        action()
    for _ in range(rounds):
        for name, (action, repeats, units) in actions.items():
            for _ in range(repeats):
                began = time.perf_counter()
                action()
                times[name].append((time.perf_counter() - began) * 1e3 / units)
    return {name: float(np.median(values)) for name, values in times.items()}


def events(rng: np.random.Generator, count: int, d: int, n_arms: int) -> list[Event]:
    """Random feedback on random unit contexts, the arms in turn."""
    x = unit_rows(rng, count, d)
    labels = rng.integers(2, size=count)
    return [
        Event(i % n_arms, x[i].tobytes(), 0.5, float(labels[i]), Feedback(Signal.PREFERENCE, 1.0)) for i in range(count)
    ]


def unit_rows(rng: np.random.Generator, count: int, d: int) -> NDArray[np.float32]:
    """(count, d) float32 rows of norm 1."""
    rows = rng.standard_normal((count, d), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def learned(d: int, n_arms: int, rng: np.random.Generator) -> Posterior:
    """A posterior of which every arm has absorbed one block and waits with `TAIL` further events."""
    state = start(no_prior(n_arms, d), FoldSettings())
    return fold(state, events(rng, n_arms * (state.settings.block_size + TAIL), d, n_arms))


def compare(d: int, n_arms: int, rounds: int, *, research: bool) -> dict[str, float]:
    """Medians in ms at one size; `research` adds the released code's way."""
    rng = np.random.default_rng(SEED)
    posterior = learned(d, n_arms, rng)
    policy = BayesianPolicy()
    one, many = unit_rows(rng, 1, d), unit_rows(rng, 256, d)
    offsets_one, offsets_many = np.full((1, n_arms), 0.5), np.full((256, n_arms), 0.5)
    log = events(rng, 64, d, n_arms)
    one_arm = [Event(0, event.x, event.offset, event.credit, event.feedback) for event in log]
    actions: dict[str, tuple[Action, int, float]] = {
        "choose one pair": (lambda: draw(policy.beliefs(one, offsets_one, posterior), rng), 20, 1),
        "choose, per pair of 256": (lambda: draw(policy.beliefs(many, offsets_many, posterior), rng), 2, 256),
        "update, one event": (lambda: fold(posterior, log[:1]), 20, 1),
        "update, per event of 64 at once": (lambda: fold(posterior, log), 2, 64),
        "update, per event of 64 of one arm": (lambda: fold(posterior, one_arm), 2, 64),
    }
    if research:
        theirs = ResearchRouter.of(posterior)
        x = one[0].astype(np.float64)
        actions["research code: choose one pair"] = (lambda: theirs.choose(x, rng), 1, 1)
        actions["research code: one update"] = (lambda: theirs.update(0, x, 0.5, 0.25), 1, 1)
    return medians(actions, rounds)


def long_log(d: int, n_arms: int, count: int) -> dict[str, float]:
    """ms per event of folding a long log in pieces of 1, of 64 and whole; blocks and refreshes included."""
    rng = np.random.default_rng(SEED)
    log = events(rng, count, d, n_arms)
    prior = no_prior(n_arms, d)
    out = {}
    for name, piece in (("pieces of 1", 1), ("pieces of 64", 64), ("all at once", count)):
        state = start(prior, FoldSettings())
        began = time.perf_counter()
        for first in range(0, count, piece):
            state = fold(state, log[first : first + piece])
        out[name] = (time.perf_counter() - began) * 1e3 / count
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.posterior", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    options = parser.parse_args(arguments)
    use_one_blas_thread()
    keep_freed_memory()

    facts = machine()
    print(describe(facts))
    print(f"seed {SEED}; ms, medians; every arm holds a tail of {TAIL} unabsorbed events")
    chief = compare(576, 4, 5 if options.quick else 15, research=True)
    ratios = {
        "choose": chief["research code: choose one pair"] / chief["choose one pair"],
        "choose, in batches of 256": chief["research code: choose one pair"] / chief["choose, per pair of 256"],
        "update": chief["research code: one update"] / chief["update, one event"],
        "update, 64 at once": chief["research code: one update"] / chief["update, per event of 64 at once"],
    }
    table(
        "d = 576, K = 4",
        ("what", "ms", "goal", "times faster than the research code"),
        [
            (name, value, f"< {GOALS[name]}" if name in GOALS else "", _ratio(name, chief))
            for name, value in chief.items()
        ],
    )
    count = 2048 if options.quick else 16_384
    steady = long_log(576, 4, count)
    table(
        f"fold of a log of {count} events, d = 576, K = 4, blocks and refreshes included",
        ("in", "ms per event"),
        list(steady.items()),
    )
    sizes: dict[str, dict[str, float]] = {}
    for d in (64, 576) if options.quick else (64, 256, 576, 1024):
        for n_arms in (4, 9):
            sizes[f"d={d} K={n_arms}"] = compare(d, n_arms, 4, research=d <= 576)
    names = list(chief)
    table(
        "other sizes, ms",
        ("what", *sizes),
        [(name, *(row.get(name, "") for row in sizes.values())) for name in names],
    )
    results: dict[str, Any] = {
        "machine": facts,
        "seed": SEED,
        "unit": "ms",
        "d=576 K=4": chief,
        "ratios": ratios,
        "goals": GOALS,
        "long_log": {"events": count, **steady},
        "sizes": sizes,
    }
    write_json(options.json, results)


def _ratio(name: str, chief: Mapping[str, float]) -> str:
    if name.startswith("research"):
        return "1"
    base = chief["research code: choose one pair" if name.startswith("choose") else "research code: one update"]
    return f"{base / chief[name]:,.0f}"


if __name__ == "__main__":
    main()
