"""Reward functions for TRL's GRPO, RLOO and online DPO trainers, blocking and asynchronous.

    trainer = GRPOTrainer(..., reward_funcs=RouterReward(url="http://router:8080", run="my-run"))

Knows TRL's signature, `f(prompts, completions, completion_ids, trainer_state, **columns) -> list[float | None]`, and
imports nothing of TRL. The mixin that sends online DPO's losses back is in `online_dpo`. Anything with the same
signature (Axolotl, oumi) takes them too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from service.trainers.client import AsyncRouterClient, RouterClient
from service.trainers.groups import Group, repeats
from service.trainers.options import ClientOptions
from service.trainers.rowwise import (
    Judge,
    OnMissing,
    Plan,
    RowOptions,
    Rows,
    Silence,
    logger,
    metrics,
    plan,
    report_feedback,
)
from service.trainers.values import (
    Feedback,
    FeedbackResult,
    RewardResult,
    RouterRefusedError,
    RouterUnavailableError,
    Scored,
)

NOT_COLUMNS = frozenset({"trainer_state", "log_extra", "log_metric", "environments", "completion_ids"})
"""Keyword arguments of TRL's that are no columns of the data set."""


class _TrlReward:
    """What both reward functions share."""

    __name__ = "reward_router"
    """TRL names its metrics `rewards/reward_router/…` after it."""

    def __init__(
        self, judge: Judge | None, row_options: RowOptions | None, reference: str | None, metadata: Sequence[str]
    ) -> None:
        self.judge = judge
        self.row_options = row_options
        self.reference = reference
        self.metadata = tuple(metadata)
        self._silence = Silence()
        self.last: tuple[tuple[Group, RewardResult], ...] = ()

    def _plan(self, prompts: Sequence[Any], completions: Sequence[Any], given: Mapping[str, Any]) -> Plan:
        columns = {name: values for name, values in given.items() if name not in NOT_COLUMNS}
        options = self.row_options or RowOptions()
        if self.reference is not None:
            options = replace(options, reference=self.reference)
        if self.metadata:
            options = replace(options, metadata=self.metadata)
        planned = plan(prompts, completions, options, columns)
        if self.row_options is not None:
            return planned
        # GRPO and RLOO hand over `log_metric` and leave a None out; online DPO does neither, and makes a 0 of it.
        if "log_metric" not in given and repeats(list(prompts)):
            return replace(planned, on_missing=OnMissing.RAISE)
        return planned

    def _finish(
        self, planned: Plan, results: Sequence[RewardResult], given: Mapping[str, Any]
    ) -> tuple[list[float | None], list[Feedback]]:
        rewards = planned.finish(results)
        self.last = tuple(zip(planned.groups, results, strict=True))
        columns = {name: values for name, values in given.items() if name not in NOT_COLUMNS}
        feedback = planned.judged(results, self.judge, columns)
        found = metrics(results)
        if self.judge is not None:
            found |= self._silence.metrics(results, feedback)
        log_metric: Callable[[str, float], None] | None = given.get("log_metric")
        if log_metric is not None:
            for name, value in found.items():
                log_metric(name, value)
        log_extra: Callable[[str, list[Any]], None] | None = given.get("log_extra")
        if log_extra is not None:
            log_extra("reward_model", planned.models(results))
        return rewards, feedback


class ComponentReward:
    """What one scorer said of the batch that the router was just asked about: another function for `reward_funcs`.

        router = RouterReward(url="http://router:8080", run="my-run", policy="sum")
        trainer = GRPOTrainer(..., reward_funcs=[router, router.component("verifier")])   # reward_weights=[1.0, 0.0]

    TRL logs it as `rewards/reward_router_NAME/mean`. Nobody is asked again.

    Args:
        router: stands before it in the list.
        name: a key of the reply's `components`: a scorer, or `SCORER.PART`.
    """

    def __init__(self, router: RouterReward, name: str) -> None:
        self.router = router
        self.name = name
        self.__name__ = f"reward_router_{name}"
        self._met = False
        self._scorers: tuple[str, ...] | None = None

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Return (n,) numbers of the batch's rows; None where the scorer said nothing.

        Raises:
            ValueError: the router was not asked about as many rows just before, or nobody has that name.
        """
        rows = sum(len(group.rows) for group, _ in self.router.last)
        if rows != len(completions):
            raise ValueError(
                f"{self.__name__}: the router was last asked about {rows} rows, and these are {len(completions)}: put "
                "it behind its router in reward_funcs"
            )
        if not self._met:
            self._check_name()
        said: list[float | None] = [None] * rows
        for group, result in self.router.last:
            parts = (result.extra.get("components") or {}) if isinstance(result, Scored) else {}
            for row, value in zip(group.rows, parts.get(self.name, ()), strict=False):
                said[row] = value
        return said

    def _check_name(self) -> None:
        """Compare the name with the last replies' components and the run's scorers, which are asked for once.

        Raises:
            ValueError: the run has no scorer of that name, or the scorer answered without a component of that name.
        """
        scored = [result for _, result in self.router.last if isinstance(result, Scored)]
        told = {name for result in scored for name in result.extra.get("components") or {}}
        self._met = self.name in told
        if self._met or not scored:
            return
        if self._scorers is None:
            self._scorers = self._ask_scorers(scored[0].run)
        scorer = next((one for one in self._scorers if self.name == one or self.name.startswith(f"{one}.")), None)
        if self._scorers and (scorer is None or scorer in told):
            raise ValueError(
                f"component({self.name!r}): there is none of that name. Scorers of run {scored[0].run!r}: "
                f"{', '.join(self._scorers)}; components of the last replies: {', '.join(sorted(told))}"
            )

    def _ask_scorers(self, run: str) -> tuple[str, ...]:
        """Return the run's scorers; none, with a warning, where the gateway does not tell them."""
        try:
            return tuple(one["model"] for one in self.router.client.posterior(run)["models"])
        except (RouterRefusedError, RouterUnavailableError) as error:
            logger.warning("component(%r) is in no reply yet, and the run's scorers are not told: %s", self.name, error)
            return ()


