"""A scripted reward model: what the tests put in the place of the pool's workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from service.scorers.protocol import WorkerError, WorkerRejectedError, WorkerTimeoutError, WorkerUnavailableError


class ScriptedArm:
    """Implements `service.scorers.protocol.Arm`.

    Attributes:
        score_of: (prompt, response) to the raw reward; the response's length by default.
        available: whether it can be asked; a scripted arm has no limit, so that it is reachable then.
        error: raised by every call when set.
        refuses: texts that it refuses; a call that holds one is refused whole, as by a real worker.
        gate: calls wait for it, until their deadline, when set.
        calls: the items of every call that reached it.
    """

    def __init__(self, name: str, score_of: Callable[[str, str], float] | None = None) -> None:
        self.name = name
        self.score_of = score_of or (lambda _, response: float(len(response)))
        self.available = True
        self.error: WorkerError | None = None
        self.refuses: Callable[[str], bool] = lambda _: False
        self.gate: asyncio.Event | None = None
        self.calls: list[list[tuple[str, str]]] = []

    @property
    def reachable(self) -> bool:
        """See `Arm.reachable`."""
        return self.available

    async def score(self, items: Sequence[tuple[str, str]], *, deadline: float) -> list[float]:
        """See `Arm.score`."""
        assert items
        await self._take(list(items), deadline)
        return self._rewards(items)

    def slots(self) -> asyncio.Semaphore:
        """See `Arm.slots`; scripted calls take none."""
        return asyncio.Semaphore(8)

    async def score_groups(
        self,
        groups: Sequence[Sequence[tuple[str, str]]],
        *,
        deadline: float,
        slots: asyncio.Semaphore | None = None,
    ) -> list[list[float] | WorkerError]:
        """See `Arm.score_groups`; one call of all items."""
        assert groups
        assert all(groups)
        try:
            await self._take([item for group in groups for item in group], deadline)
        except WorkerError as error:
            return [error] * len(groups)
        outcomes: list[list[float] | WorkerError] = []
        for group in groups:
            try:
                outcomes.append(self._rewards(group))
            except WorkerRejectedError as error:
                outcomes.append(error)
        return outcomes

    async def _take(self, items: list[tuple[str, str]], deadline: float) -> None:
        self.calls.append(items)
        if not self.available:
            raise WorkerUnavailableError(f"RM {self.name!r}: all replicas are out")
        if self.gate is not None:
            try:
                async with asyncio.timeout_at(deadline):
                    await self.gate.wait()
            except TimeoutError as error:
                raise WorkerTimeoutError(f"RM {self.name!r}: no answer before the deadline") from error
        if self.error is not None:
            raise self.error

    def _rewards(self, items: Sequence[tuple[str, str]]) -> list[float]:
        for prompt, response in items:
            if self.refuses(prompt) or self.refuses(response):
                raise WorkerRejectedError(
                    f"RM {self.name!r} refused the input (400): the text is too long for the model"
                )
        return [self.score_of(prompt, response) for prompt, response in items]
