"""A run: one pool, one prior, one log, one posterior. The registry opens runs by name and keeps them apart.

The prior's form and the signal are the run's own: a policy may insist on a form (`bayesian:none`, `laser`), a request
on a signal, and whoever opens the run first decides. They stand in the run's fingerprint, where every other gateway
finds them, and so does the pool that the run begins with. A gateway that was started with another pool takes the run's,
and proposes its own (`usecases.pools`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from router_core.combine import Combination, Pacer
from router_core.encoder.fuse import PairEncoder
from router_core.errors import UnknownPolicyError
from router_core.policies import Policy, ScoreScale, View, make_policy
from router_core.posterior import FoldSettings, Posterior, start
from router_core.prior import Prior, PriorForm
from router_core.records import Instance, Signal
from service.encoders.protocol import AwaitedEncoder
from service.errors import (
    ArchivedError,
    ConfigurationError,
    NotFoundError,
    NotReadyError,
    OverCapacityError,
    RunConflictError,
    ValidationError,
)
from service.keys.access import EVERYTHING, Access
from service.scorers.protocol import Scorer
from service.specification import Change, Specification
from service.stores.acts import is_archived
from service.stores.ids import check_run
from service.stores.protocol import NameNotFreeError, RunIdentity, Store
from service.usecases.history import DecisionHistory

if TYPE_CHECKING:
    from service.usecases.audit import Audits

logger = logging.getLogger(__name__)

IDLE_SECONDS = 60.0
"""A run that no request has named for so long may be closed to make room; its next request opens it again."""

CHARACTERS_PER_TOKEN = 3
"""Texts of fewer characters per token that a scorer reads are not counted before the draw; written words have four or
five. One that is too long all the same is found to be when its scorer is asked."""

NAME_POLL_SECONDS = 0.5
"""How often an unused name that may not be taken yet is looked at: another gateway may claim it."""

RECENT_INSTANCES = 64
"""Instances that the metrics of the posterior are means over: enough to be steady, 150 kB for each run at d = 576."""

MAX_POLICIES = 256
"""Policies that requests may name while a gateway runs: weights and budgets make any number of names."""

FOLD_WORDS = {"hyper": "list of hyper-parameters", "fold": "fold setting", "blas_threads": "number of BLAS threads"}
"""Parts of a fingerprint whose names are not words."""

MAX_NAMED_RUNS = 20
"""Runs that the error on an unknown one names."""


class Terms(NamedTuple):
    """What a run keeps from its first opening on: the form of its prior, and its kind of feedback."""

    form: PriorForm
    signal: Signal


class Wish(NamedTuple):
    """What whoever opens a run insists on; None: whatever the run has."""

    form: PriorForm | None = None
    signal: Signal | None = None


NO_WISH = Wish()
"""Whatever the run has."""


class Templates(Protocol):
    """Makes run templates of specifications."""

    def template(self, specification: Specification) -> RunTemplate:
        """Return the template of a pool, the same one for equal specifications.

        Raises:
            ConfigurationError: it does not fit the gateway's checkpoint.
        """

    def prior(self, specification: Specification, terms: Terms) -> Prior:
        """Return the prior of a pool. Pure: called in the learner's thread.

        Raises:
            ConfigurationError: it does not fit the gateway's checkpoint.
        """

    def propose(self, standing: Specification) -> Sequence[Change]:
        """Return the differences of the gateway's own pool from a run's."""

    async def begin(self, template: RunTemplate) -> None:
        """Probe and watch the scorers of a template that are new here."""


class RunTemplate:
    """What runs of one pool share: the pool, the encoder, the priors by terms.

    Args:
        arms: the pool, in arm order, retired ones included.
        encoder: text of a pair to x.
        priors: what is believed before any feedback; called once per terms. May raise ConfigurationError.
        form: of the runs that no policy insists on another one for.
        fold_settings: where the log is cut.
        signal: kind of feedback of new runs whose first request does not name another.
        policy: name of the policy of requests that name none.
        origin: what gives contexts and offsets: the checkpoint's digest, or the untrained encoder's name.
        score_scale: of the RMs' raw rewards; None: each run's score log tells it.
        combination: what the checkpoint learned about votes; None: no policy combines by them.
        prices: of one asking, by arm, in units of the cheapest; None: equal.
        max_calls: scorers that one instance may be asked of, at most; None for no bound but the pool.
        parallel_calls: scorers that may be asked at once in the first round of a cascade, 1 or 2.
        max_rounds: rounds of a cascade, at most; None for no bound.
        blas_threads: of the linear algebra library; sums are grouped by them.
        seed: of the draws; None for the operating system's entropy.
        specification: the pool in words; None where no pool changes.
        rows: per arm its row in the combination, None for an arm that has none there; None: arm k has row k.
        first_scale: what score logs begin with; None: `score_scale`.
        audits: how decisions are audited, and with which probability; None for not at all.

    Attributes:
        form: the prior form of new runs: the default policy's, if it insists on one.
        retired: (K,) True for arms that are asked no more.

    Raises:
        ConfigurationError: pool, prior and encoder do not fit each other, or there is no such policy.
    """

    def __init__(
        self,
        *,
        arms: Sequence[Scorer],
        encoder: PairEncoder | AwaitedEncoder,
        priors: Callable[[Terms], Prior],
        form: PriorForm,
        fold_settings: FoldSettings,
        signal: Signal,
        policy: str,
        origin: str,
        score_scale: ScoreScale | None = None,
        combination: Combination | None = None,
        prices: Sequence[float] | None = None,
        max_calls: int | None = None,
        parallel_calls: int = 1,
        max_rounds: int | None = None,
        blas_threads: int = 1,
        seed: int | None = None,
        specification: Specification | None = None,
        rows: Sequence[int | None] | None = None,
        first_scale: ScoreScale | None = None,
        audits: Audits | None = None,
    ) -> None:
        self.arms = tuple(arms)
        self.specification = specification
        self.pool = tuple(arm.name for arm in arms) if specification is None else specification.names
        self.retired = (False,) * len(self.arms) if specification is None else specification.state.retired
        self.asked = tuple([k for k, retired in enumerate(self.retired) if not retired])
        self._gone = np.array(self.retired) if any(self.retired) else None
        self._choosy = any(self.arms[k].choosy for k in self.asked)
        self.encoder = encoder
        self.score_scale = score_scale
        self.first_scale = first_scale or score_scale
        self.audits = audits
        costs = np.array([1.0] * len(self.arms) if prices is None else prices, dtype=np.float64)
        relative = costs / costs[list(self.asked)].min()
        self.prices: tuple[float, ...] = tuple(relative.tolist())
        self.combination = None
        if combination is not None:
            self.combination = combination.priced(relative) if rows is None else combination.placed(rows, relative)
        self.max_calls = len(self.asked) if max_calls is None else max_calls
        self.parallel_calls = parallel_calls
        self.max_rounds = sys.maxsize if max_rounds is None else max_rounds
        self.fold_settings = fold_settings
        self.signal = signal
        self.seed = seed
        self._origin = origin
        self._blas_threads = blas_threads
        self._policies: dict[str, Policy] = {}
        self._build_prior = priors
        self._priors: dict[Terms, Prior] = {}
        try:
            self.default_policy = self.policy(policy)
        except NotFoundError as error:
            raise ConfigurationError(error.message) from error
        self.form = self.default_policy.prior or form
        self.prior(self.terms())

    def policy(self, name: str) -> Policy:
        """The policy of that name.

        Raises:
            NotFoundError: there is none.
        """
        if name not in self._policies:
            if len(self._policies) >= MAX_POLICIES:
                raise NotFoundError(
                    f"policy {name!r}: requests have named {MAX_POLICIES} policies since it started, and each "
                    "is a label of its metrics; use one of those, or set it as the gateway's policy",
                    details={"policy": name},
                )
            try:
                self._policies[name] = make_policy(name, self.pool, self.combination, self.asked)
            except UnknownPolicyError as error:
                raise NotFoundError(str(error), details={"policy": name}) from error
        return self._policies[name]

    def barred(self, instances: Sequence[Instance]) -> NDArray[np.bool_] | None:
        """Return (B, K), True where a scorer is retired, or known not to apply to an instance; None for nowhere."""
        if not self._choosy:
            return None if self._gone is None else np.broadcast_to(self._gone, (len(instances), len(self.arms)))
        barred = np.array([[arm.choosy and not arm.applies(instance) for arm in self.arms] for instance in instances])
        return barred if self._gone is None else barred | self._gone

    async def readable(self, instances: Sequence[Instance]) -> NDArray[np.int64] | None:
        """Return (B, K), responses that each scorer can read whole; None where all are short, or nobody counts.

        Of a scorer that does not count it is taken that it reads as many as those that do, and one at least: it is
        neither preferred to them nor passed over, but for those that can read nothing.
        """
        limits = {k: limit for k in self.asked if (limit := self.arms[k].counts_to) is not None}
        if not limits or max(map(_longest, instances)) <= CHARACTERS_PER_TOKEN * min(limits.values()):
            return None
        told = await asyncio.gather(*(self.arms[k].readable(instances) for k in limits))
        known = np.array(told, np.int64).T
        out = np.repeat(np.maximum(known.max(axis=1, keepdims=True), 1), len(self.arms), axis=1)
        out[:, list(limits)] = known
        return out

    def terms(self, wish: Wish = NO_WISH) -> Terms:
        """Return the terms of a new run that is opened with that wish."""
        return Terms(wish.form or self.form, wish.signal or self.signal)

    def prior(self, terms: Terms) -> Prior:
        """The prior of a run on those terms.

        Raises:
            ConfigurationError: it needs a checkpoint and there is none, or it does not fit the pool or the encoder.
        """
        if terms not in self._priors:
            self._priors[terms] = self._checked(self._build_prior(terms))
        return self._priors[terms]

    def _checked(self, prior: Prior) -> Prior:
        if len(self.arms) != prior.n_arms:
            raise ConfigurationError(
                f"the pool has {len(self.arms)} models and the prior {prior.n_arms}: use a checkpoint trained for this "
                "pool"
            )
        if self.encoder.d != prior.d:
            raise ConfigurationError(
                f"the encoder gives d={self.encoder.d} and the prior has d={prior.d}: use the checkpoint's own encoder"
            )
        return prior

    def fingerprint(self, terms: Terms) -> str:
        """Names everything that the posterior of a run depends on besides its log (v only scales the draws).

        Raises:
            ConfigurationError: as `prior`.
        """
        prior, settings = self.prior(terms), self.fold_settings
        founding = {} if self.specification is None else {"founding": msgspec.to_builtins(self.specification)}
        identity = {
            "pool": self.pool,
            **founding,
            "signal": terms.signal,
            "prior": prior.form,
            "d": prior.d,
            "columns": [prior.first, prior.n_weights],
            "hyper": [prior.hyper.lambda0, prior.hyper.sigma2, prior.hyper.gamma, prior.hyper.adapt],
            "origin": self._origin,
            "means": hashlib.sha256(np.ascontiguousarray(prior.means).tobytes()).hexdigest(),
            "fold": [
                settings.block_size,
                settings.refresh_events,
                settings.drift_tolerance,
                settings.first_adaptation,
            ],
            "blas_threads": self._blas_threads,
            # Only where it matters: runs that do without keep the fingerprint that they always had.
            **({"lambda_novel": prior.hyper.lambda_novel} if prior.watches_novelty else {}),
            **({"alarm_rate": prior.hyper.alarm_rate} if prior.hyper.alarm_rate else {}),
        }
        return json.dumps(identity, sort_keys=True)

    def standing_terms(self, name: str, standing: str, wanted: Terms) -> Terms:
        """Return the terms of a run that was opened before.

        Args:
            name: of the run.
            standing: its fingerprint, as the store has it.
            wanted: the terms that a new run would have.

        Raises:
            RunConflictError: the run was started with something else than this gateway has; says with what.
        """
        terms, ours = _terms_in(standing) or wanted, None
        with contextlib.suppress(ConfigurationError):
            ours = self.fingerprint(terms)
        if ours != standing:
            changed = differences(standing, ours or self.fingerprint(wanted))
            raise RunConflictError(
                f"run {name!r} was started otherwise: {changed_words(changed)}. Use a new run name, or start the "
                "gateway with what the run was started with",
                details={"run": name, "changed": changed},
            )
        return terms


class Current(NamedTuple):
    """What requests are answered with: a posterior, and the template of its pool."""

    posterior: Posterior
    template: RunTemplate


class Run:
    """One run's mutable state: which posterior is current, up to which event, and the generator of its draws.

    The learner replaces `current`; requests read the reference once and keep to it.

    Args:
        name: its name.
        template: what it shares with the others.
        identity: what the name stood for in the store when the run was opened.
        terms: its own; None: the template's.

    Attributes:
        founding: the template that it began with.
        current: the posterior and the pool's template, which change together.
        terms: form of its prior, and kind of its feedback.
        proposal: the differences of the gateway's own pool from the run's; empty where there are none.
        archived: nothing is asked or learned any more.
        failure: why the run does not learn, and takes no feedback; None while it does.
        stalled: why its log cannot be read for some time now; None while it can.
        acknowledged: id of the newest event that was acknowledged to a caller of this gateway.
    """

    def __init__(self, name: str, template: RunTemplate, identity: RunIdentity, terms: Terms | None = None) -> None:
        self.name = name
        self.founding = template
        self.identity = identity
        self.terms = terms or template.terms()
        self.signal = self.terms.signal
        self.fingerprint = template.fingerprint(self.terms)
        self.current = Current(start(template.prior(self.terms), template.fold_settings), template)
        self.last_event_id = "0-0"
        self.ready = asyncio.Event()
        self.proposal: Sequence[Change] = ()
        self.archived = False
        self.failure: str | None = None
        self.stalled: str | None = None
        self.acknowledged = "0-0"
        self.recent: deque[NDArray[np.float32]] = deque(maxlen=RECENT_INSTANCES)
        """Context (d,) of the first instance of each of the newest requests, for the metrics."""
        self.history = DecisionHistory()
        self.last_used = time.monotonic()
        entropy = None if template.seed is None else [template.seed, *name.encode()]
        self.rng = np.random.default_rng(entropy)
        self.next_rng = np.random.default_rng(None if entropy is None else [*entropy, 1])
        """Generator of further draws, on the event loop; the first ones are drawn in the chooser's thread."""
        self._pacers: dict[str, Pacer] = {}

    @property
    def posterior(self) -> Posterior:
        """What was learned so far. A request that needs the template too reads `current` once."""
        return self.current.posterior

    @property
    def template(self) -> RunTemplate:
        """Its pool, as it is now."""
        return self.current.template

    @property
    def prior(self) -> Prior:
        """Of its pool, as it is now."""
        return self.current.posterior.prior

    def advance(self, posterior: Posterior, template: RunTemplate | None = None) -> None:
        """Take a new posterior, with the template of its pool where the pool has changed."""
        self.current = Current(posterior, template or self.current.template)
        if template is not None:
            # Budgets are paced anew, at the prices of the new pool.
            self._pacers.clear()

    def multiplier(self, policy: Policy) -> float | None:
        """Return what a call costs now under the policy's budget, in units of P(right); None where it has none."""
        pacer = self._pacers.get(policy.name) or policy.pacer()
        if pacer is None:
            return None
        return self._pacers.setdefault(policy.name, pacer).multiplier

    @property
    def budgets(self) -> dict[str, Pacer]:
        """What keeps each policy to its budget, by name, of those that were used and have one."""
        return dict(self._pacers)

    def view(self, n: int, means: Sequence[float], multiplier: float | None, template: RunTemplate) -> View:
        """Return what a policy may know of one instance.

        Args:
            n: number of responses.
            means: of the draws (K,).
            multiplier: that they were drawn at.
            template: that they were drawn with.
        """
        return View(
            n, means, multiplier, template.max_calls, self.next_rng, template.parallel_calls, template.max_rounds
        )

    def spent(self, policy: Policy, price: float) -> None:
        """Tell the policy's budget what one instance cost, in units of the cheapest scorer."""
        pacer = self._pacers.get(policy.name)
        if pacer is not None:
            self._pacers[policy.name] = pacer.spent(price)


