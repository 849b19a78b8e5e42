"""Recorded pairs through the policies, in process: what would each have earned on this stream?

Knows which pass a policy takes; no files, no summaries. Called by `service.cli.replay`, the offline stage and
`loadtests`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.combine import STACKED, Combination, budget_of, is_combined
from router_core.errors import FeedbackError, UnknownPolicyError
from router_core.policies import AllCalls, BayesianPolicy, Policy, ScoreScale, make_policy
from router_core.posterior import FoldSettings
from router_core.prior import Prior
from router_core.records import Signal
from router_core.replay.combining import combining_pass
from router_core.replay.learners import FORMS, is_learner, learner_pass
from router_core.replay.passes import (
    Stage,
    Steps,
    all_arms_pass,
    combined_correctness,
    fixed_pass,
    learns,
    online_pass,
)
from router_core.replay.stream import Plan, Scenario, make_plan
from router_core.replay.table import Table
from router_core.replay.trace import ALL_ARMS, Pass, Trace

Array = NDArray[np.float64]

SHADOW = "+shadow="
"""`bayesian+shadow=0.1`: for a tenth of the instances every RM is asked, and every verdict is learned from."""


@dataclass(frozen=True, slots=True)
class Selected:
    """A policy as it was named for a replay.

    Attributes:
        name: as given.
        policy: of `make_policy`; where answers are combined, the one that draws the first arm.
        shadow: share of the instances at which every RM is asked.
        combines: True for `stacked` and `cascade:B`.
        own: True for a learner with a state of its own (`learners`); the policy says where it starts.
    """

    name: str
    policy: Policy
    shadow: float = 0.0
    combines: bool = False
    own: bool = False

    def calls(self, plans: Sequence[Plan], n_arms: int) -> float:
        """RM calls per instance: K where all are asked, else 1 + (share shadowed)·(K − 1)."""
        if isinstance(self.policy, AllCalls):
            return float(n_arms)
        shadowed = sum(int(plan.shadowed(self.shadow).sum()) for plan in plans)
        return 1.0 + shadowed / sum(len(plan) for plan in plans) * (n_arms - 1)


def select(name: str, pool: Sequence[str]) -> Selected:
    """The policy of a name: as `make_policy`, and `+shadow=RATE` behind the name of one that learns.

    Raises:
        UnknownPolicyError: no such policy, or a rate that it cannot have.
    """
    if is_combined(name):
        if name != STACKED:
            budget_of(name)
        return Selected(name, make_policy("bayesian:calibrated", pool), combines=True)
    if is_learner(name):
        return Selected(name, BayesianPolicy(name, FORMS[name.partition(":")[2]]), own=True)
    base, option, rate = name.rpartition(SHADOW)
    if not option:
        return Selected(name, make_policy(name, pool))
    policy = make_policy(base, pool)
    try:
        share = float(rate)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise UnknownPolicyError(f"policy {name!r}: the shadow rate is {rate!r}; give a share in [0, 1]")
    if not learns(policy):
        raise UnknownPolicyError(f"policy {name!r}: {base!r} does not learn, so shadowing teaches it nothing; drop it")
    return Selected(name, policy, share)


def replay(
    table: Table,
    x: NDArray[np.float32],
    policy_names: Sequence[str],
    *,
    priors: Callable[[str | None], Prior],
    signal: Signal,
    seeds: Sequence[int],
    settings: FoldSettings | None = None,
    on_step: Steps | None = None,
    scenario: Scenario | None = None,
    scale: ScoreScale | None = None,
    combination: Combination | None = None,
    prices: Array | None = None,
) -> dict[str, Trace]:
    """Every policy over the stream, once per seed; a seed fixes order, gaps and the noise of the draws for all of them.

    Args:
        table: the stream.
        x: (N, d) float32 contexts.
        policy_names: as `select`.
        priors: the prior of a form, or of the default one for None.
        signal: `preference`, `reward` (the asked RM's correctness) or `loss` (simulated: `replay.loss`).
        seeds: one pass each.
        settings: where the log is cut.
        on_step: told how many instances were done since the last call; for progress bars.
        scenario: what happens to the stream; by default each pair comes once, with feedback before the next draw.
        scale: of the RMs' scores, for policies that combine them; by default that of the stream's own scores.
        combination: the checkpoint's learned votes, for `stacked` and `cascade:B`.
        prices: (K,) in units of the cheapest; None: equal.

    Raises:
        FeedbackError: shadowing with a signal that says nothing of the other RMs; audits with such a signal.
        UnknownPolicyError: a policy that does not exist.
        DatasetError: drift without domains; `uwo` without scores; `stacked` or a cascade without a combination.
    """
    scenario = scenario or Scenario()
    if scenario.audits is not None and signal is not Signal.PREFERENCE:
        raise FeedbackError(
            f"audits with signal {signal.value!r}: a referee speaks by preference; leave the signal out"
        )
    selected = [select(name, table.pool) for name in policy_names]
    _require_attributable(selected, signal)
    plans = [make_plan(table, scenario, seed) for seed in seeds]
    combination = None if combination is None else combination.priced(prices)
    costs = np.ones(len(table.pool)) if prices is None else prices
    tell = on_step or (lambda _: None)
    traces = {}
    for each in selected:
        if each.combines:
            prior = priors(each.policy.prior)
            stage = Stage(table, x, prior.offsets(x), each.policy, prior, signal, scenario, settings=settings)
            played = [combining_pass(stage, plan, each.name, combination, tell) for plan in plans]
            calls, price = (float(np.mean([getattr(part, of) for part in played])) for of in ("calls", "price"))
            traces[each.name] = Trace(tuple(part.trace for part in played), len(table), calls, price)
            continue
        if each.own:
            if scenario.audits is not None:
                raise FeedbackError(f"policy {each.name!r} with audits: it learns from feedback only; leave one out")
            prior = priors(each.policy.prior)
            stage = Stage(table, x, prior.offsets(x), each.policy, prior, signal, scenario)
            learned = [learner_pass(each.name, stage, plan, tell) for plan in plans]
            traces[each.name] = Trace(tuple(one for one, _ in learned), len(table), float(learned[0][1]))
            continue
        if isinstance(each.policy, AllCalls):
            correct = combined_correctness(table, each.policy, scale or _own_scale(table))
            passes = [all_arms_pass(correct, plan, tell) for plan in plans]
        else:
            prior = priors(each.policy.prior)
            stage = Stage(table, x, prior.offsets(x), each.policy, prior, signal, scenario, each.shadow, settings)
            one_pass = online_pass if learns(each.policy) else fixed_pass
            passes = [one_pass(stage, plan, tell) for plan in plans]
        calls = each.calls(plans, len(table.pool)) + _audit_calls(passes, scenario, len(table.pool))
        if isinstance(each.policy, AllCalls):
            answered = table.answered
            calls, price = float(answered.sum(axis=1).mean()), float((answered @ costs).mean())
        else:
            price = _price(passes, calls, costs)
        traces[each.name] = Trace(tuple(passes), len(table), calls, price)
    return traces


def _audit_calls(passes: Sequence[Pass], scenario: Scenario, n_arms: int) -> float:
    """RM calls per instance that audits add to one call: K − 1 at each audited step, where all are asked."""
    if scenario.audits is None or not scenario.audits.ask_all:
        return 0.0
    return sum([part.audited for part in passes]) / sum([len(part.order) for part in passes]) * (n_arms - 1)


def _price(passes: Sequence[Pass], calls: float, costs: Array) -> float:
    """Mean price of an instance, shadows included: that of the drawn arms, and of all others where they were asked."""
    asked = np.concatenate([part.asked for part in passes])
    drawn = np.where(asked == ALL_ARMS, costs.sum(), costs[asked])
    K = len(costs)
    shadowed = (calls - 1.0) / (K - 1) if K > 1 and (asked != ALL_ARMS).all() else 0.0
    return float((drawn + shadowed * (costs.sum() - drawn)).mean())


def _require_attributable(selected: Sequence[Selected], signal: Signal) -> None:
    for each in selected:
        if each.shadow and signal is not Signal.PREFERENCE:
            raise FeedbackError(
                f"policy {each.name!r} with signal {signal.value!r}: it speaks of the asked RM only, so shadowed RMs "
                "cannot learn from it; use --signal preference, or drop the shadow rate"
            )


def _own_scale(table: Table) -> ScoreScale:
    """Mean and standard deviation of each RM over the stream's own scores."""
    known = np.isfinite(table.scores)
    counts = np.maximum(known.sum(axis=(0, 2)), 1)
    scores = np.where(known, table.scores, 0.0)
    mean = scores.sum(axis=(0, 2)) / counts
    squares = np.where(known, np.square(table.scores - mean[:, None]), 0.0).sum(axis=(0, 2))
    deviation = np.sqrt(squares / counts)
    return ScoreScale(mean, np.where(deviation > 0, deviation, 1.0))
