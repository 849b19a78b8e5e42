"""What `up` checks before it starts any worker: settings, pool and checkpoint, and the run that the store holds.

Called by `service.cli.up`, for a dry run too. Builds the gateway as its own process will, and starts nothing of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray

from router_core.checkpoint import Checkpoint
from router_core.encoder.base import Block
from router_core.encoder.fuse import PairEncoder
from service.assembly import Assembly
from service.errors import ConfigurationError, RunConflictError
from service.gateway import build_gateway
from service.pool import PoolFile
from service.priors import check_known, load_checkpoint
from service.settings import Settings, read_settings
from service.specification import Specification
from service.stores.acts import is_archived
from service.stores.redis import RedisStore
from service.usecases.pools import standing_pool
from service.usecases.runs import archived

NOWHERE = "http://127.0.0.1:9"
"""Stands for the address of a scorer that is not started yet."""


@dataclass(frozen=True, slots=True)
class _UnloadedBackbone:
    """Stands for a checkpoint's backbone: its name and width, without the transformer."""

    spec: str
    dim: int
    blocks: tuple[Block, ...] = ()

    def embed(self, conversations: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Embed nothing."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Preflight:
    """A start that fits so far.

    Attributes:
        settings: of the gateway.
        pool: as it was given.
        checkpoint: loaded; None for none.
    """

    settings: Settings
    pool: PoolFile
    checkpoint: Checkpoint | None

    def check_store(self, url: str) -> None:
        """Make sure that a gateway could open its run in the store.

        Args:
            url: of the running store.

        Raises:
            ConfigurationError: settings, pool and checkpoint do not fit each other.
            RunConflictError: the run was started with something else; says with what.
            ArchivedError: the run is archived.
            StoreUnavailableError: the store does not answer.
        """
        asyncio.run(self._check(url, stands=True))

    def check_parts(self, url: str) -> None:
        """As `check_store`, without asking the store."""
        asyncio.run(self._check(url, stands=False))

    async def _check(self, url: str, *, stands: bool) -> None:
        settings = self.settings
        store = RedisStore(
            url, window_seconds=settings.decision_ttl_seconds, timeout_seconds=settings.store_timeout_seconds
        )
        encoder = None
        if self.checkpoint is not None:
            backbone = _UnloadedBackbone(self.checkpoint.encoder_spec, self.checkpoint.fuse.input_dim)
            encoder = PairEncoder(backbone, self.checkpoint.fuse)
        gateway = build_gateway(settings, _placed(self.pool), encoder=encoder, store=store)
        try:
            found = (await store.check_run(settings.run, ())).identity if stands else None
            if found is not None:
                gateway.runs.check_default(found.fingerprint.decode())
                acts = await store.acts(settings.run)
                if is_archived(acts):
                    raise archived(settings.run)
                _tell_proposal(settings.run, gateway.assembly, standing_pool(found.fingerprint, acts))
        except RunConflictError as error:
            raise RunConflictError(f"{error.message}. Nothing was started", details=error.details) from error
        finally:
            await gateway.stop()


def _tell_proposal(run: str, assembly: Assembly, standing: Specification | None) -> None:
    """Say what the pool file would change in a run that has begun with another."""
    changes = [] if standing is None else assembly.propose(standing)
    if standing is not None and changes:
        names = ", ".join(arm.name for arm in standing.asked)
        typer.echo(
            f"run {run!r} goes on with the pool that it has ({names}). This file would change it: "
            f"{'; '.join(map(str, changes))}. Apply it with `reward-router pool apply`"
        )


def check_start(pool: PoolFile, checkpoint: Path | None, run: str | None, **given: Any) -> Preflight:
    """Return what is to be started if settings, pool and checkpoint fit each other.

    Args:
        pool: the pool file.
        checkpoint: its directory, or None.
        run: name of the default run.
        given: further settings, by name; None: not given.

    Raises:
        ConfigurationError: they do not; says what to change.
    """
    settings = read_settings(checkpoint=checkpoint, run=run, **given)
    names = [model.name for model in pool.models]
    loaded = load_checkpoint(settings)
    try:
        if loaded is not None:
            check_known(loaded, names)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"--checkpoint {settings.checkpoint} does not fit the pool ({', '.join(names)}): {error.message}. Give the "
            "checkpoint that was trained for these scorers, or leave it out and start from nothing"
        ) from error
    return Preflight(settings, pool, loaded)


def _placed(pool: PoolFile) -> PoolFile:
    """The pool as if all of its scorers were started."""
    placed = {
        field: tuple(model if model.urls else model.served_at([NOWHERE]) for model in getattr(pool, field))
        for field in ("models", "referees")
    }
    return pool.model_copy(update=placed)
