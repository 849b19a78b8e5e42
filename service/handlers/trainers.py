"""The routes that RLHF trainers call as they are: read their words, call the use case, answer in their words.

Every sample is one instance with one response; what keeps those of one prompt with one reward model is
`usecases.sticky`. A sample without a reward makes the whole request an error, because these protocols have no word
for it: 503 for what may be tried again, 4xx for what may not. `…/feedback` behind each path takes the same body and a
value per sample, and names the decisions by their content. Built by `service.wiring`, served by `handlers.hot`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from service.errors import NoRewardError, ServiceError, ValidationError
from service.handlers.body import parse_body
from service.handlers.hot import QueryHandler, error_item
from service.schemas import FeedbackBatchReply, FeedbackReply, FeedbackRequest, RewardReply, RewardRequest
from service.telemetry import Telemetry
from service.trainers import llamafactory, openrlhf, slime
from service.trainers.shim import Sample, ScoredSample, ShimOptions
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

logger = logging.getLogger(__name__)

T = TypeVar("T")
RequestT = TypeVar("RequestT")
SamplesT = TypeVar("SamplesT", Sample, list[Sample])


class _Values(msgspec.Struct):
    """What a feedback's body holds beside the samples: exactly one list, of the run's signal."""

    reward: list[float] | None = None
    loss: list[float] | None = None
    preferred: list[int] | None = None


class _Value(msgspec.Struct):
    """The same of a single sample."""

    reward: float | None = None
    loss: float | None = None
    preferred: int | None = None


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
        pool: names of the RMs, in arm order.
        patience_seconds: how long to try in the stead of a client that does not.
        texts: how their texts come apart.
    """

    def __init__(
        self,
        scorer: RewardService,
        feedback: FeedbackService,
        *,
        pool: Sequence[str],
        patience_seconds: float,
        texts: TrainerTexts,
    ) -> None:
        self._scorer = scorer
        self._feedback = feedback
        self._pool = tuple(pool)
        self._index = {name: k for k, name in enumerate(self._pool)}
        self._patience_seconds = patience_seconds
        self._texts = texts
        self._openrlhf = msgspec.json.Decoder(openrlhf.OpenRlhfRequest)
        self._llamafactory = msgspec.json.Decoder(llamafactory.LlamaFactoryRequest)
        self._slime = msgspec.json.Decoder(slime.SlimeRequest)
        self._values = msgspec.json.Decoder(_Values)
        self._value = msgspec.json.Decoder(_Value)

    def routes(self) -> dict[str, QueryHandler]:
        """Handlers by path."""
        return {
            "/get_reward": self.get_reward,
            "/get_reward/feedback": self.get_reward_feedback,
            "/v1/score/evaluation": self.score_evaluation,
            "/v1/score/evaluation/feedback": self.score_evaluation_feedback,
            "/remote_rm": self.remote_rm,
            "/remote_rm/feedback": self.remote_rm_feedback,
        }

    async def get_reward(self, body: bytes, /, *, query: bytes) -> Any:
        """OpenRLHF."""
        options, request = _options(query), parse_body(self._openrlhf, body)
        samples = self._read(openrlhf.read, request, options)
        return openrlhf.write(await self._score(samples, options), self._pool)

    async def score_evaluation(self, body: bytes, /, *, query: bytes) -> Any:
        """LLaMA-Factory: as its client does not try again, this does."""
        options, request = _options(query), parse_body(self._llamafactory, body)
        samples = self._read(llamafactory.read, request, options)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience_seconds
        scored: dict[int, ScoredSample] = {}
        while True:
            missing = [index for index in range(len(samples)) if index not in scored]
            try:
                outcomes = await self._outcomes([samples[index] for index in missing], options)
            except ServiceError as error:
                outcomes = [error]
            else:
                # What has its reward is not asked for again: a large batch would never be done in one request's time.
                scored |= {i: o for i, o in zip(missing, outcomes, strict=True) if isinstance(o, ScoredSample)}
            worst = _worst(outcomes)
            if worst is None:
                return llamafactory.write([scored[index] for index in range(len(samples))])
            if not _may_be_retried(worst) or loop.time() + PAUSE_SECONDS > deadline:
                raise worst
            await asyncio.sleep(PAUSE_SECONDS)

    async def remote_rm(self, body: bytes, /, *, query: bytes) -> Any:
        """slime."""
        options, request = _options(query), parse_body(self._slime, body)
        sample = self._read(slime.read, request, options)
        (scored,) = await self._score([sample], options)
        return slime.write(scored, options.reward_key)

    async def get_reward_feedback(self, body: bytes, /, *, query: bytes) -> Any:
        """Feedback on what `/get_reward` scored."""
        options, request = _options(query), parse_body(self._openrlhf, body)
        samples = self._read(openrlhf.read, request, options)
        return await self._accept(samples, parse_body(self._values, body), options)

    async def score_evaluation_feedback(self, body: bytes, /, *, query: bytes) -> Any:
        """Feedback on what `/v1/score/evaluation` scored."""
        options, request = _options(query), parse_body(self._llamafactory, body)
        return await self._accept(
            self._read(llamafactory.read, request, options), parse_body(self._values, body), options
        )

    async def remote_rm_feedback(self, body: bytes, /, *, query: bytes) -> FeedbackReply:
        """Feedback on what `/remote_rm` scored."""
        options, request = _options(query), parse_body(self._slime, body)
        sample = self._read(slime.read, request, options)
        value = parse_body(self._value, body)
        return await self._feedback.accept(
            _feedback(sample, value.reward, value.loss, value.preferred, run=options.run)
        )

    def _read(
        self, read: Callable[[RequestT, str, Templates], SamplesT], request: RequestT, options: ShimOptions
    ) -> SamplesT:
        """What the wire format reads.

        Raises:
            ValidationError: in its words; or a chat template is not known, and such texts are refused.
        """
        try:
            found = read(request, options.text, self._texts.templates)
        except ValueError as error:
            raise ValidationError(str(error)) from error
        for index, sample in enumerate([found] if isinstance(found, Sample) else found):
            self._texts.admit(sample, index)
        return found

    async def _score(self, samples: Sequence[Sample], options: ShimOptions) -> list[ScoredSample]:
        """All of them, or the error of one: a final one where there is one, because trying again is no use then."""
        outcomes = await self._outcomes(samples, options)
        worst = _worst(outcomes)
        if worst is not None:
            raise worst
        return [outcome for outcome in outcomes if isinstance(outcome, ScoredSample)]

    async def _outcomes(self, samples: Sequence[Sample], options: ShimOptions) -> list[ScoredSample | ServiceError]:
        """What became of each, in order."""
        requests = [RewardRequest(sample.prompt, [sample.response]) for sample in samples]
        results = await self._scorer.score_many(
            requests, run=options.run, policy=options.policy, normalize=options.normalize
        )
        for sample, result in zip(samples, results, strict=True):
            if not isinstance(result, ServiceError):
                self._texts.count(sample, result.run)
        return [result if isinstance(result, ServiceError) else self._scored(result) for result in results]

    def _scored(self, reply: RewardReply) -> ScoredSample | NoRewardError:
        (reward,) = reply.rewards
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
            index=self._index.get(reply.model, -1),
            propensity=reply.propensity,
            fallback=reply.fallback,
            decision_id=reply.decision_id,
        )

    async def _accept(self, samples: Sequence[Sample], values: _Values, options: ShimOptions) -> FeedbackBatchReply:
        n = len(samples)
        rewards, losses = _as_long("reward", values.reward, n), _as_long("loss", values.loss, n)
        preferred = _as_long("preferred", values.preferred, n)
        requests = [
            _feedback(sample, rewards[i], losses[i], preferred[i], run=None) for i, sample in enumerate(samples)
        ]
        results = await self._feedback.accept_many(requests, run=options.run)
        return FeedbackBatchReply([error_item(result) for result in results])


def _feedback(
    sample: Sample, reward: float | None, loss: float | None, preferred: int | None, *, run: str | None
) -> FeedbackRequest:
    return FeedbackRequest(
        prompt=sample.prompt, responses=[sample.response], run=run, preferred=preferred, loss=loss, reward=reward
    )


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
