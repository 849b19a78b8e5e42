"""What everybody knows of a scorer: whether it can be asked, what it makes of instances, how it fares.

`service.scorers.registry` builds one per entry of the pool file; unit tests hand in scripted ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

from router_core.attempts import TOO_LONG
from router_core.records import Instance
from service.errors import ServiceError
from service.scorers.admission import Admission, Ticket
from service.scorers.status import ScorerStatus


class OverLong(StrEnum):
    """What becomes of an instance that the RM cannot read whole. No response is ever cut."""

    SKIP = "skip"
    """The RM abstains: another one is asked, which may read more. Where none reads all responses, those that are too
    long have no reward, and the others theirs."""
    REFUSE = "refuse"
    """The whole instance is an error; no other RM is asked."""
    CUT_PROMPT = "cut_prompt"
    """The prompt loses tokens on its left, all responses the same; as `skip` where that does not help."""


class Scored(NamedTuple):
    """What a scorer made of one instance.

    Attributes:
        rewards: raw reward per response (n,), finite; NaN for a response that has none, and at least one is finite.
        prompt_tokens_cut: tokens that the prompt lost on its left; 0 when it was read whole.
        components: parts of the rewards by name, each (n,); empty for a scorer that gives one number.
        failures: stable code per response (n,), "" where there is a reward; empty where all have one.
    """

    rewards: list[float]
    prompt_tokens_cut: int = 0
    components: Mapping[str, list[float]] = {}
    failures: Sequence[str] = ()


class Scorer(Admission, Protocol):
    """One scorer of the pool, behind any number of equal servers. Nobody looks behind this."""

    @property
    def name(self) -> str:
        """The scorer's name in the pool."""

    @property
    def kind(self) -> str:
        """Its kind: a key of `service.scorers.registry.KINDS`."""

    @property
    def choosy(self) -> bool:
        """True if `applies` may return False."""

    @property
    def timeout_seconds(self) -> float | None:
        """Time that one request may take, from the pool file; None for the gateway's `worker_timeout_seconds`."""

    def applies(self, instance: Instance) -> bool:
        """Return False if it is known beforehand that the scorer has nothing to say about an instance."""

    @property
    def counts_to(self) -> int | None:
        """Tokens that it reads at most, where `readable` can count them and it abstains from more; else None."""

    async def readable(self, instances: Sequence[Instance]) -> list[int]:
        """Return how many responses of each instance it can read whole, where it counts; nothing is sent."""

    async def score(
        self, instances: Sequence[Instance], *, deadline: float, ticket: Ticket | None = None
    ) -> list[Scored | WorkerError]:
        """Ask about many instances at once; what is wrong with one does not fail the others.

        Equal responses of an instance have equal rewards.

        Args:
            instances: at least one, each with at least one response.
            deadline: absolute time of `asyncio.get_running_loop().time()`, in seconds, retries included.
            ticket: of the call that this is a piece of. A piece is admitted with its call: a scorer that is over its
                limit makes it wait, where it refuses a call of its own.

        Returns:
            Per instance, in order, what was made of it, or the error for which there is nothing: a
            `WorkerRejectedError` for what the scorer refuses, an `AbstainedError` where it does not apply, a
            `WorkerTooLongError` where it can read no response whole (where it can read others, a failure of that
            response in `Scored`), another `WorkerError` for all instances of a request that failed. Several may share
            one error object. Never raises a `WorkerError`.
        """

    def status(self) -> ScorerStatus:
        """Return what operators see of it."""

    @property
    def unexpected_errors(self) -> int:
        """Health checks that failed by a fault of ours, since the start; 0 unless there is a bug."""

    async def check(self) -> None:
        """Probe every server once, before the first traffic. A server that does not pass gets none."""

    def start(self) -> None:
        """Begin health checks in the background of the running loop."""

    async def close(self) -> None:
        """End health checks and close connections; requests in flight fail."""


class WorkerError(ServiceError):
    """The asked scorer gave no reward. The use case goes on to the next-best draw."""


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
    """The input has more tokens than the scorer reads: it abstains.

    Args:
        message: see `ServiceError`.
        details: see `ServiceError`.
        final: no other RM shall be asked (`OverLong.REFUSE`).
    """

    code = TOO_LONG

    def __init__(self, message: str, *, details: Mapping[str, object] | None = None, final: bool = False) -> None:
        super().__init__(message, details=details)
        self.final = final


class WorkerInputError(WorkerRejectedError):
    """The RM fails on this input alone: a status 5xx, a reward that cannot be used, or a dropped connection, twice."""


class UnreadableVerdictError(WorkerRejectedError):
    """A judge answered, and its answer holds no verdict."""

    code = "verdict_unreadable"


class WorkerProtocolError(WorkerError):
    """The worker's answer is not what `/classify` promises."""

    status = 502
    code = "worker_protocol"


class AbstainedError(WorkerError):
    """The scorer does not apply to the instance. No failure, and no reward."""

    status = 422
    code = "abstained"
