"""The posterior of a run: Bayesian linear regression per arm, folded from the run's log (docs/math/router.md).

`fold(state, events)` is the only way a state comes to be. It is pure, and equality is bit for bit: fold(fold(s, a), b)
equals fold(s, a + b) wherever the log is cut, because floating-point sums are grouped by position, never by arrival:

* an arm's canonical (Λ, b) and Σ = Λ⁻¹ advance in blocks: whenever `block_size` of its events are waiting (one rank-m
  update), and for all arms at every `refresh_events`-th event of the log, where Σ is also inverted afresh from Λ;
* an arm's waiting events, its tail, are applied one by one on top of the block, as rank-one corrections kept beside Σ;
* an event that holds verdicts of other RMs (`Event.shadows`) moves the asked arm first, then those, by arm; it counts
  as one event of the log;
* with `Hyperparameters.adapt`, λ₀ is chosen anew at the events 8, 16, 32 and every `block_size`-th one of the log, and
  at every audit, for all arms at once: the value of `evidence.LAMBDA_GRID` that makes what was observed most probable;
  O(K W³). While the log's contexts are unlike the prior's landmarks it is drawn down to `lambda_novel`
  (`router_core.novelty`). An arm whose own data say that it is better or worse than promised gets a smaller precision
  of its first weight, its level;
* with `Hyperparameters.alarm_rate`, an event after which an arm's rewards contradict the posterior too much resets the
  arm to its prior, with the λ₀ that the run started from (`router_core.changes`);
* a discount γ < 1 falls at every `block_size`-th event of the log, for all arms at once, and inverts each Λ: O(K W³);
* Σ's drift from Λ⁻¹ is probed at each block, and Σ inverted afresh at once when it exceeds `drift_tolerance`;
* a change of the pool (`router_core.pools`) counts as one event: it adds arms at their prior, and from its position on
  it says who is asked, and with which γ and v. An arm that was retired keeps its place and its posterior.

A block that arrives whole never takes the one-by-one way. Λ, b, Σ and μ are float64; draws and the tail's corrections
read a float32 copy of Σ, so that between blocks μ and Σ_now are good to single precision. States are immutable and
share what did not change. Called by `service.usecases.learn` and `replay`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from router_core.audits.referee import Lesson, Standing
from router_core.changes import Watch
from router_core.errors import AuditError, FeedbackError, NotFiniteError, ShapeMismatchError
from router_core.evidence import level_precisions, most_probable_precision
from router_core.feedback import SignalAccumulator, SignalStatistics
from router_core.linalg import inverse_probe, inverse_residual, inverse_spd
from router_core.novelty import AUDITED_NOISE, AUDITED_PRECISION, NOISE, Tally, loosened
from router_core.pools import Mark, PoolChange, PoolState
from router_core.prior import Prior
from router_core.records import TIE, Audit, Event, Feedback, Signal, Source

Array = NDArray[np.float64]

NO_ARM = -1
"""`Event.arm` of a decision that asked several RMs: it is counted and kept, and moves no posterior."""


@dataclass(frozen=True, slots=True)
class FoldSettings:
    """Where the log is cut. Part of a run's identity: two replicas that differ here would differ in the last bits.

    Attributes:
        block_size: m, events per block.
        refresh_events: events of the log between two inversions of Λ; a multiple of `block_size`. Snapshots are taken
            there.
        drift_tolerance: largest |ΛΣp − p| (p = 1/√W) at a block's end before Σ is inverted afresh.
        first_adaptation: events until λ₀ adapts for the first time; then whenever their number has doubled, and once
            there are `block_size` at every block's end.
    """

    block_size: int = 64
    refresh_events: int = 8192
    drift_tolerance: float = 1e-6
    first_adaptation: int = 8

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.refresh_events < 1 or self.refresh_events % self.block_size:
            raise ShapeMismatchError(
                f"block_size {self.block_size} and refresh_events {self.refresh_events}: give positive integers, the "
                "second a multiple of the first"
            )
        if self.first_adaptation < 1:
            raise ShapeMismatchError(f"first_adaptation is {self.first_adaptation}: give a positive integer")

    def adapts_at(self, count: int) -> bool:
        """Return True if λ₀ is chosen anew after so many events.

        >>> list(filter(FoldSettings().adapts_at, range(1, 200)))
        [8, 16, 32, 64, 128, 192]
        """
        doublings, rest = divmod(count, self.first_adaptation)
        early = not rest and doublings & (doublings - 1) == 0
        return count % self.block_size == 0 or (count < self.block_size and early)


@dataclass(frozen=True, slots=True)
class ArmPosterior:
    """One arm: Gaussian over weights after its last block, and the tail of t events since.

    Attributes:
        precision: (W, W) Λ.
        information: (W,) b.
        covariance: (W, W) Σ.
        covariance32: (W, W) float32 copy of Σ, for draws.
        mean: (W,) μ with the tail applied.
        settled: (W,) μ at the last block.
        contexts: (t, W) the tail's x.
        targets: (t,) the tail's reward minus offset.
        corrections: (t, W) rows w with Σ_now = Σ − Σ_rows w wᵀ.
    """

    precision: Array
    information: Array
    covariance: Array
    covariance32: NDArray[np.float32]
    mean: Array
    settled: Array
    contexts: Array
    targets: Array
    corrections: Array

    def variance(self, x: Array) -> float:
        """xᵀΣ_now x in float64: the reference that draws are tested against. x: (W,)."""
        return float(x @ self.covariance @ x - np.square(self.corrections @ x).sum())


@dataclass(frozen=True, slots=True)
class Posterior:
    """What a run has learned from the first `count` events of its log.

    Attributes:
        prior: where it started; not part of the digest.
        settings: where the log is cut.
        count: events folded: the posterior's version.
        arms: one per RM, in pool order.
        statistics: running statistics per arm.
        drift: largest |ΛΣ − I| over the arms, measured at the last inversion, before it.
        precisions: (K, W) diagonal of each arm's prior precision now; `prior.hyper.lambda0` unless it adapts.
        tally: contexts met and how many of them were novel; empty unless `Prior.watches_novelty`.
        watches: (K,) what tells that an arm has changed; as at the start unless `Hyperparameters.alarm_rate`.
        referees: what gold has said of each referee, by name; those of whom it has said anything.
        spoken: events, and how many of them spoke of the asked arm alone or of some; the rest are audits of all arms.
        pool: who is asked; the prior's arms, all of them, unless the pool was changed.
    """

    prior: Prior
    settings: FoldSettings
    count: int
    arms: tuple[ArmPosterior, ...]
    statistics: SignalStatistics
    precisions: Array
    drift: float = 0.0
    tally: Tally = field(default_factory=Tally)
    watches: tuple[Watch, ...] = ()
    referees: Mapping[str, Standing] = field(default_factory=dict)
    spoken: Tally = field(default_factory=Tally)
    pool: PoolState = field(default_factory=PoolState)
    _means: list[Array] = field(default_factory=list, repr=False, compare=False)
    _events: list[Array] = field(default_factory=list, repr=False, compare=False)

    @property
    def n_arms(self) -> int:
        """K, retired arms included."""
        return len(self.arms)

    @property
    def active(self) -> NDArray[np.bool_]:
        """(K,) True for the arms that are asked."""
        retired = self.pool.retired
        return ~np.array(retired, dtype=np.bool_) if retired else np.ones(self.n_arms, dtype=np.bool_)

    @property
    def on_probation(self) -> NDArray[np.bool_] | None:
        """(K,) True for arms that are asked of a bounded share only (`pools.PoolState.probation`); None for none."""
        if not any(self.pool.probation):
            return None
        waiting = (self.events < np.array(self.pool.probation)) & self.active
        return waiting if waiting.any() else None

    @property
    def n_weights(self) -> int:
        """W."""
        return self.prior.n_weights

    @property
    def at_refresh(self) -> bool:
        """True where Σ is exactly the inverse of Λ: the positions at which a snapshot may be taken."""
        return self.count % self.settings.refresh_events == 0

    @property
    def means(self) -> Array:
        """μ of every arm, (K, W). Stacked once."""
        if not self._means:
            self._means.append(np.stack([arm.mean for arm in self.arms]))
        return self._means[0]

    @property
    def lambda0(self) -> float:
        """The prior precision λ₀ of all weights but the first, which may have a smaller one (`evidence`)."""
        return float(self.precisions[0, -1])

    @property
    def events(self) -> Array:
        """n_k: how much each arm's data weigh, in events (K,); a discount and a reset take from it. Computed once."""
        if not self._events:
            grams = np.array([np.trace(arm.precision) for arm in self.arms]) - self.precisions.sum(axis=1)
            tails = [float(np.square(arm.contexts).sum()) for arm in self.arms]
            self._events.append(np.maximum(self.prior.hyper.sigma2 * grams, 0.0) + tails)
        return self._events[0]

    @property
    def partial(self) -> float:
        """Share of the events that spoke of some arms only, in [0, 1]: how much there is to explore."""
        return 1.0 if self.spoken.share is None else self.spoken.share

    def digest(self) -> str:
        """sha256 over every number that the fold carries on: equal digests mean equal posteriors, bit for bit."""
        # The tally only where it is kept: other runs' digests are what they always were.
        scalars = (
            *self.precisions.ravel(),
            *((self.tally.met, self.tally.novel) if self.prior.watches_novelty else ()),
        )
        h = hashlib.sha256(np.int64(self.count).tobytes() + np.array(scalars).tobytes())
        h.update(np.array(self.watches).tobytes())
        h.update(np.array([self.spoken.met, self.spoken.novel]).tobytes())
        h.update(self.pool.specification)
        for name in sorted(self.referees):
            h.update(name.encode() + np.array(self.referees[name]).tobytes())
        for arm in self.arms:
            for array in (
                arm.precision,
                arm.information,
                arm.covariance,
                arm.mean,
                arm.contexts,
                arm.targets,
                arm.corrections,
            ):
                h.update(np.ascontiguousarray(array).tobytes())
        stats = self.statistics
        for array in (
            stats.count,
            stats.reward_sum,
            stats.reward_count,
            stats.loss_mean,
            stats.loss_square,
            stats.loss_history,
            stats.pooled,
        ):
            h.update(array.tobytes())
        return h.hexdigest()


