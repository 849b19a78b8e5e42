"""A scorer that this gateway cannot ask: its entry names what is not here, for example a key that is not set.

It keeps the arm's place, as one whose servers are all away. Built by `service.scorers.roster`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from router_core.records import Instance
from service.scorers.admission import Ticket
from service.scorers.protocol import Scored, WorkerError, WorkerUnavailableError
from service.scorers.status import ReplicaStatus, ScorerStatus


class AbsentScorer:
    """See `service.scorers.protocol.Scorer`.

    Args:
        name: in the pool.
        kind: in the pool.
        problem: why it cannot be asked.
    """

    available = False
    reachable = False
    choosy = False
    timeout_seconds: float | None = None
    unexpected_errors = 0
    counts_to: int | None = None

    def __init__(self, name: str, kind: str, problem: str) -> None:
        self.name = name
        self.kind = kind
        self.problem = problem

    def applies(self, instance: Instance) -> bool:
        """Return True: nothing is known of it."""
        return True

    async def readable(self, instances: Sequence[Instance]) -> list[int]:
        """Return the number of responses of each instance: nothing is known of it."""
        return [len(instance.responses) for instance in instances]

    def slots(self) -> asyncio.Semaphore:
        """Return a slot that nobody uses."""
        return asyncio.Semaphore(1)

    async def score(
        self, instances: Sequence[Instance], *, deadline: float, ticket: Ticket | None = None
    ) -> list[Scored | WorkerError]:
        """Return one error for all instances."""
        return [WorkerUnavailableError(f"scorer {self.name!r}: {self.problem}")] * len(instances)

    def status(self) -> ScorerStatus:
        """Return its name, and why it cannot be asked."""
        replica = ReplicaStatus(
            url="", state="open", in_flight=0, failures=0, latency_ms=None, problem=self.problem, max_model_len=None
        )
        return ScorerStatus(
            name=self.name,
            kind=self.kind,
            available=False,
            rendering=None,
            max_model_len=None,
            over_long=None,
            replicas=[replica],
        )

    async def check(self) -> None:
        """There is nothing to probe."""

    def start(self) -> None:
        """There is nothing to watch."""

    async def close(self) -> None:
        """There is nothing to close."""
