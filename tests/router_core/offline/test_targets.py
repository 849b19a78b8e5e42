"""Softened targets by hand."""

from __future__ import annotations

import numpy as np

from router_core.offline.targets import score_margins, soft_targets
from router_core.records import Instance, LabelledPair


def pair(label: int, scores: dict[str, tuple[float, ...]]) -> LabelledPair:
    verdicts = {name: int(np.argmax(values)) for name, values in scores.items()}
    n = len(next(iter(scores.values())))
    return LabelledPair("p", Instance("q", ("r",) * n), label, scores, verdicts)


def test_margins_are_of_the_better_response_above_each_other_one() -> None:
    pairs = [pair(0, {"A": (3.0, 1.0)}), pair(2, {"A": (5.0, 1.0, 4.0), "B": (0.0, 0.0, 1.0)})]
    margins = score_margins(pairs, ("A", "B"))
    none = [np.nan, np.nan]
    np.testing.assert_array_equal(margins, [[[2.0, np.nan], none], [[-1.0, 3.0], [1.0, 1.0]]])


def test_targets_of_several_responses_are_means_over_pairs() -> None:
    margins = score_margins([pair(1, {"A": (1.0, 3.0, 3.0)}), pair(0, {"A": (3.0, 1.0, 3.0)})], ("A",))
    soft = soft_targets(np.array([[0.75], [0.75]]), margins, share=1.0, width=1.0)
    np.testing.assert_allclose(soft, (0.5 + 1 / (1 + np.exp(-2.0))) / 2)


def test_soft_targets_by_hand() -> None:
    margins, correctness = np.array([[[1.0]], [[-1.0]], [[np.nan]]]), np.array([[1.0], [0.0], [np.nan]])
    soft = soft_targets(correctness, margins, share=0.5, width=0.5)
    sure = 1 / (1 + np.exp(-2.0))
    np.testing.assert_allclose(soft, [[0.5 + sure / 2], [0.5 * (1 - sure)], [np.nan]])


def test_a_verdict_without_scores_is_not_softened() -> None:
    scored = pair(0, {"A": (3.0, 1.0)})
    judged = LabelledPair("q", scored.instance, 0, {}, {"A": 1})
    margins = score_margins([scored, judged], ("A",))
    soft = soft_targets(np.array([[1.0], [0.0]]), margins, share=0.5, width=0.5)
    assert soft[1, 0] == 0.0
    assert 0.5 < soft[0, 0] < 1.0


def test_no_share_gives_the_verdicts_back_and_equal_margins_do_no_harm() -> None:
    correctness = np.array([[1.0], [1.0]])
    assert soft_targets(correctness, np.ones((2, 1, 1)), 0.0, 0.5) is correctness
    assert np.isfinite(soft_targets(correctness, np.ones((2, 1, 1)), 0.5, 0.5)).all()