class RunRegistry:
    """Opens runs on first use and checks that a name means the same run as before.

    Args:
        template: what the runs share.
        store: where their fingerprints stand.
        default: name of the run that requests without one mean.
        max_runs: how many this gateway holds; idle ones are closed to make room.
        on_open: starts whatever must run beside an opened run (its learner); what it returns ends that.
        timeout_seconds: how long a request waits for a run that is being opened.
        default_wish: what the operator insists on for the default run.
        free_seconds: how long the store must have been watched before an unused name is taken, see `Store.open_run`.
        templates: of other pools than the gateway's own; None: a run of another pool is refused.
    """

    def __init__(
        self,
        template: RunTemplate,
        store: Store,
        *,
        default: str,
        max_runs: int,
        on_open: Callable[[Run], Callable[[], None]],
        timeout_seconds: float = 10.0,
        default_wish: Wish = NO_WISH,
        free_seconds: float = 0.0,
        templates: Templates | None = None,
    ) -> None:
        self.template = template
        self.templates = templates
        self.default = default
        self._store = store
        self._max_runs = max_runs
        self._on_open = on_open
        self._timeout_seconds = timeout_seconds
        self._default_wish = default_wish
        self._free_seconds = free_seconds
        self._runs: dict[str, Run] = {}
        self._closers: dict[str, Callable[[], None]] = {}
        self._opening: dict[str, asyncio.Task[Run]] = {}

    @property
    def runs(self) -> Mapping[str, Run]:
        """The open runs by name."""
        return self._runs

    def template_of(self, name: str | None) -> RunTemplate:
        """The template of a run's pool as it is now; of one that is not open, the gateway's own."""
        run = self._runs.get(name or self.default)
        return self.template if run is None else run.template

    def opened(self, name: str | None, wish: Wish = NO_WISH) -> Run | None:
        """Return the run if it is open and its posterior loaded; None if it must be waited for.

        Args:
            name: see `get`.
            wish: see `get`.

        Raises:
            RunConflictError: the name was used with another prior or signal.
        """
        name, wish = self._named(name, wish)
        run = self._runs.get(name)
        return self._used(run, wish) if run is not None and run.ready.is_set() else None

    async def get(self, name: str | None, wish: Wish = NO_WISH) -> Run:
        """The run of that name, opened if need be, with its posterior loaded.

        Args:
            name: the run; None: the default one.
            wish: the prior form that the policy of the request insists on, and the signal that the request names.

        Raises:
            ValidationError: the name is malformed, or the form needs a checkpoint that the gateway lacks.
            RunConflictError: the name was used with another pool, prior, signal or checkpoint.
            OverCapacityError: `max_runs` are open.
            NotReadyError: its log is still being replayed, or cannot be; or another gateway may hold its name still.
            StoreUnavailableError: the store does not answer.
        """
        run = await self._open_patiently(name, wish)
        if not run.ready.is_set():
            await self._wait_until_ready(run)
        return run

    async def _open_patiently(self, name: str | None, wish: Wish) -> Run:
        """Open the run; wait for a name that may be taken in time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_seconds
        while True:
            try:
                return await self.open(name, wish)
            except NameNotFreeError as error:
                if loop.time() + error.seconds >= deadline:
                    raise
                await asyncio.sleep(min(error.seconds, NAME_POLL_SECONDS))

    async def open(self, name: str | None, wish: Wish = NO_WISH) -> Run:
        """As `get`, without waiting for its posterior or its name."""
        name, wish = self._named(name, wish)
        return self._used(self._runs.get(name) or await self._open_once(name, wish), wish)

    def check_default(self, standing: str) -> Signal:
        """Return the signal of the default run, given its fingerprint in the store; opens nothing.

        Raises:
            RunConflictError: this gateway could not open it.
        """
        name, wish = self._named(None, NO_WISH)
        template = self._founding_template(standing)
        terms = template.standing_terms(name, standing, self.template.terms(wish))
        _insist(name, terms, wish)
        return terms.signal

    def _named(self, name: str | None, wish: Wish) -> tuple[str, Wish]:
        """Return the run's name and what is insisted on, with the defaults in their places."""
        name = name or self.default
        if name == self.default:
            ours = self._default_wish
            wish = Wish(wish.form or ours.form, wish.signal or ours.signal)
        return name, wish

    def _used(self, run: Run, wish: Wish) -> Run:
        """Return the run, which is in use now, if it is what was wished for."""
        _insist(run.name, Terms(run.prior.form, run.signal), wish)
        run.last_used = time.monotonic()
        return run

    async def find(self, name: str | None, access: Access = EVERYTHING) -> Run:
        """As `open`, for a run that some gateway has opened before: feedback never makes one.

        Raises:
            ForbiddenError: the caller may not name it.
            NotFoundError: none has.
        """
        name = name or self.default
        access.check_run(name)
        if not await self.known(name):
            known = access.seen(await self._store.list_runs())
            raise NotFoundError(
                f"run {name!r} is unknown: send the run of the decision, as `/reward` answered it; {known_runs(known)}",
                details={"run": name, "known": known[:MAX_NAMED_RUNS]},
            )
        return await self.open(name)

    async def loaded(self, name: str | None, access: Access = EVERYTHING) -> Run:
        """As `get`, for a run that some gateway has opened before: looking at a run never makes one.

        Raises:
            ServiceError: see `find` and `get`.
        """
        return await self.get((await self.find(name, access)).name)

    async def known(self, name: str | None) -> bool:
        """Return True if the run is open here, or some gateway has opened it before.

        Raises:
            ValidationError: the name is malformed.
            StoreUnavailableError: the store does not answer.
        """
        name = name or self.default
        return name in self._runs or await self._store.has_run(check_run(name))

    async def _open_once(self, name: str, wish: Wish) -> Run:
        check_run(name)
        if name not in self._opening:
            if len(self._runs) + len(self._opening) >= self._max_runs and not self._close_idle():
                raise OverCapacityError(
                    f"{self._max_runs} runs are open (max_runs), and none of them has been idle for "
                    f"{IDLE_SECONDS:.0f} s, after which it makes room: name one of them, or start another gateway",
                    retry_after_seconds=self._seconds_to_room(),
                )
            self._opening[name] = asyncio.create_task(self._open(name, wish))
            self._opening[name].add_done_callback(lambda _: self._opening.pop(name, None))
        return await asyncio.shield(self._opening[name])

    async def _open(self, name: str, wish: Wish) -> Run:
        """Open it on the terms that stand in its fingerprint; on those wished for, or the default ones, if none do."""
        terms = self.template.terms(wish)
        try:
            fingerprint = self.template.fingerprint(terms)
        except ConfigurationError as error:
            raise ValidationError(error.message, details={"field": "policy"}) from error
        identity = await self._store.open_run(name, fingerprint.encode(), free_seconds=self._free_seconds)
        standing = identity.fingerprint.decode()
        template = self.template if standing == fingerprint else self._founding_template(standing)
        terms = template.standing_terms(name, standing, terms)
        if is_archived(await self._store.acts(name)):
            raise archived(name)
        if self.templates is not None:
            await self.templates.begin(template)
        run = Run(name, template, identity, terms)
        self._runs[name] = run
        self.propose(run)
        self._closers[name] = self._on_open(run)
        return run

    def _founding_template(self, fingerprint: str) -> RunTemplate:
        """The template of the pool that stands in a fingerprint; the gateway's own where that cannot be had."""
        with contextlib.suppress(ConfigurationError, msgspec.ValidationError, KeyError):
            if self.templates is not None:
                return self.templates.template(msgspec.convert(json.loads(fingerprint)["founding"], Specification))
        return self.template

    def propose(self, run: Run) -> None:
        """Note what the gateway's own pool would change, and log it once."""
        standing = run.template.specification
        if self.templates is None or standing is None:
            return
        before, run.proposal = run.proposal, self.templates.propose(standing)
        if run.proposal and run.proposal != before:
            logger.warning(
                "the run's pool is another one than this gateway's: apply it with `reward-router pool apply`, or start "
                "the gateway with the run's",
                extra={"fields": {"run": run.name, "changes": [str(change) for change in run.proposal]}},
            )

    def close(self, name: str) -> None:
        """Close a run; its next request opens it again, unless it is archived."""
        if self._runs.pop(name, None) is not None:
            self._closers.pop(name)()

    def _longest_unused(self) -> Run | None:
        """The run that may be closed first. The default one stays open."""
        others = [run for name, run in self._runs.items() if name != self.default]
        return min(others, key=lambda run: run.last_used, default=None)

    def _seconds_to_room(self) -> int:
        """Whole seconds until a run can have been idle for long enough, at least 1."""
        oldest = self._longest_unused()
        idle = 0.0 if oldest is None else time.monotonic() - oldest.last_used
        return max(1, math.ceil(IDLE_SECONDS - idle))

    def _close_idle(self) -> bool:
        """Close the run that has been idle for longest, if one is; what it learned is in the store."""
        oldest = self._longest_unused()
        if oldest is None or time.monotonic() - oldest.last_used < IDLE_SECONDS:
            return False
        self.close(oldest.name)
        return True

    async def _wait_until_ready(self, run: Run) -> None:
        if run.failure is not None:
            raise NotReadyError(failure_of(run), details={"run": run.name})
        try:
            await asyncio.wait_for(run.ready.wait(), self._timeout_seconds)
        except TimeoutError as error:
            raise NotReadyError(
                f"run {run.name!r} is still replaying its log: try again in a moment", retry_after_seconds=1
            ) from error


