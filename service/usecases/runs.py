"""A run: one pool, one prior, one log, one posterior. The registry opens runs by name and keeps them apart."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from router_core.encoder.fuse import PairEncoder
from router_core.errors import UnknownPolicyError
from router_core.policies import Policy, make_policy
from router_core.posterior import FoldSettings, Posterior, start
from router_core.prior import Prior
from router_core.records import Signal
from service.errors import (
    ConfigurationError,
    NotFoundError,
    NotReadyError,
    OverCapacityError,
    RunConflictError,
)
from service.stores.ids import check_run
from service.stores.protocol import Store
from service.workers.protocol import Arm

IDLE_SECONDS = 60.0
"""A run that no request has named for so long may be closed to make room; its next request opens it again."""


class RunTemplate:
    """What all runs of a gateway share: the pool, the encoder, the prior, the signal. Immutable.

    Args:
        arms: the pool, in arm order.
        encoder: text of a pair to x.
        prior: what is believed before any feedback.
        fold_settings: where the log is cut.
        signal: kind of feedback.
        policy: name of the policy of requests that name none.
        origin: what gives contexts and offsets: the checkpoint's digest, or the untrained encoder's name.
        blas_threads: of the linear algebra library; sums are grouped by them.
        seed: of the draws; None for the operating system's entropy.

    Raises:
        ConfigurationError: pool, prior and encoder do not fit each other, or there is no such policy.
    """

    def __init__(
        self,
        *,
        arms: Sequence[Arm],
        encoder: PairEncoder,
        prior: Prior,
        fold_settings: FoldSettings,
        signal: Signal,
        policy: str,
        origin: str,
        blas_threads: int = 1,
        seed: int | None = None,
    ) -> None:
        if len(arms) != prior.n_arms:
            raise ConfigurationError(
                f"the pool has {len(arms)} models and the prior {prior.n_arms}: use a checkpoint trained for this pool"
            )
        if encoder.dim != prior.dim:
            raise ConfigurationError(
                f"the encoder gives d={encoder.dim} and the prior has d={prior.dim}: use the checkpoint's own encoder"
            )
        self.arms = tuple(arms)
        self.pool = tuple(arm.name for arm in arms)
        self.encoder = encoder
        self.prior = prior
        self.fold_settings = fold_settings
        self.signal = signal
        self.seed = seed
        self._origin = origin
        self._blas_threads = blas_threads
        self._policies: dict[str, Policy] = {}
        try:
            self.default_policy = self.policy(policy)
        except NotFoundError as error:
            raise ConfigurationError(error.message) from error

    def policy(self, name: str) -> Policy:
        """The policy of that name.

        Raises:
            NotFoundError: there is none.
        """
        if name not in self._policies:
            try:
                self._policies[name] = make_policy(name, self.pool)
            except UnknownPolicyError as error:
                raise NotFoundError(str(error), details={"policy": name}) from error
        return self._policies[name]

    def fingerprint(self) -> str:
        """Names everything that the posterior of a run depends on besides its log (v only scales the draws)."""
        prior, settings = self.prior, self.fold_settings
        identity = {
            "pool": self.pool,
            "signal": self.signal,
            "prior": prior.form,
            "d": prior.dim,
            "hyper": [prior.hyper.lambda0, prior.hyper.sigma2, prior.hyper.gamma],
            "origin": self._origin,
            "means": hashlib.sha256(np.ascontiguousarray(prior.means).tobytes()).hexdigest(),
            "fold": [settings.block_size, settings.refresh_events, settings.drift_tolerance],
            "blas_threads": self._blas_threads,
        }
        return json.dumps(identity, sort_keys=True)


class Run:
    """One run's mutable state: which posterior is current, up to which event, and the generator of its draws.

    The learner replaces `posterior`; requests read the reference once and keep to it.
    """

    def __init__(self, name: str, template: RunTemplate) -> None:
        self.name = name
        self.template = template
        self.posterior: Posterior = start(template.prior, template.fold_settings)
        self.last_event_id = "0-0"
        self.ready = asyncio.Event()
        self.failure: str | None = None
        self.last_used = time.monotonic()
        entropy = None if template.seed is None else [template.seed, *name.encode()]
        self.rng = np.random.default_rng(entropy)


class RunRegistry:
    """Opens runs on first use and checks that a name means the same run as before.

    Args:
        template: what the runs share.
        store: where their fingerprints stand.
        default: name of the run that requests without one mean.
        max_runs: how many this gateway holds; idle ones are closed to make room.
        on_open: starts whatever must run beside an opened run (its learner); what it returns ends that.
        timeout_seconds: how long a request waits for a run that is being opened.
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
    ) -> None:
        self.template = template
        self.default = default
        self._store = store
        self._max_runs = max_runs
        self._on_open = on_open
        self._timeout_seconds = timeout_seconds
        self._runs: dict[str, Run] = {}
        self._closers: dict[str, Callable[[], None]] = {}
        self._opening: dict[str, asyncio.Task[Run]] = {}

    @property
    def runs(self) -> Mapping[str, Run]:
        """The open runs by name."""
        return self._runs

    async def get(self, name: str | None) -> Run:
        """The run of that name, opened if need be, with its posterior loaded.

        Raises:
            ValidationError: the name is malformed.
            RunConflictError: the name was used with another pool, prior or checkpoint.
            OverCapacityError: `max_runs` are open.
            NotReadyError: its log is still being replayed, or cannot be.
            StoreUnavailableError: the store does not answer.
        """
        run = await self.open(name)
        if not run.ready.is_set():
            await self._wait_until_ready(run)
        return run

    async def open(self, name: str | None) -> Run:
        """As `get`, without waiting for its posterior."""
        name = name or self.default
        run = self._runs.get(name) or await self._open_once(name)
        run.last_used = time.monotonic()
        return run

    async def find(self, name: str | None) -> Run:
        """As `open`, for a run that some gateway has opened before: feedback never makes one.

        Raises:
            NotFoundError: none has.
        """
        name = name or self.default
        if name not in self._runs and not await self._store.has_run(check_run(name)):
            raise NotFoundError(
                f"run {name!r} is unknown: send the run of the decision, as `/reward` answered it",
                details={"run": name},
            )
        return await self.open(name)

    async def _open_once(self, name: str) -> Run:
        check_run(name)
        if name not in self._opening:
            if len(self._runs) + len(self._opening) >= self._max_runs and not self._close_idle():
                raise OverCapacityError(
                    f"{self._max_runs} runs are open and in use (max_runs): name one of them, or start another gateway"
                )
            self._opening[name] = asyncio.create_task(self._open(name))
            self._opening[name].add_done_callback(lambda _: self._opening.pop(name, None))
        return await asyncio.shield(self._opening[name])

    async def _open(self, name: str) -> Run:
        fingerprint = self.template.fingerprint()
        standing = (await self._store.open_run(name, fingerprint.encode())).decode()
        if standing != fingerprint:
            raise RunConflictError(
                f"run {name!r} was started with another pool, prior, checkpoint or fold setting: use a new run name, "
                "or start the gateway with what the run was started with",
                details={"run": name, "changed": _differences(standing, fingerprint)},
            )
        run = Run(name, self.template)
        self._runs[name] = run
        self._closers[name] = self._on_open(run)
        return run

    def _close_idle(self) -> bool:
        """Close the run that has been idle for longest, if one is; what it learned is in the store."""
        idle = [run for name, run in self._runs.items() if name != self.default]
        oldest = min(idle, key=lambda run: run.last_used, default=None)
        if oldest is None or time.monotonic() - oldest.last_used < IDLE_SECONDS:
            return False
        del self._runs[oldest.name]
        self._closers.pop(oldest.name)()
        return True

    async def _wait_until_ready(self, run: Run) -> None:
        if run.failure is not None:
            raise NotReadyError(f"the learner of run {run.name!r} stopped: {run.failure}", details={"run": run.name})
        try:
            await asyncio.wait_for(run.ready.wait(), self._timeout_seconds)
        except TimeoutError as error:
            raise NotReadyError(
                f"run {run.name!r} is still replaying its log: try again in a moment", retry_after_seconds=1
            ) from error


def _differences(standing: str, wanted: str) -> dict[str, object]:
    old, new = json.loads(standing), json.loads(wanted)
    return {key: {"run": old.get(key), "gateway": new[key]} for key in new if old.get(key) != new[key]}
