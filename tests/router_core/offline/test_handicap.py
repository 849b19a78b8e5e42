"""The best RM's lead over the others where routing gains nothing."""

from __future__ import annotations

import numpy as np

from router_core.offline.calibrate import handicap, handicapped


def test_routing_that_pays_is_left_alone() -> None:
    right = np.tile([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], (40, 1))
    assert not handicap(0.2 + 0.6 * right, right, [str(i) for i in range(120)]).any()


def test_where_routing_loses_the_best_rm_is_asked() -> None:
    rng = np.random.default_rng(0)
    right = (rng.random((300, 20)) < np.array([0.97, *[0.9] * 19])).astype(float)
    said = np.clip(0.93 + 0.03 * rng.standard_normal((300, 20)), 0.5, 0.99)
    shift = handicap(said, right, [str(i) for i in range(300)])
    assert shift[0] == 0
    assert (shift[1:] < 0).all()
    routed = handicapped(said, shift).argmax(axis=1)
    before, after = (right[np.arange(300), arms].mean() for arms in (said.argmax(axis=1), routed))
    assert after > before
    np.testing.assert_allclose(handicapped(said, shift)[:, 0], said[:, 0])


def test_an_rm_that_was_not_asked_is_not_routed_to() -> None:
    right = np.array([[1.0, np.nan], [np.nan, 0.0], [1.0, 0.0], [1.0, 0.0]])
    said = np.array([[0.6, 0.9], [0.6, 0.5], [0.6, 0.9], [0.6, 0.9]])
    assert handicap(said, right, ["a", "b", "c", "d"])[1] < 0
