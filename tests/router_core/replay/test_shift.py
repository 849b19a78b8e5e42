"""Splits between what is learned from and what is streamed: shares are kept, groups never leak."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_core.errors import DatasetError
from router_core.records import LabelledPair
from router_core.replay import Shift, domain_split, matching, share_split, with_share, without_groups
from tests.support.replay import pair

WORDS = {"left": 0, "right": 1}


def data(code: int = 60, maths: int = 60, chat: int = 30) -> list[LabelledPair]:
    """Code comes in groups of three (one task, three languages); maths and chat pairs stand alone."""
    rows = [("code", f"hep-{'abc'[i % 3]}", f"task{i // 3}") for i in range(code)]
    rows += [("math", "prm", f"m{i}") for i in range(maths)]
    rows += [("chat", "llmbar-natural", f"c{i}") for i in range(chat)]
    return [
        pair(i, 0, WORDS, domain=domain, subset=subset, group=group) for i, (domain, subset, group) in enumerate(rows)
    ]


def groups(pairs: list[LabelledPair], index: np.ndarray) -> set[str]:
    return {pairs[i].group for i in index}


def share(pairs: list[LabelledPair], index: np.ndarray, domain: str) -> float:
    return float(np.mean([pairs[i].domain == domain for i in index]))


@given(
    code=st.integers(9, 80),
    others=st.integers(9, 80),
    stream=st.floats(0, 1),
    offline=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_no_group_is_on_both_sides_whatever_the_shares(
    code: int, others: int, stream: float, offline: float, seed: int
) -> None:
    pairs = data(code, others, 0)
    if stream == offline:
        return
    try:
        learned, streamed = share_split(pairs, Shift("code", stream, offline), np.random.default_rng(seed))
    except DatasetError:
        return
    assert not groups(pairs, learned) & groups(pairs, streamed)
    assert len(learned)
    assert len(streamed)


@pytest.mark.parametrize(
    ("stream", "offline"), [(0.8, 0.1), (0.5, 0.2), (1.0, 0.0), (1.0, 0.2), (0.9, 0.0), (0.1, 0.7)]
)
def test_both_sides_hold_their_shares(stream: float, offline: float) -> None:
    pairs = data(300, 200, 100)
    learned, streamed = share_split(pairs, Shift("code", stream, offline), np.random.default_rng(0))
    # Groups of three are dealt whole.
    assert share(pairs, streamed, "code") == pytest.approx(stream, abs=0.02)
    assert share(pairs, learned, "code") == pytest.approx(offline, abs=0.02)
    assert min(len(learned), len(streamed)) > 50


def test_the_default_shift_uses_nearly_all_the_data() -> None:
    pairs = data(690, 400, 205)
    learned, streamed = share_split(pairs, Shift.parse("code"), np.random.default_rng(0))
    assert len(learned) + len(streamed) > 0.97 * len(pairs)


def test_the_split_is_the_generators() -> None:
    pairs = data()
    one, two, three = (share_split(pairs, Shift("code"), np.random.default_rng(seed))[1].tolist() for seed in (0, 0, 1))
    assert one == two != three


def test_a_shift_to_everything_or_to_nothing_is_refused() -> None:
    with pytest.raises(DatasetError, match="all 60 pairs"):
        share_split(data(60, 0, 0), Shift("code"), np.random.default_rng(0))
    with pytest.raises(DatasetError, match=r"poetry.*code: 60"):
        share_split(data(), Shift("poetry"), np.random.default_rng(0))
    with pytest.raises(DatasetError, match="nothing shifts"):
        Shift("code", 0.5, 0.5)


@pytest.mark.parametrize("text", ["code:much", "code:.8:.1:.1", "code:1.5"])
def test_shares_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(DatasetError, match="code"):
        Shift.parse(text)


def test_words_name_domains_then_subsets_then_beginnings_then_ids() -> None:
    pairs = data(6, 2, 2)
    assert matching(pairs, ["CODE"]).sum() == 6
    assert matching(pairs, ["hep-a"]).sum() == 2
    assert matching(pairs, ["llmbar"]).sum() == 2
    assert matching(pairs, ["p9", "math"]).sum() == 3
    with pytest.raises(DatasetError, match="names none"):
        matching(pairs, [""])


def test_domains_of_both_sides_are_apart_and_shared_ones_are_dealt_by_groups() -> None:
    pairs = data()
    learned, streamed = domain_split(pairs, ["math", "chat"], ["code"], np.random.default_rng(0))
    assert {pairs[i].domain for i in learned} == {"math", "chat"}
    assert {pairs[i].domain for i in streamed} == {"code"}
    assert (len(learned), len(streamed)) == (90, 60)
    learned, streamed = domain_split(pairs, ["math", "code"], ["code"], np.random.default_rng(0))
    assert not groups(pairs, learned) & groups(pairs, streamed)
    assert (share(pairs, learned, "code") * len(learned), len(streamed)) == (30, 30)
    # Other languages of the streamed tasks are not learned from.
    learned, streamed = domain_split(pairs, ["hep-a"], ["hep-b"], np.random.default_rng(0))
    assert not groups(pairs, learned) & groups(pairs, streamed)
    assert (len(learned), len(streamed)) == (10, 10)
    # No words on a side: everything that is not on the other.
    learned, streamed = domain_split(pairs, [], ["chat"], np.random.default_rng(0))
    assert len(learned) + len(streamed) == 150


def test_with_share_keeps_the_most_that_fits() -> None:
    pairs = data(30, 60, 0)
    mask, rows = matching(pairs, ["code"]), np.arange(90)
    kept = with_share(pairs, mask, rows, 0.5, np.random.default_rng(0))
    assert (mask[kept].sum(), (~mask[kept]).sum()) == (30, 30)
    assert len(with_share(pairs, mask, rows, 0.0, np.random.default_rng(0))) == 60
    assert len(with_share(pairs, mask, rows, 1.0, np.random.default_rng(0))) == 30


def test_pairs_of_streamed_groups_are_not_learned_from() -> None:
    pairs = data(6, 1, 0)
    assert without_groups(pairs, pairs[:1]).tolist() == [3, 4, 5, 6]