def start(prior: Prior, settings: FoldSettings | None = None) -> Posterior:
    """The posterior before any event: Λ = λ₀I, b = λ₀·mean, Σ = I/λ₀ for every arm.

    Args:
        prior: the run's prior.
        settings: where the log is cut.
    """
    W, lambda0 = prior.n_weights, prior.hyper.lambda0
    precision, covariance = np.eye(W) * lambda0, np.eye(W) / lambda0
    arms = tuple(_arm(precision, lambda0 * mean, covariance, mean.copy()) for mean in prior.means)
    statistics = SignalStatistics.empty(prior.n_arms)
    precisions, watches = np.full((prior.n_arms, W), lambda0), (Watch(),) * prior.n_arms
    return Posterior(prior, settings or FoldSettings(), 0, arms, statistics, precisions, watches=watches)


def restore(
    prior: Prior,
    settings: FoldSettings,
    *,
    count: int,
    precision: Sequence[Array],
    information: Array,
    statistics: SignalStatistics,
    precisions: Array,
    drift: float,
    tally: Tally,
    watches: Sequence[Watch],
    referees: Mapping[str, Standing],
    spoken: Tally,
    pool: PoolState,
) -> Posterior:
    """The posterior at a refresh position, from what a snapshot holds; bit for bit what the fold had there.

    Args:
        prior: the run's prior.
        settings: where the log is cut.
        count: the position, a positive multiple of `refresh_events`.
        precision: K arrays (W, W).
        information: (K, W).
        statistics: running statistics at the position.
        precisions: (K, W) diagonals of the arms' prior precisions at the position.
        drift: as it was measured there.
        tally: of novel contexts up to there.
        watches: (K,) as they were there.
        referees: as they were there.
        spoken: as it was there.
        pool: as it was there; the prior is that of its last change.

    Raises:
        ShapeMismatchError: `count` is no refresh position, or the arrays do not fit the prior.
    """
    K, W = prior.n_arms, prior.n_weights
    if count <= 0 or count % settings.refresh_events:
        raise ShapeMismatchError(
            f"snapshot at event {count} with refresh every {settings.refresh_events}: it was made with other fold "
            "settings"
        )
    if len(precision) != K or information.shape != (K, W) or any(p.shape != (W, W) for p in precision):
        raise ShapeMismatchError(
            f"snapshot arrays do not fit {K} arms of {W} weights: the pool or the checkpoint was changed"
        )
    arms = []
    for lam, b in zip(precision, information, strict=True):
        covariance = inverse_spd(lam)
        arms.append(_arm(lam, b.copy(), covariance, covariance @ b))
    return Posterior(
        prior,
        settings,
        count,
        tuple(arms),
        statistics,
        precisions,
        drift,
        tally,
        tuple(watches),
        referees,
        spoken,
        pool,
    )


