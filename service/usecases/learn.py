"""Learn: accept feedback exactly once (design: the way of `POST /feedback`).

`FeedbackService` only appends to the log. `service.usecases.follow` folds it into the posterior, on every gateway.
"""

from __future__ import annotations

from collections.abc import Sequence

from router_core.errors import FeedbackError
from router_core.feedback import validate
from router_core.records import Feedback, Signal
from service.errors import (
    ConflictError,
    GoneError,
    NotFoundError,
    NotReadyError,
    ServiceError,
    StoreUnavailableError,
    ValidationError,
)
from service.keys.access import EVERYTHING, Access
from service.schemas import FeedbackReply, FeedbackRequest
from service.stores.ids import check_run, event_order
from service.stores.protocol import FeedbackRecord, FeedbackResult, FeedbackStatus, Store
from service.telemetry import Telemetry
from service.usecases.converse import instance_of
from service.usecases.decisions import content_key, decode_feedback, encode_feedback
from service.usecases.runs import Run, RunRegistry, failure_of

RETRY_AFTER_SECONDS = 1
"""Hint for feedback by content that comes before its decision."""


class FeedbackService:
    """The use case behind `/feedback` and `/feedback/batch`.

    Args:
        runs: where runs are opened.
        store: marks decisions and appends events, atomically.
        telemetry: counters.
        max_batch: items per call at most.
    """

    def __init__(self, runs: RunRegistry, store: Store, telemetry: Telemetry, *, max_batch: int) -> None:
        self._runs = runs
        self._store = store
        self._telemetry = telemetry
        self._max_batch = max_batch

    async def accept(self, request: FeedbackRequest, access: Access = EVERYTHING) -> FeedbackReply:
        """One feedback. When this returns, the event is in the log, once.

        Raises:
            ServiceError: see `docs/api.md` for the codes; nothing was changed.
        """
        result = (await self.accept_many([request], access=access))[0]
        if isinstance(result, ServiceError):
            raise result
        return result

    async def accept_many(
        self,
        requests: Sequence[FeedbackRequest | ValidationError],
        *,
        run: str | None = None,
        access: Access = EVERYTHING,
    ) -> list[FeedbackReply | ServiceError]:
        """Many feedbacks, each applied or refused on its own, in one pipeline per run.

        Raises:
            ServiceError: what concerns the whole call: the batch's size, the run, the store away (resend: what had been
                applied answers `duplicate`).
        """
        if len(requests) > self._max_batch:
            raise ValidationError(
                f"items holds {len(requests)} feedbacks: send at most {self._max_batch} at once",
                details={"field": "items", "limit": self._max_batch},
            )
        if run:
            check_run(run)  # Also where there are no items, and so nobody to ask for it.
        results: list[FeedbackReply | ServiceError | None] = [None] * len(requests)
        by_run: dict[str, list[tuple[int, FeedbackRequest, FeedbackRecord]]] = {}
        runs: dict[str | None, Run | ServiceError] = {}
        opened: dict[str, Run] = {}
        for index, request in enumerate(requests):
            if isinstance(request, ValidationError):
                results[index] = request
                continue
            name = request.run or run
            if name not in runs:
                runs[name] = await self._find(name, access)
            found = runs[name]
            if isinstance(found, ServiceError):
                if request.run is None:
                    raise found
                results[index] = found
                continue
            try:
                record = _record(request, found)
            except ServiceError as error:
                self._telemetry.feedback.labels(found.name, "invalid").inc()
                results[index] = error
            else:
                opened[found.name] = found
                by_run.setdefault(found.name, []).append((index, request, record))
        for run_name, records in by_run.items():
            held = opened[run_name]
            try:
                outcomes = await self._store.apply_feedback(
                    run_name, [record for _, _, record in records], identity=held.identity
                )
            except StoreUnavailableError:
                self._telemetry.store_errors.labels("apply_feedback").inc()
                raise
            for (index, request, record), outcome in zip(records, outcomes, strict=True):
                self._telemetry.feedback.labels(run_name, outcome.status).inc()
                results[index] = _answer(request, record, outcome)
                if outcome.event_id is not None:
                    held.acknowledged = max(held.acknowledged, outcome.event_id, key=event_order)
        return [result for result in results if result is not None]

    async def _find(self, name: str | None, access: Access) -> Run | ServiceError:
        """The run, or why there is none. Appending to a log does not wait for the posterior.

        A run that does not learn takes no feedback: what its log can no longer give to the posterior would be lost.
        """
        try:
            run = await self._runs.find(name, access)
        except StoreUnavailableError:
            raise
        except ServiceError as error:
            return error
        if run.failure is not None:
            return NotReadyError(failure_of(run), details={"run": run.name}, retry_after_seconds=1)
        return run


