"""TRL's online DPO with its per-pair losses sent back to the gateway: the signal `loss` of the paper.

    class Trainer(LossFeedbackMixin, OnlineDPOTrainer):
        pass

    trainer = Trainer(..., reward_funcs=RouterReward(url="http://router:8080", run="my-run"))

The trainer keeps a pair's loss in a local variable. The mixin copies none of its code: it watches what goes in and out
of three methods (`_forward`, `_calculate_rewards_from_functions`, `training_step`), computes the losses from that, and
checks in every step that their mean is the loss that the trainer returns. Where the installed TRL differs from what
this needs, it says so with TRL's version instead of sending wrong losses.

A pair for which no reward could be had would be trained on as a tie, since this trainer takes None for 0. The mixin
takes it out: it empties both completion masks, so that the pair's loss is a constant without gradient.

Knows TRL 1.16's `OnlineDPOTrainer` by the three methods; imports torch when a step runs, and nothing of TRL.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from service.trainers.rowwise import OnMissing, RowOptions, Rows, metrics
from service.trainers.trl import RouterReward
from service.trainers.values import Feedback, RewardResult, RouterClientError, Scored

if TYPE_CHECKING:
    import torch

WRITTEN_FOR = "1.16"
"""The TRL that this was written for and is tested with."""

NEEDED = {
    "_forward": ("model", "prompt_ids", "prompt_mask", "completion_ids", "completion_mask"),
    "_calculate_rewards_from_functions": ("prompts", "completions", "completion_ids_list"),
    "training_step": ("model", "inputs"),
}
"""Method to the first parameters that it must have."""


class TrlMismatchError(RouterClientError):
    """The installed TRL's online DPO trainer is not what the mixin was written for."""

    def __init__(self, found: str) -> None:
        super().__init__(
            f"TRL {_trl_version()}: {found}. LossFeedbackMixin was written for TRL {WRITTEN_FOR}: install that, or use "
            "OnlineDPOTrainer without the mixin and give feedback by other means (docs/trainers/trl.md)"
        )


@dataclass(slots=True)
class _Step:
    """What one training step showed on its way."""

    forwards: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """(2B, T) log-probabilities and completion masks: of the policy, then of the reference."""
    rewards: torch.Tensor | None = None
    """(2B,); the trainer subtracts its penalty for a missing end of text in place, so it lands here too."""


@dataclass(slots=True)
class LossCounts:
    """Pairs of a training, by what became of their losses."""

    posted: int = 0
    declined: int = 0
    """Sent, and not taken by the gateway."""
    dropped: int = 0
    """Without a reward: taken out of the training."""
    overruled: int = 0
    """The trainer's order is not the asked reward model's (other functions, penalties, ties): no loss is sent."""


class LossFeedbackMixin:
    """Goes before `OnlineDPOTrainer` among the bases; see the module.

    Needs exactly one `RouterReward` among `reward_funcs`, and a gateway whose signal is `loss`.

    Attributes:
        last_pair_losses: (B,) losses of the last step, as a list.
        loss_counts: see `LossCounts`.

    Raises:
        TrlMismatchError: the trainer is not what this was written for.
        ValueError: not exactly one `RouterReward`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_trainer(super())
        super().__init__(*args, **kwargs)
        functions: list[Any] = getattr(self, "reward_funcs", [])
        ours = [function for function in functions if isinstance(function, RouterReward)]
        if len(ours) != 1:
            raise ValueError(f"reward_funcs holds {len(ours)} RouterReward: LossFeedbackMixin needs exactly one")
        self._router_reward = ours[0]
        self._router_alone = len(functions) == 1
        options = ours[0].row_options or RowOptions()
        ours[0].row_options = replace(options, rows=Rows.PAIRS, on_missing=OnMissing.NONE)
        self._router_step: _Step | None = None
        self.last_pair_losses: list[float] = []
        self.loss_counts = LossCounts()
        self._router_results: list[RewardResult] = []

    def _forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        logprobs: torch.Tensor = super()._forward(*args, **kwargs)  # type: ignore[misc]
        if self._router_step is not None:
            mask = kwargs["completion_mask"] if "completion_mask" in kwargs else args[4]
            self._router_step.forwards.append((logprobs.detach(), mask))
        return logprobs

    def _calculate_rewards_from_functions(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards: torch.Tensor = super()._calculate_rewards_from_functions(*args, **kwargs)  # type: ignore[misc]
        if self._router_step is not None:
            self._router_step.rewards = rewards
            self._router_drop(self._router_step)
        return rewards

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The trainer's own step, and the losses of its pairs sent afterwards.

        Raises:
            TrlMismatchError: the step was not what this was written for.
            RouterRefusedError: the gateway refused the feedback as a whole: is its signal `loss`?
        """
        self._router_step = step = _Step()
        try:
            loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._router_step = None
        trainer: Any = self
        losses = _losses_of(step, float(trainer.beta), str(trainer.args.loss_type))
        mean = float(losses.mean())
        _check_mean(mean, float(loss) * trainer.args.gradient_accumulation_steps, losses.dtype)
        self.last_pair_losses = losses.tolist()
        self._router_results.extend(result for _, result in self._router_reward.last)
        self._router_post(step)
        return loss

    def _router_drop(self, step: _Step) -> None:
        """Empty the masks of pairs without a reward, unless other reward functions have an opinion of them."""
        for group, result in self._router_reward.last:
            if isinstance(result, Scored) and None not in result.rewards:
                continue
            self.loss_counts.dropped += 1
            if self._router_alone:
                for _, mask in step.forwards:
                    mask[list(group.rows)] = 0

    def _router_post(self, step: _Step) -> None:
        assert step.rewards is not None
        rewards = step.rewards.tolist()
        feedback = []
        for (first, second), result, loss in self._router_pairs():
            if not isinstance(result, Scored) or None in result.rewards or not result.recorded:
                continue
            own = [reward for reward in result.rewards if reward is not None]
            if own[0] == own[1] or (own[0] > own[1]) != (rewards[first] >= rewards[second]):
                self.loss_counts.overruled += 1
            elif math.isfinite(loss):
                feedback.append(Feedback(decision_id=result.decision_id, run=result.run, loss=loss))
        accepted = sum(answer.ok for answer in self._router_reward.give(feedback))
        self.loss_counts.posted += accepted
        self.loss_counts.declined += len(feedback) - accepted

    def _router_pairs(self) -> list[tuple[tuple[int, ...], Any, float]]:
        pairs = self._router_reward.last
        if len(pairs) != len(self.last_pair_losses):
            raise TrlMismatchError(f"a step of {len(self.last_pair_losses)} pairs asked for {len(pairs)} rewards")
        return [(group.rows, result, self.last_pair_losses[group.rows[0]]) for group, result in pairs]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's log, with what happened since the last one (`rowwise.metrics`) and the counts so far."""
        counts = self.loss_counts
        words = {
            **(metrics(self._router_results) if self._router_results else {}),
            "reward_router/losses_posted": float(counts.posted),
            "reward_router/losses_declined": float(counts.declined),
            "reward_router/pairs_dropped": float(counts.dropped),
            "reward_router/pairs_overruled": float(counts.overruled),
        }
        self._router_results.clear()
        super().log({**logs, **words}, *args, **kwargs)  # type: ignore[misc]


