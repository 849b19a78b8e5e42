"""Which pairs the offline stage learns from and which are streamed, when the two are not alike.

No group is ever on both sides. Knows pairs and numpy; trains nothing. Called by `service.cli.replay` and `loadtests`.

A *word* names pairs as people would: a domain (`code`), else a subset (`hep-go`), else the beginning of a domain or
subset (`llmbar`), else the beginning of an id (`rb/hep`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.errors import DatasetError
from router_core.intervals import group_index
from router_core.records import LabelledPair

Index = NDArray[np.int64]
Mask = NDArray[np.bool_]

STREAM_SHARE, OFFLINE_SHARE = 0.8, 0.1
"""What `--shift DOMAIN` means without shares: the stream is mostly of the domain, the offline data hardly."""


@dataclass(frozen=True, slots=True)
class Shift:
    """The stream is `stream_share` of `word`, the offline data `offline_share`."""

    word: str
    stream_share: float = STREAM_SHARE
    offline_share: float = OFFLINE_SHARE

    def __post_init__(self) -> None:
        for name, share in (("stream", self.stream_share), ("offline", self.offline_share)):
            if not 0.0 <= share <= 1.0:
                raise DatasetError(f"shift {self.word!r}: the {name} share is {share}; give a share in [0, 1]")
        if self.stream_share == self.offline_share:
            raise DatasetError(
                f"shift {self.word!r}: both shares are {self.stream_share}, so nothing shifts; --folds does that"
            )

    @classmethod
    def parse(cls, text: str) -> Shift:
        """`WORD`, `WORD:STREAM` or `WORD:STREAM:OFFLINE`.

        Raises:
            DatasetError: a share is no number in [0, 1].

        >>> Shift.parse("code:0.9")
        Shift(word='code', stream_share=0.9, offline_share=0.1)
        """
        word, *shares = text.split(":")
        try:
            return cls(word, *(float(share) for share in shares))
        except (ValueError, TypeError) as error:
            raise DatasetError(f"shift {text!r}: give DOMAIN, or DOMAIN:STREAM_SHARE:OFFLINE_SHARE") from error


def matching(pairs: Sequence[LabelledPair], words: Sequence[str], *, required: bool = True) -> Mask:
    """(N,) which pairs any of the words names.

    Raises:
        DatasetError: a word names none although it must; the message lists what there is.
    """
    mask = np.zeros(len(pairs), bool)
    for word in words:
        named = _named(pairs, word)
        if required and not named.any():
            raise _names_none(pairs, word)
        mask |= named
    return mask


def domain_split(
    pairs: Sequence[LabelledPair],
    offline_words: Sequence[str],
    stream_words: Sequence[str],
    rng: np.random.Generator,
) -> tuple[Index, Index]:
    """Offline pairs are of some words, streamed ones of others; no words on one side: all pairs qualify for it.

    A group with pairs that qualify for both sides goes to one of them, by chance and about evenly; the pairs of it that
    qualify only for the other are left out.

    Returns:
        Ascending indices (offline, stream).

    Raises:
        DatasetError: a word names no pair, or nothing is left for one side.
    """
    wanted = [matching(pairs, words) if words else np.ones(len(pairs), bool) for words in (offline_words, stream_words)]
    index = group_index([pair.group for pair in pairs])
    groups = [np.bincount(index, mask) > 0 for mask in wanted]
    contested = np.flatnonzero(groups[0] & groups[1])
    dealt = rng.permutation(contested)
    to_stream = groups[1].copy()
    to_stream[dealt[: len(dealt) // 2]] = False
    offline = np.flatnonzero(wanted[0] & ~to_stream[index])
    stream = np.flatnonzero(wanted[1] & to_stream[index])
    return _both_sides(
        offline, stream, f"--offline-domains {list(offline_words)}, --stream-domains {list(stream_words)}"
    )


def share_split(pairs: Sequence[LabelledPair], shift: Shift, rng: np.random.Generator) -> tuple[Index, Index]:
    """As many pairs as possible, such that each side holds its share of the domain; groups are dealt whole.

    With D pairs of the domain and O others, a total of T pairs of which ρT are streamed needs sρ + o(1 − ρ) times T of
    the domain and the rest of the others, so T(ρ) = min(D / (sρ + o(1 − ρ)), O / ((1 − s)ρ + (1 − o)(1 − ρ))). The ρ
    with the largest T is taken, between a quarter and three quarters. What does not fit is left out.

    Returns:
        Ascending indices (offline, stream).

    Raises:
        DatasetError: the domain names no pair, or all of them, or nothing is left for one side.
    """
    mask = matching(pairs, [shift.word])
    if mask.all():
        raise DatasetError(
            f"shift {shift.word!r}: all {len(pairs)} pairs are of it, so nothing else can be learned from"
        )
    inside, outside = int(mask.sum()), int((~mask).sum())
    in_stream, out_stream = _stream_fractions(inside, outside, shift)
    index = group_index([pair.group for pair in pairs])
    of_domain = np.bincount(index, mask) > 0
    to_stream = np.zeros(len(of_domain), bool)
    for groups, fraction in ((of_domain, in_stream), (~of_domain, out_stream)):
        to_stream[_dealt(np.flatnonzero(groups), np.bincount(index), fraction, rng)] = True
    stream, offline = np.flatnonzero(to_stream[index]), np.flatnonzero(~to_stream[index])
    return _both_sides(
        offline[with_share(pairs, mask, offline, shift.offline_share, rng)],
        stream[with_share(pairs, mask, stream, shift.stream_share, rng)],
        f"--shift {shift.word}",
    )


def with_share(
    pairs: Sequence[LabelledPair], mask: Mask, among: Index, share: float, rng: np.random.Generator
) -> Index:
    """Positions in `among` of the largest part whose share of masked pairs is `share`; whole groups are left out.

    Args:
        pairs: all.
        mask: (N,) of the domain.
        among: indices to choose from.
        share: wanted.
        rng: decides which groups of the surplus kind are left out.

    Returns:
        Ascending positions.
    """
    inside = mask[among]
    n_in, n_out = int(inside.sum()), int((~inside).sum())
    # Of one kind all are kept: of the one there is too little of.
    keep_in = n_in if n_in * (1.0 - share) <= n_out * share else round(n_out * share / (1.0 - share))
    keep_out = n_out if n_out * share <= n_in * (1.0 - share) else round(n_in * (1.0 - share) / share)
    names = [pairs[i].group for i in among]
    index = group_index(names)
    kept = np.ones(len(among), bool)
    for kind, size, keep in ((inside, n_in, keep_in), (~inside, n_out, keep_out)):
        if keep < size:
            counts = np.bincount(index, kind)
            groups = _dealt(np.flatnonzero(counts), counts, keep / size, rng)
            kept &= ~kind | np.isin(index, groups)
    return np.flatnonzero(kept)


def without_groups(pairs: Sequence[LabelledPair], others: Sequence[LabelledPair]) -> Index:
    """Indices of the pairs whose group is not among the others': what may be learned from when those are streamed."""
    taken = {pair.group for pair in others if pair.group}
    return np.array([i for i, pair in enumerate(pairs) if pair.group not in taken], dtype=np.int64)


