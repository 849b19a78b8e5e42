"""One gateway: its parts, built in order and put together, and how they start and stop. Called by `service.app`.

Each part is built beside where it lives: `priors`, `encoders.build`, `scorers.registry`, `stores.build`.

Build order: store, arms, encoder, prior, run template, use cases, application. `Gateway.start` and `stop` run in
lifespan.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp

from router_core.encoder.fuse import PairEncoder
from router_core.policies import ScoreScale
from router_core.posterior import FoldSettings
from router_core.records import Signal
from service.audit_entry import STACKED
from service.encoders.build import load_pair_encoder
from service.encoders.protocol import AwaitedEncoder
from service.errors import ConfigurationError, RunConflictError, StoreUnavailableError
from service.handlers.hot import HotLimits, HotRoutes
from service.handlers.templates import build_trainer_texts
from service.handlers.trainers import TrainerRoutes, TrainerTexts
from service.keys.ring import KeyRing
from service.pool import PoolFile
from service.priors import build_prior, form_of, load_checkpoint
from service.scorers.protocol import Scorer
from service.scorers.registry import build_scorer
from service.settings import EMBEDDED, OnStoreUnavailable, Settings
from service.stores.build import open_store
from service.stores.embedded import EmbeddedStore
from service.stores.protocol import FeedbackStatus, NameNotFreeError, Store
from service.stores.requirements import RequirementsWatch
from service.telemetry import Telemetry
from service.usecases.audit import Auditor, AuditPlan, Referee
from service.usecases.audit_choice import AuditChooser
from service.usecases.choose import Chooser
from service.usecases.follow import Learner
from service.usecases.hold import NameHolder
from service.usecases.learn import FeedbackService
from service.usecases.normalise import Normaliser
from service.usecases.people import PeopleService
from service.usecases.report import Reporter
from service.usecases.runs import NAME_POLL_SECONDS, Run, RunRegistry, RunTemplate, Wish
from service.usecases.score import RewardService, limits_of
from service.usecases.shadow import Shadower
from service.usecases.status import StatusService
from service.usecases.sticky import StickyChoices
from service.usecases.watch import Watcher

if TYPE_CHECKING:
    # OpenTelemetry is optional, and not imported where it is off.
    from service.tracing import Tracing

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Gateway:
    """One process's context: what lifespan starts and stops, and what handlers call."""

    settings: Settings
    telemetry: Telemetry
    keys: KeyRing
    store: Store
    runs: RunRegistry
    scorer: RewardService
    feedback: FeedbackService
    status: StatusService
    people: PeopleService
    reporter: Reporter
    watcher: Watcher
    shadower: Shadower
    auditor: Auditor | None
    """Lets referees look at chosen decisions; None where the pool file has no `audit`."""
    audits: AuditChooser | None
    normaliser: Normaliser
    tracing: Tracing | None
    """Wraps the parts in spans; None where it is off."""
    watch: RequirementsWatch
    encoder: AwaitedEncoder | None
    """The encoder over a network; None where contexts are computed here."""
    trainer_texts: TrainerTexts
    arms: tuple[Scorer, ...]
    referees: tuple[Scorer, ...]
    """Scorers that are asked about audits only."""
    chooser_thread: ThreadPoolExecutor
    learner_thread: ThreadPoolExecutor
    embedded: EmbeddedStore | None
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    async def start(self) -> None:
        """Probe the workers, begin health checks, and begin to load the default run. A wrong worker gets no traffic."""
        await self.watch.check()
        self._spawn(self.watch.run_forever())
        self._spawn(self.keys.follow_forever())
        scorers = (*self.arms, *self.referees)
        await asyncio.gather(*(scorer.check() for scorer in scorers))
        for scorer in scorers:
            scorer.start()
        if self.encoder is not None:
            await self.encoder.start()
        self._spawn(self._open_default_run())
        self._spawn(self.watcher.run_forever())
        self._spawn(NameHolder(self.runs.runs, self.store).run_forever())
        if self.auditor is not None:
            self._spawn(self.auditor.run_forever())
        if self.settings.workers > 1:
            self._spawn(self.status.tell_forever())

    async def _open_default_run(self) -> None:
        """Open it as soon as the store answers; readiness is false until then."""
        while True:
            try:
                await self.runs.open(None)
            except NameNotFreeError as error:
                logger.info("default run waits for its name", extra={"fields": {"reason": error.message}})
                await asyncio.sleep(min(error.seconds, NAME_POLL_SECONDS))
            except (StoreUnavailableError, ConfigurationError) as error:
                logger.warning("store away, default run waits", extra={"fields": {"error": str(error)}})
                await asyncio.sleep(0.5)
            except RunConflictError as error:
                logger.error("default run refused", extra={"fields": {"error": error.message, **error.details}})
                return
            else:
                return

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("background task failed", exc_info=task.exception())

    def follow(self, run: Run) -> Callable[[], None]:
        """Start the learner of an opened run; what is returned ends it and forgets the run's metrics."""
        template = run.template
        self.telemetry.open_run(run.name, template.default_policy.name, template.pool, [*FeedbackStatus, "invalid"])
        learner = Learner(
            run,
            self.store,
            self.learner_thread,
            self.telemetry,
            keep_events=self.settings.log_keep_events,
            replicated=self.settings.store_replicas > 0,
        )
        task = self._spawn(learner.run_forever())

        def close() -> None:
            task.cancel()
            self.telemetry.forget_run(run.name)
            self.normaliser.forget(run.name)
            self.reporter.forget(run.name)
            self.watcher.forget(run.name)
            if self.audits is not None:
                self.audits.forget(run.name)

        return close

    async def stop(self) -> None:
        """Stop in the order in which things depend on each other; what is being asked in the shadow is waited for."""
        await self.shadower.drain()
        self.telemetry.tell_watched()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.gather(*(scorer.close() for scorer in (*self.arms, *self.referees)))
        if self.encoder is not None:
            await self.encoder.close()
        await self.store.close()
        self.chooser_thread.shutdown(wait=True)
        self.learner_thread.shutdown(wait=True)
        if self.embedded is not None:
            self.embedded.stop()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)

    def hot_routes(self, rest: ASGIApp) -> HotRoutes:
        """The hot routes in front of the rest of the application."""
        settings = self.settings
        return HotRoutes(
            scorer=self.scorer,
            feedback=self.feedback,
            people=self.people,
            telemetry=self.telemetry,
            keys=self.keys,
            limits=HotLimits(settings.max_body_bytes, settings.max_in_flight),
            rest=rest,
            trainers=TrainerRoutes(
                self.scorer,
                self.feedback,
                pool=tuple(arm.name for arm in self.arms),
                patience_seconds=settings.trainer_patience_seconds,
                texts=self.trainer_texts,
            ).routes(),
        )


