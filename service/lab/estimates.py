"""What other policies would have earned on an exported log: every estimator for each, as one JSON document.

Called by `service.cli.ope`, which prints it. Equations: docs/off-policy.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_core.attempts import Outcome
from router_core.checkpoint import Checkpoint
from router_core.combine import is_combined
from router_core.intervals import Z95
from router_core.ope import (
    Estimate,
    LoggedData,
    NoSupportError,
    doubly_robust,
    evaluate_sequences,
    ips,
    safe_interval,
    sequential_ridge,
    snips,
)
from router_core.records import Signal
from service.errors import ConfigurationError
from service.lab.eventlog.load import EventLog, logged_data
from service.lab.eventlog.record import Header
from service.lab.eventlog.targets import Targets
from service.usecases.decisions import StoredDecision

Array = NDArray[np.float64]

FEW_ROWS = 100
"""Effective sample size below which the normal intervals may hold the truth less often than they say."""

WEIGHT_TOLERANCE = 0.1
"""How far the mean weight may be from its expectation before the estimates by plain weights are warned of."""

ESTIMATORS = ("ips", "snips", "dr")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the log says about one policy.

    Attributes:
        estimates: by name of the estimator; empty where the log cannot tell.
        safe95: interval that holds without a limit theorem; None for rewards outside [0, 1] and for audited decisions,
            which are a sample.
        problem: why there are no estimates.
        warnings: what to know before using them.
        coverage: share of the instances that its scorer answers; None where it has abstained on none in the log.
    """

    estimates: dict[str, Estimate]
    safe95: tuple[float, float] | None
    problem: str | None
    warnings: list[str]
    coverage: float | None = None


def evaluate_log(
    log: EventLog,
    names: Sequence[str],
    checkpoint: Checkpoint | None,
    *,
    clip: float | None = None,
    learn_share: float = 0.5,
) -> dict[str, Any]:
    """The JSON of the command.

    Args:
        log: the file.
        names: target policies.
        checkpoint: the run's, restricted to its pool.
        clip: largest importance weight.
        learn_share: of the log, for `bayesian`.

    Raises:
        ConfigurationError: no event can be used.
        UnknownPolicyError: a policy that cannot be evaluated in this way.
    """
    whole = logged_data(log)
    if not len(whole):
        raise ConfigurationError(
            f"run {log.header.run!r} has {len(log.events)} events and none with a reward of one asked RM: nothing can "
            "be evaluated; send feedback, and export again"
        )
    decisions = [event.decision for event, usable in zip(log.events, log.usable, strict=True) if usable]
    q = sequential_ridge(whole)
    targets = Targets(log, checkpoint, learn_share)
    policies: dict[str, Any] = {}
    for name in names:
        if is_combined(name):
            policies[name] = _figures(*_judge_sequences(targets, name, clip), name, log.header)
            continue
        first, pi = targets.probabilities(name, whole)
        part = slice(first, None)
        silent = _silent(name, whole, decisions)
        if silent is None:
            verdict = judge(whole.rows(part), pi, q[part], clip)
        else:
            verdict = judge_answered(whole, pi, silent, clip)
        policies[name] = _figures(verdict, 1.0, name, log.header)
    return {
        "n": len(whole),
        "run": log.header.run,
        "signal": log.header.signal.value,
        "left_out": len(log.events) - len(whole),
        "shadowed": int((whole.seen.sum(axis=1) > 1).sum()),
        "sharing_a_draw": _followers(decisions),
        "after_a_failure": sum(any(it.outcome is Outcome.FAILED for it in one.attempts) for one in decisions),
        "logged": {"value": float((whole.share * whole.reward).mean()), "ci95": list(_mean_interval(whole))},
        "policies": policies,
    }


def judge(data: LoggedData, pi: Array, q: Array, clip: float | None) -> Verdict:
    """All estimators for one target; `data` is in log order, `pi` and `q` are (N, K)."""
    bounded = data.unit_rewards and data.inclusion is None
    safe = safe_interval(data, pi) if bounded and (pi * data.available).any() else None
    estimators: dict[str, Callable[[], Estimate]] = {
        "ips": lambda: ips(data, pi, clip=clip),
        "snips": lambda: snips(data, pi, clip=clip),
        "dr": lambda: doubly_robust(data, pi, q, clip=clip),
    }
    try:
        estimates = {name: estimator() for name, estimator in estimators.items()}
    except NoSupportError as error:
        return Verdict({}, safe, str(error), [])
    return Verdict(estimates, safe, None, _warnings(estimates["snips"], clip))


def judge_answered(data: LoggedData, pi: Array, silent: NDArray[np.bool_], clip: float | None) -> Verdict:
    """SNIPS for a single scorer over the instances that it answers, and the share of these.

    Where it abstained, the log holds the reward of whoever was asked instead, which says nothing of it. Whether it
    would have abstained where it was not asked is not known, so only an estimate that weighs the answered rows alone is
    made: the others divide by all of them.

    Args:
        data: in log order.
        pi: (N, K) of a policy that asks one arm.
        silent: (N,), True where that arm was asked and abstained.
        clip: largest importance weight.
    """
    answered = np.flatnonzero(~silent)
    try:
        every, told = snips(data, pi, clip=clip), snips(data.rows(answered), pi[answered], clip=clip)
    except NoSupportError as error:
        return Verdict({}, None, str(error), [])
    coverage = min(1.0, told.mean_weight * told.n / (every.mean_weight * every.n))
    return Verdict({"snips": told}, None, None, _warnings(told, clip, conditional=True), coverage)


