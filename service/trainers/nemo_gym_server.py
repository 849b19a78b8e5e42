"""NeMo Gym's resources server that verifies through the gateway.

    entrypoint: app.py        # from service.trainers.nemo_gym_server import RouterResourcesServer as Server

With `num_rollouts_per_prompt` above 1 a prompt's rollouts are judged together; `POST /compare` judges a group that the
caller holds already. Imports NeMo Gym, so it can be loaded only where NeMo Gym is; called by it.
"""

from typing import Any

from fastapi import FastAPI
from nemo_gym.base_resources_server import (  # type: ignore[import-not-found, unused-ignore]
    BaseMultiRewardVerifyResponse,
    BaseResourcesServerConfig,
    BaseVerifyRequest,
    SimpleResourcesServer,
)
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from service.trainers.conversation import prompt_text
from service.trainers.nemo_gym import Cohorts, input_messages, output_messages, verdict_of
from service.trainers.samples import Sample, SampleScorer, reference_text, scorer_from_environment


class RouterConfig(BaseResourcesServerConfig):  # type: ignore[misc, unused-ignore]
    """Configuration of the server; `url` and `run` win over the environment's `REWARD_ROUTER_CLIENT_…`."""

    url: str | None = None
    run: str | None = None
    policy: str | None = None
    deadline_seconds: float | None = None
    num_rollouts_per_prompt: int = Field(default=1, ge=1, le=64)
    cohort_seconds: float = Field(default=1800.0, gt=0)


class RouterVerifyRequest(BaseVerifyRequest):  # type: ignore[misc, unused-ignore]
    """A rollout, and which of its cohort it is."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    expected_answer: str | None = None
    group_id: str | None = Field(default=None, alias="_ng_group_id")
    task_index: int | None = Field(default=None, alias="_ng_task_index")
    rollout_index: int | None = Field(default=None, alias="_ng_rollout_index")


class RouterVerifyResponse(BaseMultiRewardVerifyResponse):  # type: ignore[misc, unused-ignore]
    """The verdict; `decision_id` names the decision, for feedback."""

    model_config = ConfigDict(extra="allow")


class CompareRequest(BaseModel):
    """A group that is judged together; the words are those of NeMo Gym's `genrm_compare`."""

    conversation_history: list[dict[str, Any]]
    response_objs: list[dict[str, Any]]
    expected_answer: str | None = None


class RouterResourcesServer(SimpleResourcesServer):  # type: ignore[misc, unused-ignore]
    """`/verify` and `/compare` through the gateway."""

    ray_enabled = False

    config: RouterConfig
    _cohorts: Cohorts | None = PrivateAttr(default=None)

    def setup_webserver(self) -> FastAPI:
        """Return NeMo Gym's application, with `/compare`."""
        app = super().setup_webserver()
        app.post("/compare")(self.compare)
        return app  # type: ignore[no-any-return, unused-ignore]

    def scorer(self) -> SampleScorer:
        """Return who asks."""
        given = self.config
        return scorer_from_environment(
            url=given.url, run=given.run, policy=given.policy, deadline_seconds=given.deadline_seconds
        )

    async def verify(self, body: RouterVerifyRequest) -> RouterVerifyResponse:
        """Return the rollout's verdict; see `verdict_of`."""
        document = body.model_dump(mode="json", by_alias=True)
        verdict = verdict_of(await self._sample(body, document))
        found: RouterVerifyResponse = RouterVerifyResponse.model_validate({**document, **verdict})
        return found

    async def _sample(self, body: RouterVerifyRequest, document: dict[str, Any]) -> Sample:
        prompt = input_messages(document["responses_create_params"]["input"])
        response = output_messages(document["response"]["output"])
        reference = reference_text(body.expected_answer)
        if self.config.num_rollouts_per_prompt == 1 or body.rollout_index is None:
            return await self.scorer().one(prompt, response, reference)
        if self._cohorts is None:
            size, seconds = self.config.num_rollouts_per_prompt, self.config.cohort_seconds
            self._cohorts = Cohorts(self.scorer(), size, seconds)
        group = body.group_id or str(body.task_index if body.task_index is not None else prompt_text(prompt))
        return await self._cohorts.verify(group, body.rollout_index, prompt, response, reference)

    async def compare(self, body: CompareRequest) -> dict[str, Any]:
        """Return the rewards of a group; null where there is none, with the reason at its place in `failures`."""
        prompt = input_messages(body.conversation_history)
        responses = [output_messages(one["output"]) for one in body.response_objs]
        samples = await self.scorer().group(prompt, responses, reference_text(body.expected_answer))
        return {
            "rewards": [sample.reward for sample in samples],
            "failures": [sample.failure for sample in samples],
            "reward_components": [dict(sample.components) for sample in samples],
        }


if __name__ == "__main__":
    RouterResourcesServer.run_webserver()
