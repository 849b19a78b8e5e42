"""A run: one pool, one prior, one log, one posterior. The registry opens runs by name and keeps them apart."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
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
    ValidationError,
)
from service.stores.protocol import Store
from service.workers.protocol import Arm

_NAME = re.compile(r"^[A-Za-z0-9._-]{1,64}$")


class RunTemplate:
    """What all runs of a gateway share: the pool, the encoder, the prior, the signal. Immutable.

    Args:
        arms: the pool, in arm order.
        encoder: text of a pair to x.
        prior: what is believed before any feedback.
        fold_settings: where the log is cut.
        signal: kind of feedback.
        policy: name of the policy of requests that name none.
        origin: what else tells one prior from another: the checkpoint's digest, or the encoder's name.
        seed: of the draws; None for the operating system's entropy.

    Raises:
        ConfigurationError: pool, prior and encoder do not fit each other.
        UnknownPolicyError: no such policy.
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
        self.origin = origin
        self._policies: dict[str, Policy] = {}
        self.default_policy = self.policy(policy)

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
        """Names everything that the posterior of a run depends on besides its log."""
        prior, settings = self.prior, self.fold_settings
        identity = {
            "pool": self.pool,
            "signal": self.signal,
            "prior": prior.form,
            "d": prior.dim,
            "hyper": [prior.hyper.lambda0, prior.hyper.sigma2, prior.hyper.v, prior.hyper.gamma],
            "origin": self.origin,
            "means": hashlib.sha256(np.ascontiguousarray(prior.means).tobytes()).hexdigest(),
            "fold": [settings.block_size, settings.refresh_events, settings.drift_tolerance],
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
        entropy = None if template.seed is None else [template.seed, *name.encode()]
        self.rng = np.random.default_rng(entropy)


class RunRegistry:
    """Opens runs on first use and checks that a name means the same run as before.

    Args:
        template: what the runs share.
        store: where their fingerprints stand.
        default: name of the run that requests without one mean.
        max_runs: how many this gateway holds.
        on_open: starts whatever must run beside an opened run (its learner).
        timeout_seconds: how long a request waits for a run that is being opened.
    """

    def __init__(
        self,
        template: RunTemplate,
        store: Store,
        *,
        default: str,
        max_runs: int,
        on_open: Callable[[Run], None],
        timeout_seconds: float = 10.0,
    ) -> None:
        self.template = template
        self.default = default
        self._store = store
        self._max_runs = max_runs
        self._on_open = on_open
        self._timeout_seconds = timeout_seconds
        self._runs: dict[str, Run] = {}
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
        return self._runs.get(name) or await self._open_once(name)

    async def _open_once(self, name: str) -> Run:
        if not _NAME.match(name):
            raise ValidationError(f"run is {name!r}: use 1 to 64 letters, digits, '.', '_' and '-'")
        if name not in self._opening:
            if len(self._runs) + len(self._opening) >= self._max_runs:
                raise OverCapacityError(
                    f"{self._max_runs} runs are open (max_runs): name one of them, or start another gateway"
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
        self._on_open(run)
        return run

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