def check_trainer(trainer: object) -> None:
    """The trainer behind the mixin has the three methods with the parameters that the mixin relies on.

    Args:
        trainer: its class, or `super()` of the mixin.

    Raises:
        TrlMismatchError: it has not.
    """
    for name, needed in NEEDED.items():
        method: Callable[..., Any] | None = getattr(trainer, name, None)
        if method is None:
            raise TrlMismatchError(f"there is no {name} behind LossFeedbackMixin (is OnlineDPOTrainer the next base?)")
        found = [parameter for parameter in inspect.signature(method).parameters if parameter != "self"]
        if tuple(found[: len(needed)]) != needed:
            raise TrlMismatchError(f"{name} takes ({', '.join(found)}), not ({', '.join(needed)}, ...)")


def pair_losses(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    completion_mask: torch.Tensor,
    rewards: torch.Tensor,
    beta: float,
    loss_type: str,
) -> torch.Tensor:
    """DPO loss of each pair: -log sigmoid(beta * h) or (h - 1/(2 beta))^2, h = the log-ratios' difference.

    Rafailov et al. 2023 (arXiv 2305.18290), equation 7; Azar et al. 2023 (arXiv 2310.12036) for `ipo`.

    Args:
        logprobs: (2B, T) of the policy; rows i and i + B are a pair.
        ref_logprobs: (2B, T) of the reference.
        completion_mask: (2B, T), 1 where there is a token.
        rewards: (2B,); the larger of a pair is chosen, the first on a tie.
        beta: strength of the reference.
        loss_type: `sigmoid` or `ipo`.

    Returns:
        (B,) losses.

    Raises:
        TrlMismatchError: another loss type.
    """
    from torch.nn.functional import logsigmoid

    first, second = rewards.chunk(2)
    sign = (first >= second) * 2 - 1
    kept = completion_mask.bool()
    ratios = (logprobs * kept).sum(1) - (ref_logprobs * kept).sum(1)
    first_ratio, second_ratio = ratios.chunk(2)
    logits = (first_ratio - second_ratio) * sign
    if loss_type == "sigmoid":
        return -logsigmoid(beta * logits)
    if loss_type == "ipo":
        return (logits - 1 / (2 * beta)) ** 2
    raise TrlMismatchError(f"loss_type is {loss_type!r}, of which only sigmoid and ipo are known here")


def _losses_of(step: _Step, beta: float, loss_type: str) -> torch.Tensor:
    if len(step.forwards) != 2 or step.rewards is None:
        raise TrlMismatchError(
            f"a step ran _forward {len(step.forwards)} times and asked for rewards "
            f"{'once' if step.rewards is not None else 'never'}, instead of twice and once"
        )
    (logprobs, mask), (ref_logprobs, _) = step.forwards
    if logprobs.shape != ref_logprobs.shape or logprobs.shape != mask.shape or len(step.rewards) != len(mask):
        shapes = ", ".join(str(tuple(t.shape)) for t in (logprobs, ref_logprobs, mask, step.rewards))
        raise TrlMismatchError(f"log-probabilities, references, masks and rewards have shapes {shapes}")
    return pair_losses(logprobs, ref_logprobs, mask, step.rewards, beta, loss_type)


def _check_mean(ours: float, theirs: float, dtype: torch.dtype) -> None:
    """The mean of the losses is the trainer's loss, up to rounding in the dtype of the log-probabilities."""
    import torch

    if math.isfinite(theirs) and abs(ours - theirs) > 1e-4 + 16 * torch.finfo(dtype).eps * max(abs(theirs), 1.0):
        raise TrlMismatchError(f"the mean of the pairs' losses is {ours:.6f} and the trainer's loss is {theirs:.6f}")


def _trl_version() -> str:
    try:
        return metadata.version("trl")
    except metadata.PackageNotFoundError:
        return "(not installed)"
