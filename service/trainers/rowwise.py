"""From a trainer's rows to rewards per row: what TRL's and ms-swift's reward functions have in common.

Knows groups, results and feedback; knows neither of the two trainers nor whether the client blocks. `trl` and
`ms_swift` call `plan` before they ask, and `Plan.finish` and `Plan.judged` after.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from service.trainers.conversation import Said, as_sent, completion_text, prompt_text
from service.trainers.groups import MAX_RESPONSES, Group, by_prompt, in_pairs
from service.trainers.values import (
    FATAL_CODES,
    Declined,
    Feedback,
    FeedbackResult,
    Missing,
    RewardItem,
    RewardResult,
    RouterRefusedError,
    RouterUnavailableError,
    Scored,
)

logger = logging.getLogger("reward_router")


SILENT_STEPS = 10
"""Steps without a word of the judge after which that is warned of."""


class OnMissing(StrEnum):
    """What becomes of rows for which no reward could be had."""

    NONE = "none"
    """The trainer is given None, and leaves the row out."""
    GROUP = "group"
    """The trainer is given None for all rows of the group, since beside the others it would take None for a 0."""
    RAISE = "raise"
    """The training stops, for trainers that would turn None into a 0."""


class Rows(StrEnum):
    """Which rows of a batch belong together."""

    PROMPTS = "prompts"
    """Those with the same prompt."""
    PAIRS = "pairs"
    """i and i + B, as in online DPO."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What a judge is shown: one group, its rewards, and the data set's columns of its rows.

    Args:
        prompt: its text.
        responses: their texts.
        columns: name to one value per response: ground truths, test cases and whatever else the data set holds.
        result: the rewards and the decision.
    """

    prompt: str
    responses: tuple[str, ...]
    columns: Mapping[str, tuple[Any, ...]]
    result: Scored

    def right_over_wrong(self, right: Collection[int]) -> Feedback | None:
        """Return what is known where some responses are right and the others wrong; None where all are alike.

        The feedback is a `reward`, for a run of that signal: the share of (right, wrong) pairs that the asked reward
        model put in that order, half for a tie. A `preferred` would say more than is known: it names one response that
        is better than each of the others.

        Args:
            right: indices of the right responses.
        """
        known = [(reward, index in right) for index, reward in enumerate(self.result.rewards) if reward is not None]
        pairs = [(good, bad) for good, is_right in known if is_right for bad, is_too in known if not is_too]
        if not pairs:
            return None
        ordered = sum(0.5 if good == bad else float(good > bad) for good, bad in pairs)
        return Feedback(reward=ordered / len(pairs))


Judge = Callable[[Judged], Feedback | None]
"""Says what is known about a group that was scored, as `Feedback(preferred=…)` and the like; None for nothing."""


@dataclass(frozen=True, slots=True)
class RowOptions:
    """How rows become instances, and what becomes of those without a reward.

    Args:
        rows: which rows belong together.
        on_missing: see `OnMissing`.
        max_responses: longest group; the gateway's bound.
        prompt_text: prompt, as the trainer holds it, to text. With the default, chats are sent as messages; with one of
            your own, its text is.
        completion_text: the same for responses.
        reference: the data set's column that is sent as each prompt's `reference`, what a right answer looks like, for
            rules and judges that compare; None for none.
        metadata: the data set's columns that are sent as each prompt's `metadata`, flat facts by which scorers apply
            (`applies: {metadata.task: math}` in the pool file) or judge.
    """

    rows: Rows = Rows.PROMPTS
    on_missing: OnMissing = OnMissing.NONE
    max_responses: int = MAX_RESPONSES
    prompt_text: Callable[[Any], str] = prompt_text
    completion_text: Callable[[Any], str] = completion_text
    reference: str | None = None
    metadata: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """The instances of one batch.

    Args:
        groups: the instances.
        count: n, how many rows there are.
        on_missing: see `OnMissing`.
        prompts: (n,) what is sent of each row.
        completions: (n,) the same.
        references: (n,) each prompt's reference, None for none; empty where no column holds them.
        metadata: (n,) each prompt's facts; empty where no column holds any.
    """

    groups: tuple[Group, ...]
    count: int
    on_missing: OnMissing
    prompts: Sequence[Said]
    completions: Sequence[Said]
    references: Sequence[str | None] = ()
    metadata: Sequence[Mapping[str, Any]] = ()

    def items(self) -> list[RewardItem]:
        """Return the instances as the client takes them."""
        return [
            RewardItem(
                self.prompts[group.rows[0]],
                tuple(self.completions[row] for row in group.rows),
                reference=self.references[group.rows[0]] if self.references else None,
                metadata=self.metadata[group.rows[0]] or None if self.metadata else None,
            )
            for group in self.groups
        ]

    def finish(self, results: Sequence[RewardResult]) -> list[float | None]:
        """Rewards per row, (n,); None, never a number, where there is none. The log names the codes of the reasons.

        Raises:
            RouterRefusedError: a refusal that concerns the training as a whole, not one instance.
            RouterUnavailableError: a reward is missing, and the trainer would make a 0 of it.
        """
        rewards: list[float | None] = [None] * self.count
        reasons: Counter[tuple[str, str]] = Counter()
        for group, result in zip(self.groups, results, strict=True):
            if isinstance(result, Missing):
                if result.code in FATAL_CODES:
                    raise RouterRefusedError(0, result.code, result.message)
                reasons[result.code, result.message] += len(group.rows)
                continue
            lost = [code for code in result.failures if code is not None]
            reasons.update((code, f"{result.model} gave none") for code in lost)
            if lost and self.on_missing is OnMissing.GROUP:
                continue
            for row, reward in zip(group.rows, result.rewards, strict=True):
                rewards[row] = reward
        if reasons:
            said = f"{reasons.total()} of {self.count} rewards are missing: " + "; ".join(
                f"{code}: {reason} (x{count})" for (code, reason), count in reasons.most_common(3)
            )
            if self.on_missing is OnMissing.RAISE:
                [((code, _), _)] = reasons.most_common(1)
                raise RouterUnavailableError(f"{said}. The trainer would take None for a 0, so it stops here", code)
            whole = self.on_missing is OnMissing.GROUP
            logger.warning("%s; the trainer is given None for %s", said, "their whole groups" if whole else "them")
        return rewards

    def judged(
        self, results: Sequence[RewardResult], judge: Judge | None, columns: Mapping[str, Any]
    ) -> list[Feedback]:
        """The judge's feedback on the groups that were scored and recorded."""
        if judge is None:
            return []
        found = []
        for group, result in zip(self.groups, results, strict=True):
            if isinstance(result, Scored) and result.recorded:
                given = judge(Judged(group.prompt, group.responses, _columns_of(group, columns, self.count), result))
                if given is not None:
                    found.append(given.named(result.decision_id, result.run))
        return found

    def models(self, results: Sequence[RewardResult]) -> list[str]:
        """The reward model per row, (n,); "" where there was none."""
        names = [""] * self.count
        for group, result in zip(self.groups, results, strict=True):
            for row in group.rows if isinstance(result, Scored) else ():
                names[row] = result.model if isinstance(result, Scored) else ""
        return names


