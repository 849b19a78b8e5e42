"""Groups of n responses: what does a preference teach about an RM that knows nothing, and about one that knows some?

Each of n responses has a quality ~ N(0, 1), and the best one is preferred. An RM of skill ρ scores ρ·quality +
√(1 − ρ²)·noise; `constant` gives all the same score. Three rules make a reward of its scores:

* `½ on a tie`: 1 if its best response is the preferred one, ½ where several tie for it: the rule until now.
* `1/winners`: 1/w where w responses tie for its best and the preferred one is among them.
* `implied pairs`: the share of the other responses that it puts below the preferred one (`records.credit`), as now.

The router then starts from nothing (`bayesian:none`), or with what pairs say of each RM, and asks one of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from loadtests.soundness.report import Options, Report
from router_core.policies import BayesianPolicy, draw
from router_core.posterior import fold, start
from router_core.prior import Prior, calibrated_prior, no_prior
from router_core.records import Event, Feedback, Signal, chance_of, credit, leaders_of

Array = NDArray[np.float64]
Rule = Callable[[list[float], int], float | None]

SKILLS: Mapping[str, float] = {"constant": 0.0, "honest": 0.5}
SIZES = (2, 4, 8)
GROUPS = 4000
STEPS, SEEDS = 600, 12


def responses(options: Options) -> Report:
    """What each RM earns per rule and n, and how often the router asks the honest one at the end."""
    seeds = options.seeds or SEEDS
    earned = {str(n): {rm: {rule: _earned(rm, n, rule) for rule in RULES} for rm in SKILLS} for n in SIZES}
    asked = {case: {rule: _asked(case, rule, seeds) for rule in RULES} for case in CASES}
    rows = [
        (f"earned by {rm}, n = {n}", *(f"{value:.2f}" for value in by_rule.values()))
        for n, by_rm in earned.items()
        for rm, by_rule in by_rm.items()
    ]
    rows += [
        (f"honest asked, {case}", *(f"{found['mean']:.2f} ± {found['error']:.2f}" for found in by_rule.values()))
        for case, by_rule in asked.items()
    ]
    return Report(
        title=f"preferences among n responses, {GROUPS} groups; {seeds} runs of {STEPS} steps",
        columns=("", *RULES),
        rows=tuple(rows),
        notes=(
            "Promise: an RM that knows nothing earns no more than one that knows some, and is not asked.",
            "`honest asked`: over the last third of a run; `offsets`: it starts at what pairs say of each RM.",
        ),
        figures={"earned": earned, "asked": asked},
    )


def _half_on_a_tie(scores: list[float], preferred: int) -> float:
    winners = leaders_of(scores)
    return 0.5 if len(winners) > 1 or len(scores) == 1 else float(winners[0] == preferred)


def _winners(scores: list[float], preferred: int) -> float | None:
    return chance_of(leaders_of(scores), preferred) if len(scores) > 1 else None


RULES: Mapping[str, Rule] = {"½ on a tie": _half_on_a_tie, "1/winners": _winners, "implied pairs": credit}

CASES: Mapping[str, tuple[tuple[int, ...], bool]] = {
    "n = 2": ((2,), False),
    "n = 8": ((8,), False),
    "n = 8, offsets": ((8,), True),
    "n = 1, 2 and 8, offsets": ((1, 2, 8), True),
}
"""Sizes of the stream's groups, evenly mixed; and whether the run starts with offsets."""


def _scores(rm: str, n: int, rng: np.random.Generator) -> tuple[list[float], int]:
    """One group: what the RM says of it, and the best response."""
    quality, noise = rng.standard_normal((2, n))
    skill = SKILLS[rm]
    scores = skill * quality + (1 - skill**2) ** 0.5 * noise if rm != "constant" else np.zeros(n)
    return scores.tolist(), int(quality.argmax())


def _earned(rm: str, n: int, rule: str) -> float:
    rng = np.random.default_rng(n)
    rewards = [RULES[rule](*_scores(rm, n, rng)) for _ in range(GROUPS)]
    return float(np.mean([reward for reward in rewards if reward is not None]))


def _asked(case: str, rule: str, seeds: int) -> dict[str, float]:
    shares = np.array([_run(*CASES[case], RULES[rule], np.random.default_rng(seed)) for seed in range(seeds)])
    return {"mean": float(shares.mean()), "error": float(shares.std(ddof=1) / seeds**0.5) if seeds > 1 else 0.0}


def _run(sizes: tuple[int, ...], offsets: bool, rule: Rule, rng: np.random.Generator) -> float:
    """Share of the last third of the steps at which the honest RM is asked."""
    names, d = list(SKILLS), 4
    state = start(_prior(offsets, d))
    policy, chosen = BayesianPolicy(), []
    for _ in range(STEPS):
        x = np.concatenate([[1.0], rng.standard_normal(d - 1)]).astype(np.float32)
        x /= np.linalg.norm(x)
        o = state.prior.offsets(x[None])
        arm = int(draw(policy.beliefs(x[None], o, state), rng).ranking[0, 0])
        scores, best = _scores(names[arm], int(rng.choice(sizes)), rng)
        feedback = Feedback(Signal.PREFERENCE, float(best))
        state = fold(state, [Event(arm, x.tobytes(), float(o[0, arm]), rule(scores, best), feedback)])
        chosen.append(names[arm] == "honest")
    return float(np.mean(chosen[-STEPS // 3 :]))


def _prior(offsets: bool, d: int) -> Prior:
    if not offsets:
        return no_prior(len(SKILLS), d)
    known = np.array([_earned(rm, 2, "implied pairs") for rm in SKILLS])
    return calibrated_prior(len(SKILLS), d, lambda x: np.tile(known, (len(x), 1)))