def _record(request: FeedbackRequest, run: Run) -> FeedbackRecord:
    given = {
        signal: value
        for signal, value in (
            (Signal.PREFERENCE, request.preferred),
            (Signal.LOSS, request.loss),
            (Signal.REWARD, request.reward),
        )
        if value is not None
    }
    wanted = run.signal
    field = "preferred" if wanted is Signal.PREFERENCE else wanted.value
    if set(given) != {wanted}:
        sent = ", ".join("preferred" if s is Signal.PREFERENCE else s.value for s in given) or "none of them"
        raise ValidationError(
            f"run {run.name!r} learns from the signal {wanted.value!r}: send exactly the field {field!r}, not {sent}",
            details={"field": field, "signal": wanted.value},
        )
    try:
        feedback = validate(Feedback(wanted, float(given[wanted])))
    except FeedbackError as error:
        raise ValidationError(str(error), details={"field": field}) from error
    preferred = int(feedback.value) if wanted is Signal.PREFERENCE else None
    parts_of_content = (request.prompt is not None) + (request.responses is not None)
    if parts_of_content != (2 if request.decision_id is None else 0):
        raise ValidationError(
            "name the decision by decision_id, or by prompt and responses; send one of the two",
            details={"field": "decision_id"},
        )
    value = encode_feedback(feedback)
    if request.decision_id is not None:
        return FeedbackRecord(value, decision_id=request.decision_id, preferred=preferred)
    assert request.prompt is not None
    assert request.responses is not None
    key = content_key(run.name, instance_of(request.prompt, request.responses))
    return FeedbackRecord(value, content_key=key, preferred=preferred)


def _answer(request: FeedbackRequest, record: FeedbackRecord, outcome: FeedbackResult) -> FeedbackReply | ServiceError:
    name = outcome.decision_id or record.decision_id or "named by its content"
    details: dict[str, object] = {"decision_id": outcome.decision_id or record.decision_id}
    match outcome.status:
        case FeedbackStatus.APPLIED | FeedbackStatus.DUPLICATE:
            return FeedbackReply(
                decision_id=outcome.decision_id or record.decision_id or "",
                event_id=outcome.event_id or "",
                duplicate=outcome.status is FeedbackStatus.DUPLICATE,
            )
        case FeedbackStatus.CONFLICT:
            standing = decode_feedback(outcome.standing_value or b"").value
            return ConflictError(
                f"decision {name} already has the feedback {standing:g}, and got another value: the first one stands",
                details={**details, "standing": standing},
            )
        case FeedbackStatus.EXPIRED:
            return GoneError(
                f"decision {name} is older than the feedback window: send feedback sooner, or raise "
                "decision_ttl_seconds",
                details=details,
            )
        case FeedbackStatus.OUT_OF_RANGE:
            return ValidationError(
                f"preferred is {request.preferred}: decision {name} has fewer responses; send an index, 0 for the "
                "first",
                details={**details, "field": "preferred"},
            )
        case FeedbackStatus.UNKNOWN:
            if record.content_key is not None:
                # Its reward may be on the way still: a trainer that cannot carry ids may have two things going at once.
                return NotFoundError(
                    "no decision of this run has that prompt and these responses: send them exactly as they were "
                    "scored, with the run; if the reward is still being computed, send the feedback again in a moment",
                    details=details,
                    retry_after_seconds=RETRY_AFTER_SECONDS,
                )
            return NotFoundError(
                f"decision {name} is unknown in this run: send the decision_id of a reply with `recorded: true`, and "
                "its run",
                details=details,
            )
