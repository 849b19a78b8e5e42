"""The figures of Table 2, by hand where the numbers are small, by counting where they are intervals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from router_core.intervals import accuracy_interval
from router_core.offline.evaluate import wilson
from router_core.offline.figures import figures
from router_core.offline.table import Judged
from router_core.records import TIE, Instance, LabelledPair
from router_core.replay.table import tabulate


def judged_pair(i: int, a: int, b: int) -> LabelledPair:
    scores = {"A": (float(a == 0), float(a == 1)), "B": (float(b == 0), float(b == 1))}
    subset = "one" if i < 2 else "two"
    return LabelledPair(str(i), Instance("p", ("x", "y")), 0, scores, {"A": a, "B": b}, subset=subset, group=str(i))


def four() -> Judged:
    """A is right on the first subset, B on the second; `offline` errs once, in one of two fits."""
    table = tabulate([judged_pair(0, 0, 1), judged_pair(1, 0, TIE), judged_pair(2, 1, 0), judged_pair(3, 1, 0)], "AB")
    return Judged(
        table=table,
        rows={
            "single:A": table.correctness[None, :, 0],
            "single:B": table.correctness[None, :, 1],
            "random": table.correctness.mean(axis=1)[None],
            "offline": np.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]]),
        },
        calls={"single:A": 1.0, "single:B": 1.0, "random": 1.0, "offline": 1.0},
        price={"single:A": 1.0, "single:B": 3.0, "random": 2.0, "offline": 1.75},
        asked={"offline": np.array([0.625, 0.375])},
        left_out=3,
    )


def test_the_document_has_the_keys_of_replay_and_the_figures_by_hand() -> None:
    document = figures(four())
    assert (document["n"], document["left_out"], document["oracle"]) == (4, 3, 1.0)
    assert document["best_single"] == {"model": "B", "accuracy": 0.625}
    row = document["policies"]["offline"]
    assert set(row) == {"accuracy", "ci95", "calls_per_instance", "price_per_instance", "regret", "coverage"}
    assert (row["accuracy"], row["regret"], row["calls_per_instance"]) == (0.875, 0.125, 1.0)
    assert row["price_per_instance"] == 1.75
    assert (document["per_seed"]["offline"], document["asked"]["offline"]) == ([1.0, 0.75], {"A": 0.625, "B": 0.375})
    assert document["paired"]["offline"]["best_single"]["difference"] == 0.25
    assert document["paired"]["offline"]["random"]["difference"] == pytest.approx(0.875 - 0.5625)
    itself = document["paired"]["single:B"]["best_single"]
    assert itself["difference"] == 0.0
    assert -itself["ci95"][0] == itself["ci95"][1] > 0, "four pairs that agree do not prove that all do"


def test_calibration_is_of_the_fits_that_had_not_seen_the_pairs() -> None:
    said = np.array([[[0.9, 0.4]] * 4, [[0.7, 0.4]] * 4])
    found = figures(replace(four(), said=said, chosen=np.zeros((2, 4), np.int64)))["calibration"]
    assert set(found) == {"(none)", ""}
    assert found[""]["n"] == 4
    assert found[""]["said"] == pytest.approx(0.8)
    assert found[""]["right"] == four().table.correctness[:, 0].mean()
    assert figures(four())["calibration"] == {}


def test_subsets_have_their_own_best_model_and_oracle() -> None:
    document = figures(four())
    one, two = document["subsets"]["one"], document["subsets"]["two"]
    assert (one["n"], one["best_single"], one["policies"]["single:B"]["accuracy"]) == (
        2,
        {"model": "A", "accuracy": 1.0},
        0.25,
    )
    assert (two["best_single"]["model"], two["policies"]["offline"]["accuracy"]) == ("B", 0.75)
    assert document["best_per_subset"] == 1.0


def test_equal_rows_give_equal_figures() -> None:
    assert figures(four()) == figures(four())


def test_independent_pairs_have_wilsons_interval() -> None:
    values = np.array([[1.0] * 80 + [0.0] * 20])
    low, high = accuracy_interval(values, [str(i) for i in range(100)])
    expected = wilson(80, 100)
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=0.02)
    assert low <= expected.low


def test_pairs_of_one_group_count_once_and_seeds_that_differ_widen() -> None:
    values = np.repeat(np.random.default_rng(0).random(40) < 0.8, 5)[None].astype(float)
    width = [
        np.diff(accuracy_interval(values, groups))[0] for groups in ([""] * 200, [str(i // 5) for i in range(200)])
    ]
    assert 1.8 < width[1] / width[0] < 2.7
    same = np.repeat(values, 3, axis=0)
    assert accuracy_interval(same, [""] * 200) == accuracy_interval(values, [""] * 200)
    differing = same.copy()
    differing[0, :20], differing[1, 20:40] = 0.0, 0.0
    assert np.diff(accuracy_interval(differing, [""] * 200))[0] > width[0]


def test_certainty_is_never_claimed() -> None:
    low, high = accuracy_interval(np.ones((1, 30)), [""] * 30)
    assert 0.85 < low < high == pytest.approx(1.0)


def test_the_interval_covers_the_truth_about_95_times_in_100_for_grouped_pairs() -> None:
    rng, covered = np.random.default_rng(3), 0
    groups = [str(i // 4) for i in range(240)]
    for _ in range(400):
        rates = rng.beta(4.5, 0.5, 60)
        values = (rng.random((60, 4)) < rates[:, None]).astype(float).reshape(1, 240)
        low, high = accuracy_interval(values, groups)
        covered += low <= 0.9 <= high
    # 400 draws of 0.95: standard deviation 0.011; with 60 groups a little less is honest.
    assert 0.92 <= covered / 400 <= 0.985