def plan(
    prompts: Sequence[Any], completions: Sequence[Any], options: RowOptions, columns: Mapping[str, Any] | None = None
) -> Plan:
    """The instances of one batch.

    Args:
        prompts: (n,) texts or lists of messages.
        completions: (n,) texts or lists of messages.
        options: see `RowOptions`.
        columns: of the data set, (n,) values each.

    Raises:
        ValueError: there is no such column of references or facts, not as many completions as prompts, or something
            that cannot be put into text.
    """
    if len(prompts) != len(completions):
        raise ValueError(
            f"there are {len(prompts)} prompts and {len(completions)} completions: give one of each per row"
        )
    asked = [options.prompt_text(prompt) for prompt in prompts]
    said = [options.completion_text(completion) for completion in completions]
    groups = in_pairs(asked, said) if options.rows is Rows.PAIRS else by_prompt(asked, said, options.max_responses)
    if options.prompt_text is prompt_text:
        sent_prompts: Sequence[Said] = [as_sent(prompt) for prompt in prompts]
    else:
        sent_prompts = asked
    if options.completion_text is completion_text:
        sent_completions: Sequence[Said] = [as_sent(one, "completion", "assistant") for one in completions]
    else:
        sent_completions = said
    count, held = len(prompts), columns or {}
    references: list[str | None] = []
    if options.reference is not None:
        values = _column("reference", options.reference, held, count)
        references = [None if value is None or value == "" else str(value) for value in values]
    facts = [(name, _column("metadata", name, held, count)) for name in options.metadata]
    metadata = [
        {name: values[row] for name, values in facts if values[row] is not None} for row in range(count) if facts
    ]
    return Plan(tuple(groups), count, options.on_missing, sent_prompts, sent_completions, references, metadata)


