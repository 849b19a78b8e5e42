"""Decision ids sort by time and give it back; run names cannot leave their keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.stores.ids import RANDOM_BYTES, created_ms, new_decision_id

times = st.integers(0, (1 << 48) - 1)
randoms = st.binary(min_size=RANDOM_BYTES, max_size=RANDOM_BYTES)


@given(times, randoms)
def test_an_id_gives_its_creation_time_back(now_ms: int, rng_bytes: bytes) -> None:
    assert created_ms(new_decision_id(now_ms, rng_bytes)) == now_ms


@given(st.tuples(times, randoms), st.tuples(times, randoms))
def test_ids_sort_as_their_times_and_differ_when_anything_differs(
    one: tuple[int, bytes], other: tuple[int, bytes]
) -> None:
    a, b = new_decision_id(*one), new_decision_id(*other)
    assert (a < b) == (one < other)
    assert (a == b) == (one == other)


@given(st.text())
def test_other_text_has_no_creation_time(text: str) -> None:
    assert created_ms("x" + text) is None


@pytest.mark.parametrize(
    "text",
    ["", "d", "d" + "0" * 25, "d" + "0" * 27, "d" + "w" * 26, "D" + "0" * 26, "d" + "0" * 26 + "\n", "d" + "٣" * 26],
)
def test_nearly_an_id_has_no_creation_time(text: str) -> None:
    assert created_ms(text) is None


@pytest.mark.parametrize(
    ("now_ms", "rng_bytes"), [(-1, bytes(10)), (1 << 48, bytes(10)), (0, bytes(9)), (0, bytes(11))]
)
def test_time_and_random_bytes_out_of_range_are_refused(now_ms: int, rng_bytes: bytes) -> None:
    with pytest.raises(ValueError, match=r"now_ms|rng_bytes"):
        new_decision_id(now_ms, rng_bytes)
