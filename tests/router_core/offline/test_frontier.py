"""The frontier: budgets are kept, prices count, what cannot be bought has no row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from router_core.dataset import grouped_folds
from router_core.encoder.surface import SurfaceBackbone
from router_core.errors import DatasetError
from router_core.offline.frontier import Point, frontier, undominated
from router_core.offline.train import TrainConfig, pair_features
from tests.support.offline import POOL, two_domains

FAST = TrainConfig(max_epochs=10, folds=2, directions=4, hidden=8)
SURFACE = SurfaceBackbone()


def points(budgets: tuple[float, ...] = (1.3, 1.6), prices: list[float] | None = None) -> dict[str, Point]:
    pairs = two_domains(200)
    splits = {0: grouped_folds(pairs, 2, np.random.default_rng(0))}
    costs = None if prices is None else np.array(prices)
    found = frontier(pairs, POOL, splits, SURFACE, pair_features(pairs, SURFACE), budgets, costs, FAST)
    return {point.policy: point for point in found}


def test_every_policy_keeps_to_its_budget_and_says_what_it_cost() -> None:
    found = points()
    assert (found["offline"].calls, found["offline"].price) == (1.0, 1.0)
    assert (found["stacked"].calls, found["majority"].calls, found["uwo"].calls) == (2.0, 2.0, 2.0)
    for budget in (1.3, 1.6):
        assert 1.0 <= found[f"cascade:{budget}"].price <= budget + 0.15
        assert found[f"random-cascade:{budget}"].price == pytest.approx(budget, abs=0.1)
    assert found["stacked"].accuracy >= found["majority"].accuracy
    for point in found.values():
        assert point.ci95[0] <= point.accuracy <= point.ci95[1]


def test_prices_count_in_what_is_spent_and_in_who_is_asked() -> None:
    equal, dear = points(), points(prices=[1.0, 10.0])
    assert dear["stacked"].price == 11.0
    assert dear["stacked"].accuracy == equal["stacked"].accuracy
    assert dear["offline"].price > 1.0


def test_a_budget_that_all_arms_together_do_not_cost_has_no_row() -> None:
    assert "cascade:2.5" not in points(budgets=(1.5, 2.5))


def test_pairs_with_gaps_are_refused() -> None:
    pairs = two_domains(60)
    pairs[3] = replace(pairs[3], verdicts={POOL[0]: 0}, scores={POOL[0]: pairs[3].scores[POOL[0]]})
    splits = {0: grouped_folds(pairs, 2, np.random.default_rng(0))}
    with pytest.raises(DatasetError, match="every RM of the pool must have judged"):
        frontier(pairs, POOL, splits, SURFACE, pair_features(pairs, SURFACE), config=FAST)


def test_only_what_nothing_cheaper_beats_is_undominated() -> None:
    def point(name: str, price: float, accuracy: float) -> Point:
        return Point(name, price, price, accuracy, (0.0, 1.0))

    found = [point("dear", 3.0, 0.91), point("good", 2.0, 0.92), point("cheap", 1.0, 0.9), point("poor", 1.0, 0.8)]
    assert undominated(found) == ["cheap", "good"]
