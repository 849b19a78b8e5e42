"""One RM asked about many instances: so many requests at once, patient with a worker that is away, final with refusals.

Knows an `Arm` and instances; nothing of files, rows or progress bars: every answer goes to a callback as it comes.
The command `label` runs one `ModelAsker` per RM; `service.scorers.health` keeps the arm's breakers true meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from router_core.attempts import TOO_LONG
from router_core.records import Instance
from service.errors import ConfigurationError, NoWorkerError
from service.lab.labelling.journal import Answer
from service.scorers.protocol import (
    AbstainedError,
    Scored,
    Scorer,
    WorkerError,
    WorkerInputError,
    WorkerRejectedError,
    WorkerUnavailableError,
)
from service.scorers.requests import WHOLESALE_STATUSES
from service.scorers.wire import PROBE_PROMPT, PROBE_RESPONSE

POLL_SECONDS: Final = 0.05
"""How often a worker that is out is looked at; health checks decide when it is back."""

MAX_BACKOFF_SECONDS: Final = 15.0
"""Bound of the doubling of `AskPolicy.backoff_seconds`."""

ABSTAINED: Final = "refused (abstained)"
REFUSED: Final = "refused"
"""Kind of the reasons of instances that an RM will not read, mostly because they are too long."""

FAILED: Final = "failed"
"""Kind of the reason of an instance on which an RM fails while it answers others."""

MAX_REASON_CHARS: Final = 200
"""Characters of a worker's words that are kept; they may quote the text."""


@dataclass(frozen=True, slots=True)
class AskPolicy:
    """How an RM is asked.

    Attributes:
        concurrency: batches in flight.
        batch: instances per batch.
        timeout_seconds: for one batch, retries on other replicas included.
        patience_seconds: how long an RM may be away.
        attempts: timeouts or unusable answers after which an instance is given up.
        tries: failures of any kind after which it is, if the RM answers the probe conversation then; a worker that is
            overloaded, or dies of the instance, answers at times.
        backoff_seconds: pause after an instance's first failure; it doubles with each further one.
    """

    concurrency: int = 4
    batch: int = 16
    timeout_seconds: float = 120.0
    patience_seconds: float = 120.0
    attempts: int = 3
    tries: int = 8
    backoff_seconds: float = 0.5


@dataclass(slots=True)
class _Work:
    """One instance that is to be asked about, and how that has gone."""

    content: str
    instance: Instance
    failures: int = 0
    tries: int = 0
    answered_before: int = 0
    error: WorkerError | None = None


