"""Hold: claim the names of a gateway's runs again and again, so that a store that lost them gives them to nobody else.

A store that comes back empty looks as if no run had ever been. `NameHolder` takes the names back within a second where
the connection lived, and within `HOLD_SECONDS`, the store's timeout and its longest back-off otherwise. A gateway that
opens a new run waits longer than that (`RunRegistry`), unless the store has been watched for so long without a loss. So
no other pool gets the name of a run that a gateway holds which runs and reaches the store. One that does neither for
longer finds the name taken: it then folds nothing and acknowledges nothing (`service.usecases.follow`).
`service.wiring` starts one per gateway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from service.errors import ServiceError
from service.stores.protocol import Store
from service.usecases.runs import Run

HOLD_SECONDS = 1.0
"""Pause between two claims."""


class NameHolder:
    """Claims the names of the open runs.

    Args:
        runs: by name; read at each turn.
        store: where the names stand.
    """

    def __init__(self, runs: Mapping[str, Run], store: Store) -> None:
        self._runs = runs
        self._store = store

    async def run_forever(self) -> None:
        """Claim until cancelled."""
        while True:
            await self.claim()
            await asyncio.sleep(HOLD_SECONDS)

    async def claim(self) -> None:
        """Claim every name once. A name that the store had lost gets a new identity, so its learner sees the loss."""
        await asyncio.gather(*(self._claim(run) for run in tuple(self._runs.values())))

    async def _claim(self, run: Run) -> None:
        try:
            await self._store.open_run(run.name, run.identity.fingerprint)
        except ServiceError:
            # The run's learner meets the same store, counts the error and says so in readiness.
            return
