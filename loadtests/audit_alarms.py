"""How often the report's alarms are false, and how late they are, over simulated runs (docs/audits.md, "The report").

    python -m loadtests.audit_alarms [--runs N]

Each run has `AUDITS` audits of one scorer. Without a fault it is right with a constant probability, and its rewards
follow length as much as the referee's do. Faults are planted halfway: an accuracy that falls, rewards that begin to
follow length. Looked at after every `LOOK` audits, as a scrape does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from router_core.audits.summary import fall_evidence, following

AUDITS = 600
"""Audits of a run."""

START = 300
"""Audits before a planted fault."""

LOOK = 20
"""Audits between two looks."""

Array = NDArray[np.float64]


def fall_alarm(values: Array) -> int | None:
    """Return after how many audits the accuracy's alarm is raised first; None for never."""
    looks = range(LOOK, len(values) + 1, LOOK)
    return next((n for n in looks if fall_evidence(values[:n]) >= 1.0), None)


def length_alarm(rewards: Sequence[Array], referee: Sequence[Array], length: Sequence[Array]) -> int | None:
    """Return after how many audits the length's alarm is raised first; None for never."""
    for n in range(LOOK, len(rewards) + 1, LOOK):
        _, more = following(rewards[:n], referee[:n], length[:n])
        if more is not None and more.low > 0:
            return n
    return None


def falls(rng: np.random.Generator, runs: int, before: float, after: float) -> list[int | None]:
    """Return the alarms of runs whose accuracy is `before`, then `after`."""
    probability = np.where(np.arange(AUDITS) < START, before, after)
    return [fall_alarm((rng.random(AUDITS) < probability).astype(float)) for _ in range(runs)]


def lengths(rng: np.random.Generator, runs: int, bias: float, share: float) -> list[int | None]:
    """Return the alarms of runs whose rewards follow length by `bias` from `START` on, the referee's by `share`."""
    out = []
    for _ in range(runs):
        quality, length = rng.normal(size=(AUDITS, 2)), rng.normal(size=(AUDITS, 2))
        referee = quality + share * length
        rewards = referee + rng.normal(size=(AUDITS, 2))
        rewards[START:] += bias * length[START:]
        out.append(length_alarm([*rewards], [*referee], [*length]))
    return out


def show(name: str, alarms: Sequence[int | None]) -> None:
    """Print false alarms before `START`, and how late the others are."""
    early = sum(alarm is not None and alarm <= START for alarm in alarms)
    late = sorted(alarm - START for alarm in alarms if alarm is not None and alarm > START)
    middle = f"{np.median(late):.0f}, nine in ten by {np.quantile(late, 0.9):.0f}" if late else "–"
    missed = len(alarms) - len(late) - early
    print(f"{name:<38} early {early / len(alarms):.3f}, late {middle}, never {missed / len(alarms):.3f}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    runs = parser.parse_args().runs
    rng = np.random.default_rng(0)
    for accuracy in (0.6, 0.75, 0.9):
        show(f"accuracy {accuracy}, no fault", falls(rng, runs, accuracy, accuracy))
    for before, after in ((0.9, 0.75), (0.85, 0.6), (0.75, 0.6)):
        show(f"accuracy {before}, then {after}", falls(rng, runs, before, after))
    few = max(runs // 4, 1)
    show(f"no length bias ({few} runs)", lengths(rng, few, 0.0, 0.0))
    show(f"both follow length alike ({few} runs)", lengths(rng, few, 0.0, 0.7))
    show(f"length bias 1.0 ({few} runs)", lengths(rng, few, 1.0, 0.0))


if __name__ == "__main__":
    main()