@dataclass(slots=True)
class ModelAsker:
    """Asks one RM about all that it is given. For one event loop, and one call of `run`.

    Attributes:
        arm: the RM.
        policy: how.
        record: told of answers as they come.
        describe: what is known of the RM's workers, for the error when they stay away.
    """

    arm: Scorer
    policy: AskPolicy
    record: Callable[[Sequence[Answer]], None]
    describe: Callable[[], str] = lambda: ""
    _away_since: float | None = field(default=None, init=False)
    _answered: int = field(default=0, init=False)

    async def run(self, instances: Sequence[tuple[str, Instance]]) -> None:
        """Ask about (content key, instance) until each has an answer or a reason.

        Raises:
            NoWorkerError: the RM was away for longer than the policy's patience.
            ConfigurationError: the worker refuses us, whatever we ask.
        """
        size = self.policy.batch
        work = [_Work(content, instance) for content, instance in instances]
        batches = deque(work[start : start + size] for start in range(0, len(work), size))

        async def drain() -> None:
            while batches:
                await self._finish(batches.popleft())

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(self.policy.concurrency, len(batches))):
                    tasks.create_task(drain())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _finish(self, batch: Sequence[_Work]) -> None:
        """Ask until every item has its answer. What failed by a worker's fault is asked again, each item alone."""
        failed = await self._ask(batch)
        rounds = 0
        while failed:
            await asyncio.sleep(min(self.policy.backoff_seconds * 2**rounds, MAX_BACKOFF_SECONDS))
            rounds += 1
            again = []
            for item in failed:
                again += await self._ask([item])
            failed = again

    async def _ask(self, batch: Sequence[_Work]) -> list[_Work]:
        """One call, once the RM is there; returns what must be asked again."""
        await self._until_available()
        loop = asyncio.get_running_loop()
        asked: list[_Work] = []
        silent: list[_Work] = []
        for item in await self._without_hopeless(batch):
            (asked if self.arm.applies(item.instance) else silent).append(item)
        if silent:
            reason = f"{ABSTAINED}: it does not apply (`applies` of the pool file, or what its rubric requires)"
            self.record([Answer(item.content, self.arm.name, reason=reason) for item in silent])
        if not asked:
            return []
        instances = [item.instance for item in asked]
        outcomes = await self.arm.score(instances, deadline=loop.time() + self.policy.timeout_seconds)
        answers, failed = [], []
        for item, outcome in zip(asked, outcomes, strict=True):
            if not isinstance(outcome, WorkerError):
                answers.append(self._answer(item, outcome))
            elif isinstance(outcome, AbstainedError):
                answers.append(Answer(item.content, self.arm.name, reason=_reason(ABSTAINED, outcome)))
            elif isinstance(outcome, WorkerRejectedError):
                answers.append(self._refusal(item, outcome))
            else:
                self._note_failure(item, outcome)
                failed.append(item)
        if answers:
            self._answered += len(answers)
            self.record(answers)
        return failed

    async def _until_available(self) -> None:
        """Return when some replica may be asked; the time for which none may be is counted over all batches."""
        loop = asyncio.get_running_loop()
        while not self.arm.available:
            now = loop.time()
            self._away_since = now if self._away_since is None else self._away_since
            if now - self._away_since > self.policy.patience_seconds:
                raise NoWorkerError(
                    f"RM {self.arm.name!r} has been away for {self.policy.patience_seconds:g} s ({self.describe()}); "
                    "start its worker, or leave it out with --models"
                )
            await asyncio.sleep(POLL_SECONDS)
        self._away_since = None

    def _note_failure(self, item: _Work, error: WorkerError) -> None:
        if item.tries == 0:
            item.answered_before = self._answered
        item.error = error
        item.tries += 1
        # A worker that is away says nothing of the instance.
        if not isinstance(error, WorkerUnavailableError):
            item.failures += 1

    async def _without_hopeless(self, batch: Sequence[_Work]) -> list[_Work]:
        """Give up what has failed too often: the RM is there now, so the fault lies with the instance.

        Raises:
            NoWorkerError: the RM has answered nothing since an instance began to fail, nor the probe conversation now.
        """
        hopeful: list[_Work] = []
        for item in batch:
            if item.error is None or (item.failures < self.policy.attempts and item.tries < self.policy.tries):
                hopeful.append(item)
                continue
            if self._answered == item.answered_before and not await self._answers():
                raise NoWorkerError(
                    f"RM {self.arm.name!r} failed {item.tries} times and answered nothing: {item.error.message} "
                    f"({self.describe()})"
                )
            kind = item.error.code.removeprefix("worker_")
            self.record([Answer(item.content, self.arm.name, reason=_reason(kind, item.error))])
        return hopeful

    async def _answers(self) -> bool:
        """Return True if the RM scores a conversation that is known to be good."""
        deadline = asyncio.get_running_loop().time() + self.policy.timeout_seconds
        (outcome,) = await self.arm.score([Instance(PROBE_PROMPT, (PROBE_RESPONSE,))], deadline=deadline)
        return not isinstance(outcome, WorkerError)

    def _answer(self, item: _Work, scored: Scored) -> Answer:
        """Return the scores; a reason where some response has none, since a row needs them all."""
        failures = sorted({code for code in scored.failures if code})
        if failures == [TOO_LONG]:
            reason = f"{REFUSED}: some response is longer than it reads"
            return Answer(item.content, self.arm.name, reason=reason)
        if failures:
            reason = f"{FAILED}: no score of some response ({', '.join(failures)})"
            return Answer(item.content, self.arm.name, reason=reason)
        return Answer(item.content, self.arm.name, scores=tuple(scored.rewards))

    def _refusal(self, item: _Work, error: WorkerRejectedError) -> Answer:
        status = error.details.get("worker_status")
        if status in WHOLESALE_STATUSES:
            raise ConfigurationError(
                f"{error.message}: it refuses whatever we ask; check URL, proxy and `api_key` ({self.describe()})"
            )
        if isinstance(error, WorkerInputError):
            return Answer(item.content, self.arm.name, reason=_reason(FAILED, error))
        kind = REFUSED if status is None else f"{REFUSED} ({status})"
        return Answer(item.content, self.arm.name, reason=_reason(kind, error))


def reason_kind(reason: str) -> str:
    """The part of a reason that reasons are counted by."""
    return reason.partition(":")[0]


def is_failure(kind: str) -> bool:
    """Return True if a kind of reason says that the RM failed, rather than refused."""
    return not kind.startswith(REFUSED)


def _reason(kind: str, error: WorkerError) -> str:
    text = f"{kind}: {error.message}"
    return text if len(text) <= MAX_REASON_CHARS else text[: MAX_REASON_CHARS - 1] + "…"
