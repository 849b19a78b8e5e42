"""What audits say of who is right: accuracies, the referee against gold, what rewards follow, who has changed.

Audits are a random sample with known probabilities, so a mean weighted by their inverses estimates the mean over all
decisions (Hájek's ratio form of Horvitz & Thompson 1952). Whoever looks at a report again and again needs intervals
that stay valid however often one looks: confidence sequences (asymptotic, Waudby-Smith et al., arXiv 2103.06476).

Knows numbers. Called by the gateway's reports; docs/audits.md says how to read them.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ALPHA = 0.05
"""Probability with which a confidence sequence misses at any time."""

BEST_AT = 200
"""Number of audits at which a confidence sequence is narrowest for its size."""

FALSE_ALARMS = 1e-3
"""Alarms per audit, at most, of an arm whose accuracy does not change."""

FALL = 0.15
"""Fall of an accuracy that is looked for."""

USUAL_ACCURACY = 0.75
"""Accuracy that an arm is taken to have before anything is known, worth `USUAL_AUDITS` audits."""

USUAL_AUDITS = 16.0

KINDS = 6
"""Kinds of text that are told apart, at most."""

KIND_AUDITS = 25
"""Audits per kind, at least."""

PERIODS = 8
"""Parts of the time that accuracies are given for."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate, the bounds of its confidence sequence, and the number of audits behind it."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class Audited:
    """One audited decision.

    Attributes:
        time_ms: when the decision was made.
        probability: with which it was chosen.
        x: (d,) its context.
        rewards: (K, n) of the scorers; NaN where one was not asked.
        credits: (K,) against the referee's verdict; NaN where there is nothing to compare.
        referee: its name.
        verdict: of the referee, or a tie.
        referee_rewards: (n,).
        signs: (n, S) what can be counted in the responses.
        words: of the prompt.
        served: credit of what the caller got, against the referee's verdict; NaN where there is nothing to compare.
        trust: how often the referee was expected to be right.
        asked: arms that were asked before the reply.
        gold: preferred response of the trainer or a person; None where there is no gold.
        gold_credits: (K,) against gold; NaN without.
    """

    time_ms: int
    probability: float
    x: NDArray[np.float32]
    rewards: Array
    credits: Array
    referee: str
    verdict: int
    referee_rewards: Array
    signs: Array
    words: Sequence[str]
    served: float
    trust: float
    asked: tuple[int, ...] = ()
    gold: int | None = None
    gold_credits: Array | None = None


def half_width(variance: float, n: float) -> float:
    """Return half the width of the confidence sequence of a mean of n values.

    √(s² · 2(nρ² + 1)/(n²ρ²) · log(√(nρ² + 1)/α)), the normal mixture's boundary; ρ is chosen for `BEST_AT`.

    >>> round(half_width(0.25, 100), 3), round(half_width(0.25, 10_000), 3)
    (0.154, 0.017)
    """
    if n < 1:
        return math.inf
    rho2 = (-2.0 * math.log(ALPHA) + math.log(-2.0 * math.log(ALPHA) + 1.0)) / BEST_AT
    return math.sqrt(variance * 2.0 * (n * rho2 + 1.0) / (n * n * rho2) * math.log(math.sqrt(n * rho2 + 1.0) / ALPHA))


def mean_interval(values: Array, weights: Array) -> Interval | None:
    """Return the weighted mean of values in [0, 1] with its confidence sequence; None without values.

    Two further values, 0 and 1, count for the variance, so that a few equal ones do not look certain.

    Args:
        values: (n,), NaN where there is none.
        weights: (n,) inverse probabilities.
    """
    there = ~np.isnan(values)
    y, w = values[there], weights[there]
    n = len(y)
    if not n:
        return None
    w = w / w.mean()
    mean = float((w * y).mean())
    padded = np.append(np.square(w * (y - mean)), [mean * mean, (1.0 - mean) ** 2])
    half = half_width(float(padded.mean()), n)
    return Interval(mean, max(mean - half, 0.0), min(mean + half, 1.0), n)


def fall_evidence(values: Array) -> float:
    """Return how surely an accuracy has fallen: 1 or more is an alarm, 0 is no sign of it.

    A cumulative sum of how much better each credit is explained by an accuracy that is `FALL` below the one so far.
    While that accuracy holds, it alarms once in 1/`FALSE_ALARMS` audits or less (Lorden 1971).

    Args:
        values: (n,) credits in [0, 1] in order of time, NaN where there is none.
    """
    total, count, rise = USUAL_ACCURACY * USUAL_AUDITS, USUAL_AUDITS, 0.0
    for y in values[~np.isnan(values)].tolist():
        usual = min(max(total / count, 0.02 + FALL), 0.98)
        fallen = usual - FALL
        rise = max(0.0, rise + y * math.log(fallen / usual) + (1.0 - y) * math.log((1.0 - fallen) / (1.0 - usual)))
        total, count = total + y, count + 1.0
    return rise / math.log(1.0 / FALSE_ALARMS)