def fold(state: Posterior, events: Sequence[Event | PoolChange | Mark]) -> Posterior:
    """Apply events in log order: Λ_k += x xᵀ/σ², b_k += (r − o)x/σ² for the asked arm k (arXiv 2510.02850, online
    stage).

    The same for every arm in `event.shadows`, with its own credit and offset. A referee's verdict counts ω events with
    the reward r' (`audits.referee`). One event costs one matrix-vector
    product per arm it moves, O(W²); a block of m events one rank-m update, O(m W²).

    Args:
        state: what was learned so far; not changed.
        events: what comes next in the log.

    Returns:
        The state after them; `state` itself for no events.

    Raises:
        ShapeMismatchError: an event's context is not (d,), or its arm not in the pool.
        NotFiniteError: a context, offset or value is NaN or infinite.
        FeedbackError: verdicts of other RMs with a signal that says nothing of them.
        AuditError: an audit without a referee, or numbers of one outside their domain.
    """
    if not events:
        return state
    folding = _Folding(state)
    for event in events:
        if isinstance(event, Event):
            folding.apply(event)
            continue
        if isinstance(event, PoolChange):
            folding = _Folding(_changed(folding.freeze(), event))
        folding.advance()
    return folding.freeze()


def _changed(state: Posterior, change: PoolChange) -> Posterior:
    """The state with the arms, hyper-parameters and offsets of a changed pool, at the same position.

    Raises:
        ShapeMismatchError: the change takes arms away, or moves what earlier arms started from.
    """
    prior, K = change.prior, state.n_arms
    if prior.n_arms < K or prior.n_weights != state.n_weights or not np.array_equal(prior.means[:K], state.prior.means):
        raise ShapeMismatchError(
            f"a change of the pool has a prior of {prior.n_arms} arms over {prior.n_weights} weights, the run one of "
            f"{K} over {state.n_weights}: a change only adds arms behind those that are there"
        )
    added, lambda0 = prior.n_arms - K, prior.hyper.lambda0
    precision, covariance = np.eye(state.n_weights) * lambda0, np.eye(state.n_weights) / lambda0
    arms = [_arm(precision, lambda0 * mean, covariance, mean.copy()) for mean in prior.means[K:]]
    return replace(
        state,
        prior=prior,
        arms=(*state.arms, *arms),
        statistics=state.statistics.extended(added),
        precisions=np.concatenate([state.precisions, np.full((added, state.n_weights), lambda0)]),
        watches=(*state.watches, *[Watch()] * added),
        pool=change.state,
        _means=[],
        _events=[],
    )


