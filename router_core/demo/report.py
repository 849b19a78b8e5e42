"""What a pool of reward models is worth on labelled pairs: accuracy per model and domain, and what a router could gain.

Pure arithmetic over records; no model is loaded here. Called by the demo command and by tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router_core.errors import DatasetError
from router_core.policies import vote_shares
from router_core.records import LabelledPair, chance_of, leaders_of


@dataclass(frozen=True, slots=True)
class PoolReport:
    """Accuracies in [0, 1], a tie counting one half.

    `accuracy[model][domain]`, `overall[model]`; `majority` asks all models; `best_per_domain` asks the domain's best
    model (chosen in hindsight); `oracle` is right where any model is.
    """

    accuracy: dict[str, dict[str, float]]
    overall: dict[str, float]
    majority: float
    best_per_domain: float
    oracle: float

    @property
    def best_single(self) -> str:
        """Name of the model that is best overall; the first by name among equals."""
        return min(self.overall, key=lambda name: (-self.overall[name], name))


def report_pool(pairs: Sequence[LabelledPair]) -> PoolReport:
    """Measure the models that were asked about every pair.

    Raises:
        DatasetError: no pairs, or no model that was asked about all of them.
    """
    if not pairs:
        raise DatasetError("pairs is empty; label some first")
    models = [name for name in pairs[0].verdicts if all(name in pair.verdicts for pair in pairs)]
    if not models:
        raise DatasetError("no model was asked about every pair; label the pairs with one pool")
    domains = sorted({pair.domain for pair in pairs})
    accuracy = {
        name: {domain: _mean([p.correctness(name) for p in pairs if p.domain == domain]) for domain in domains}
        for name in models
    }
    best = {domain: max(models, key=lambda name: accuracy[name][domain]) for domain in domains}
    return PoolReport(
        accuracy=accuracy,
        overall={name: _mean([pair.correctness(name) for pair in pairs]) for name in models},
        majority=_mean([_majority(pair, models) for pair in pairs]),
        best_per_domain=_mean([pair.correctness(best[pair.domain]) for pair in pairs]),
        oracle=_mean([max(pair.correctness(name) for name in models) for pair in pairs]),
    )


def _majority(pair: LabelledPair, models: Sequence[str]) -> float:
    shares = vote_shares([pair.verdicts[name] for name in models], len(pair.instance.responses))
    return chance_of(leaders_of(shares), pair.label)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
