"""Tables and figures: by hand on streams whose answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from router_core.errors import DatasetError
from router_core.intervals import accuracy_interval
from router_core.records import TIE, Instance, LabelledPair, Signal
from router_core.replay import (
    Pass,
    Scenario,
    Trace,
    complete_pairs,
    curve,
    merge,
    replay,
    report,
    score_scale,
    summarise,
    tabulate,
)
from router_core.replay.plot import plot_curves
from tests.support.replay import POOL, pair, specialists, undecided


def test_tabulate_counts_a_tie_as_one_half() -> None:
    table = tabulate([pair(0, 1, {"left": 1, "right": TIE})], POOL)
    assert table.correctness.tolist() == [[1.0, 0.5]]


def test_missing_verdicts_and_empty_files_are_refused() -> None:
    with pytest.raises(DatasetError, match="right"):
        tabulate([pair(0, 1, {"left": 1})], POOL)
    with pytest.raises(DatasetError, match="empty"):
        tabulate([], POOL)


def test_incomplete_pairs_are_found_and_counted() -> None:
    pairs = [pair(0, 0, {"left": 0, "right": 1}), pair(1, 0, {"left": 0}), pair(2, 0, {"left": 0, "right": 0})]
    kept, missing = complete_pairs(pairs, POOL)
    assert (kept.tolist(), missing) == ([0, 2], {"right": 1})
    with pytest.raises(DatasetError, match="none of the 1 pairs"):
        complete_pairs(pairs[1:2], POOL)
    with pytest.raises(DatasetError, match="every RM"):
        complete_pairs([pair(0, 0, {"left": 0}), pair(1, 0, {"right": 0})], POOL)


def test_several_responses_keep_their_scores_and_verdicts() -> None:
    three = LabelledPair("t", Instance("q", ("a", "b", "c")), 2, {"left": (1.0, 2.0, 3.0)}, {"left": 2})
    two = pair(0, 0, {"left": 0}, scores={"left": (2.0, 1.0)})
    table = tabulate([three, two], ["left"])
    assert table.correctness.tolist() == [[1.0], [1.0]]
    assert table.responses.tolist() == [3, 2]
    assert np.isnan(table.scores[1, 0, 2])
    scale = score_scale([three, two], ["left", "unknown"])
    assert scale.shift.tolist() == [pytest.approx(9 / 5), 0.0]
    assert scale.scale[1] == 1.0


def test_the_report_has_the_promised_keys_and_figures_by_hand() -> None:
    pairs, x = specialists(400)
    table = tabulate(pairs, POOL)
    traces = replay(
        table, x, ["bayesian", "random", "single:left", "majority"],
        priors=undecided, signal=Signal.PREFERENCE, seeds=[0, 1],
    )  # fmt: skip
    figures = json.loads(json.dumps(report(traces, table)))
    # The two always disagree: every vote is a tie.
    assert figures["policies"]["majority"] == {
        "accuracy": 0.5, "ci95": pytest.approx([0.451, 0.549], abs=1e-3), "calls_per_instance": 2.0,
        "price_per_instance": 2.0, "regret": 0.5, "coverage": 1.0,
    }  # fmt: skip
    assert figures["oracle"] == 1.0
    assert figures["n"] == 400
    assert figures["best_single"] == {"model": "left", "accuracy": 0.5}
    assert figures["seeds"] == [0, 1]
    assert figures["pool"] == list(POOL)
    # The pairs have domains and no subsets.
    assert {name: part["n"] for name, part in figures["subsets"].items()} == {"even": 200, "odd": 200}
    assert figures["best_per_subset"] == 1.0
    assert figures["asked"]["single:left"] == {"left": 1.0, "right": 0.0}
    assert "majority" not in figures["asked"]
    assert figures["last_third"]["bayesian"] > 0.95
    assert set(figures["paired"]["bayesian"]) == {"best_single", "random", "majority"}
    assert set(figures["paired"]["random"]) == {"best_single", "majority"}
    over = figures["paired"]["bayesian"]["best_single"]
    assert over["difference"] == pytest.approx(figures["policies"]["bayesian"]["accuracy"] - 0.5)
    assert over["ci95"][0] < over["difference"] < over["ci95"][1]


def test_figures_by_subset() -> None:
    pairs = [pair(i, 0, {"left": int(i >= 4), "right": int(i < 2)}, subset=("x", "y")[i // 4]) for i in range(8)]
    table = tabulate(pairs, POOL)
    x = np.ones((8, 2), np.float32)
    traces = replay(table, x, ["single:left"], priors=undecided, signal=Signal.PREFERENCE, seeds=[0])
    figures = report(traces, table)
    # left is right on x (4 of 4) and wrong on y; right is right on 2 of x and on all of y.
    assert figures["subsets"]["x"]["policies"]["single:left"]["accuracy"] == 1.0
    assert figures["subsets"]["y"]["best_single"] == {"model": "right", "accuracy": 1.0}
    assert figures["best_single"] == {"model": "right", "accuracy": 0.75}
    assert figures["best_per_subset"] == 1.0


def test_regret_and_interval_of_the_summary() -> None:
    pairs, x = specialists(100)
    table = tabulate(pairs, POOL)
    [trace] = replay(table, x, ["random"], priors=undecided, signal=Signal.PREFERENCE, seeds=range(4)).values()
    row = summarise(trace, table)
    assert row.regret == pytest.approx(1.0 - row.accuracy)
    assert row.ci95 == accuracy_interval(trace.correct, table.groups)


def test_a_trace_averages_repeats_and_remembers_the_last_arm() -> None:
    part = Pass(9, np.array([0, 1, 1, 0]), np.array([1.0, 0.0, 1.0, 1.0]), np.array([0, 0, 1, 1]))
    trace = Trace((part,), 2, 1.0)
    assert trace.correct.tolist() == [[1.0, 0.5]]
    assert trace.asked.tolist() == [[1, 1]]


def test_merged_folds_are_one_trace_over_all_pairs() -> None:
    pairs, x = specialists(60)
    table = tabulate(pairs, POOL)
    parts = []
    for rows in (np.arange(0, 60, 2), np.arange(1, 60, 2)):
        traces = replay(
            table.rows(rows), x[rows], ["single:left"], priors=undecided, signal=Signal.PREFERENCE, seeds=[4, 5]
        )
        parts.append((rows, traces))
    merged = merge(parts, 60)["single:left"]
    assert merged.seeds == (4, 5)
    assert len(merged.passes) == 4
    assert (merged.correct == table.correctness[:, 0]).all()


def hand_made(*rows: list[float]) -> tuple[Trace, object]:
    pairs, _ = specialists(4)
    order = np.array([3, 2, 1, 0])
    passes = tuple(Pass(seed, order, np.array(row), np.zeros(4, np.int64)) for seed, row in enumerate(rows))
    return Trace(passes, 4, 1.0), tabulate(pairs, POOL)


def test_curves_by_hand() -> None:
    trace, table = hand_made([1, 0, 1, 1], [1, 1, 1, 0])
    found = curve(trace, table, window=2)  # type: ignore[arg-type]
    assert found.steps.tolist() == [1, 2, 3, 4]
    # Running means of two: (1, .5, .5, 1) and (1, 1, 1, .5); misses add up to (0, 1, 1, 1) and (0, 0, 0, 1).
    assert found.accuracy.mean.tolist() == [1.0, 0.75, 0.75, 0.75]
    assert found.regret.mean.tolist() == [0.0, 0.5, 0.5, 1.0]
    # Two passes: t(1) = 12.706 times the standard error sd/√2 = 0.5.
    assert found.regret.high[1] == pytest.approx(0.5 + 12.706 * 0.5)
    assert found.accuracy.high.max() <= 1.0
    document = json.loads(json.dumps(found.as_dict()))
    assert document["step"] == [1, 2, 3, 4]
    assert len(document["accuracy_ci95"]) == len(document["regret_ci95"]) == 4


def test_a_single_pass_has_no_band() -> None:
    trace, table = hand_made([1, 0, 1, 1])
    found = curve(trace, table, window=2)  # type: ignore[arg-type]
    assert found.accuracy.low.tolist() == found.accuracy.mean.tolist() == found.accuracy.high.tolist()


def test_long_curves_keep_a_hundred_points_and_the_end() -> None:
    pairs, x = specialists(500)
    table = tabulate(pairs, POOL)
    [trace] = replay(
        table, x, ["random"], priors=undecided, signal=Signal.PREFERENCE, seeds=[0, 1], scenario=Scenario(repeat=2)
    ).values()
    found = curve(trace, table)
    assert (found.steps[0], found.steps[-1], len(found.steps)) == (1, 1000, 100)
    assert found.regret.mean[-1] == pytest.approx(1000 - np.mean([part.correct.sum() for part in trace.passes]))


def test_the_picture_is_drawn(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("matplotlib")
    pairs, x = specialists(120)
    table = tabulate(pairs, POOL)
    traces = replay(table, x, ["bayesian", "random"], priors=undecided, signal=Signal.PREFERENCE, seeds=[0, 1])
    curves = {name: curve(trace, table) for name, trace in traces.items()}
    plot_curves(curves, tmp_path / "curve.png", "two specialists")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