def _column(field: str, name: str, columns: Mapping[str, Any], count: int) -> Sequence[Any]:
    """Return the column's values, (n,)."""
    values = columns.get(name)
    if not isinstance(values, list | tuple) or len(values) != count:
        raise ValueError(
            f"{field} is {name!r}, and the trainer hands over no such column with a value per row; it has "
            f"{', '.join(sorted(columns)) or 'no column'}"
        )
    return values


def metrics(results: Sequence[RewardResult]) -> dict[str, float]:
    """Return what is worth a curve: shares of missing rewards, fallbacks and models, and the mean of what each said."""
    scored = [result for result in results if isinstance(result, Scored)]
    incomplete = sum(isinstance(result, Missing) or None in result.rewards for result in results)
    found = {"reward_router/missing": incomplete / max(len(results), 1)}
    if scored:
        found["reward_router/fallback"] = sum(result.fallback for result in scored) / len(scored)
        found["reward_router/propensity"] = sum(result.propensity for result in scored) / len(scored)
        for model, count in sorted(Counter(result.model for result in scored).items()):
            found[f"reward_router/share/{model}"] = count / len(scored)
        said: dict[str, list[float]] = {}
        for result in scored:
            for name, values in (result.extra.get("components") or {}).items():
                said.setdefault(name, []).extend(value for value in values if value is not None)
        found |= {f"reward_router/component/{name}": sum(v) / len(v) for name, v in sorted(said.items()) if v}
    return found


class Silence:
    """Counts what a judge says, and warns when it has said nothing for `SILENT_STEPS` steps."""

    def __init__(self) -> None:
        self._steps = 0

    def metrics(self, results: Sequence[RewardResult], feedback: Sequence[Feedback]) -> dict[str, float]:
        """Return what is logged of one step: feedbacks, and the share of scored groups without one."""
        scored = sum(isinstance(result, Scored) and result.recorded for result in results)
        self._steps = 0 if feedback or not scored else self._steps + 1
        if self._steps == SILENT_STEPS:
            logger.warning(
                "the judge has said nothing about any group for %d steps: no feedback was sent, and the router learns "
                "nothing. Does it find its columns, and does it return a Feedback?",
                SILENT_STEPS,
            )
        silent = 1.0 - len(feedback) / scored if scored else 0.0
        return {"reward_router/feedbacks_sent": float(len(feedback)), "reward_router/judge_silent": silent}


def report_feedback(results: Sequence[FeedbackResult]) -> None:
    """Say which feedback was declined, once per call and reason.

    Raises:
        RouterRefusedError: feedback of another kind than the run's signal: none of the training's would ever count.
    """
    for answer in results:
        if isinstance(answer, Declined) and answer.code == "validation":
            raise RouterRefusedError(0, answer.code, answer.message)
    for reason, count in Counter(r.message for r in results if isinstance(r, Declined)).items():
        logger.warning("%d feedbacks were declined: %s", count, reason)


def _columns_of(group: Group, columns: Mapping[str, Any], count: int) -> dict[str, tuple[Any, ...]]:
    """The columns that have one value per row, cut to the group's rows."""
    return {
        name: tuple(values[row] for row in group.rows)
        for name, values in columns.items()
        if isinstance(values, list | tuple) and len(values) == count
    }
