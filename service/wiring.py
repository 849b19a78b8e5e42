"""Builds everything from settings: the only module that knows the concrete classes. Called by `service.app`.

Build order: store, arms, encoder, prior, run template, use cases, application. `Gateway.start` and `stop` run in
lifespan.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from starlette.types import ASGIApp

from router_core.checkpoint import Checkpoint
from router_core.encoder.fuse import Fuse, PairEncoder
from router_core.encoder.registry import load_backbone, load_checkpoint_backbone
from router_core.errors import RouterCoreError
from router_core.policies import ScoreScale
from router_core.posterior import FoldSettings
from router_core.prior import (
    CALIBRATED_LOSS_HYPERPARAMETERS,
    NONE_HYPERPARAMETERS,
    PAPER_HYPERPARAMETERS,
    Hyperparameters,
    Prior,
    PriorForm,
    calibrated_prior,
    linucb_prior,
    no_prior,
    paper_prior,
)
from router_core.records import Signal
from service.encoders.load import RemoteOptions, is_remote, load_remote_encoder
from service.encoders.protocol import AwaitedEncoder
from service.errors import ConfigurationError, RunConflictError, StoreUnavailableError
from service.handlers.hot import HotLimits, HotRoutes
from service.handlers.keys import ApiKeys
from service.handlers.trainers import TrainerRoutes, TrainerTexts
from service.pool import ModelEntry, PoolFile
from service.scorers.protocol import Arm, OverLong
from service.scorers.rm.client import TOKENS_PER_REQUEST, ArmConfig, VllmArm
from service.scorers.rm.health import HealthMonitor, HealthPolicy
from service.scorers.rm.render import Rendering, load_rendering
from service.settings import EMBEDDED, OnStoreUnavailable, OnUnknownTemplate, Settings
from service.stores.embedded import EmbeddedStore
from service.stores.protocol import FeedbackStatus, Store
from service.stores.redis import RedisStore
from service.stores.requirements import RequirementsWatch
from service.telemetry import Telemetry
from service.trainers.chat_families import FAMILIES
from service.trainers.chat_format import ChatFormat
from service.trainers.learned import load_chat_format
from service.trainers.templated import Templates
from service.usecases.choose import Chooser
from service.usecases.follow import Learner
from service.usecases.learn import FeedbackService
from service.usecases.normalise import Normaliser
from service.usecases.runs import Run, RunRegistry, RunTemplate
from service.usecases.score import RewardService, ScoreLimits
from service.usecases.shadow import Shadower
from service.usecases.status import ArmStatus, ReplicaStatus, StatusService
from service.usecases.sticky import StickyChoices

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Gateway:
    """One process's context: what lifespan starts and stops, and what handlers call."""

    settings: Settings
    telemetry: Telemetry
    store: Store
    runs: RunRegistry
    scorer: RewardService
    feedback: FeedbackService
    status: StatusService
    shadower: Shadower
    normaliser: Normaliser
    watch: RequirementsWatch
    monitor: HealthMonitor | None
    encoder: AwaitedEncoder | None
    """The encoder over a network; None where contexts are computed here."""
    trainer_texts: TrainerTexts
    arms: tuple[Arm, ...]
    chooser_thread: ThreadPoolExecutor
    learner_thread: ThreadPoolExecutor
    embedded: EmbeddedStore | None
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    async def start(self) -> None:
        """Probe the workers, begin health checks, and begin to load the default run. A wrong worker gets no traffic."""
        await self.watch.check()
        self._spawn(self.watch.run_forever())
        if self.monitor is not None:
            await self.monitor.check_all()
            self.monitor.start()
        if self.encoder is not None:
            await self.encoder.start()
        self._spawn(self._open_default_run())

    async def _open_default_run(self) -> None:
        """Open it as soon as the store answers; readiness is false until then."""
        while True:
            try:
                await self.runs.open(None)
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

        return close

    async def stop(self) -> None:
        """Stop in the order in which things depend on each other; what is being asked in the shadow is waited for."""
        await self.shadower.drain()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.monitor is not None:
            await self.monitor.stop()
        for arm in self.arms:
            if isinstance(arm, VllmArm):
                await arm.close()
        if self.encoder is not None:
            await self.encoder.close()
        await self.store.close()
        self.chooser_thread.shutdown(wait=True)
        self.learner_thread.shutdown(wait=True)
        if self.embedded is not None:
            self.embedded.stop()

    def hot_routes(self, rest: ASGIApp) -> HotRoutes:
        """The hot routes in front of the rest of the application."""
        settings = self.settings
        return HotRoutes(
            scorer=self.scorer,
            feedback=self.feedback,
            telemetry=self.telemetry,
            keys=ApiKeys(settings.api_keys),
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


def build_trainer_texts(settings: Settings, telemetry: Telemetry) -> TrainerTexts:
    """How trainers' texts come apart: the operator's chat templates, and behind them the built-in ones.

    Raises:
        ConfigurationError: a file that holds no chat template, or one that cannot be learned from.
    """
    learned: list[ChatFormat] = []
    for path in settings.chat_templates:
        try:
            learned.append(load_chat_format(path))
        except (ValueError, OSError) as error:
            raise ConfigurationError(
                f"setting chat_templates: {path}: {error}: name a tokenizer's directory or a chat template's file"
            ) from error
    refuse = settings.on_unknown_template is OnUnknownTemplate.REFUSE
    return TrainerTexts(Templates([*learned, *FAMILIES]), refuse_unknown=refuse, telemetry=telemetry)


def build_gateway(
    settings: Settings,
    pool: PoolFile,
    *,
    encoder: PairEncoder | AwaitedEncoder | None = None,
    arms: Sequence[Arm] | None = None,
    store: Store | None = None,
    score_scale: ScoreScale | None = None,
) -> Gateway:
    """Everything, not yet started.

    Args:
        settings: the operator's choices.
        pool: the reward models.
        encoder: instead of the settings' or the checkpoint's; for tests and benchmarks.
        arms: instead of clients of the pool's workers; for tests.
        store: instead of the settings' store; for tests.
        score_scale: of the RMs' raw rewards, for `uwo`, instead of the checkpoint's; with neither, each run learns it
            from the rewards it sees.

    Raises:
        ConfigurationError: settings, pool and checkpoint do not fit each other.
    """
    names = [model.name for model in pool.models]
    checkpoint = _load_checkpoint(settings, names)
    telemetry = Telemetry()
    trainer_texts = build_trainer_texts(settings, telemetry)
    encoder = encoder or load_pair_encoder(settings, checkpoint, telemetry)
    dim = encoder.dim
    awaited = encoder if isinstance(encoder, AwaitedEncoder) else None
    built = (
        tuple(arms) if arms is not None else tuple(build_arm(model, settings, pool.over_long) for model in pool.models)
    )
    origin = checkpoint.digest if checkpoint is not None else f"untrained:{encoder.spec}:{encoder.dim}"
    template = RunTemplate(
        arms=built,
        encoder=encoder,
        priors=lambda form: build_prior(settings, checkpoint, len(names), dim, form),
        form=_form_of(settings, checkpoint),
        score_scale=score_scale or (None if checkpoint is None else checkpoint.scores),
        combination=None if checkpoint is None else checkpoint.combination,
        max_calls=settings.max_calls_per_instance,
        fold_settings=FoldSettings(settings.block_size, settings.refresh_events),
        signal=settings.signal,
        policy=settings.policy,
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
        store, embedded = _open_store(settings)
    chooser_thread = ThreadPoolExecutor(1, thread_name_prefix="choose")
    learner_thread = ThreadPoolExecutor(1, thread_name_prefix="learn")
    runs = RunRegistry(
        template,
        store,
        default=settings.run,
        max_runs=settings.max_runs,
        on_open=lambda run: gateway.follow(run),
        timeout_seconds=settings.request_timeout_seconds,
        default_form=template.default_policy.prior or (None if settings.prior == "auto" else template.form),
    )
    shadower = Shadower(
        store,
        telemetry,
        rate=settings.shadow_rate,
        timeout_seconds=settings.worker_timeout_seconds,
    )
    required = settings.on_store_unavailable is OnStoreUnavailable.REFUSE
    sticky = StickyChoices(store, telemetry, seconds=settings.sticky_seconds, required=required)
    normaliser = Normaliser(store, telemetry, required=required)
    watch = RequirementsWatch(store, allow_unsafe=settings.allow_unsafe_store)
    monitor = _build_monitor([arm for arm in built if isinstance(arm, VllmArm)], settings)
    gateway = Gateway(
        settings=settings,
        telemetry=telemetry,
        store=store,
        runs=runs,
        scorer=RewardService(
            runs,
            Chooser(chooser_thread, telemetry),
            store,
            telemetry,
            _score_limits(settings),
            shadower,
            sticky,
            normaliser,
        ),
        feedback=FeedbackService(runs, store, telemetry, max_batch=settings.max_batch),
        status=StatusService(
            runs,
            store,
            telemetry,
            models=lambda: describe_arms(built),
            executor=learner_thread,
            health_check_errors=lambda: monitor.unexpected_errors if monitor is not None else 0,
            answers_without_store=settings.on_store_unavailable is OnStoreUnavailable.ANSWER,
            scales=normaliser.scales,
            encoder=awaited,
            store_findings=lambda: watch.findings,
        ),
        shadower=shadower,
        normaliser=normaliser,
        watch=watch,
        monitor=monitor,
        encoder=awaited,
        trainer_texts=trainer_texts,
        arms=built,
        chooser_thread=chooser_thread,
        learner_thread=learner_thread,
        embedded=embedded,
    )
    return gateway


def build_prior(
    settings: Settings, checkpoint: Checkpoint | None, n_arms: int, dim: int, form: PriorForm | None = None
) -> Prior:
    """The prior of that form; by default of the one that the settings and the checkpoint name.

    The settings' lambda0, sigma2, v, gamma, adapt, lambda_novel, floor and alarm_rate override those of every form but
    `linucb`, which is LASER's as published.

    Raises:
        ConfigurationError: a prior form that needs a checkpoint, without one.
    """
    form = form or _form_of(settings, checkpoint)
    first, d = (0, dim) if checkpoint is None else checkpoint.columns(form)
    return _prior_of_form(settings, checkpoint, n_arms, d, form).reading(first, dim)


def _prior_of_form(settings: Settings, checkpoint: Checkpoint | None, n_arms: int, d: int, form: PriorForm) -> Prior:
    """Over the d columns of a context that a posterior of this form reads."""
    if form is PriorForm.LINUCB:
        return linucb_prior(n_arms, d)
    if form is PriorForm.NONE:
        return no_prior(n_arms, d, _overridden(NONE_HYPERPARAMETERS, settings))
    if checkpoint is None:
        raise ConfigurationError(
            f"prior is {form.value!r}, which a checkpoint holds, and none is given: train one (`reward-router train`) "
            "and pass --checkpoint, or choose the prior or policy that needs none (`none`, `bayesian:none`)"
        )
    if form is PriorForm.PAPER:
        return paper_prior(checkpoint.bt_embeddings, _overridden(PAPER_HYPERPARAMETERS, settings))
    learned = CALIBRATED_LOSS_HYPERPARAMETERS if settings.signal is Signal.LOSS else checkpoint.hyperparameters
    hyper = _overridden(learned, settings)
    return calibrated_prior(n_arms, d, checkpoint.class_probabilities, hyper, checkpoint.landmarks)


def _form_of(settings: Settings, checkpoint: Checkpoint | None) -> PriorForm:
    """The form of runs whose policy insists on none."""
    if settings.prior != "auto":
        return PriorForm(settings.prior)
    return PriorForm.NONE if checkpoint is None else checkpoint.prior_form


def load_pair_encoder(
    settings: Settings, checkpoint: Checkpoint | None, telemetry: Telemetry
) -> PairEncoder | AwaitedEncoder:
    """The checkpoint's encoder, or the settings' one with an untrained fuse; computed here, or over vLLM.

    Raises:
        ConfigurationError: it cannot be loaded.
    """
    if is_remote(settings.encoder):
        options = RemoteOptions(
            timeout_seconds=settings.encoder_timeout_seconds,
            parallel_requests=settings.encoder_parallel_requests,
            health_interval_seconds=settings.health_interval_seconds,
            api_key=settings.encoder_api_key,
            seed=settings.seed,
        )
        return load_remote_encoder(
            settings.encoder, checkpoint, settings.encoder_reading, options, telemetry.encoder_texts.observe
        )
    try:
        if checkpoint is not None:
            return PairEncoder(load_checkpoint_backbone(checkpoint), checkpoint.fuse)
        backbone = load_backbone(settings.encoder)
        return PairEncoder(backbone, Fuse.identity(backbone.dim))
    except RouterCoreError as error:
        raise ConfigurationError(str(error)) from error


def describe_arms(arms: Sequence[Arm]) -> list[ArmStatus]:
    """The pool as operators see it."""
    out = []
    for arm in arms:
        replicas = []
        if isinstance(arm, VllmArm):
            for replica in arm.snapshots():
                latency = replica.latency_seconds
                replicas.append(
                    ReplicaStatus(
                        url=replica.url,
                        state=replica.state.value,
                        in_flight=replica.in_flight,
                        failures=replica.consecutive_failures,
                        latency_ms=None if latency is None else latency * 1e3,
                        problem=replica.problem,
                        max_model_len=replica.max_model_len,
                    )
                )
        served = arm if isinstance(arm, VllmArm) else None
        out.append(
            ArmStatus(
                name=arm.name,
                available=arm.available,
                rendering=None if served is None else served.rendering.name,
                max_model_len=None if served is None else served.max_model_len,
                over_long=None if served is None else served.config.over_long.value,
                replicas=replicas,
            )
        )
    return out


def _load_checkpoint(settings: Settings, names: list[str]) -> Checkpoint | None:
    if settings.checkpoint is None:
        return None
    try:
        return Checkpoint.load(settings.checkpoint).select_pool(names)
    except RouterCoreError as error:
        raise ConfigurationError(str(error)) from error


def _overridden(hyper: Hyperparameters, settings: Settings) -> Hyperparameters:
    names = ("lambda0", "sigma2", "v", "gamma", "adapt", "lambda_novel", "floor", "alarm_rate")
    given = {name: getattr(settings, name) for name in names}
    if settings.lambda0 is not None and settings.adapt is None:
        given["adapt"] = False
    return replace(hyper, **{name: value for name, value in given.items() if value is not None})


def build_arm(model: ModelEntry, settings: Settings, over_long: OverLong = OverLong.SKIP) -> VllmArm:
    """The client of one RM's workers. The caller closes it.

    Raises:
        ConfigurationError: no `urls`, or a chat template, tokenizer or URL that cannot be used.
    """
    if not model.urls:
        raise ConfigurationError(
            f"model {model.name!r} has no `urls` in the pool file: say where it is served, or let "
            "`reward-router up` start it"
        )
    try:
        rendering, fallback = _load_rendering(model)
    except (ValueError, OSError) as error:
        what = "rendering: tokens" if model.rendering == "tokens" else f"chat template {model.chat_template}"
        raise ConfigurationError(f"model {model.name!r}: {what}: {error}") from error
    return VllmArm(
        ArmConfig(
            name=model.name,
            urls=model.urls,
            model=model.served_name,
            rendering=rendering,
            fallback=fallback,
            max_in_flight=model.max_in_flight or settings.worker_max_in_flight,
            tokens_per_request=model.tokens_per_request or TOKENS_PER_REQUEST,
            max_model_len=model.max_model_len,
            over_long=over_long,
            attempt_timeout_seconds=settings.worker_timeout_seconds,
            api_key=model.api_key,
            score_scale=model.score_scale,
            score_shift=model.score_shift,
            reward_limit=model.reward_limit,
        )
    )


def _load_rendering(model: ModelEntry) -> tuple[Rendering, Rendering | None]:
    """The model's rendering, and the one for workers that read another text than that; `tokenizers` is imported only
    where token ids are to be sent.
    """
    if model.rendering in ("messages", "template"):
        return load_rendering(model.rendering, model.chat_template), None
    from service.scorers.rm.tokens import load_token_rendering

    # The template `plain` is the default of the field; a model that is given ids has one of its own.
    template = None if model.chat_template == "plain" else model.chat_template
    # A tokenizer of its own name has revisions of its own.
    revision = None if model.tokenizer else model.revision
    try:
        rendering = load_token_rendering(model.tokenizer or str(model.source), template, revision=revision)
    except (ValueError, OSError) as error:
        if model.rendering == "tokens":
            raise
        fields = {"model": model.name, "rendering": "messages", "reason": str(error)}
        logger.warning("the reward model's tokenizer cannot be had", extra={"fields": fields})
        return load_rendering("messages"), None
    return rendering, load_rendering("messages") if model.rendering == "auto" else None


def _build_monitor(arms: Sequence[VllmArm], settings: Settings) -> HealthMonitor | None:
    if not arms:
        return None
    policy = HealthPolicy(settings.health_interval_seconds, settings.worker_timeout_seconds)
    return HealthMonitor(arms, policy, np.random.default_rng(settings.seed))


def _open_store(settings: Settings) -> tuple[Store, EmbeddedStore | None]:
    embedded = None
    url = settings.store_url
    if url == EMBEDDED:
        embedded = EmbeddedStore(settings.data_dir, fsync=settings.store_fsync)
        embedded.start()
        url = embedded.url
    try:
        store = RedisStore(
            url,
            window_seconds=settings.decision_ttl_seconds,
            timeout_seconds=settings.store_timeout_seconds,
            replicas=settings.store_replicas,
        )
    except ConfigurationError:
        if embedded is not None:
            embedded.stop()
        raise
    return store, embedded


def _score_limits(settings: Settings) -> ScoreLimits:
    return ScoreLimits(
        max_responses=settings.max_responses,
        max_text_chars=settings.max_text_chars,
        max_batch=settings.max_batch,
        request_timeout_seconds=settings.request_timeout_seconds,
        worker_timeout_seconds=settings.worker_timeout_seconds,
        on_store_unavailable=settings.on_store_unavailable,
        content_keys=settings.content_keys,
        normalize=settings.normalize,
        piece_responses=settings.batch_piece_responses,
    )