def load_tracing(settings: Settings) -> Tracing | None:
    """Return what wraps the parts in spans; None where the setting `tracing` is off.

    Raises:
        ConfigurationError: OpenTelemetry is not installed.
    """
    if not settings.tracing:
        return None
    try:
        from service.tracing import open_tracing
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise ConfigurationError(
            f"tracing is on, and {error.name!r} is missing: pip install 'reward-router[tracing]', or set "
            "tracing to false"
        ) from error
    return open_tracing(package_version())


def package_version() -> str:
    """The installed version, or `0+unknown` in a source tree that is not installed."""
    try:
        return version("reward-router")
    except PackageNotFoundError:
        return "0+unknown"


def default_policy(settings: Settings, pool: PoolFile) -> str:
    """Return the policy of requests that name none: the setting where it is given, else the pool's `combine`."""
    if "policy" in settings.model_fields_set or pool.combine in (None, "route"):
        return settings.policy
    return str(pool.combine)


def build_referees(
    settings: Settings, pool: PoolFile, arms: Sequence[Scorer]
) -> tuple[tuple[Scorer, ...], AuditPlan | None]:
    """Return the scorers that are asked about audits only, and how decisions are audited.

    Raises:
        ConfigurationError: a referee cannot be used, or the runs' signal says nothing of a referee's verdicts.
    """
    audit = pool.audit
    if audit is None:
        return (), None
    if settings.signal is not Signal.PREFERENCE:
        raise ConfigurationError(
            f"the pool file has an `audit`, and signal is {settings.signal.value!r}: a referee's verdict is a "
            "preference; set the signal to 'preference', or leave `audit` out"
        )
    built = {entry.name: build_scorer(entry, settings, pool) for entry in pool.referees}
    names = [arm.name for arm in arms]
    cheapest = min(model.price for model in pool.models)
    price = {entry.name: entry.price / cheapest for entry in pool.scorers}
    referees = tuple(
        Referee(name, None, None, 0.0)
        if name == STACKED and name not in price
        else Referee(
            name,
            built.get(name) or arms[names.index(name)],
            names.index(name) if name in names else None,
            price[name],
        )
        for name in audit.referee
    )
    plan = AuditPlan(referees, audit.ask == "all", audit.budget, audit.trust, audit.keep)
    return tuple(built.values()), plan