def events_to_refresh(state: Posterior) -> int:
    """How many more events until the next refresh position (1 .. refresh_events)."""
    every = state.settings.refresh_events
    return every - state.count % every


def _arm(precision: Array, information: Array, covariance: Array, mean: Array) -> ArmPosterior:
    """An arm with an empty tail."""
    W = len(mean)
    return ArmPosterior(
        precision,
        information,
        covariance,
        covariance.astype(np.float32),
        mean,
        mean,
        np.empty((0, W)),
        np.empty(0),
        np.empty((0, W)),
    )


class _Folding:
    """The mutable half of one `fold` over all arms."""

    def __init__(self, state: Posterior) -> None:
        self._state = state
        self._count = state.count
        self._drift = state.drift
        self._precisions = state.precisions
        self._tally = state.tally
        self._watches = [*state.watches]
        self._referees = dict(state.referees)
        self._spoken = state.spoken
        self._landmarks = state.prior.landmarks if state.prior.watches_novelty else None
        self._signal = SignalAccumulator(state.statistics, state.prior.loss_scale)
        self._touched: dict[int, _ArmFolding] = {}
        self._n_active = int(state.active.sum())

    def apply(self, event: Event) -> None:
        x = np.frombuffer(event.x, dtype="<f4")
        self._check(event, x)
        if self._landmarks is not None:
            self._tally = self._tally.add(self._landmarks.is_novel(x))
        x = self._state.prior.learned(x)
        lesson = None if event.audit is None else self._lesson(event.audit)
        if event.arm != NO_ARM:
            self._learn(event.arm, x, event.offset, event.credit, event, lesson)
        # By arm, however the log lists them: the order of sums must not depend on who answered first.
        for arm, offset, credit in sorted(event.shadows, key=itemgetter(0)):
            self._learn(arm, x, offset, credit, event, lesson)
        if event.audit is not None:
            self._judge(event, event.audit)
        full = event.source is Source.AUDIT and (event.arm != NO_ARM) + len(event.shadows) >= self._n_active
        self._spoken = self._spoken.add(not full)
        self.advance(audited=event.source is Source.AUDIT)

    def advance(self, *, audited: bool = False) -> None:
        """Count an event, and do what falls due at its position."""
        settings = self._state.settings
        self._count += 1
        if self._count % settings.block_size == 0:
            self._spoken = self._spoken.faded()
            self._discount()
        if audited or settings.adapts_at(self._count):
            self._adapt()
        if self._count % settings.refresh_events == 0:
            self._drift = max(self._arm(k).refresh() for k in range(self._state.n_arms))

    def _discount(self) -> None:
        """Forget a little of every arm."""
        if self._state.prior.hyper.gamma != 1.0:
            for k in range(self._state.n_arms):
                self._arm(k).discount(self._precisions[k])

    def _adapt(self) -> None:
        """Choose λ₀ anew, for all arms."""
        hyper, arms = self._state.prior.hyper, range(self._state.n_arms)
        if hyper.adapt:
            data = [self._arm(k).data(self._precisions[k]) for k in arms]
            grams, informations = np.stack([g for g, _ in data]), np.stack([b for _, b in data])
            chosen = most_probable_precision(grams, informations)
            if self._landmarks is not None:
                self._tally = self._tally.faded()
                # Between the two settings in proportion to the events that spoke of some arms only.
                partial = self._spoken.novel / self._spoken.met
                deviations = partial * NOISE + (1.0 - partial) * AUDITED_NOISE
                audited = min(AUDITED_PRECISION, hyper.lambda_novel)
                precision = hyper.lambda_novel**partial * audited ** (1.0 - partial)
                chosen = loosened(chosen, self._tally.excess(deviations), precision)
            precisions = np.full(self._precisions.shape, chosen)
            precisions[:, 0] = level_precisions(grams, informations, chosen)
            for k in np.flatnonzero((precisions != self._precisions).any(axis=1)).tolist():
                self._arm(k).change_precision(precisions[k] - self._precisions[k])
            self._precisions = precisions

    def _learn(
        self, arm: int, x: NDArray[np.float32], offset: float, credit: float | None, event: Event, lesson: Lesson | None
    ) -> None:
        """Apply what the event says of one arm."""
        audit = event.audit
        if audit is not None and lesson is not None:
            if event.source is Source.AUDIT and not audit.after_gold:
                self._learn_audited(arm, x, offset, credit, lesson)
                return
            taught = dict(audit.taught).get(arm)
        else:
            taught = None
        reward = self._signal.observe(arm, event.feedback, credit=credit, offset=offset)
        if reward is None:
            return
        if lesson is not None and lesson.weight and taught is not None:
            weight, target = lesson.correction(reward, taught, offset)
            self._arm(arm).append(x, target, weight)
            return
        if self._state.prior.hyper.alarm_rate:
            self._watch(arm, offset + self._arm(arm).predicted(x), reward)
        self._arm(arm).append(x, reward - offset)

    def _learn_audited(
        self, arm: int, x: NDArray[np.float32], offset: float, credit: float | None, lesson: Lesson
    ) -> None:
        if credit is None or not lesson.weight:
            return
        reward = lesson.reward(credit)
        self._signal.observe(arm, Feedback(Signal.PREFERENCE, 0.0), credit=reward)
        if self._state.prior.hyper.alarm_rate:
            self._watch(arm, lesson.seen(offset + self._arm(arm).predicted(x)), credit)
        self._arm(arm).append(x, reward - offset, lesson.weight)

    def _lesson(self, audit: Audit) -> Lesson:
        standing = self._referees.get(audit.referee, Standing())
        return standing.lesson(audit.trust, self._state.prior.hyper.sigma2)

    def _judge(self, event: Event, audit: Audit) -> None:
        """Judge the referee where the event holds gold as well."""
        gold = event.source is not Source.AUDIT or audit.after_gold
        if not gold or event.feedback.signal is not Signal.PREFERENCE:
            return
        right = 0.5 if audit.verdict == TIE else float(audit.verdict == event.feedback.value)
        earned = audit.earned if event.arm == NO_ARM else event.credit
        standing = self._referees.get(audit.referee, Standing())
        self._referees[audit.referee] = standing.after(right, right if earned is None else earned)

    def _watch(self, arm: int, predicted: float, reward: float) -> None:
        """Reset the arm if its rewards have contradicted the posterior too much."""
        hyper, watch = self._state.prior.hyper, self._watches[arm]
        self._watches[arm] = watch.after(predicted, reward, hyper.alarm_rate)
        if self._watches[arm].alarms > watch.alarms:
            self._precisions = self._precisions.copy()
            self._precisions[arm] = hyper.lambda0
            self._arm(arm).reset()

    def _arm(self, k: int) -> _ArmFolding:
        if k not in self._touched:
            self._touched[k] = _ArmFolding(self._state.arms[k], k, self._state)
        return self._touched[k]

    def _check(self, event: Event, x: NDArray[np.float32]) -> None:
        if x.shape != (self._state.prior.d,):
            raise ShapeMismatchError(
                f"event {event.decision_id!r} has a context of {x.shape[0]} numbers, the prior one of "
                f"{self._state.prior.d}"
            )
        if not NO_ARM <= event.arm < self._state.n_arms:
            raise ShapeMismatchError(f"event {event.decision_id!r} asked arm {event.arm} of {self._state.n_arms}")
        numbers = (event.offset, event.credit or 0.0, event.feedback.value)
        if not (np.isfinite(x).all() and np.isfinite(numbers).all()):
            raise NotFiniteError(f"event {event.decision_id!r} holds NaN or infinity")
        if event.shadows:
            self._check_shadows(event)
        if event.audit is not None or event.source is Source.AUDIT:
            self._check_audit(event)

    def _check_shadows(self, event: Event) -> None:
        if event.feedback.signal is not Signal.PREFERENCE:
            raise FeedbackError(
                f"event {event.decision_id!r} holds verdicts of other RMs and a {event.feedback.signal.value}, which "
                "says nothing of them: shadow runs of the signal 'preference' only"
            )
        arms = [arm for arm, _, _ in event.shadows]
        if len({event.arm, *arms}) != 1 + len(arms) or not all(0 <= arm < self._state.n_arms for arm in arms):
            raise ShapeMismatchError(
                f"event {event.decision_id!r} asked arm {event.arm} of {self._state.n_arms} and holds verdicts of the "
                f"other arms {arms}: each arm of the pool once at most"
            )
        if not all(np.isfinite((offset, credit or 0.0)).all() for _, offset, credit in event.shadows):
            raise NotFiniteError(f"event {event.decision_id!r} holds NaN or infinity")

    def _check_audit(self, event: Event) -> None:
        audit = event.audit
        if audit is None or not audit.referee:
            raise AuditError(f"event {event.decision_id!r} is an audit without a referee: name who judged it")
        if not (0.0 < audit.probability <= 1.0 and 0.5 <= audit.trust <= 1.0 and audit.verdict >= TIE):
            raise AuditError(
                f"event {event.decision_id!r}: audit by {audit.referee!r} with probability {audit.probability}, trust "
                f"{audit.trust} and verdict {audit.verdict}: give (0, 1], [0.5, 1] and a response's index, or {TIE}"
            )
        if event.source is Source.AUDIT and event.feedback.signal is not Signal.PREFERENCE:
            raise AuditError(f"event {event.decision_id!r}: an audit speaks by preference, not {event.feedback.signal}")
        if not all(0 <= arm < self._state.n_arms and np.isfinite(credit or 0.0) for arm, credit in audit.taught):
            raise AuditError(f"event {event.decision_id!r}: audit has taught arms {audit.taught}, which cannot be")

    def freeze(self) -> Posterior:
        arms = list(self._state.arms)
        for k, folding in self._touched.items():
            arms[k] = folding.freeze()
        return replace(
            self._state,
            count=self._count,
            arms=tuple(arms),
            statistics=self._signal.freeze(),
            drift=self._drift,
            precisions=self._precisions,
            tally=self._tally,
            watches=tuple(self._watches),
            referees=self._referees,
            spoken=self._spoken,
            _means=[],
            _events=[],
        )


