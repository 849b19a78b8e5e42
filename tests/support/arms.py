"""A scripted reward model: what the tests put in the place of the pool's workers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

from router_core.attempts import TOO_LONG
from router_core.records import Instance
from service.scorers.admission import Ticket
from service.scorers.protocol import (
    AbstainedError,
    Scored,
    WorkerError,
    WorkerRejectedError,
    WorkerTimeoutError,
    WorkerTooLongError,
    WorkerUnavailableError,
)
from service.scorers.rm.client import VllmArm
from service.scorers.status import ScorerStatus


class ScriptedArm:
    """Implements `service.scorers.protocol.Scorer`.

    Attributes:
        score_of: (prompt, response) to the raw reward; the response's length by default.
        available: whether it can be asked; a scripted arm has no limit, so that it is reachable then.
        error: raised by every call when set.
        refuses: texts that it refuses; a call that holds one is refused whole, as by a real worker.
        too_long: responses that it cannot read whole, as it finds when it is asked.
        only: the instances to which it applies; None for all.
        counts_to: characters of a response that it reads at most, and knows beforehand; None for any number.
        gate: calls wait for it, until their deadline, when set.
        calls: the items of every call that reached it.
    """

    def __init__(self, name: str, score_of: Callable[[str, str], float] | None = None) -> None:
        self.name = name
        self.score_of = score_of or (lambda _, response: float(len(response)))
        self.available = True
        self.error: WorkerError | None = None
        self.refuses: Callable[[str], bool] = lambda _: False
        self.only: Callable[[Instance], bool] | None = None
        self.gate: asyncio.Event | None = None
        self.counts_to: int | None = None
        self.too_long: Callable[[str], bool] = lambda _: False
        self.calls: list[list[tuple[str, str]]] = []

    @property
    def reachable(self) -> bool:
        return self.available

    @property
    def kind(self) -> str:
        return "rm"

    @property
    def unexpected_errors(self) -> int:
        return 0

    @property
    def timeout_seconds(self) -> float | None:
        return None

    @property
    def choosy(self) -> bool:
        return self.only is not None

    def applies(self, instance: Instance) -> bool:
        return self.only is None or self.only(instance)

    async def readable(self, instances: Sequence[Instance]) -> list[int]:
        return [sum(len(response) <= (self.counts_to or 10**9) for response in one.responses) for one in instances]

    def slots(self) -> asyncio.Semaphore:
        """See `Admission.slots`; scripted calls take none."""
        return asyncio.Semaphore(8)

    def status(self) -> ScorerStatus:
        return ScorerStatus(
            name=self.name,
            kind=self.kind,
            available=self.available,
            rendering=None,
            max_model_len=None,
            over_long=None,
            replicas=[],
        )

    async def check(self) -> None:
        """See `Scorer.check`."""

    def start(self) -> None:
        """See `Scorer.start`."""

    async def close(self) -> None:
        """See `Scorer.close`."""

    async def score(
        self, instances: Sequence[Instance], *, deadline: float, ticket: Ticket | None = None
    ) -> list[Scored | WorkerError]:
        """See `Scorer.score`; one call of all items."""
        assert instances
        groups = [[(instance.prompt, response) for response in instance.responses] for instance in instances]
        assert all(groups)
        try:
            await self._take([item for group in groups for item in group], deadline)
        except WorkerError as error:
            return [error] * len(groups)
        outcomes: list[Scored | WorkerError] = []
        for group in groups:
            try:
                outcomes.append(self._scored(group))
            except (WorkerRejectedError, AbstainedError) as error:
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

    def _scored(self, items: Sequence[tuple[str, str]]) -> Scored:
        for prompt, response in items:
            if self.refuses(prompt) or self.refuses(response):
                raise WorkerRejectedError(
                    f"RM {self.name!r} refused the input (400): the text is too long for the model"
                )
        long = [self.too_long(response) for _, response in items]
        if all(long):
            raise WorkerTooLongError(f"RM {self.name!r}: more tokens than it reads")
        rewards = [math.nan if no else self.score_of(*item) for no, item in zip(long, items, strict=True)]
        return Scored(rewards, failures=[TOO_LONG if no else "" for no in long] if any(long) else ())


Items = Sequence[tuple[str, str]]
"""(prompt, response) texts of one instance."""


async def score_groups(
    arm: VllmArm, groups: Sequence[Items], *, deadline: float, **options: Any
) -> list[list[float] | WorkerError]:
    """Ask a reward model about many instances; their rewards, or their errors."""
    outcomes = await arm.score_groups(groups, deadline=deadline, **options)
    return [one if isinstance(one, WorkerError) else one.rewards for one in outcomes]


async def score_items(arm: VllmArm, items: Items, *, deadline: float) -> list[float]:
    """Ask a reward model about one instance; raises its error."""
    (outcome,) = await score_groups(arm, [items], deadline=deadline)
    if isinstance(outcome, WorkerError):
        raise outcome
    return outcome