def _silent(name: str, data: LoggedData, decisions: Sequence[StoredDecision]) -> NDArray[np.bool_] | None:
    """Where the one scorer that a policy `single:NAME` asks was asked and abstained; None for others, or nowhere."""
    if not name.startswith("single:"):
        return None
    arm = data.pool.index(name.removeprefix("single:"))
    told = [(*one.attempts, *(one.shadows or ())) for one in decisions]
    silent = np.array([any(it.arm == arm and it.outcome is Outcome.ABSTAINED for it in part) for part in told])
    return silent if silent.any() else None


def _judge_sequences(targets: Targets, name: str, clip: float | None) -> tuple[Verdict, float | None]:
    """The same for a policy that asks several RMs; and its calls per instance."""
    log, target = targets.sequences(name)
    try:
        found = evaluate_sequences(log, target, clip=clip)
    except NoSupportError as error:
        return Verdict({}, None, str(error), []), None
    warnings = _warnings(found.estimates["snips"], clip)
    if log.logger is None:
        warnings.append("calls were made two at once in this log, so only shadowed decisions are used")
    return Verdict(found.estimates, found.safe95, None, warnings), found.calls


def _followers(decisions: Sequence[StoredDecision]) -> int:
    """Rows whose RM was drawn for an earlier row; see `StoredDecision.sticky`."""
    shared = [decision.sticky for decision in decisions if decision.sticky]
    return len(shared) - len(set(shared))


def recommended(estimate: Estimate) -> tuple[str, str]:
    """Return the name of the estimator to use, and why: docs/off-policy.md, "Which one".

    Args:
        estimate: any one of the policy; weights are the same in all.
    """
    if _off(estimate):
        return "snips", (
            f"the weights' mean is {estimate.mean_weight:.2f} where 1 is expected; `snips` divides by what it is"
        )
    if estimate.ess < FEW_ROWS:
        return "snips", f"the log is worth {estimate.ess:.0f} rows: `snips` varies least on so few"
    return "dr", "the weights are as expected: `dr` varies least, and its interval holds for a policy that learned"


def _off(estimate: Estimate) -> bool:
    """Return True if the mean weight is far from its expectation; where weights were clipped it is meant to be."""
    return not estimate.clipped and abs(estimate.mean_weight + estimate.lost - 1.0) > WEIGHT_TOLERANCE


def _warnings(estimate: Estimate, clip: float | None, *, conditional: bool = False) -> list[str]:
    """What a reader of the figures should know; `conditional` where only some rows can count, so that weights do not
    add up to 1.
    """
    out = []
    if _off(estimate) and not conditional:
        out.append(
            f"mean weight {estimate.mean_weight:.2f} where 1 is expected: `ips` is off by about that factor, and `dr` "
            "leans on its model"
        )
    if estimate.ess < FEW_ROWS:
        out.append(
            f"the log is worth {estimate.ess:.0f} rows of this policy's own: its 95% intervals may hold the truth less "
            "often than they say"
        )
    if estimate.lost:
        out.append(
            f"{estimate.lost:.1%} of what it would have asked has no support in this log: the intervals are that wider"
        )
    if estimate.clipped:
        out.append(f"{estimate.clipped:.1%} of the weights were clipped at {clip}: the values are biased, unknown how")
    if estimate.dropped:
        out.append(f"{estimate.dropped} decisions left out, at which none of its RMs was available")
    return out


def _figures(verdict: Verdict, calls: float | None, name: str, header: Header) -> dict[str, Any]:
    """One policy's part of the JSON."""
    warnings = list(verdict.warnings)
    if verdict.safe95 is not None and verdict.estimates and verdict.estimates["snips"].ess < FEW_ROWS:
        low, high = verdict.safe95
        warnings.append(f"the interval that holds on any number of rows is {low:.3f} – {high:.3f}")
    if header.signal is Signal.LOSS:
        warnings.append("losses are scaled per RM by what came before, so that RMs are hard to compare by them")
    if name.startswith("bayesian"):
        warnings.append("as it was after the first part of the log, evaluated on the rest and held fixed")
    figures: dict[str, Any] = dict.fromkeys(ESTIMATORS)
    for how, estimate in verdict.estimates.items():
        figures[how] = {
            "value": estimate.value,
            "ci95": list(estimate.ci95),
            "ess": estimate.ess,
            "n": estimate.n,
            "mean_weight": estimate.mean_weight,
            "max_weight": estimate.max_weight,
            "clipped": estimate.clipped,
            "lost": estimate.lost,
        }
    name_of, why = recommended(verdict.estimates["snips"]) if verdict.estimates else (None, None)
    if verdict.coverage is not None:
        name_of, why = (
            "snips",
            (
                f"its scorer answers {verdict.coverage:.0%} of the instances and abstains on the others: this is its "
                "value where it answers"
            ),
        )
    return {
        **figures,
        "recommended": name_of,
        "why": why,
        "calls": calls,
        "coverage": verdict.coverage,
        "safe95": None if verdict.safe95 is None else list(verdict.safe95),
        "problem": verdict.problem,
        "warnings": warnings,
    }


def _mean_interval(data: LoggedData) -> tuple[float, float]:
    """95 % normal interval of the mean reward; rows that share a draw count as one."""
    mean = float((data.share * data.reward).mean())
    half = Z95 * float(np.sqrt(np.square(data.per_draw(data.share * (data.reward - mean))).sum())) / len(data)
    return mean - half, mean + half