def _stream_fractions(inside: int, outside: int, shift: Shift) -> tuple[float, float]:
    """Which part of the domain's pairs, and of the others, goes to the stream; `share_split` has the equations."""
    s, o = shift.stream_share, shift.offline_share
    rho = np.linspace(0.25, 0.75, 201)
    with np.errstate(divide="ignore", over="ignore"):
        by_domain = inside / (s * rho + o * (1.0 - rho))
        by_others = outside / ((1.0 - s) * rho + (1.0 - o) * (1.0 - rho))
    totals = np.minimum(by_domain, by_others)
    best = int(totals.argmax())
    streamed = rho[best] * totals[best]
    return min(float(s * streamed / inside), 1.0), min(float((1.0 - s) * streamed / outside), 1.0)


def _dealt(groups: Index, counts: NDArray[np.floating] | Index, fraction: float, rng: np.random.Generator) -> Index:
    """Groups drawn at random until they hold the fraction of the pairs of all of them, to the nearest group."""
    shuffled = rng.permutation(groups)
    sums = np.cumsum(counts[shuffled])
    if not len(sums) or fraction <= 0.0:
        return shuffled[:0]
    target = fraction * sums[-1]
    # The last group that brings the sum nearer to the target than it was.
    return shuffled[: int((sums - counts[shuffled] / 2 <= target).sum())]


def _both_sides(offline: Index, stream: Index, what: str) -> tuple[Index, Index]:
    for name, part in (("learn from", offline), ("stream", stream)):
        if not len(part):
            raise DatasetError(f"{what}: no pair is left to {name}; name other domains, or other shares")
    return offline, stream


def _named(pairs: Sequence[LabelledPair], word: str) -> Mask:
    wanted = word.strip().casefold()
    tests: tuple[Callable[[LabelledPair], bool], ...] = (
        lambda pair: pair.domain.casefold() == wanted,
        lambda pair: pair.subset.casefold() == wanted,
        lambda pair: pair.domain.casefold().startswith(wanted) or pair.subset.casefold().startswith(wanted),
        lambda pair: pair.id.casefold().startswith(wanted),
    )
    for test in tests if wanted else ():
        mask = np.array([test(pair) for pair in pairs], dtype=bool)
        if mask.any():
            return mask
    return np.zeros(len(pairs), bool)


def _names_none(pairs: Sequence[LabelledPair], word: str) -> DatasetError:
    domains = Counter(pair.domain or "(none)" for pair in pairs)
    subsets = Counter(pair.subset or "(none)" for pair in pairs)
    return DatasetError(
        f"{word!r} names none of the {len(pairs)} pairs: give a domain ({_listed(domains)}) or a subset "
        f"({_listed(subsets)}), or the beginning of one or of an id"
    )


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.most_common(12))
