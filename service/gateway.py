"""One gateway: its parts, built in order and put together, and how they start and stop. Called by `service.app`.

Each part is built beside where it lives: `priors`, `encoders.build`, `scorers.registry`, `stores.build`.

Build order: store, arms, encoder, prior, run template, use cases, application. `Gateway.start` and `stop` run in
lifespan.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp

from router_core.encoder.fuse import PairEncoder
from router_core.policies import ScoreScale
from service.assembly import Assembly, scorers_of
from service.encoders.build import load_pair_encoder
from service.encoders.protocol import AwaitedEncoder
from service.errors import (
    ActsUnavailableError,
    ArchivedError,
    ConfigurationError,
    RunConflictError,
    StoreUnavailableError,
)
from service.handlers.hot import HotLimits, HotRoutes
from service.handlers.templates import build_trainer_texts
from service.handlers.trainers import TrainerRoutes, TrainerTexts
from service.keys.acts import ActLog
from service.keys.ring import KeyRing
from service.pool import PoolFile, with_audit
from service.priors import load_checkpoint
from service.scorers.protocol import Scorer
from service.scorers.roster import Roster
from service.settings import EMBEDDED, OnStoreUnavailable, Settings
from service.specification import pool_fields
from service.stores.build import open_store
from service.stores.embedded import EmbeddedStore
from service.stores.protocol import FeedbackStatus, NameNotFreeError, Store
from service.stores.requirements import RequirementsWatch
from service.telemetry import Telemetry
from service.usecases.audit import Auditor
from service.usecases.audit_choice import AuditChooser
from service.usecases.choose import Chooser
from service.usecases.follow import Learner
from service.usecases.hold import NameHolder
from service.usecases.learn import FeedbackService
from service.usecases.normalise import Normaliser
from service.usecases.people import PeopleService
from service.usecases.pools import PoolService
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

LET_GO_SECONDS = 5.0
"""Pause between two looks at which scorers are still asked."""


@dataclass(slots=True)
class Gateway:
    """One process's context: what lifespan starts and stops, and what handlers call."""

    settings: Settings
    telemetry: Telemetry
    keys: KeyRing
    acts: ActLog
    store: Store
    runs: RunRegistry
    scorer: RewardService
    feedback: FeedbackService
    status: StatusService
    people: PeopleService
    reporter: Reporter
    watcher: Watcher
    shadower: Shadower
    auditor: Auditor
    audits: AuditChooser
    pools: PoolService
    normaliser: Normaliser
    tracing: Tracing | None
    """Wraps the parts in spans; None where it is off."""
    watch: RequirementsWatch
    encoder: AwaitedEncoder | None
    """The encoder over a network; None where contexts are computed here."""
    trainer_texts: TrainerTexts
    assembly: Assembly
    chooser_thread: ThreadPoolExecutor
    learner_thread: ThreadPoolExecutor
    embedded: EmbeddedStore | None
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    failed_tasks: list[str] = field(default_factory=list)
    """Background tasks that ended by a fault of ours; shared with `status`."""

    async def start(self) -> None:
        """Probe the workers, begin health checks, and begin to load the default run. A wrong worker gets no traffic."""
        await self.watch.check()
        self._spawn("store watch", self.watch.run_forever())
        self._spawn("keys file", self.keys.follow_forever(self._keys_changed))
        await self.assembly.begin(self.runs.template)
        self._spawn("old scorers", self._let_go_forever())
        if self.encoder is not None:
            await self.encoder.start()
        self._spawn("default run", self._open_default_run())
        self._spawn("run names", NameHolder(self.runs.runs, self.store).run_forever())
        self._spawn("auditor", self.auditor.run_forever())
        self._spawn("console", self.watcher.run_forever())
        if self.settings.workers > 1:
            self._spawn("metrics", self.status.tell_forever())

    async def let_go(self, now: float) -> None:
        """Forget pools that no open run has any more, and close connections to scorers that nobody asks.

        Args:
            now: monotonic time.
        """
        used = [*dict.fromkeys([self.runs.template, *(run.template for run in self.runs.runs.values())])]
        self.assembly.keep(used)
        await self.assembly.roster.let_go([scorer for template in used for scorer in scorers_of(template)], now)

    async def _let_go_forever(self) -> None:
        while True:
            await asyncio.sleep(LET_GO_SECONDS)
            await self.let_go(time.monotonic())

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
            except (RunConflictError, ArchivedError) as error:
                logger.error("default run refused", extra={"fields": {"error": error.message, **error.details}})
                return
            else:
                return

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _keys_changed(self, changes: Sequence[str]) -> None:
        with contextlib.suppress(ActsUnavailableError):
            self.acts.write("keys file taken", changes=list(changes))

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            name = task.get_name()
            self.failed_tasks.append(name)
            self.telemetry.background_failures.labels(name).inc()
            logger.error("background task failed", extra={"fields": {"task": name}}, exc_info=task.exception())

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
            templates=self.assembly,
            on_pool=self._pool_changed,
            on_archived=lambda ended: self.runs.close(ended.name),
        )
        task = self._spawn("learner", learner.run_forever())

        def close() -> None:
            task.cancel()
            self.telemetry.forget_run(run.name)
            self.normaliser.forget(run.name)
            self.reporter.forget(run.name)
            self.watcher.forget(run.name)
            self.audits.forget(run.name)

        return close

    def _pool_changed(self, run: Run) -> None:
        """Say what a run's pool is now; the metrics of scorers that it asks no more end."""
        template = run.template
        names = [template.pool[k] for k in template.asked]
        self.telemetry.open_run(run.name, template.default_policy.name, names, [*FeedbackStatus, "invalid"])
        self.telemetry.forget_scorers(run.name, [template.pool[k] for k, gone in enumerate(template.retired) if gone])
        self.runs.propose(run)
        if run.ready.is_set():
            logger.info("pool changed", extra={"fields": {"run": run.name, "scorers": names}})

    async def stop(self) -> None:
        """Stop in the order in which things depend on each other; what is being asked in the shadow is waited for."""
        await self.shadower.drain()
        self.telemetry.tell_watched()
        await self.watcher.tell()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.assembly.roster.close()
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
                pool=lambda run: self.runs.template_of(run).pool,
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
    pool = pool if settings.audit is None else with_audit(pool, settings.audit)
    checkpoint = load_checkpoint(settings)
    telemetry = Telemetry(shared=settings.workers > 1)
    trainer_texts = build_trainer_texts(settings, telemetry)
    encoder = encoder or load_pair_encoder(settings, checkpoint, telemetry)
    awaited = encoder if isinstance(encoder, AwaitedEncoder) else None
    tracing = tracing or load_tracing(settings)
    if tracing is not None and awaited is not None:
        awaited.intercept(tracing.exchange)
    wrap: Callable[[Scorer], Scorer] = (lambda scorer: scorer) if tracing is None else tracing.scorer
    given = {arm.name: wrap(arm) for arm in arms or ()}
    grace = settings.request_timeout_seconds + settings.worker_timeout_seconds
    roster = Roster(settings, pool, given=given, wrap=wrap, grace_seconds=grace)
    for entry in pool.scorers:
        if entry.name not in given:
            # What cannot be asked at all is said at once, and not when a run asks it.
            roster.keep(entry, roster.build(entry, pool_fields(pool)), pool_fields(pool))
    assembly = Assembly(settings, pool, checkpoint, encoder, roster, score_scale=score_scale)
    template = assembly.template(assembly.own)
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
        templates=assembly,
    )
    shadower = Shadower(
        store,
        telemetry,
        rate=settings.shadow_rate,
        timeout_seconds=settings.worker_timeout_seconds,
    )
    audits, idle = AuditChooser(store, sticky_seconds=settings.sticky_seconds), asyncio.Event()
    auditor = Auditor(store, lambda: runs.runs, telemetry, timeout_seconds=settings.worker_timeout_seconds, idle=idle)
    reporter = Reporter(runs, store, telemetry)
    required = settings.on_store_unavailable is OnStoreUnavailable.REFUSE
    sticky = StickyChoices(store, telemetry, seconds=settings.sticky_seconds, required=required)
    normaliser = Normaliser(store, telemetry, required=required)
    watch = RequirementsWatch(store, allow_unsafe=settings.allow_unsafe_store)
    status = StatusService(
        runs,
        store,
        telemetry,
        models=lambda: [scorer.status() for scorer in models_of(runs)],
        referees=lambda: [scorer.status() for scorer in referees_of(runs)],
        tell_audits=reporter.tell,
        executor=learner_thread,
        failed_tasks=lambda: gateway.failed_tasks,
        health_check_errors=lambda: sum(scorer.unexpected_errors for scorer in roster.scorers),
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
        texts=settings.console_texts,
        viewers=settings.console_viewers,
        executor=learner_thread,
    )
    gateway = Gateway(
        settings=settings,
        telemetry=telemetry,
        keys=KeyRing(settings.api_keys, settings.keys_file),
        acts=ActLog(settings.acts_file),
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
            auditor.notify,
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
        assembly=assembly,
        pools=PoolService(runs, store, assembly),
        chooser_thread=chooser_thread,
        learner_thread=learner_thread,
        embedded=embedded,
    )
    return gateway


def _templates_of(runs: RunRegistry) -> list[RunTemplate]:
    """The default run's pool, or that of new runs, then those of the other open runs."""
    others = [run.template for run in runs.runs.values()]
    return [*dict.fromkeys([runs.template_of(None), *others])]


def models_of(runs: RunRegistry) -> list[Scorer]:
    """Every scorer that an open run asks, or a new one would."""
    return [*dict.fromkeys(template.arms[k] for template in _templates_of(runs) for k in template.asked)]


def referees_of(runs: RunRegistry) -> list[Scorer]:
    """Every scorer that is asked about audits only."""
    found = [template.audits.apart for template in _templates_of(runs) if template.audits is not None]
    return [*dict.fromkeys(scorer for apart in found for scorer in apart)]