def archived(name: str) -> ArchivedError:
    """The refusal of a run that was archived."""
    return ArchivedError(
        f"run {name!r} is archived: use a new run name, or take it back with `reward-router runs archive {name} "
        "--undo`",
        details={"run": name},
    )


def known_runs(names: Sequence[str]) -> str:
    """The words on which runs a store knows."""
    if not names:
        return "no run is known yet"
    shown = ", ".join(names[:MAX_NAMED_RUNS])
    return f"known runs: {shown}" + (f" and {len(names) - MAX_NAMED_RUNS} more" if len(names) > MAX_NAMED_RUNS else "")


def failure_of(run: Run) -> str:
    """The sentence on a run that does not learn."""
    return f"the learner of run {run.name!r} stopped: {run.failure}"


def differences(standing: str, wanted: str) -> dict[str, dict[str, Any]]:
    """What differs between two fingerprints, by field: the run's value and the gateway's."""
    old, new = json.loads(standing), json.loads(wanted)
    return {key: {"run": old.get(key), "gateway": new[key]} for key in new if old.get(key) != new[key]}


def changed_words(changed: Mapping[str, Any]) -> str:
    """Return what differs between a run and a gateway as a sentence's part: names and kinds, no digests.

    >>> changed_words({"signal": {"run": "loss", "gateway": "preference"}, "means": {"run": "1f", "gateway": "2e"}})
    'its signal is loss, the gateway has preference; its checkpoint is another one'
    """
    words = []
    first = [key for key in ("pool", "signal", "prior") if key in changed]
    # Another prior or checkpoint brings its own scalars.
    told = {"hyper", *first} if {"origin", "prior"} & changed.keys() else {*first}
    for key in [*first, *(key for key in changed if key not in told)]:
        values = changed[key]
        old, new = values["run"], values["gateway"]
        if key == "founding":
            continue
        if key == "pool":
            words.append(f"its scorers are {', '.join(old or ())}, the gateway has {', '.join(new or ())}")
        elif key in ("origin", "means", "d", "columns"):
            words.append("its checkpoint is another one")
        elif key in ("signal", "prior"):
            words.append(f"its {key} is {old}, the gateway has {new}")
        else:
            words.append(f"its {FOLD_WORDS.get(key, key)} is {old}, the gateway has {new}")
    return "; ".join(dict.fromkeys(words))