class RouterReward(_TrlReward):
    """A reward function for `reward_funcs`: one instance per prompt, all its completions scored by one reward model.

    Args:
        options: of the client; or its fields by name (`url`, `run`, `api_key`, `deadline_seconds`, …).
        judge: says what is known about a scored group, where anything is: it is posted to `/feedback`.
        row_options: overrides which rows belong together and what becomes of missing rewards.
        client: instead of one made from the options.
        reference: the data set's column that is sent as each prompt's `reference`, for rules and judges that compare.
        metadata: columns that are sent as each prompt's `metadata`, by which scorers apply.
        fields: of `ClientOptions`.

    Attributes:
        last: the groups of the last call and their results.
    """

    def __init__(
        self,
        options: ClientOptions | None = None,
        *,
        judge: Judge | None = None,
        row_options: RowOptions | None = None,
        reference: str | None = None,
        metadata: Sequence[str] = (),
        client: RouterClient | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(judge, row_options, reference, metadata)
        self.client = client if client is not None else RouterClient(options, **fields)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Rewards per row.

        Args:
            prompts: (n,) texts or lists of messages.
            completions: (n,) texts or lists of messages.
            columns: what else TRL hands over.

        Returns:
            (n,) rewards; None where none could be had.

        Raises:
            RouterRefusedError: a wrong key, run, policy or signal: the training cannot go on.
            RouterUnavailableError: a reward is missing and the trainer would make a 0 of it (online DPO).
        """
        planned = self._plan(prompts, completions, columns)
        results = self.client.reward_many(planned.items())
        rewards, feedback = self._finish(planned, results, columns)
        self.give(feedback)
        return rewards

    def component(self, name: str) -> ComponentReward:
        """Return a reward function of what one scorer said of the batch, to stand behind this one in `reward_funcs`."""
        return ComponentReward(self, name)

    def give(self, feedback: Sequence[Feedback]) -> list[FeedbackResult]:
        """Post feedback; where the gateway is away, say so and go on.

        Raises:
            RouterRefusedError: it was refused as a whole, or is of another kind than the run's signal.
        """
        if not feedback:
            return []
        try:
            results = self.client.feedback_many(feedback)
        except RouterUnavailableError as error:
            logger.warning("%d feedbacks were not acknowledged: %s", len(feedback), error)
            return []
        report_feedback(results)
        return results


class AsyncRouterReward(_TrlReward):
    """`RouterReward` for trainers that await: TRL's GRPO and RLOO run it beside other reward functions.

    Online DPO calls its functions without awaiting them: give it `RouterReward`.
    """

    def __init__(
        self,
        options: ClientOptions | None = None,
        *,
        judge: Judge | None = None,
        row_options: RowOptions | None = None,
        reference: str | None = None,
        metadata: Sequence[str] = (),
        client: AsyncRouterClient | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(judge, row_options, reference, metadata)
        self.client = client if client is not None else AsyncRouterClient(options, **fields)

    async def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        planned = self._plan(prompts, completions, columns)
        results = await self.client.reward_many(planned.items())
        rewards, feedback = self._finish(planned, results, columns)
        await self.give(feedback)
        return rewards

    async def give(self, feedback: Sequence[Feedback]) -> list[FeedbackResult]:
        if not feedback:
            return []
        try:
            results = await self.client.feedback_many(feedback)
        except RouterUnavailableError as error:
            logger.warning("%d feedbacks were not acknowledged: %s", len(feedback), error)
            return []
        report_feedback(results)
        return results


PAIRS = RowOptions(rows=Rows.PAIRS)
"""Rows (i, i + B), None for missing rewards: what `online_dpo` asks with, which drops those pairs itself."""