def following(
    rewards: Sequence[Array], others: Sequence[Array], signs: Sequence[Array]
) -> tuple[Interval | None, Interval | None]:
    """Return what rewards have to do with a sign beyond the referee's, and how much more than the referee's they do.

    Inside each decision all are centred. The first is the partial correlation of reward and sign given the referee's
    reward; the second the difference between reward's and the referee's correlations with the sign.

    Args:
        rewards: (n,) of one scorer, per decision.
        others: (n,) of the referee.
        signs: (n,) of one sign.
    """
    several = [parts for parts in zip(rewards, others, signs, strict=True) if len(parts[0]) > 1]
    if not several:
        return None, None
    sizes = np.array([len(part[0]) for part in several])
    table = np.stack([np.concatenate(parts) for parts in zip(*several, strict=True)])
    starts = np.cumsum(sizes) - sizes
    told = np.logical_and.reduceat(np.isfinite(table).all(axis=0), starts)
    table, sizes = table[:, np.repeat(told, sizes)], sizes[told]
    n = len(sizes)
    if n < 3:
        return None, None
    starts = np.cumsum(sizes) - sizes
    a, b, s = table - np.repeat(np.add.reduceat(table, starts, axis=1) / sizes, sizes, axis=1)
    scale = [float(np.sqrt(np.square(part).mean())) for part in (a, b, s)]
    if min(scale[0], scale[2]) < 1e-12:
        return None, None
    a, s = a / scale[0], s / scale[2]
    b = b / scale[1] if scale[1] > 1e-12 else b

    def per_decision(values: Array) -> Array:
        return np.add.reduceat(values, starts) * n / len(values)

    ra, rb, rab = float((a * s).mean()), float((b * s).mean()), float((a * b).mean())
    rest = math.sqrt(max((1.0 - rb * rb) * (1.0 - rab * rab), 1e-9))
    partial = min(max((ra - rb * rab) / rest, -1.0), 1.0)
    half = half_width(float(np.var(per_decision((a - rab * b) * (s - rb * b)))) / rest**2 + 1.0 / n, n)
    more = per_decision(a * s - 0.5 * ra * (a * a + s * s)) - per_decision(b * s - 0.5 * rb * (b * b + s * s))
    half_more = half_width(float(np.var(more)) + 1.0 / n, n)
    return (
        Interval(partial, max(partial - half, -1.0), min(partial + half, 1.0), n),
        Interval(ra - rb, ra - rb - half_more, ra - rb + half_more, n),
    )


def liked(rewards: Sequence[Array], earned: Array) -> tuple[float, float, float] | None:
    """Return (change of the best reward, accuracy on what was liked best before, and after), or None where too few.

    Before and after are the halves of the time; liked best is the third with the largest best rewards of each. The
    change is in standard deviations of the best rewards.

    Args:
        rewards: (n,) of one scorer per decision, in order of time.
        earned: (N,).
    """
    told = [i for i, one in enumerate(rewards) if np.isfinite(one).all() and not np.isnan(earned[i])]
    if len(told) < 40:
        return None
    best = np.array([rewards[i].max() for i in told])
    right, half = earned[told], len(told) // 2
    accuracies = []
    for part in (slice(None, half), slice(half, None)):
        top = np.argsort(-best[part], kind="stable")[: max(len(best[part]) // 3, 1)]
        accuracies.append(float(right[part][top].mean()))
    spread = float(best.std()) or 1.0
    return float(best[half:].mean() - best[:half].mean()) / spread, accuracies[0], accuracies[1]


def kinds_of(contexts: Array, words: Sequence[Sequence[str]]) -> tuple[NDArray[np.int64], list[str]]:
    """Return the kind of each text (N,) and the kinds' names: clusters of contexts, named by their typical words.

    k-means from farthest points, so that equal audits give equal kinds.

    Args:
        contexts: (N, d).
        words: of each prompt.
    """
    n = len(contexts)
    k = min(KINDS, n // KIND_AUDITS)
    if k < 2:
        return np.zeros(n, dtype=np.int64), ["all"]
    centres = [contexts[0]]
    for _ in range(k - 1):
        distances = np.min([np.square(contexts - centre).sum(axis=1) for centre in centres], axis=0)
        centres.append(contexts[int(distances.argmax())])
    middles = np.array(centres)
    kind = np.zeros(n, dtype=np.int64)
    for _ in range(20):
        # |x − c|² without |x|², which is the same for every centre.
        new = np.argmin(np.square(middles).sum(axis=1) - 2.0 * (contexts @ middles.T), axis=1)
        if np.array_equal(new, kind):
            break
        kind = new
        middles = np.array([contexts[kind == j].mean(axis=0) if (kind == j).any() else middles[j] for j in range(k)])
    everywhere = Counter(word for one in words for word in set(one))
    names = []
    for j in range(k):
        inside = [set(words[i]) for i in np.flatnonzero(kind == j).tolist()]
        here = Counter(word for one in inside for word in one)
        size = max(len(inside), 1)
        typical = sorted(here, key=lambda word: (-here[word] / size * math.log(n / everywhere[word] + 1e-9), word))
        names.append(" ".join(typical[:3]) or f"kind {j + 1}")
    return kind, names


def periods_of(count: int) -> list[slice]:
    """Return the parts of the time, each with as many audits, for so many in order.

    >>> periods_of(10)[0], len(periods_of(10))
    (slice(0, 1, None), 8)
    """
    edges = np.linspace(0, count, min(PERIODS, max(count, 1)) + 1).round().astype(int).tolist()
    return [slice(low, high) for low, high in itertools.pairwise(edges)]
