"""Replay: figures by hand on streams whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from router_core.errors import DatasetError, FeedbackError
from router_core.prior import Hyperparameters, Prior, no_prior
from router_core.records import TIE, Instance, LabelledPair, Signal
from router_core.replay import parse_policy, replay, report, summarise, tabulate

POOL = ("left", "right")


def pair(i: int, label: int, verdicts: dict[str, int]) -> LabelledPair:
    return LabelledPair(f"p{i}", Instance(f"q{i}", ("a", "b")), label, {}, verdicts)


def specialists(n: int) -> tuple[list[LabelledPair], np.ndarray]:
    """Even pairs: `left` is right; odd pairs: `right` is. The context says which."""
    pairs = [pair(i, 0, {"left": i % 2, "right": 1 - i % 2}) for i in range(n)]
    x = np.zeros((n, 2), np.float32)
    x[np.arange(n), np.arange(n) % 2] = 1.0
    return pairs, x


def undecided(_: str | None) -> Prior:
    return no_prior(2, 2, Hyperparameters(1.0, 0.1, 0.5))


def test_tabulate_counts_a_tie_as_one_half() -> None:
    table = tabulate([pair(0, 1, {"left": 1, "right": TIE})], POOL)
    assert table.correctness.tolist() == [[1.0, 0.5]]


def test_missing_verdicts_and_empty_files_are_refused() -> None:
    with pytest.raises(DatasetError, match="right"):
        tabulate([pair(0, 1, {"left": 1})], POOL)
    with pytest.raises(DatasetError, match="empty"):
        tabulate([], POOL)


def test_the_router_learns_which_specialist_to_ask() -> None:
    pairs, x = specialists(400)
    table = tabulate(pairs, POOL)
    traces = replay(
        table,
        x,
        ["bayesian", "random", "single:left", "majority"],
        priors=undecided,
        signal=Signal.PREFERENCE,
        seeds=[0, 1],
    )
    figures = report(traces, table)
    policies = figures["policies"]
    assert isinstance(policies, dict)
    assert policies["bayesian"]["accuracy"] > 0.95
    assert 0.4 < policies["random"]["accuracy"] < 0.6
    assert policies["single:left"]["accuracy"] == 0.5
    # The two always disagree: every vote is a tie.
    assert policies["majority"] == {
        "accuracy": 0.5, "ci95": [0.5, 0.5], "calls_per_instance": 2.0, "regret": 0.5,
    }  # fmt: skip
    assert figures["oracle"] == 1.0
    assert figures["n"] == 400
    assert figures["best_single"] == {"model": "left", "accuracy": 0.5}


def test_the_reward_signal_teaches_the_same() -> None:
    pairs, x = specialists(300)
    table = tabulate(pairs, POOL)
    [trace] = replay(table, x, ["bayesian"], priors=undecided, signal=Signal.REWARD, seeds=[3]).values()
    assert trace.correct.mean() > 0.95


def test_same_seed_same_trace_and_other_seed_another() -> None:
    pairs, x = specialists(60)
    table = tabulate(pairs, POOL)

    def asked(seed: int) -> list[list[int]]:
        return replay(table, x, ["random"], priors=undecided, signal=Signal.PREFERENCE, seeds=[seed])[
            "random"
        ].asked.tolist()

    assert asked(1) == asked(1)
    assert asked(1) != asked(2)


def test_recorded_pairs_hold_no_loss() -> None:
    pairs, x = specialists(4)
    with pytest.raises(FeedbackError, match="preference"):
        replay(tabulate(pairs, POOL), x, ["random"], priors=undecided, signal=Signal.LOSS, seeds=[0])


def test_progress_adds_up_to_the_stream() -> None:
    pairs, x = specialists(150)
    steps: list[int] = []
    replay(
        tabulate(pairs, POOL), x, ["random", "majority"], priors=undecided, signal=Signal.PREFERENCE, seeds=[0, 1],
        on_step=steps.append,
    )  # fmt: skip
    assert sum(steps) == 150 * 2 * 2


def test_interval_covers_seeds_and_instances() -> None:
    pairs, x = specialists(100)
    table = tabulate(pairs, POOL)
    [trace] = replay(table, x, ["random"], priors=undecided, signal=Signal.PREFERENCE, seeds=range(4)).values()
    row = summarise(trace, table)
    low, high = row.ci95
    by_instance = trace.correct.mean(axis=0).var() / 100
    by_seed = trace.correct.mean(axis=1).var(ddof=1) / 4
    assert high - row.accuracy == pytest.approx(1.96 * (by_instance + by_seed) ** 0.5)
    assert row.accuracy - low == pytest.approx(high - row.accuracy)
    assert row.regret == pytest.approx(1.0 - row.accuracy)


def test_a_policy_may_name_its_prior() -> None:
    policy, form = parse_policy("bayesian:paper", POOL)
    assert (policy.name, form) == ("bayesian", "paper")
    assert parse_policy("single:left", POOL)[1] is None
