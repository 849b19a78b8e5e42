"""Status: what operators ask of a gateway. Reads, never changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor

import msgspec
import numpy as np
from pydantic import BaseModel, Field

from router_core.moments import ScoreScales
from router_core.policies.bayesian import posterior_beliefs
from service.encoders.protocol import AwaitedEncoder, ServerStatus
from service.errors import (
    ArchivedError,
    NotReadyError,
    RunConflictError,
    ServiceError,
    StoreUnavailableError,
    ValidationError,
)
from service.keys.access import EVERYTHING, Access
from service.scorers.status import ScorerStatus
from service.stores.acts import is_archived
from service.stores.protocol import Store
from service.telemetry import Telemetry
from service.usecases.pools import standing_pool
from service.usecases.runs import Run, RunRegistry, failure_of

TELL_SECONDS = 5.0
"""How old what one process says of another may be."""


class ArmLearned(BaseModel):
    """What a run knows of one RM."""

    model: str = Field(description="Name of the RM.")
    feedbacks: int = Field(description="Feedbacks that taught of it.")
    mean_reward: float | None = Field(description="Mean learned reward; null without feedback.")
    score_mean: float | None = Field(description="Running mean of its raw scores; null where none was normalised here.")
    score_sd: float | None = Field(description="Running sd of its raw scores; null where it is not known.")
    alarms: int = Field(description="How often it was found to have changed, and learned afresh.")
    mean_norm: float = Field(description="Length of the posterior mean.")
    sd: float = Field(description="Root mean variance of a weight: how unsure the router still is.")


class PosteriorStatus(BaseModel):
    """One run's posterior."""

    run: str = Field(description="Name of the run.")
    version: int = Field(description="Events it has learned from.")
    last_event_id: str = Field(description="Id of the last of them in the run's log.")
    digest: str = Field(description="sha256 over every number of it.")
    prior: str = Field(description="Form of the prior: calibrated, paper, none or linucb.")
    policy: str = Field(description="Policy of requests that name none.")
    signal: str = Field(description="Kind of feedback that it learns from: preference, loss or reward.")
    dim: int = Field(description="Length of a context.")
    drift: float = Field(description="Largest entry of ΛΣ − I at the last refresh.")
    lambda0: float = Field(description="Prior precision λ₀ now: how far the offline stage is trusted.")
    novel_share: float | None = Field(
        description="Share of its contexts that are unlike the checkpoint's training pairs; about 0.25 on texts of the "
        "same kind. Null before the first one, and where nothing depends on it."
    )
    log_appended: int = Field(description="Events ever appended to the run's log.")
    scale_version: int | None = Field(description="Entries of the score log folded here; null without `normalize`.")
    models: list[ArmLearned] = Field(description="What is known of each RM, in the order of the pool.")


class RunStatus(BaseModel):
    """One run of the store."""

    run: str = Field(description="Its name.")
    events: int = Field(description="Events ever appended to its log.")
    signal: str | None = Field(description="Kind of feedback that it learns from.")
    prior: str | None = Field(description="Form of its prior.")
    pool: list[str] = Field(description="The scorers that it asks now, in arm order.")
    archived: bool = Field(description="Closed by an operator: neither asked nor taught.")


async def stored_runs(store: Store, names: Sequence[str]) -> list[RunStatus]:
    """Return what a store holds of these runs; those that it has lost are left out.

    Raises:
        StoreUnavailableError: the store does not answer.
    """
    found = []
    for name in names:
        check, acts = await store.check_run(name, ()), await store.acts(name)
        if check.identity is None:
            continue
        try:
            identity, standing = json.loads(check.identity.fingerprint), standing_pool(check.identity.fingerprint, acts)
        except (ValueError, msgspec.MsgspecError, ValidationError):
            # Of another program, or another time: it is there, and no more is known of it.
            identity, standing = {}, None
        pool = identity.get("pool") or () if standing is None else [arm.name for arm in standing.asked]
        found.append(
            RunStatus(
                run=name,
                events=check.status.appended,
                signal=identity.get("signal"),
                prior=identity.get("prior"),
                pool=list(pool),
                archived=is_archived(acts),
            )
        )
    return found


