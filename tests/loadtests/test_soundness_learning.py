"""The soundness experiments about what is learned: the rules until now, beside those in use, on small samples."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from loadtests.soundness import losses, responses, singles
from router_core.encoder.fuse import Fuse
from router_core.feedback import LossScale, SignalAccumulator, SignalStatistics
from router_core.records import Feedback, Signal


def test_half_on_a_tie_prefers_a_constant_among_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "GROUPS", 400)
    earned = {rule: [responses._earned(rm, 8, rule) for rm in ("constant", "honest")] for rule in responses.RULES}
    assert earned["½ on a tie"][0] > earned["½ on a tie"][1] + 0.1
    assert earned["implied pairs"][0] == 0.5 < earned["implied pairs"][1] - 0.1


def learned(rule: str) -> list[float | None]:
    """Residuals of average losses after a warm-up, of a low and of a high offset."""
    with losses._rule(rule):
        signal = SignalAccumulator(SignalStatistics.empty(1), LossScale.POOLED)
        for i in range(20):
            signal.observe(0, Feedback(Signal.LOSS, float(i % 2)), credit=None, offset=0.9)
        out = []
        for offset in (0.5, 0.9):
            reward = signal.observe(0, Feedback(Signal.LOSS, 0.5), credit=None, offset=offset)
            out.append(None if reward is None else reward - offset)
    return out


def test_the_rule_before_levels_offsets_and_the_one_in_use_does_not() -> None:
    assert learned(losses.BEFORE) == pytest.approx([0.4, 0.0], abs=0.05)
    assert learned("f = 0") == pytest.approx([0.0, 0.0], abs=1e-9)
    assert learned("f = 0.03") == pytest.approx([-0.03, -0.03], abs=1e-9)


def test_the_deviation_of_a_single_response_counted_as_zero() -> None:
    z = np.ones((1, 4), dtype=np.float32)
    z[0, 2:] = np.nan
    fuse = Fuse(
        shift=np.full(4, 0.5, np.float32),
        projection=np.eye(4, dtype=np.float32),
        w1=np.eye(4, dtype=np.float32),
        b1=np.zeros(4, np.float32),
        w2=np.eye(4, dtype=np.float32),
        b2=np.zeros(4, np.float32),
    )
    with singles._no_deviation():
        assert fuse.standardise(z).tolist() == [[0.5, 0.5, -0.5, -0.5]]
    assert fuse.standardise(z).tolist() == [[0.5, 0.5, 0.0, 0.0]]
