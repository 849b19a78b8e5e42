"""Off-policy evaluation of policies that ask several arms: a log as sequences of arms, and their importance weights.

Knows cascades as probabilities of the next arm given the answers so far; no file and no posterior. Called by
`service.lab.estimates` and `loadtests.ope_coverage`. Equations: docs/off-policy.md, "Cascades and learned votes".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from router_core.combine import Answers, Combination, call_values, next_call, verdicts_of
from router_core.ope.data import Estimate, LoggedData, NoSupportError
from router_core.ope.estimators import doubly_robust, ips, snips
from router_core.ope.safe import safe_interval
from router_core.ope.weights import MAX_LOST, PROPENSITY_FLOOR
from router_core.records import TIE

Array = NDArray[np.float64]

SAMPLES = 32
"""Sequences of the target that are drawn at an instance about which every arm was asked."""

_CELLS = 2_000_000
"""Numbers of one pass over many sequences; bounds memory, changes nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Sequencer:
    """A policy at N instances, as probabilities of what it asks next.

    Attributes:
        combination: votes and prices.
        offsets: (N, K) what its votes read.
        first: (N, K) probability that an arm is asked first.
        multipliers: (N,) price of a call in units of P(right); infinite where one arm alone is asked.
        everyone: True if all arms are asked at once.
        max_calls: arms that are asked at most; None for no bound.
    """

    combination: Combination
    offsets: Array
    first: Array
    multipliers: Array
    everyone: bool = False
    max_calls: int | None = None

    def rows(self, index: NDArray[np.int64]) -> Sequencer:
        """The policy at these instances."""
        return replace(self, offsets=self.offsets[index], first=self.first[index], multipliers=self.multipliers[index])

    def next_shares(self, said: Answers, there: NDArray[np.bool_]) -> Array:
        """Probability (N, K + 1) of each arm to be asked next, and of stopping, after these answers.

        Args:
            said: of the arms that were asked.
            there: (N, K), arms that can be asked.
        """
        N, K = self.offsets.shape
        values = call_values(self.combination.votes, self.offsets, said)
        going, shares = next_call(values, self.combination.costs, self.multipliers[:, None], there & ~said.answered)
        if self.max_calls is not None:
            going = going & (said.answered.sum(axis=1) < self.max_calls)
        out = np.zeros((N, K + 1))
        out[:, :K], out[:, K] = shares * going[:, None], ~going
        return out

    def actions(self, arms: NDArray[np.int64], answers: Answers, there: NDArray[np.bool_]) -> Array:
        """Probability of every action along given sequences: (N, T + 1, K + 1), the last action is to stop.

        Args:
            arms: (N, T), −1 after the last.
            answers: of those arms at least.
            there: (N, K), arms that can be asked.
        """
        (N, T), K = arms.shape, self.offsets.shape[1]
        out = np.zeros((N, T + 1, K + 1))
        if self.everyone:
            # Nothing is chosen: all arms, in any order.
            out[:, :T][arms >= 0] = 1.0
            out[np.arange(N), (arms >= 0).sum(axis=1), K] = ((arms >= 0).sum(axis=1) == there.sum(axis=1)) * 1.0
            return out
        out[:, 0, :K] = self.first
        asked = np.zeros((N, K), dtype=bool)
        for t in range(T):
            active = np.flatnonzero(arms[:, t] >= 0)
            asked[active, arms[active, t]] = True
            part = answers.rows(active).only(asked[active])
            out[active, t + 1] = self.rows(active).next_shares(part, there[active])
        return out

    def sample(self, answers: Answers, there: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw a sequence at each instance, whose answers are all known: (N, K), −1 after the last."""
        N, K = self.offsets.shape
        arms = np.full((N, K), -1, dtype=np.int64)
        if self.everyone:
            order = np.where(there, np.arange(K), K)
            order.sort(axis=1)
            return np.where(order < K, order, -1)
        arms[:, 0] = _drawn(self.first, rng)
        asked, active = np.zeros((N, K), dtype=bool), np.arange(N)
        for t in range(1, K + 1):
            asked[active, arms[active, t - 1]] = True
            if t == K:
                break
            part = answers.rows(active).only(asked[active])
            chosen = _drawn(self.rows(active).next_shares(part, there[active]), rng)
            arms[active[chosen < K], t] = chosen[chosen < K]
            active = active[chosen < K]
            if not len(active):
                break
        return arms

    def verdicts(self, arms: NDArray[np.int64], answers: Answers) -> NDArray[np.int64]:
        """The preferred response (N,) after these sequences."""
        asked = _asked(arms, self.offsets.shape[1])
        return verdicts_of(self.combination.votes.probabilities(self.offsets, answers.only(asked))).preferred


@dataclass(frozen=True, slots=True, eq=False)
class SequenceLog:
    """N decisions with feedback that tells the better response, as what was asked, in the order of the log.

    Attributes:
        answers: everything that is in the log, shadows included.
        labels: (N,) the better response.
        arms: (N, T) asked before the reply, in order; −1 after the last.
        chances: (N, T) probability with which each of them was asked, given what came before; 1 after the last.
        there: (N, K), arms that could be asked.
        complete: (N,), True where every such arm has answered, whatever the policy asked.
        inclusion: (N,) probability of being complete.
        logger: what the logging policy asks; None where it cannot be worked out, and only complete rows are used.
    """

    answers: Answers
    labels: NDArray[np.int64]
    arms: NDArray[np.int64]
    chances: Array
    there: NDArray[np.bool_]
    complete: NDArray[np.bool_]
    inclusion: Array
    logger: Sequencer | None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True, eq=False)
class SequenceWeights:
    """A log seen through a target.

    Attributes:
        weight: (N,) importance weight of the row.
        right: (N,) weighted mean of what the target's verdicts earn there; NaN where the weight is 0.
        calls: (N,) the same of its calls.
        lost: probability of the target on what the log (almost) never does.
    """

    weight: Array
    right: Array
    calls: Array
    lost: float


def weigh_sequences(
    log: SequenceLog, target: Sequencer, rng: np.random.Generator, floor: float = PROPENSITY_FLOOR
) -> SequenceWeights:
    """w_i = Σ_s π(s)/P(s is in the log) over the sequences s that row i shows, P = c + (1 − c)·e(s).

    A complete row (probability c) shows every sequence; another one shows what was asked and all its beginnings, e the
    probability that the logged sequence begins so. Complete rows take the mean over `SAMPLES` draws of the target.

    Args:
        log: the log.
        target: at the same instances.
        rng: of the draws.
        floor: probabilities below it count as no support.
    """
    N = len(log)
    weight, right, calls = np.zeros(N), np.full(N, np.nan), np.full(N, np.nan)
    full = np.flatnonzero(log.complete)
    step = max(_CELLS // (SAMPLES * target.offsets.shape[1] * 8), 1)
    for begin in range(0, len(full), step):
        rows = full[begin : begin + step]
        many = rows.repeat(SAMPLES)
        answers, there = log.answers.rows(many), log.there[many]
        policy = target.rows(many)
        arms = policy.sample(answers, there, rng)
        earned, asked = _earned(policy, arms, answers, log.labels[many]), (arms >= 0).sum(axis=1).astype(np.float64)
        included = log.inclusion[many]
        chance = np.zeros(len(many))
        if log.logger is not None and not target.everyone and (included < 1.0).any():
            chance = begun(log.logger.rows(many).actions(arms, answers, there), arms)
        omega = (1.0 / (included + (1.0 - included) * chance)).reshape(-1, SAMPLES)
        weight[rows] = omega.mean(axis=1)
        right[rows] = (omega * earned.reshape(-1, SAMPLES)).mean(axis=1) / weight[rows]
        calls[rows] = (omega * asked.reshape(-1, SAMPLES)).mean(axis=1) / weight[rows]
    if log.logger is None:
        return SequenceWeights(weight, right, calls, 0.0 if (log.inclusion >= floor).all() else 1.0)
    rest = np.flatnonzero(~log.complete)
    included = log.inclusion[rest]
    if target.everyone:
        # A cascade may come to have asked everyone, in one of many orders; only complete rows count.
        lost = np.where(included >= floor, 0.0, 1.0)
        return SequenceWeights(weight, right, calls, float(lost.sum() / N))
    arms, answers, there, labels = log.arms[rest], log.answers.rows(rest), log.there[rest], log.labels[rest]
    policy = target.rows(rest)
    would = policy.actions(arms, answers, there)
    did = log.logger.rows(rest).actions(arms, answers, there)
    mine, theirs = reached(would, arms), log.chances[rest].cumprod(axis=1)
    total, score, asked = np.zeros(len(rest)), np.zeros(len(rest)), np.zeros(len(rest))
    for t in range(arms.shape[1]):
        active = np.flatnonzero(arms[:, t] >= 0)
        if not len(active):
            break
        seen = included[active] + (1.0 - included[active]) * theirs[active, t]
        ends = mine[active, t] * would[active, t + 1, -1]
        w = np.where(seen >= floor, ends / np.maximum(seen, floor), 0.0)
        part = np.where(np.arange(arms.shape[1]) <= t, arms[active], -1)
        total[active] += w
        score[active] += w * _earned(policy.rows(active), part, answers.rows(active), labels[active])
        asked[active] += w * (t + 1)
    weight[rest] = total
    useful = total > 0.0
    right[rest[useful]], calls[rest[useful]] = score[useful] / total[useful], asked[useful] / total[useful]
    lost = np.where(included >= floor, 0.0, _unsupported(would, did, arms, floor))
    return SequenceWeights(weight, right, calls, float(lost.sum() / N))


@dataclass(frozen=True, slots=True, eq=False)
class SequenceValue:
    """What a log says of a target: estimates by estimator, the safe interval, calls per instance."""

    estimates: dict[str, Estimate]
    safe95: tuple[float, float]
    calls: float


def evaluate_sequences(
    log: SequenceLog,
    target: Sequencer,
    *,
    clip: float | None = None,
    max_lost: float = MAX_LOST,
    seed: int = 0,
) -> SequenceValue:
    """IPS, SNIPS and doubly robust estimates of how often the target's verdict is right.

    Weighted rows are what a log of one arm is; so the estimators are the same. The doubly robust one predicts every row
    by the weighted mean of those before it.

    Args:
        log: the log.
        target: at the same instances.
        clip: largest weight.
        max_lost: largest tolerated probability of the target on what the log never does.
        seed: of the target's draws at complete rows.

    Raises:
        NoSupportError: the log says too little about the target.
    """
    found = weigh_sequences(log, target, np.random.default_rng(seed))
    useful = found.weight > 0.0
    if found.lost > max_lost or not useful.any():
        share = min(max(found.lost, 0.0 if useful.any() else 1.0), 1.0)
        raise NoSupportError(
            f"{share:.1%} of what the target would have asked has a probability below {PROPENSITY_FLOOR:g} in this log "
            f"(allowed: {max_lost:.1%}). Log with a shadow rate, which shows every "
            "sequence, or with a cascade of a larger budget; or replay recorded pairs (`reward-router replay`)"
        )
    N = len(log)
    inverse = np.where(useful, 1.0 / np.where(useful, found.weight, 1.0), 1.0)
    data = LoggedData(
        ("target",),
        np.zeros((N, 1), np.float32),
        np.zeros(N, np.int64),
        inverse[:, None],
        np.ones((N, 1), np.bool_),
        np.where(useful, found.right, 0.0)[:, None],
    )
    weights = found.weight if clip is None else np.minimum(found.weight, clip)
    before = np.cumsum(weights * np.where(useful, found.right, 0.0)) - weights * np.where(useful, found.right, 0.0)
    q = ((before + 0.5) / (np.cumsum(weights) - weights + 1.0)).clip(0.0, 1.0)[:, None]
    data = _silent(data, ~useful)
    pi = np.ones((N, 1))
    makers: dict[str, Callable[[], Estimate]] = {
        "ips": lambda: ips(data, pi, clip=clip, floor=0.0),
        "snips": lambda: snips(data, pi, clip=clip, floor=0.0),
        "dr": lambda: doubly_robust(data, pi, q, stabilise=False, clip=clip, floor=0.0),
    }
    estimates = {name: _lossy(make(), found.lost, name) for name, make in makers.items()}
    safe = safe_interval(data, pi, floor=0.0, baseline=False)
    total = found.weight[useful].sum()
    return SequenceValue(estimates, safe, float((found.weight * found.calls)[useful].sum() / total))


def reached(actions: Array, arms: NDArray[np.int64]) -> Array:
    """P(the sequence begins with the first t + 1 of these arms), (N, T); 0 after the last."""
    out: Array = _taken(actions, arms).cumprod(axis=1)
    return out


def whole(actions: Array, arms: NDArray[np.int64]) -> Array:
    """P(exactly this sequence), (N,): it is reached, and the policy stops there."""
    rows, last = np.arange(len(arms)), (arms >= 0).sum(axis=1)
    out: Array = reached(actions, arms)[rows, last - 1] * actions[rows, last, -1]
    return out


def begun(actions: Array, arms: NDArray[np.int64]) -> Array:
    """P(the sequence begins with all of these arms), (N,)."""
    return np.asarray(reached(actions, arms)[np.arange(len(arms)), (arms >= 0).sum(axis=1) - 1])


def _taken(actions: Array, arms: NDArray[np.int64]) -> Array:
    """Probability (N, T) of each arm when it was asked; 0 after the last."""
    taken = np.take_along_axis(actions[:, : arms.shape[1]], np.maximum(arms, 0)[:, :, None], axis=2)[:, :, 0]
    out: Array = np.where(arms >= 0, taken, 0.0)
    return out


def _unsupported(would: Array, did: Array, arms: NDArray[np.int64], floor: float) -> Array:
    """(N,): probability of the target on arms that the log asks with less than `floor`, along what was asked.

    Each step counts with the weight of the steps before it. To stop is always supported: the answers are there.
    """
    mine, theirs = _taken(would, arms), _taken(did, arms)
    ratio = np.where(theirs >= floor, mine / np.maximum(theirs, floor), 0.0)
    before = np.concatenate([np.ones((len(arms), 1)), ratio.cumprod(axis=1)], axis=1)
    missing = np.where(did[:, :, :-1] >= floor, 0.0, would[:, :, :-1]).sum(axis=2)
    out: Array = (before * missing).sum(axis=1)
    return out


def _earned(policy: Sequencer, arms: NDArray[np.int64], answers: Answers, labels: NDArray[np.int64]) -> Array:
    """1 right, 0 wrong, ½ a tie, of the verdicts after these sequences: (N,)."""
    preferred = policy.verdicts(arms, answers)
    return np.where(preferred == TIE, 0.5, (preferred == labels).astype(np.float64))


def _asked(arms: NDArray[np.int64], K: int) -> NDArray[np.bool_]:
    """(N, K) from sequences (N, T)."""
    asked = np.zeros((len(arms), K), dtype=bool)
    rows, steps = np.nonzero(arms >= 0)
    asked[rows, arms[rows, steps]] = True
    return asked


def _drawn(shares: Array, rng: np.random.Generator) -> NDArray[np.int64]:
    """One index per row of probabilities (N, m)."""
    limits = shares.cumsum(axis=1)
    return np.asarray((rng.random((len(shares), 1)) * limits[:, -1:] > limits).sum(axis=1), dtype=np.int64)


def _silent(data: LoggedData, rows: NDArray[np.bool_]) -> LoggedData:
    """The same, with a weight of next to nothing for these rows: they are part of n, and tell nothing."""
    propensities = data.propensities.copy()
    propensities[rows] = 1e12
    return replace(data, propensities=propensities)


def _lossy(estimate: Estimate, lost: float, name: str) -> Estimate:
    """The same, its interval wider by what the log cannot tell; without support `ips` has earned nothing."""
    low, high = estimate.ci95
    return replace(estimate, ci95=(low - (0.0 if name == "ips" else lost), high + lost), lost=lost)
