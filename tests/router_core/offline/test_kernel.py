"""The kernel regression on training pairs: what it finds, what it says far away, and verdicts that are missing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router_core.offline.kernel import ANCHORS, fit_kernel


def rings(count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """(N, 2) inputs, and correctness (N, 2) of RMs that are right inside and outside a circle: no line parts them."""
    u = np.random.default_rng(seed).standard_normal((count, 2)).astype(np.float32)
    inside = np.square(u).sum(axis=1) < 1.4
    return u, np.stack([inside, ~inside], axis=1).astype(np.float64)


def fitted(u: NDArray[np.float32], right: NDArray[np.float64], kinds: int = 0):  # type: ignore[no-untyped-def]
    return fit_kernel(u, right, kinds, np.random.default_rng(0))


def test_it_finds_what_no_line_parts() -> None:
    u, right = rings(ANCHORS + 200, 0)
    kernel, means = fitted(u, right)
    assert len(kernel.anchors) == ANCHORS
    np.testing.assert_allclose(means, right.mean(axis=0))
    new, truth = rings(400, 1)
    assert (kernel.apply(new).argmax(axis=1) == truth.argmax(axis=1)).mean() > 0.9


def test_far_from_all_pairs_it_says_nothing() -> None:
    kernel, _ = fitted(*rings(200, 0))
    assert np.abs(kernel.apply(np.full((1, 2), 40.0, dtype=np.float32))).max() < 1e-3


def test_an_rm_is_judged_by_its_own_verdicts() -> None:
    u, right = rings(300, 0)
    some = right.copy()
    some[150:, 1] = np.nan
    kernel, means = fitted(u, some)
    whole, _ = fitted(u, right)
    np.testing.assert_allclose(kernel.weights[:, 0], whole.weights[:, 0], atol=1e-5)
    np.testing.assert_allclose(means[1], right[:150, 1].mean())
    new, truth = rings(400, 1)
    assert np.corrcoef(kernel.apply(new)[:, 1], truth[:, 1])[0, 1] > 0.6
    never = np.where(np.arange(2) == 1, np.nan, right)
    assert not fitted(u, never)[0].weights[:, 1].any()


def test_a_kind_counts_more_in_distances() -> None:
    u, right = rings(200, 0)
    plain, kind = fitted(u, right)[0], fitted(u, right, kinds=1)[0]
    assert plain.reach[0] == plain.reach[1]
    np.testing.assert_allclose(kind.reach[1] / kind.reach[0], 4.0, rtol=1e-5)