def build_gateway(
    settings: Settings,
    pool: PoolFile,
    *,
    encoder: PairEncoder | AwaitedEncoder | None = None,
    arms: Sequence[Scorer] | None = None,
    store: Store | None = None,
    score_scale: ScoreScale | None = None,
    tracing: Tracing | None = None,
) -> Gateway:
    """Everything, not yet started.

    Args:
        settings: the operator's choices.
        pool: the reward models.
        encoder: instead of the settings' or the checkpoint's; for tests and benchmarks.
        arms: instead of clients of the pool's workers; for tests.
        store: instead of the settings' store; for tests.
        score_scale: of the RMs' raw rewards, for `uwo`, instead of the checkpoint's; with neither, a run's score log
            tells it.
        tracing: instead of the settings'; for tests.

    Raises:
        ConfigurationError: settings, pool and checkpoint do not fit each other.
    """
    names = [model.name for model in pool.models]
    checkpoint = load_checkpoint(settings, names)
    telemetry = Telemetry(shared=settings.workers > 1)
    trainer_texts = build_trainer_texts(settings, telemetry)
    encoder = encoder or load_pair_encoder(settings, checkpoint, telemetry)
    dim = encoder.dim
    awaited = encoder if isinstance(encoder, AwaitedEncoder) else None
    built = tuple(arms) if arms is not None else tuple(build_scorer(model, settings, pool) for model in pool.models)
    tracing = tracing or load_tracing(settings)
    if tracing is not None:
        built = tuple(map(tracing.scorer, built))
        if awaited is not None:
            awaited.intercept(tracing.exchange)
    origin = checkpoint.digest if checkpoint is not None else f"untrained:{encoder.spec}:{encoder.dim}"
    template = RunTemplate(
        arms=built,
        encoder=encoder,
        priors=lambda terms: build_prior(settings, checkpoint, len(names), dim, terms.form, terms.signal),
        form=form_of(settings, checkpoint),
        score_scale=score_scale or (None if checkpoint is None else checkpoint.scores),
        combination=None if checkpoint is None else checkpoint.combination,
        prices=[model.price for model in pool.models],
        max_calls=settings.max_calls_per_instance,
        parallel_calls=settings.parallel_calls,
        max_rounds=settings.max_rounds_per_instance,
        fold_settings=FoldSettings(settings.block_size, settings.refresh_events),
        signal=settings.signal,
        policy=default_policy(settings, pool),
        origin=origin,
        blas_threads=settings.blas_threads,
        seed=settings.seed,
    )
    if settings.prior not in ("auto", template.form.value):
        raise ConfigurationError(
            f"prior is {settings.prior!r}, and the policy {settings.policy!r} insists on {template.form.value!r}: "
            "leave the prior at `auto`, or choose another policy"
        )
    embedded = None
    if store is None:
        store, embedded = open_store(settings)
    if tracing is not None:
        store = tracing.store(store)
    chooser_thread = ThreadPoolExecutor(1, thread_name_prefix="choose")
    chooser = Chooser(chooser_thread, telemetry)
    if tracing is not None:
        chooser = tracing.chooser(chooser)
    learner_thread = ThreadPoolExecutor(1, thread_name_prefix="learn")
    runs = RunRegistry(
        template,
        store,
        default=settings.run,
        max_runs=settings.max_runs,
        on_open=lambda run: gateway.follow(run),
        timeout_seconds=settings.request_timeout_seconds,
        default_wish=Wish(
            template.default_policy.prior or (None if settings.prior == "auto" else template.form),
            settings.signal if "signal" in settings.model_fields_set else None,
        ),
        # An embedded store serves this gateway's own processes only.
        free_seconds=0.0 if settings.store_url == EMBEDDED else settings.new_run_wait_seconds,
    )
    shadower = Shadower(
        store,
        telemetry,
        template.prices,
        rate=settings.shadow_rate,
        timeout_seconds=settings.worker_timeout_seconds,
    )
    referees, audit_plan = build_referees(settings, pool, built)
    audits = None
    if pool.audit is not None and audit_plan is not None:
        audits = AuditChooser(store, pool.audit.plan, sticky_seconds=settings.sticky_seconds)
    auditor, idle = None, asyncio.Event()
    if audit_plan is not None:
        auditor = Auditor(
            store,
            lambda: runs.runs,
            built,
            template.prices,
            audit_plan,
            telemetry,
            timeout_seconds=settings.worker_timeout_seconds,
            idle=idle,
        )
    reporter = Reporter(runs, store, telemetry)
    required = settings.on_store_unavailable is OnStoreUnavailable.REFUSE
    sticky = StickyChoices(store, telemetry, seconds=settings.sticky_seconds, required=required)
    normaliser = Normaliser(store, telemetry, required=required)
    watch = RequirementsWatch(store, allow_unsafe=settings.allow_unsafe_store)
    status = StatusService(
        runs,
        store,
        telemetry,
        models=lambda: [scorer.status() for scorer in built],
        referees=lambda: [scorer.status() for scorer in referees],
        tell_audits=None if auditor is None else reporter.tell,
        executor=learner_thread,
        health_check_errors=lambda: sum(scorer.unexpected_errors for scorer in (*built, *referees)),
        answers_without_store=settings.on_store_unavailable is OnStoreUnavailable.ANSWER,
        scales=normaliser.scales,
        encoder=awaited,
        store_findings=lambda: watch.findings,
        store_refused=lambda: bool(watch.verdict.refusals),
    )
    watcher = Watcher(
        runs,
        status,
        reporter,
        store,
        audits=auditor is not None,
        texts=settings.console_texts,
        viewers=settings.console_viewers,
        executor=learner_thread,
    )
    gateway = Gateway(
        settings=settings,
        telemetry=telemetry,
        keys=KeyRing(settings.api_keys, settings.keys_file),
        store=store,
        runs=runs,
        scorer=RewardService(
            runs,
            chooser,
            store,
            telemetry,
            limits_of(settings),
            shadower,
            sticky,
            normaliser,
            audits,
            (lambda: None) if auditor is None else auditor.notify,
            idle,
        ),
        feedback=FeedbackService(runs, store, telemetry, max_batch=settings.max_batch),
        status=status,
        people=PeopleService(runs, store, telemetry),
        reporter=reporter,
        watcher=watcher,
        shadower=shadower,
        auditor=auditor,
        audits=audits,
        normaliser=normaliser,
        tracing=tracing,
        watch=watch,
        encoder=awaited,
        trainer_texts=trainer_texts,
        arms=built,
        referees=referees,
        chooser_thread=chooser_thread,
        learner_thread=learner_thread,
        embedded=embedded,
    )
    return gateway
