"""What `reward-router replay` learns from and what it streams: from options to contexts and priors, part by part.

A part is one stream with the offline stage that precedes it; cross-validation has one per fold, everything else one.
Trains where it is asked to, and needs torch only then. Called by `service.cli.replay`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_core.checkpoint import Checkpoint
from router_core.dataset import grouped_folds, load_pairs
from router_core.encoder.base import Backbone
from router_core.encoder.fuse import Fuse, PairEncoder
from router_core.encoder.registry import load_backbone, load_checkpoint_backbone
from router_core.errors import DatasetError
from router_core.policies import ScoreScale
from router_core.prior import Prior, PriorForm
from router_core.records import LabelledPair, Signal
from router_core.replay import (
    Combination,
    Shift,
    domain_split,
    matching,
    score_scale,
    share_split,
    with_share,
    without_groups,
)
from service.errors import ConfigurationError
from service.priors import build_prior
from service.settings import read_settings

Index = NDArray[np.int64]

SPLIT_SEED = 0
"""Folds and shifts are dealt once, alike for all seeds of the stream."""


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for.

    Attributes:
        checkpoint: directory of a trained offline stage, instead of training one.
        train: file of labelled pairs to learn from.
        folds: of cross-validation; 0: none.
        shift: shares of a domain in the offline data and in the stream.
        offline_domains, stream_domains: words that the pairs of each side must match; empty: all do.
        encoder: where there is no checkpoint.
        cache: directory of stored encodings; None: none are kept.
        signal: kind of feedback, which decides the prior's scalars.
    """

    checkpoint: Path | None = None
    train: Path | None = None
    folds: int = 0
    shift: Shift | None = None
    offline_domains: tuple[str, ...] = ()
    stream_domains: tuple[str, ...] = ()
    encoder: str = "static"
    cache: Path | None = None
    signal: Signal = Signal.PREFERENCE

    def check(self, *, over_http: bool = False) -> None:
        """Raises ConfigurationError if options contradict each other.

        Args:
            over_http: a gateway is replayed through, which has its own checkpoint.
        """
        learned = {"--checkpoint": self.checkpoint, "--train": self.train, "--folds": self.folds or None}
        given = [name for name, value in learned.items() if value is not None]
        if over_http and (given or self.offline_domains):
            named = ", ".join([*given, *(["--offline-domains"] if self.offline_domains else [])])
            raise ConfigurationError(f"{named} with --url: the gateway has its own checkpoint; leave one of them out")
        if len(given) > 1:
            raise ConfigurationError(f"{' and '.join(given)}: each says where the offline stage comes from; give one")
        if self.folds == 1 or self.folds < 0:
            raise ConfigurationError(f"--folds {self.folds}: give at least 2, or 0 for none")
        if self.shift is not None and (self.offline_domains or self.stream_domains):
            raise ConfigurationError("--shift and --offline-domains/--stream-domains: both split by domain; give one")
        if self.checkpoint is not None and self.offline_domains:
            raise ConfigurationError(
                "--offline-domains with --checkpoint: it is trained already; leave one of them out"
            )

    @property
    def splits(self) -> bool:
        """True where the data themselves are divided into an offline part and a stream."""
        return self.checkpoint is None and self.train is None and (self.shift is not None or self.by_domain)

    @property
    def by_domain(self) -> bool:
        """True where domains decide what is learned from or streamed."""
        return bool(self.offline_domains or self.stream_domains)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One stream and what precedes it.

    Attributes:
        stream: ascending indices of the streamed pairs.
        x: (len(stream), d) float32 contexts.
        priors: the prior of a form, or the default one for None.
        scale: of the RMs' scores, from the checkpoint or the offline pairs; None where neither has it.
        offline_digest: of what was learned from; "" where nothing was.
        learned_from: number of offline pairs; None where that is not known.
        combination: learned votes; None where there are none.
    """

    stream: Index
    x: NDArray[np.float32]
    priors: Callable[[str | None], Prior]
    scale: ScoreScale | None
    offline_digest: str
    learned_from: int | None
    combination: Combination | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """For the JSON: sizes of both sides, and what was learned from."""
        return {"learned_from": self.learned_from, "streamed": len(self.stream), "offline_digest": self.offline_digest}


def choose_parts(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    complete: Index,
    options: Options,
    checkpoint: Checkpoint | None,
    note: Callable[[str], None],
    load: Callable[[Path], list[LabelledPair]] = load_pairs,
) -> list[Part]:
    """Every stream of the replay.

    Pairs that an RM of the pool was not asked about are learned from (the losses mask the gap), but not streamed.

    Args:
        pairs: all pairs of the data.
        pool: K names.
        complete: indices of the pairs that may be streamed.
        options: as given, checked.
        checkpoint: loaded from `options.checkpoint`, for this pool.
        note: told what people should know, a sentence each.
        load: reads `options.train`.

    Raises:
        DatasetError: nothing is left to stream, or to learn from.
        ConfigurationError: training is asked for and torch is missing.
    """
    if checkpoint is not None or not (options.train or options.folds or options.splits):
        return [_without_training(pairs, pool, streamed(pairs, complete, options), checkpoint, options)]
    trainer = _Trainer(pairs, pool, load_backbone(options.encoder, options.cache), options.signal)
    if options.train is not None:
        stream = streamed(pairs, complete, options)
        return [_from_other_file(trainer, load(options.train), stream, options, note)]
    parts = []
    for offline, stream in _splits(pairs, options):
        kept = np.intersect1d(stream, complete, assume_unique=True)
        if not len(kept):
            raise DatasetError("no pair is left to stream: every RM of the pool must have judged the streamed pairs")
        parts.append(trainer.part([pairs[i] for i in offline], offline, kept))
    return parts


def _without_training(
    pairs: Sequence[LabelledPair],
    pool: Sequence[str],
    stream: Index,
    checkpoint: Checkpoint | None,
    options: Options,
) -> Part:
    if checkpoint is None:
        backbone = load_backbone(options.encoder, options.cache)
        encoder = PairEncoder(backbone, Fuse.identity(backbone.dim))
    else:
        encoder = PairEncoder(load_checkpoint_backbone(checkpoint, options.cache), checkpoint.fuse)
    x = encoder.encode([pairs[i].instance for i in stream])
    return Part(
        stream,
        x,
        _priors_of(checkpoint, len(pool), x.shape[1], options.signal),
        None if checkpoint is None else checkpoint.scores,
        "" if checkpoint is None else checkpoint.data_digest,
        None if checkpoint is None or "pairs" not in checkpoint.metrics else int(checkpoint.metrics["pairs"]),
        None if checkpoint is None else checkpoint.combination,
    )


def _from_other_file(
    trainer: _Trainer, others: Sequence[LabelledPair], stream: Index, options: Options, note: Callable[[str], None]
) -> Part:
    kept = without_groups(others, [trainer.pairs[i] for i in stream])
    if len(kept) < len(others):
        note(f"{len(others) - len(kept)} pairs of {options.train} are not learned from: their groups are streamed")
    if options.shift is not None:
        mask = matching(others, [options.shift.word], required=False)
        if mask.any():
            kept = kept[with_share(others, mask, kept, options.shift.offline_share, _dealer())]
        else:
            note(f"{options.train} holds nothing of {options.shift.word!r}: all of it is learned from")
    elif options.offline_domains:
        kept = kept[matching(others, options.offline_domains)[kept]]
    if not len(kept):
        raise DatasetError(f"{options.train}: no pair is left to learn from; give another file, or other domains")
    return trainer.part([others[i] for i in kept], None, stream)


def streamed(pairs: Sequence[LabelledPair], complete: Index, options: Options) -> Index:
    """Which pairs are streamed where the offline stage comes from elsewhere."""
    stream = complete
    if options.shift is not None:
        mask = matching(pairs, [options.shift.word])
        stream = complete[with_share(pairs, mask, complete, options.shift.stream_share, _dealer())]
    elif options.stream_domains:
        stream = complete[matching(pairs, options.stream_domains)[complete]]
    if not len(stream):
        raise DatasetError("no pair is left to stream; name other domains, or other shares")
    return stream


def _splits(pairs: Sequence[LabelledPair], options: Options) -> list[tuple[Index, Index]]:
    """(offline, stream) of every fold, or of the one split by domains or shares."""
    rng = _dealer()
    if not options.folds:
        if options.shift is not None:
            return [share_split(pairs, options.shift, rng)]
        return [domain_split(pairs, options.offline_domains, options.stream_domains, rng)]
    folds = grouped_folds(pairs, options.folds, rng)
    if options.shift is not None:
        mask = matching(pairs, [options.shift.word])
        shift = options.shift
        return [
            (
                inside[with_share(pairs, mask, inside, shift.offline_share, rng)],
                outside[with_share(pairs, mask, outside, shift.stream_share, rng)],
            )
            for inside, outside in folds
        ]
    every = np.ones(len(pairs), bool)
    learned = matching(pairs, options.offline_domains) if options.offline_domains else every
    streamed = matching(pairs, options.stream_domains) if options.stream_domains else every
    return [(inside[learned[inside]], outside[streamed[outside]]) for inside, outside in folds]


def _dealer() -> np.random.Generator:
    return np.random.default_rng(SPLIT_SEED)


def _priors_of(checkpoint: Checkpoint | None, n_arms: int, d: int, signal: Signal) -> Callable[[str | None], Prior]:
    def prior(form: str | None) -> Prior:
        named = None if form is None else PriorForm(form)
        return build_prior(read_settings(prior="auto", signal=signal), checkpoint, n_arms, d, named)

    return prior


class _Trainer:
    """Embeds the data once, and trains one offline stage per part."""

    def __init__(self, pairs: Sequence[LabelledPair], pool: Sequence[str], backbone: Backbone, signal: Signal) -> None:
        try:
            from router_core.offline.train import pair_features, train
        except ImportError as error:
            raise ConfigurationError(f"training needs torch ({error}): pip install 'reward-router[train]'") from error
        self.pairs = pairs
        self._pool, self._backbone, self._signal = tuple(pool), backbone, signal
        self._train, self._embed = train, pair_features
        self._features = pair_features(pairs, backbone)

    def part(self, learned: Sequence[LabelledPair], rows: Index | None, stream: Index) -> Part:
        """Train on `learned` (rows of the data where they are of them), and prepare the stream."""
        features = self._embed(learned, self._backbone) if rows is None else self._features[rows]
        checkpoint = self._train(learned, self._pool, self._backbone, features=features)
        x = checkpoint.fuse.apply(self._features[stream])
        return Part(
            stream,
            x,
            _priors_of(checkpoint, len(self._pool), x.shape[1], self._signal),
            checkpoint.scores or score_scale(learned, self._pool),
            checkpoint.data_digest,
            len(learned),
            None if checkpoint is None else checkpoint.combination,
        )