class StatusService:
    """The use case behind the routes for operators.

    Args:
        runs: the registry.
        store: asked whether it answers.
        telemetry: rendered.
        models: describes the pool's workers.
        referees: describes the workers of scorers that are asked about audits only.
        failed_tasks: names of background tasks that ended by a fault of ours.
        tell_audits: sets the gauges of a run's audits; None where there are none.
        executor: where digests are computed.
        health_check_errors: health checks that failed by a fault of ours, so far.
        answers_without_store: whether `/reward` answers while the store is away.
        scales: what is known here of a run's raw scores.
        encoder: the encoder over a network; None where contexts are computed here.
        store_findings: what is wrong with the store: sentences with a remedy.
        store_refused: returns True while nothing is saved for that.
    """

    def __init__(
        self,
        runs: RunRegistry,
        store: Store,
        telemetry: Telemetry,
        *,
        models: Callable[[], list[ScorerStatus]],
        executor: Executor,
        health_check_errors: Callable[[], int],
        answers_without_store: bool,
        scales: Callable[[str], ScoreScales | None],
        encoder: AwaitedEncoder | None = None,
        store_findings: Callable[[], Sequence[str]] = tuple,
        store_refused: Callable[[], bool] = lambda: False,
        referees: Callable[[], list[ScorerStatus]] = list,
        failed_tasks: Callable[[], Sequence[str]] = tuple,
        tell_audits: Callable[[Run], Awaitable[None]] | None = None,
    ) -> None:
        self._runs = runs
        self._store = store
        self._telemetry = telemetry
        self.models = models
        self.referees = referees
        self._tell_audits = tell_audits
        self.failed_tasks = failed_tasks
        self._executor = executor
        self._health_check_errors = health_check_errors
        self._answers_without_store = answers_without_store
        self._scales = scales
        self._encoder = encoder
        self.store_findings = store_findings
        self._store_refused = store_refused

    def encoder_servers(self) -> list[ServerStatus]:
        """Return the encoder's servers; none where contexts are computed here."""
        return [] if self._encoder is None else [*self._encoder.servers()]

    async def render_metrics(self) -> bytes:
        """Prometheus' text format, with the workers' states, the logs' lag and the posteriors as they are now."""
        await self.tell_metrics()
        return self._telemetry.render()

    async def tell_forever(self) -> None:
        """Set what a scrape would set again and again, until cancelled: another process may answer the scrape."""
        while True:
            await self.tell_metrics()
            self._telemetry.tell_watched()
            await asyncio.sleep(TELL_SECONDS)

    async def tell_metrics(self) -> None:
        """Set the gauges of the workers' states, the logs' lag and the posteriors.

        A lag that cannot be had, because the store is away, keeps its last value and counts as a store error.
        """
        runs = list(self._runs.runs.values())
        self._telemetry.store_up.set(await self._measure_lags(runs))
        if self._tell_audits is not None:
            for run in [run for run in runs if run.template.audits is not None]:
                try:
                    await self._tell_audits(run)
                except ServiceError:
                    self._telemetry.store_errors.labels("report").inc()
        expected = await asyncio.get_running_loop().run_in_executor(self._executor, _expectations, runs)
        for run, means, sds in expected:
            if run.name not in self._runs.runs:
                continue
            # The pool may have grown since; retired scorers are shown no more.
            for model, mean, sd, retired in zip(run.template.pool, means, sds, run.template.retired, strict=False):
                if retired:
                    continue
                self._telemetry.posterior_mean.labels(run.name, model).set(mean)
                self._telemetry.posterior_sd.labels(run.name, model).set(sd)
        for arm in [*self.models(), *self.referees()]:
            for replica in arm.replicas:
                self._telemetry.worker_up.labels(arm.name, replica.url).set(replica.state == "closed")
                self._telemetry.worker_in_flight.labels(arm.name, replica.url).set(replica.in_flight)
                if replica.latency_ms is not None:
                    self._telemetry.worker_latency.labels(arm.name, replica.url).set(replica.latency_ms / 1e3)
            self._tell_judging(arm)
        for server in self._encoder.servers() if self._encoder is not None else ():
            self._telemetry.encoder_up.labels(server.url).set(server.up)
        for run in runs:
            if run.name in self._runs.runs:
                self._telemetry.learner_waiting.labels(run.name).set(run.stalled is not None)
        self._telemetry.store_refused.set(self._store_refused())
        self._telemetry.health_check_errors.set(self._health_check_errors())

    def _tell_judging(self, arm: ScorerStatus) -> None:
        judging = arm.judging
        if judging is None:
            return
        self._telemetry.judge_comparisons.labels(arm.name).set(judging.comparisons)
        if judging.position_bias is not None:
            self._telemetry.judge_position_bias.labels(arm.name).set(judging.position_bias)
        if judging.consistency is not None:
            self._telemetry.judge_consistency.labels(arm.name).set(judging.consistency)

    async def _measure_lags(self, runs: Sequence[Run]) -> bool:
        """Set the gauge of every run's lag; whether the store answered."""
        try:
            if not runs:
                await self._store.ping()
            for run in runs:
                appended = (await self._store.log_status(run.name)).appended
                if run.name in self._runs.runs:
                    self._telemetry.log_lag.labels(run.name).set(max(appended - run.posterior.count, 0))
        except ServiceError:
            self._telemetry.store_errors.labels("log_status").inc()
            return False
        return True

    async def check_ready(self) -> tuple[str, int]:
        """The default run's name and version.

        Raises:
            NotReadyError: its log is being replayed, its name belongs to another pool or checkpoint, it is archived,
                its learner stopped, no RM can be asked, or no server of the encoder.
            StoreUnavailableError: the store does not answer, and rewards are refused then.
        """
        try:
            run = await self._runs.open(None)
            # Ready means that a decision can be saved: a server that is full or read-only answers a ping too.
            await self._store.probe(run.name)
        except (ArchivedError, RunConflictError) as error:
            raise NotReadyError(error.message, details=error.details) from error
        except StoreUnavailableError:
            loaded = self._runs.runs.get(self._runs.default)
            if not self._answers_without_store or loaded is None:
                raise
            run = loaded
        if run.failure is not None:
            raise NotReadyError(failure_of(run), details={"run": run.name})
        if run.stalled is not None and not self._answers_without_store:
            raise NotReadyError(f"the log of run {run.name!r} cannot be read: {run.stalled}", details={"run": run.name})
        if not run.ready.is_set():
            raise NotReadyError(
                f"run {run.name!r} is replaying its log: {run.posterior.count} events so far", details={"run": run.name}
            )
        models = self.models()
        if not any(arm.available for arm in models):
            raise NotReadyError(
                "no reward model can be asked: start the workers, or check their addresses in the pool file",
                details={"models": [arm.name for arm in models]},
            )
        if self._encoder is not None and not self._encoder.available:
            # By number: readiness is told to everybody, and addresses are for the log and the metrics.
            problems = [server.problem or "no answer" for server in self._encoder.servers()]
            reasons = "; ".join(f"server {number}: {problem}" for number, problem in enumerate(problems, 1))
            raise NotReadyError(f"the encoder's servers cannot be asked: {reasons}", details={"encoder": problems})
        return run.name, run.posterior.count

    async def list_runs(self, access: Access = EVERYTHING) -> list[RunStatus]:
        """What the store holds of each run that the caller may see.

        Raises:
            StoreUnavailableError: the store does not answer.
        """
        return await stored_runs(self._store, access.seen(await self._store.list_runs()))

    async def posterior(self, name: str | None, access: Access = EVERYTHING) -> PosteriorStatus:
        """What a run has learned; one of the store's is opened.

        Raises:
            NotFoundError: there is no such run.
        """
        run = await self._runs.loaded(name, access)
        name = run.name
        (posterior, template), last_event_id = run.current, run.last_event_id
        status = await self._store.log_status(name)
        digest = await asyncio.get_running_loop().run_in_executor(self._executor, posterior.digest)
        statistics, scales = posterior.statistics, self._scales(name)
        moments = (ScoreScales(0, "0-0", ()) if scales is None else scales).of_arms(posterior.n_arms).arms
        models = []
        for k, model in enumerate(template.pool):
            # A referee that errs has its errors taken out, which may lead beyond either end.
            mean_reward = float(np.clip(statistics.mean_reward()[k], 0.0, 1.0))
            arm = posterior.arms[k]
            variance = (arm.covariance.trace() - (arm.corrections**2).sum()) / posterior.n_weights
            models.append(
                ArmLearned(
                    model=model,
                    feedbacks=int(statistics.count[k]),
                    mean_reward=None if mean_reward != mean_reward else mean_reward,
                    score_mean=moments[k].mean if moments[k].count else None,
                    score_sd=moments[k].sd if scales is not None else None,
                    alarms=int(posterior.watches[k].alarms),
                    mean_norm=float((arm.mean @ arm.mean) ** 0.5),
                    sd=float(max(variance, 0.0) ** 0.5),
                )
            )
        return PosteriorStatus(
            run=name,
            version=posterior.count,
            last_event_id=last_event_id,
            digest=digest,
            prior=posterior.prior.form,
            policy=template.default_policy.name,
            signal=run.signal,
            dim=posterior.prior.d,
            drift=posterior.drift,
            lambda0=posterior.lambda0,
            novel_share=posterior.tally.share,
            log_appended=status.appended,
            scale_version=None if scales is None else scales.count,
            models=models,
        )


def _expectations(runs: Sequence[Run]) -> list[tuple[Run, list[float], list[float]]]:
    """Per run that has been asked: mean and sd per RM (K,) of what the posterior expects on the newest instances."""
    found = []
    for run in runs:
        recent, posterior = list(run.recent), run.posterior
        if recent:
            x = np.stack(recent)
            beliefs = posterior_beliefs(x, posterior.prior.offsets(x), posterior)
            found.append((run, beliefs.means.mean(axis=0).tolist(), beliefs.sds.mean(axis=0).tolist()))
    return found
