"""How often the report's alarms are false, and how late they are, over many runs (docs/audits.md, "The report").

    python -m loadtests.audit_alarms [--runs N] [--data rb9_dev.jsonl]

Each run has `AUDITS` audits of one scorer. Without a fault it is right with a constant probability, and its rewards
follow length as much as the referee's do. Faults are planted halfway: an accuracy that falls, rewards that begin to
follow length. Looked at after every `LOOK` audits, as a scrape does.

With --data there are also runs of recorded pairs, drawn with replacement: verdicts and scores of real RMs, judged by
the labels. Their faults are verdicts of which a share is turned round, an RM in whose place a weaker one answers, and
scores that begin to follow the real lengths.
Without a fault lengths are those of the pair's responses in random order, so that nothing follows them; "as recorded"
says what the scores follow by themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router_core.audits.signs import signs_of
from router_core.audits.summary import fall_evidence, following
from router_core.dataset import load_pairs
from router_core.records import LabelledPair

AUDITS = 600
"""Audits of a run."""

START = 300
"""Audits before a planted fault."""

LOOK = 20
"""Audits between two looks."""

RECORDED = ("internlm2-1_8b-reward", "GRM-Gemma-2B-rewardmodel-ft", "FsfairX-LLaMA3-RM-v0.1", "RM-Mistral-7B")
"""RMs of the recorded pairs: K4."""

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


@dataclass(frozen=True, slots=True)
class Recorded:
    """One RM on N recorded pairs: whether it was right (N,), its scores and the words of the responses (N, 2), in
    standard deviations inside pairs, and the referee's rewards (N, 2): 1 for the better response."""

    right: Array
    scores: Array
    words: Array
    referee: Array


def recorded(pairs: Sequence[LabelledPair], name: str) -> Recorded:
    """Return one RM's part of the pairs."""
    known = [pair for pair in pairs if len(pair.instance.responses) == 2 and name in pair.scores]
    words = np.array([[signs_of(text)[0] for text in pair.instance.responses] for pair in known])
    scores = np.array([pair.scores[name] for pair in known])
    referee = np.array([[float(i == pair.label) for i in range(2)] for pair in known])
    right = np.array([pair.correctness(name) for pair in known])
    return Recorded(right, _standard(scores), _standard(words), referee)


def _standard(values: Array) -> Array:
    centred = values - values.mean(axis=1, keepdims=True)
    return np.asarray(centred / np.sqrt(np.square(centred).mean()))


def replaced(
    rng: np.random.Generator, runs: int, before: Recorded, after: Recorded, turned: float = 0.0
) -> list[int | None]:
    """Return the accuracy's alarms of runs in which another RM answers from `START` on, a share of it turned round."""
    out = []
    for _ in range(runs):
        drawn = rng.integers(len(before.right), size=AUDITS)
        late = np.where(rng.random(AUDITS) < turned, 1.0 - after.right[drawn], after.right[drawn])
        out.append(fall_alarm(np.where(np.arange(AUDITS) < START, before.right[drawn], late)))
    return out


def recorded_lengths(
    rng: np.random.Generator, runs: int, rm: Recorded, bias: float, *, shuffled: bool = True
) -> list[int | None]:
    """Return the length's alarms of runs whose scores follow length by `bias` from `START` on."""
    out = []
    for _ in range(runs):
        drawn = rng.integers(len(rm.scores), size=AUDITS)
        words, rewards = rm.words[drawn], rm.scores[drawn].copy()
        if shuffled:
            words = np.where(rng.random((AUDITS, 1)) < 0.5, words, words[:, ::-1])
        rewards[START:] += bias * words[START:]
        out.append(length_alarm([*rewards], [*rm.referee[drawn]], [*words]))
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
    parser.add_argument("--data", type=Path, help="labelled pairs with scores, for runs of recorded pairs")
    arguments = parser.parse_args()
    runs = arguments.runs
    rng = np.random.default_rng(0)
    for accuracy in (0.6, 0.75, 0.9):
        show(f"accuracy {accuracy}, no fault", falls(rng, runs, accuracy, accuracy))
    for before, after in ((0.9, 0.75), (0.85, 0.6), (0.75, 0.6)):
        show(f"accuracy {before}, then {after}", falls(rng, runs, before, after))
    show("no length bias", lengths(rng, runs, 0.0, 0.0))
    show("both follow length alike", lengths(rng, runs, 0.0, 0.7))
    show("length bias 1.0", lengths(rng, runs, 1.0, 0.0))
    if arguments.data is not None:
        pairs = load_pairs(arguments.data)
        models = {name: recorded(pairs, name) for name in RECORDED}
        for name, rm in models.items():
            print(f"{name}: right {rm.right.mean():.3f}")
            show("  no fault", replaced(rng, runs, rm, rm))
            show("  a quarter turned round", replaced(rng, runs, rm, rm, 0.25))
            show("  no length bias", recorded_lengths(rng, runs, rm, 0.0))
            for bias in (0.5, 1.0):
                show(f"  length bias {bias}", recorded_lengths(rng, runs, rm, bias))
            show("  lengths as recorded", recorded_lengths(rng, runs, rm, 0.0, shuffled=False))
        best, *_, worst = sorted(models, key=lambda name: -float(models[name].right.mean()))
        show(f"{worst} for {best}", replaced(rng, runs, models[best], models[worst]))


if __name__ == "__main__":
    main()
