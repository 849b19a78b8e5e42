"""The simulated runs of `loadtests.soundness`: contexts, when an arm counts as found, and one short run."""

from __future__ import annotations

import numpy as np

from loadtests.soundness.exploration import SAID, TRUE
from loadtests.soundness.streams import Simulated, asked, contexts, found_after


def test_contexts_have_norm_one_and_a_positive_constant() -> None:
    rows = contexts(np.random.default_rng(0), 50)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, rtol=1e-6)
    assert (rows[:, 0] > 0).all()


def test_an_arm_is_found_where_most_of_a_window_ask_it() -> None:
    assert found_after(np.repeat([0, 1], 200), 1) == 151
    assert found_after(np.tile([0, 1], 200), 1) is None
    assert found_after(np.ones(100, np.int64), 1) == 0


def test_shadows_teach_of_an_arm_that_is_never_drawn() -> None:
    arms, state = asked(Simulated(SAID, ((64, TRUE),), shadow=1.0), seed=0)
    assert len(arms) == state.count == 64
    assert state.statistics.count.tolist() == [64.0, 64.0]
    assert state.precisions[1, 0] < state.lambda0
