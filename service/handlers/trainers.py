"""The routes that RLHF trainers call as they are: read their words, call the use case, answer in their words.

`service.trainers.protocols` has a record per trainer; nothing here knows one of them.

Every sample is one instance with one response; what keeps those of one prompt with one reward model is
`usecases.sticky`. A sample without a reward makes the whole request an error, because these protocols have no word
for it: 503 for what may be tried again, 4xx for what may not. Their clients show little of an error or nothing, so the
log names its code. `…/feedback` behind each path takes the same body and a
value per sample, and names the decisions by their content. Built by `service.gateway`, served by `handlers.hot`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from service.errors import NoRewardError, ServiceError, ValidationError
from service.handlers.body import parse_body
from service.handlers.hot import QueryHandler, error_item
from service.keys.access import Access, Scope
from service.schemas import (
    FeedbackBatchReply,
    FeedbackReply,
    FeedbackRequest,
    RewardReply,
    RewardRequest,
    SampleValue,
    SampleValues,
)
from service.telemetry import Telemetry
from service.trainers.protocols import PROTOCOLS
from service.trainers.shim import Sample, ScoredSample, ShimOptions, UrlProtocol
from service.trainers.templated import UNKNOWN, Templates
from service.usecases.learn import FeedbackService
from service.usecases.score import RewardService

REMEDY = (
    "name the policy's tokenizer directory or template file in chat_templates (docs/trainers/index.md), or put "
    "text=raw into the URL"
)

PAUSE_SECONDS = 1.0
"""Between two tries of a client that does not try again by itself."""

LOGGED_RUNS = 1024
"""Runs of which it is remembered that their unknown chat template was logged."""

QUIET_SECONDS = 10.0
"""How long the same reason for no reward is not logged again: clients that try again would fill the log."""

logger = logging.getLogger(__name__)

T = TypeVar("T")


class TrainerTexts:
    """How trainers' texts come apart, and what becomes of those whose chat template is not known.

    Args:
        templates: known ones.
        refuse_unknown: refuse a text of another one instead of scoring it as it came.
        telemetry: counts them.
    """

    def __init__(self, templates: Templates, *, refuse_unknown: bool, telemetry: Telemetry) -> None:
        self.templates = templates
        self._refuse_unknown = refuse_unknown
        self._telemetry = telemetry
        self._logged: dict[str, None] = {}

    def admit(self, sample: Sample, index: int) -> None:
        """Let a sample pass.

        Raises:
            ValidationError: its chat template is not known, and such texts are refused.
        """
        if self._refuse_unknown and sample.template == UNKNOWN:
            raise ValidationError(
                f"sample {index} has a chat template that is not known, and on_unknown_template is 'refuse': {REMEDY}",
                details={"index": index},
            )

    def count(self, sample: Sample, run: str) -> None:
        """Count a sample that was scored; log the first of a run whose template is not known."""
        self._telemetry.trainer_texts.labels(run, sample.template).inc()
        if sample.template != UNKNOWN or run in self._logged:
            return
        if len(self._logged) >= LOGGED_RUNS:
            del self._logged[next(iter(self._logged))]
        self._logged[run] = None
        logger.warning(
            "texts of an unknown chat template are scored as they came: %s", REMEDY, extra={"fields": {"run": run}}
        )


class TrainerRoutes:
    """The handlers.

    Args:
        scorer: the use case behind `/reward/batch`.
        feedback: the use case behind `/feedback/batch`.
        pool: names of the RMs of a run (None: the default one), in arm order.
        patience_seconds: how long to try in the stead of a client that does not.
        texts: how their texts come apart.
    """

    def __init__(
        self,
        scorer: RewardService,
        feedback: FeedbackService,
        *,
        pool: Callable[[str | None], Sequence[str]],
        patience_seconds: float,
        texts: TrainerTexts,
    ) -> None:
        self._scorer = scorer
        self._feedback = feedback
        self._pool = pool
        self._patience_seconds = patience_seconds
        self._texts = texts
        self._told: dict[tuple[str, str], float] = {}

    def routes(self) -> dict[str, tuple[Scope, QueryHandler]]:
        """Return what each path requires, and its handler."""
        found: dict[str, tuple[Scope, QueryHandler]] = {}
        for protocol in PROTOCOLS:
            decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(protocol.request)
            found[protocol.path] = Scope.REWARD, self._rewards_of(protocol, decoder)
            found[protocol.path + "/feedback"] = Scope.FEEDBACK, self._feedback_of(protocol, decoder)
        return found

    def _rewards_of(self, protocol: UrlProtocol, decoder: msgspec.json.Decoder[Any]) -> QueryHandler:
        score = self._score_patiently if protocol.patient else self._score

        async def rewards(body: bytes, access: Access, /, *, query: bytes) -> Any:
            options, request = _options(query), parse_body(decoder, body)
            samples = self._read(protocol, request, options)
            access.charge(len(samples))
            try:
                scored = await score(samples, options, access)
            except ServiceError as error:
                self._log(protocol, error, options)
                raise
            return protocol.write(scored, tuple(self._pool(options.run)), options)

        return rewards

    def _log(self, protocol: UrlProtocol, error: ServiceError, options: ShimOptions) -> None:
        """Log why a trainer's sample has no reward, the same code at most once in `QUIET_SECONDS` per path."""
        code, now = str(error.details.get("failure", error.code)), time.monotonic()
        if now - self._told.get((protocol.path, code), -QUIET_SECONDS) < QUIET_SECONDS:
            return
        self._told[protocol.path, code] = now
        fields = {"route": protocol.path, "run": options.run, "code": code, "reason": error.message}
        logger.warning("%s has no reward for a sample (%s)", protocol.trainer, code, extra={"fields": fields})

    def _feedback_of(self, protocol: UrlProtocol, decoder: msgspec.json.Decoder[Any]) -> QueryHandler:
        value_of = msgspec.json.Decoder(SampleValue)
        values_of = msgspec.json.Decoder(SampleValues)

        async def one(body: bytes, access: Access, /, *, query: bytes) -> FeedbackReply:
            options, request = _options(query), parse_body(decoder, body)
            (sample,) = self._read(protocol, request, options)
            value = parse_body(value_of, body)
            given = _feedback(sample, value.reward, value.loss, value.preferred, run=options.run)
            return await self._feedback.accept(given, access)

        async def many(body: bytes, access: Access, /, *, query: bytes) -> FeedbackBatchReply:
            options, request = _options(query), parse_body(decoder, body)
            samples = self._read(protocol, request, options)
            access.charge(len(samples))
            return await self._accept(samples, parse_body(values_of, body), options, access)

        return one if protocol.single else many

    def _read(self, protocol: UrlProtocol, request: object, options: ShimOptions) -> list[Sample]:
        """Return what a request holds.

        Raises:
            ValidationError: in the protocol's words; or a chat template is not known, and such texts are refused.
        """
        try:
            found = protocol.read(request, options, self._texts.templates)
        except ValueError as error:
            raise ValidationError(str(error)) from error
        for index, sample in enumerate(found):
            self._texts.admit(sample, index)
        return found

    async def _score_patiently(
        self, samples: Sequence[Sample], options: ShimOptions, access: Access
    ) -> list[ScoredSample]:
        """Score for a client that does not try again: what has no reward is tried again for as long as is set."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience_seconds
        scored: dict[int, ScoredSample] = {}
        while True:
            missing = [index for index in range(len(samples)) if index not in scored]
            try:
                outcomes = await self._outcomes([samples[index] for index in missing], options, access)
            except ServiceError as error:
                outcomes = [error]
            else:
                # What has its reward is not asked for again: a large batch would never be done in one request's time.
                scored |= {i: o for i, o in zip(missing, outcomes, strict=True) if isinstance(o, ScoredSample)}
            worst = _worst(outcomes)
            if worst is None:
                return [scored[index] for index in range(len(samples))]
            if not _may_be_retried(worst) or loop.time() + PAUSE_SECONDS > deadline:
                raise worst
            await asyncio.sleep(PAUSE_SECONDS)

    async def _score(self, samples: Sequence[Sample], options: ShimOptions, access: Access) -> list[ScoredSample]:
        """All of them, or the error of one: a final one where there is one, because trying again is no use then."""
        outcomes = await self._outcomes(samples, options, access)
        worst = _worst(outcomes)
        if worst is not None:
            raise worst
        return [outcome for outcome in outcomes if isinstance(outcome, ScoredSample)]

    async def _outcomes(
        self, samples: Sequence[Sample], options: ShimOptions, access: Access
    ) -> list[ScoredSample | ServiceError]:
        """What became of each, in order."""
        requests = [RewardRequest(_given(sample), [sample.response], reference=sample.reference) for sample in samples]
        results = await self._scorer.score_many(
            requests,
            run=options.run,
            policy=options.policy,
            signal=options.signal,
            normalize=options.normalize,
            access=access,
        )
        for sample, result in zip(samples, results, strict=True):
            if not isinstance(result, ServiceError):
                self._texts.count(sample, result.run)
        return [result if isinstance(result, ServiceError) else self._scored(result) for result in results]

    def _scored(self, reply: RewardReply) -> ScoredSample | NoRewardError:
        (reward,) = reply.rewards
        if (
            reward is None
            and not isinstance(reply.failure, msgspec.UnsetType)
            and reply.failure != [NoRewardError.code]
        ):
            return NoRewardError(
                f"{reply.model!r} gives no reward to this response ({reply.failure[0]})",
                details={"model": reply.model, "failure": reply.failure[0]},
            )
        if reward is None:
            return NoRewardError(
                f"RM {reply.model!r} has given too few scores to know its scale: ask again in a moment, or without "
                "normalize",
                details={"model": reply.model},
                retry_after_seconds=1,
            )
        raw = None if isinstance(reply.raw_rewards, msgspec.UnsetType) else reply.raw_rewards[0]
        return ScoredSample(
            reward=reward,
            raw_reward=reward if raw is None else raw,
            model=reply.model,
            index=-1 if reply.arm is None else reply.arm,
            propensity=reply.propensity,
            fallback=reply.fallback,
            decision_id=reply.decision_id,
            components={name: value for name, (value,) in reply.components.items() if value is not None},
        )

    async def _accept(
        self, samples: Sequence[Sample], values: SampleValues, options: ShimOptions, access: Access
    ) -> FeedbackBatchReply:
        n = len(samples)
        rewards, losses = _as_long("reward", values.reward, n), _as_long("loss", values.loss, n)
        preferred = _as_long("preferred", values.preferred, n)
        requests = [
            _feedback(sample, rewards[i], losses[i], preferred[i], run=None) for i, sample in enumerate(samples)
        ]
        results = await self._feedback.accept_many(requests, run=options.run, access=access)
        return FeedbackBatchReply([error_item(result) for result in results])


def _feedback(
    sample: Sample, reward: float | None, loss: float | None, preferred: int | None, *, run: str | None
) -> FeedbackRequest:
    return FeedbackRequest(
        prompt=_given(sample), responses=[sample.response], run=run, preferred=preferred, loss=loss, reward=reward
    )


def _given(sample: Sample) -> str | list[dict[str, Any]]:
    """Return the prompt as a request holds it."""
    return sample.prompt if isinstance(sample.prompt, str) else [dict(message) for message in sample.prompt]


def _as_long(name: str, values: Sequence[T] | None, n: int) -> Sequence[T | None]:
    if values is None:
        return [None] * n
    if len(values) != n:
        raise ValidationError(
            f"{name} holds {len(values)} values for {n} samples: send one per sample", details={"field": name}
        )
    return values


def _options(query: bytes) -> ShimOptions:
    try:
        return ShimOptions.parse(query)
    except ValueError as error:
        raise ValidationError(str(error), details={"field": "query"}) from error


def _worst(outcomes: Sequence[ScoredSample | ServiceError]) -> ServiceError | None:
    """An error that trying again would not change, before one that it would; None where all were scored."""
    return min((one for one in outcomes if isinstance(one, ServiceError)), key=_may_be_retried, default=None)


def _may_be_retried(error: ServiceError) -> bool:
    return error.status in (429, 503)
