"""Answers and accuracies from agreement alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from router_core.errors import DatasetError
from router_core.offline.consensus import Consensus, estimate, with_answers
from router_core.records import TIE, Instance, LabelledPair

POOL = ("a", "b", "c", "d")


def world(
    accuracy: NDArray[np.float64], n: int = 800, responses: int = 2, together: float = 0.0, seed: int = 0
) -> tuple[list[LabelledPair], NDArray[np.float64]]:
    """Return pairs of two kinds, (2, K) accuracies, and features; on a share of them all RMs err together."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(2, size=n)
    pairs = []
    for i, kind in enumerate(kinds):
        label = int(rng.integers(responses))
        right = rng.random(len(POOL)) < accuracy[kind]
        if rng.random() < together:
            right[:] = False
        wrong = (label + 1 + rng.integers(responses - 1, size=len(POOL))) % responses
        if not right.any():
            wrong[:] = wrong[0]
        verdicts = {name: label if ok else int(w) for name, ok, w in zip(POOL, right, wrong, strict=True)}
        texts = tuple(f"{j}" for j in range(responses))
        pairs.append(LabelledPair(str(i), Instance("p", texts), label, {}, verdicts, group=str(i)))
    features = np.stack([kinds, 1 - kinds], axis=1) * 3.0 + rng.standard_normal((n, 2)) * 0.1
    return pairs, features


def right(pairs: list[LabelledPair], found: Consensus) -> float:
    return float(np.mean(found.labels() == [pair.label for pair in pairs]))


SPECIALISTS = np.array([[0.95, 0.9, 0.6, 0.6], [0.6, 0.6, 0.95, 0.9]])


@pytest.mark.parametrize("responses", [2, 4])
def test_answers_beat_the_majority_and_every_scorer(responses: int) -> None:
    pairs, features = world(SPECIALISTS, responses=responses)
    found = estimate(pairs, POOL, features, np.random.default_rng(1))
    best = max(np.mean([pair.verdicts[name] == pair.label for pair in pairs]) for name in POOL)
    assert right(pairs, found) > best + 0.1
    in_first = found.kinds == found.kinds[int(features[:, 1].argmax())]
    estimated = found.accuracy[found.kinds[in_first][0]]
    assert estimated[:2].min() > estimated[2:].max() + 0.1


def test_labels_are_not_read_unless_known() -> None:
    pairs, features = world(SPECIALISTS, n=200)
    turned = [replace(pair, label=1 - pair.label) for pair in pairs]
    one, other = (estimate(p, POOL, features, np.random.default_rng(0)) for p in (pairs, turned))
    assert np.array_equal(one.answers, other.answers)


def test_known_labels_stay() -> None:
    pairs, features = world(SPECIALISTS, n=200)
    known = np.arange(200) < 50
    found = estimate(pairs, POOL, features, np.random.default_rng(0), known)
    assert found.labels()[known].tolist() == [pair.label for pair in pairs[:50]]
    assert [pair.label for pair in with_answers(pairs, found)] == found.labels().tolist()
    assert found.labelled == 50


@pytest.mark.parametrize(("together", "overstated"), [(0.0, False), (0.3, True)])
def test_labels_show_that_scorers_err_together(together: float, overstated: bool) -> None:
    pairs, features = world(np.full((2, 4), 0.9), n=600, together=together)
    known = np.arange(600) < 60
    found = estimate(pairs, POOL, features, np.random.default_rng(0), known)
    assert found.overstated is overstated


def test_ties_and_gaps_say_nothing() -> None:
    pairs, features = world(SPECIALISTS, n=200)
    pairs[0] = replace(pairs[0], verdicts={"a": TIE, "b": TIE})
    found = estimate(pairs, POOL, features, np.random.default_rng(0))
    assert found.answers[0].tolist() == [0.5, 0.5]
    assert found.answers.sum(axis=1) == pytest.approx(np.ones(200))


def test_too_few_witnesses_are_refused() -> None:
    pairs, features = world(SPECIALISTS, n=60)
    with pytest.raises(DatasetError, match="fewer than three"):
        estimate(pairs, POOL[:2], features, np.random.default_rng(0))
    with pytest.raises(DatasetError, match="no RM of the pool"):
        estimate([replace(pairs[0], verdicts={})], POOL, features[:1], np.random.default_rng(0))
