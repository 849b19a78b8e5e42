"""Accuracies of a pool, on numbers small enough for paper."""

from __future__ import annotations

import pytest

from router_core.demo.report import report_pool
from router_core.errors import DatasetError
from router_core.records import TIE, Instance, LabelledPair


def pair(domain: str, label: int, **verdicts: int) -> LabelledPair:
    return LabelledPair(domain, Instance("p", ("a", "b")), label, {}, verdicts, domain=domain)


PAIRS = [
    pair("code", 0, a=0, b=1, c=1),
    pair("code", 1, a=1, b=TIE, c=0),
    pair("safety", 1, a=0, b=1, c=1),
    pair("safety", 0, a=1, b=0, c=1),
]


def test_accuracies_count_a_tie_one_half() -> None:
    report = report_pool(PAIRS)
    assert report.accuracy["b"] == {"code": 0.25, "safety": 1.0}
    assert report.overall == {"a": 0.5, "b": 0.625, "c": 0.25}
    assert report.best_single == "b"


def test_best_per_domain_and_oracle_are_what_hindsight_gives() -> None:
    report = report_pool(PAIRS)
    assert report.best_per_domain == 1.0
    assert report.oracle == 1.0
    assert report_pool([pair("code", 0, a=1, b=TIE)]).oracle == 0.5


def test_majority_ignores_ties_and_counts_a_draw_one_half() -> None:
    """Wrong 1:2, draw 1:1, right 2:1, wrong 1:2."""
    assert report_pool(PAIRS).majority == (0 + 0.5 + 1 + 0) / 4


def test_models_not_asked_everywhere_are_left_out_and_none_is_an_error() -> None:
    assert set(report_pool([*PAIRS, pair("code", 0, a=0, b=0)]).overall) == {"a", "b"}
    with pytest.raises(DatasetError, match="no model"):
        report_pool([pair("code", 0)])
    with pytest.raises(DatasetError, match="empty"):
        report_pool([])