class _ArmFolding:
    """The mutable half of one `fold` over one arm: owns the tail's buffers, replaces the matrices, never writes to
    them.
    """

    def __init__(self, arm: ArmPosterior, k: int, state: Posterior) -> None:
        m, W = state.settings.block_size, state.n_weights
        self._sigma2 = state.prior.hyper.sigma2
        self._hyper = state.prior.hyper
        self._prior_mean = state.prior.means[k]
        self._settings = state.settings
        self._precision, self._information, self._covariance = arm.precision, arm.information, arm.covariance
        self._covariance32: NDArray[np.float32] | None = arm.covariance32
        self._mean, self._settled = arm.mean.copy(), arm.settled
        self._rows = self._corrected = len(arm.targets)
        self._contexts, self._targets, self._corrections = np.empty((m, W)), np.empty(m), np.empty((m, W))
        self._contexts[: self._rows] = arm.contexts
        self._targets[: self._rows] = arm.targets
        self._corrections[: self._rows] = arm.corrections

    def append(self, x: NDArray[np.float32], target: float, weight: float = 1.0) -> None:
        """Add one observation; one with weight ω is a whole one with √ω x and √ω target."""
        scale = math.sqrt(weight)
        self._contexts[self._rows] = x
        self._contexts[self._rows] *= scale
        self._targets[self._rows] = target * scale
        self._rows += 1
        if self._rows == self._settings.block_size:
            self._absorb()

    def predicted(self, x: NDArray[np.float32]) -> float:
        """xᵀμ at the last block: it does not depend on where the log was cut since."""
        return float(self._settled @ x.astype(np.float64))

    def reset(self) -> None:
        """Forget everything but the prior."""
        W, lambda0 = len(self._mean), self._hyper.lambda0
        self._precision, self._covariance = np.eye(W) * lambda0, np.eye(W) / lambda0
        self._information = lambda0 * self._prior_mean
        self._settle()

    def _correct(self, row: int) -> None:
        """Sherman-Morrison on Σ_now = Σ − WᵀW: one more row w = Σx/√(σ² + xᵀΣx), and the mean moves along Σx.

        Σx is read from the float32 copy: half the memory traffic, and the tail is gone with the next block.
        """
        x = self._contexts[row]
        gain = (self._single_precision() @ x.astype(np.float32)).astype(np.float64)
        if row:
            earlier = self._corrections[:row]
            gain -= (earlier @ x) @ earlier
        scale = self._sigma2 + x @ gain
        self._mean += gain * ((self._targets[row] - x @ self._mean) / scale)
        np.divide(gain, np.sqrt(scale), out=self._corrections[row])

    def _absorb(self) -> None:
        """Rank-m update: Λ += XᵀX/σ², b += Xᵀt/σ², Σ −= ΣXᵀ(σ²I + XΣXᵀ)⁻¹XΣ (Woodbury), μ = Σb; the tail is empty
        then.
        """
        x, targets = self._contexts[: self._rows], self._targets[: self._rows]
        scaled = x / np.sqrt(self._sigma2)
        precision = scaled.T @ scaled
        precision += self._precision
        gains = x @ self._covariance
        inner = gains @ x.T
        inner[np.diag_indices_from(inner)] += self._sigma2
        # A general solve with W right-hand sides takes several times as long as this product.
        half = np.linalg.inv(np.linalg.cholesky(inner)) @ gains
        covariance = half.T @ half
        np.subtract(self._covariance, covariance, out=covariance)
        self._precision, self._covariance = precision, covariance
        self._information = self._information + (targets @ x) / self._sigma2
        if inverse_probe(precision, covariance) > self._settings.drift_tolerance:
            self._covariance = inverse_spd(precision)
        self._settle()

    def discount(self, precisions: Array) -> None:
        """Λ ← γΛ + (1 − γ)Λ₀, b ← γb + (1 − γ)b₀: forget towards the prior."""
        if self._rows:
            self._absorb()
        gamma = self._hyper.gamma
        precision = gamma * self._precision
        precision[np.diag_indices_from(precision)] += (1 - gamma) * precisions
        self._information = gamma * self._information + (1 - gamma) * precisions * self._prior_mean
        self._replace_precision(precision)

    def data(self, precisions: Array) -> tuple[Array, Array]:
        """What the data alone say, (Λ − λ₀I, b − Λ·mean₀): Gram matrix and information about the departure from the
        prior mean.
        """
        if self._rows:
            self._absorb()
        gram = self._precision.copy()
        gram[np.diag_indices_from(gram)] -= precisions
        return gram, self._information - self._precision @ self._prior_mean

    def change_precision(self, difference: Array) -> None:
        """Λ ← Λ + δI, b ← b + δ·mean₀: the same data under another λ₀."""
        precision = self._precision.copy()
        precision[np.diag_indices_from(precision)] += difference
        self._information = self._information + difference * self._prior_mean
        self._replace_precision(precision)

    def _replace_precision(self, precision: Array) -> None:
        self._precision = precision
        self._covariance = inverse_spd(precision)
        self._settle()

    def refresh(self) -> float:
        """Σ = Λ⁻¹ afresh; returns the drift that had gathered since the last time."""
        if self._rows:
            self._absorb()
        residual = inverse_residual(self._precision, self._covariance)
        self._covariance = inverse_spd(self._precision)
        self._settle()
        return residual

    def _settle(self) -> None:
        self._settled = self._covariance @ self._information
        self._mean = self._settled.copy()
        self._covariance32 = None
        self._rows = self._corrected = 0

    def _single_precision(self) -> NDArray[np.float32]:
        if self._covariance32 is None:
            self._covariance32 = self._covariance.astype(np.float32)
        return self._covariance32

    def freeze(self) -> ArmPosterior:
        """Correct Σ and μ for the rows that no block has absorbed, in log order, and return the arm."""
        for row in range(self._corrected, self._rows):
            self._correct(row)
        rows = self._rows
        return ArmPosterior(
            self._precision,
            self._information,
            self._covariance,
            self._single_precision(),
            self._mean,
            self._settled,
            self._contexts[:rows].copy(),
            self._targets[:rows].copy(),
            self._corrections[:rows].copy(),
        )
