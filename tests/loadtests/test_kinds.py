"""The pairs that the command about unseen RMs learns from."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from loadtests.kinds import training_pairs
from router_core.records import Instance, LabelledPair


def pair(number: int) -> LabelledPair:
    verdicts = {"asked": 0, "other": 1, "third": 0}
    return LabelledPair(
        id=str(number), instance=Instance("p", ("a", "b")), label=0, scores={}, verdicts=verdicts, group=str(number)
    )


def test_the_pool_is_known_only_where_it_was_asked() -> None:
    pairs = [pair(i) for i in range(4)]
    known = training_pairs(pairs, np.array([0, 2, 3]), np.array([2]), ["asked"], ["other"])
    assert [one.id for one in known] == ["0", "2", "3"]
    assert [set(one.verdicts) for one in known] == [{"other"}, {"asked", "other"}, {"other"}]
