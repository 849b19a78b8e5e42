"""A recorded stream as arrays: what each RM said of each pair, what was right, and which pairs belong together.

Knows records and numpy. Made by `service.cli.replay` and `loadtests` from pairs; read by the rest of this package.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.dataset import judgeable, pool_names
from router_core.errors import DatasetError
from router_core.policies import ScoreScale
from router_core.records import TIE, LabelledPair

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """N pairs, K RMs, at most n responses.

    Attributes:
        pool: K names.
        verdicts: (N, K) int64, a response's index or TIE; TIE where the RM abstained.
        labels: (N,) int64.
        correctness: (N, K) in [0, 1], `LabelledPair.correctness`: what asking an RM earns; NaN where it abstained.
        credit: (N, K) in [0, 1], `LabelledPair.credit`: what its answer teaches. The same for two responses; NaN where
            it abstained.
        scores: (N, K, n) float64; NaN beyond a pair's own number of responses, and where only verdicts are recorded.
        responses: (N,) int64, each pair's number of responses.
        groups: N names; pairs of one group are right or wrong together. "": a group of its own.
        subsets: N names, for reports; see `LabelledPair.part`.
        domains: N names; "" where there is none.
    """

    pool: tuple[str, ...]
    verdicts: NDArray[np.int64]
    labels: NDArray[np.int64]
    correctness: Array
    credit: Array
    scores: Array
    responses: NDArray[np.int64]
    groups: tuple[str, ...]
    subsets: tuple[str, ...]
    domains: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: NDArray[np.int64]) -> Table:
        """The table of these pairs, in this order."""

        def chosen(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(names[i] for i in index)

        return Table(
            self.pool,
            self.verdicts[index],
            self.labels[index],
            self.correctness[index],
            self.credit[index],
            self.scores[index],
            self.responses[index],
            chosen(self.groups),
            chosen(self.subsets),
            chosen(self.domains),
        )

    @property
    def answered(self) -> NDArray[np.bool_]:
        """(N, K): the RMs that did not abstain. Every pair has one."""
        return np.asarray(~np.isnan(self.correctness))

    @property
    def oracle(self) -> Array:
        """(N,) correctness of the best RM of each pair, known in hindsight."""
        best: Array = np.nanmax(self.correctness, axis=1)
        return best

    @property
    def singles(self) -> Array:
        """(K,) mean correctness of each RM, where abstaining counts as an even guess: what RMs are compared by."""
        means: Array = np.where(self.answered, self.correctness, 0.5).mean(axis=0)
        return means


def tabulate(pairs: Sequence[LabelledPair], pool: Sequence[str]) -> Table:
    """The stream as arrays.

    Raises:
        DatasetError: no pairs, or an RM of the pool that was not asked about one of them, or all abstained
            (`complete_pairs` leaves such pairs out).
    """
    if not pairs:
        raise DatasetError("no pairs to replay: the data file is empty")
    for pair in pairs:
        missing = [name for name in pool if name not in pair.verdicts and name not in pair.abstained]
        if missing or not any(name in pair.verdicts for name in pool):
            raise DatasetError(
                f"pair {pair.id!r} holds no verdict of {', '.join(missing or pool)}: shorten --pool, or leave the pair "
                "out"
            )
    verdicts = np.array([[pair.verdicts.get(name, TIE) for name in pool] for pair in pairs], dtype=np.int64)
    labels = np.array([pair.label for pair in pairs], dtype=np.int64)
    return Table(
        tuple(pool),
        verdicts,
        labels,
        _answered(pairs, pool, LabelledPair.correctness),
        _answered(pairs, pool, LabelledPair.credit),
        _scores(pairs, pool),
        np.array([len(pair.instance.responses) for pair in pairs], dtype=np.int64),
        tuple(pair.group for pair in pairs),
        tuple(pair.part for pair in pairs),
        tuple(pair.domain for pair in pairs),
    )


def complete_pairs(pairs: Sequence[LabelledPair], pool: Sequence[str]) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Which pairs can be replayed (`dataset.judgeable`), and how many pairs each RM is missing from.

    Returns:
        Ascending indices of the complete pairs, and {RM: pairs that lack it} of the RMs that miss any.

    Raises:
        DatasetError: an RM was asked about none of the pairs, or no pair is complete.
    """
    missing = Counter(
        name for pair in pairs for name in pool if name not in pair.verdicts and name not in pair.abstained
    )
    for name in pool:
        if not any(name in pair.verdicts for pair in pairs):
            known = sorted(pool_names(pairs))
            raise DatasetError(
                f"pool: RM {name!r} was asked about none of the {len(pairs)} pairs; the data have {', '.join(known)}; "
                "correct --pool or record its scores"
            )
    kept = np.flatnonzero(judgeable(pairs, pool))
    if not len(kept):
        raise DatasetError(
            f"no pair of {len(pairs)} was put to every RM of the pool ({', '.join(pool)}): give a smaller --pool, or "
            "complete the data with `reward-router label`"
        )
    return kept, dict(missing)


def score_scale(pairs: Sequence[LabelledPair], pool: Sequence[str]) -> ScoreScale:
    """Mean and standard deviation of each RM's scores over all responses of these pairs, for UWO.

    An RM without scores, or whose scores are all equal, keeps shift 0 (or its constant) and scale 1.
    """
    shift, scale = np.zeros(len(pool)), np.ones(len(pool))
    for k, name in enumerate(pool):
        values = np.array([score for pair in pairs if name in pair.scores for score in pair.scores[name]])
        if len(values):
            shift[k] = values.mean()
            scale[k] = values.std() or 1.0
    return ScoreScale(shift, scale)


def _answered(pairs: Sequence[LabelledPair], pool: Sequence[str], value: Callable[[LabelledPair, str], float]) -> Array:
    """(N, K), NaN where the RM abstained."""
    return np.array([[value(pair, name) if name in pair.verdicts else np.nan for name in pool] for pair in pairs])


def _scores(pairs: Sequence[LabelledPair], pool: Sequence[str]) -> Array:
    most = max(len(pair.instance.responses) for pair in pairs)
    scores = np.full((len(pairs), len(pool), most), np.nan)
    for i, pair in enumerate(pairs):
        for k, name in enumerate(pool):
            if name in pair.scores:
                scores[i, k, : len(pair.scores[name])] = pair.scores[name]
    return scores