def _insist(name: str, terms: Terms, wish: Wish) -> None:
    """Raise RunConflictError if a run's terms are not what was wished for."""
    changed = {}
    if wish.form not in (None, terms.form):
        changed["prior"] = {"run": terms.form.value, "gateway": wish.form}
    if wish.signal not in (None, terms.signal):
        changed["signal"] = {"run": terms.signal.value, "gateway": wish.signal}
    if changed:
        words = " and ".join(f"the {key} {one['run']!r}" for key, one in changed.items())
        wanted = " and ".join(f"{str(one['gateway'])!r}" for one in changed.values())
        raise RunConflictError(
            f"run {name!r} was opened with {words}, which it keeps; the request, its policy or the gateway's setting "
            f"asks for {wanted}: use a new run name for that",
            details={"run": name, "changed": changed},
        )


def _terms_in(fingerprint: str) -> Terms | None:
    """The terms in a fingerprint; None if this version does not know them."""
    with contextlib.suppress(ValueError, KeyError):
        identity = json.loads(fingerprint)
        return Terms(PriorForm(identity["prior"]), Signal(identity["signal"]))
    return None


def _longest(instance: Instance) -> int:
    """Return the characters of the prompt and the longest response; one that is not ASCII counts as three."""
    texts = [instance.prompt, max(instance.responses, key=len)]
    return sum([len(text) if text.isascii() else 3 * len(text) for text in texts])
