"""What the use cases know of a reward model: a name, whether it can be asked, and a score per (prompt, response).

`service.wiring` builds the concrete `service.scorers.rm.client.VllmArm`; unit tests hand in scripted ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Protocol

from service.errors import ServiceError


class OverLong(StrEnum):
    """What becomes of an instance that the RM cannot read whole. No response is ever cut."""

    SKIP = "skip"
    """The next-best draw is asked; it may read more."""
    REFUSE = "refuse"
    """The instance is an error; no other RM is asked."""
    CUT_PROMPT = "cut_prompt"
    """The prompt loses tokens on its left, all responses the same; as `skip` where that does not help."""


class Rewards(list[float]):
    """The rewards of one instance's responses, and what was cut of its prompt to get them.

    Attributes:
        prompt_tokens_cut: tokens that the prompt lost on its left; 0 when it was read whole.
    """

    __slots__ = ("prompt_tokens_cut",)

    def __init__(self, rewards: Iterable[float] = (), *, prompt_tokens_cut: int = 0) -> None:
        super().__init__(rewards)
        self.prompt_tokens_cut = prompt_tokens_cut


class Arm(Protocol):
    """One reward model, behind any number of equal replicas."""

    @property
    def name(self) -> str:
        """The RM's name in the pool."""

    @property
    def available(self) -> bool:
        """False while every replica's circuit is open or the arm is over its limit of requests in flight."""

    @property
    def reachable(self) -> bool:
        """False while every replica's circuit is open; one that is only over its limit is reachable."""

    async def score(self, items: Sequence[tuple[str, str]], *, deadline: float) -> list[float]:
        """Ask one replica for the raw reward (logit, no activation) of each (prompt, response).

        All items together are one instance. Equal items are asked once and have equal rewards.

        Args:
            items: (prompt, response) texts, at least one.
            deadline: absolute time of `asyncio.get_running_loop().time()`, in seconds, retries included.

        Returns:
            One finite reward per item, in order; `Rewards` where the prompt may have been cut.

        Raises:
            WorkerUnavailableError: no replica could answer (refused, dropped, 5xx, open circuit, over its limit).
            WorkerTimeoutError: the deadline passed.
            WorkerRejectedError: the worker refused this input (4xx); another replica would refuse it too.
            WorkerTooLongError: of those, for its length.
            WorkerInputError: of those, the worker failed on this input, twice, and answered other inputs meanwhile.
            WorkerProtocolError: the answer is not what `/classify` promises, or is NaN or infinite.
        """

    def slots(self) -> asyncio.Semaphore:
        """As many as one call has requests in flight at most; calls that are parts of one share them."""

    async def score_groups(
        self,
        groups: Sequence[Sequence[tuple[str, str]]],
        *,
        deadline: float,
        slots: asyncio.Semaphore | None = None,
    ) -> list[list[float] | WorkerError]:
        """Ask for the raw rewards of many instances at once; what is wrong with one does not fail the others.

        Equal items of an instance are asked once and have equal rewards.

        Args:
            groups: (prompt, response) texts by instance, at least one group and one item in each.
            deadline: of the whole call; see `score`.
            slots: of the whole that this call is part of; its own when None. A part is admitted with its whole: an arm
                that is over its limit makes it wait, where it refuses a call of its own.

        Returns:
            Per group, in order, its rewards in the order of its items, or the error for which it has none: a
            `WorkerRejectedError` for what the worker refuses, another `WorkerError` for all groups of a request that
            failed. Several groups may share one error object. Never raises a `WorkerError`.
        """


class WorkerError(ServiceError):
    """The asked RM gave no reward. The use case goes on to the next-best draw."""


class WorkerUnavailableError(WorkerError):
    """No replica could answer."""

    status = 503
    code = "worker_unavailable"


class WorkerTimeoutError(WorkerError):
    """The deadline passed before the worker answered."""

    status = 503
    code = "worker_timeout"


class WorkerRejectedError(WorkerError):
    """The worker refused the input: too long, unknown to a recorded worker, or malformed."""

    status = 422
    code = "worker_rejected"


class WorkerTooLongError(WorkerRejectedError):
    """The input has more tokens than the RM reads.

    Args:
        message: see `ServiceError`.
        details: see `ServiceError`.
        final: no other RM shall be asked (`OverLong.REFUSE`).
    """

    code = "worker_too_long"

    def __init__(self, message: str, *, details: Mapping[str, object] | None = None, final: bool = False) -> None:
        super().__init__(message, details=details)
        self.final = final


class WorkerInputError(WorkerRejectedError):
    """The RM fails on this input alone: a status 5xx, a reward that cannot be used, or a dropped connection, twice."""


class WorkerProtocolError(WorkerError):
    """The worker's answer is not what `/classify` promises."""

    status = 502
    code = "worker_protocol"
