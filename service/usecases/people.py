"""People: the newest audits with their texts, and what a person says of one, which is gold.

Called by `handlers.audits` and `handlers.hot`. A person may judge whatever the store keeps, also
after the feedback window.
"""

from __future__ import annotations

import msgspec
from pydantic import BaseModel, Field

from router_core.records import TIE, Fact, Instance
from service.errors import ConflictError, NotFoundError, NotReadyError, ValidationError
from service.keys.access import EVERYTHING, Access
from service.schemas import JudgementReply, JudgementRequest
from service.stores.ids import event_order
from service.stores.protocol import AuditedDecision, DecisionRecord, FeedbackStatus, Store
from service.telemetry import Telemetry
from service.usecases.decisions import decode_decision, encode_decision, encode_person, told_by
from service.usecases.pools import names_of
from service.usecases.runs import RunRegistry, failure_of

MAX_SHOWN = 200
"""Audits of one answer."""

_DECODER = msgspec.msgpack.Decoder(Instance)


class AuditShown(BaseModel):
    """One audited decision, with its texts."""

    decision_id: str
    prompt: str
    responses: list[str]
    reference: str | None
    metadata: dict[str, Fact]
    referee: str
    preferred: int | None = Field(description="The referee's choice; null for a tie.")
    verdicts: dict[str, int | None] = Field(description="What each RM preferred that answered; null for a tie.")
    probability: float = Field(description="With which the decision was chosen for an audit.")
    judged: bool = Field(description="A person has judged it.")
    judged_preferred: int | None = Field(description="The person's choice; null for a tie, and where none has judged.")


class PeopleService:
    """The use case behind `/audits`.

    Args:
        runs: where runs are opened.
        store: keeps the newest audits.
        telemetry: counters.
    """

    def __init__(self, runs: RunRegistry, store: Store, telemetry: Telemetry) -> None:
        self._runs = runs
        self._store = store
        self._telemetry = telemetry

    async def newest(self, run: str | None, count: int, access: Access = EVERYTHING) -> list[AuditShown]:
        """Return the newest audits that are kept, newest first."""
        name = run or self._runs.default
        access.check_run(name)
        found = await self._store.newest_audits(name, count)
        # As the store has them: the run may not be open here, or its pool may have grown elsewhere first.
        pool = await names_of(self._store, name) if found else ()
        return [_shown(kept, pool) for kept in found]

    async def judge(self, judgement: JudgementRequest, access: Access = EVERYTHING) -> JudgementReply:
        """Append what a person says. When this returns, the event is in the log, once.

        Raises:
            NotFoundError: the audit is not kept, or there is no such run.
            ValidationError: it has fewer responses.
            ConflictError: another judgement stands.
            NotReadyError: the run does not learn.
        """
        run = await self._runs.find(judgement.run, access)
        if run.failure is not None:
            raise NotReadyError(failure_of(run), details={"run": run.name}, retry_after_seconds=1)
        kept = await self._store.audited(run.name, judgement.decision_id)
        details: dict[str, object] = {"decision_id": judgement.decision_id}
        if kept is None:
            raise NotFoundError(
                f"decision {judgement.decision_id} is not among the audits that run {run.name!r} keeps: take one of "
                "`GET /audits` (the pool file's `audit.keep` says how many there are)",
                details=details,
            )
        decision = decode_decision(kept.payload)
        preferred = TIE if judgement.preferred is None else judgement.preferred
        if preferred >= decision.n:
            raise ValidationError(
                f"preferred is {preferred}: decision {judgement.decision_id} has {decision.n} responses; send an "
                "index, 0 for the first, or null for a tie",
                details={**details, "field": "preferred"},
            )
        assert decision.audit is not None
        judged = msgspec.structs.replace(decision, audit=msgspec.structs.replace(decision.audit, judged=True))
        record = DecisionRecord(judgement.decision_id, encode_decision(judged))
        result = await self._store.judge_audit(run.name, record, encode_person(preferred), identity=run.identity)
        self._telemetry.judgements.labels(run.name, result.status).inc()
        if result.status is FeedbackStatus.CONFLICT:
            raise ConflictError(
                f"decision {judgement.decision_id} was judged before, and otherwise: the first judgement stands",
                details=details,
            )
        if result.event_id is not None:
            run.acknowledged = max(run.acknowledged, result.event_id, key=event_order)
        return JudgementReply(
            decision_id=judgement.decision_id,
            event_id=result.event_id or "",
            duplicate=result.status is FeedbackStatus.DUPLICATE,
        )


def _shown(kept: AuditedDecision, pool: tuple[str, ...]) -> AuditShown:
    decision, instance = decode_decision(kept.payload), _DECODER.decode(kept.shown)
    audit = decision.audit
    assert audit is not None
    person = None if kept.judged is None else int(told_by(decision, kept.judged).feedback.value)
    return AuditShown(
        decision_id=kept.decision_id,
        prompt=instance.prompt,
        responses=[*instance.responses],
        reference=instance.reference,
        metadata=dict(instance.metadata),
        referee=audit.referee,
        preferred=_choice(audit.verdict),
        verdicts={pool[answer.arm]: _choice(answer.verdict) for answer in decision.heard},
        probability=1.0 if decision.inclusion is None else decision.inclusion,
        judged=person is not None,
        judged_preferred=None if person is None else _choice(person),
    )


def _choice(verdict: int) -> int | None:
    return None if verdict == TIE else verdict
