"""The mixin by hand: losses small enough for paper, and trainers that are not TRL's are refused by name."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from service.trainers.online_dpo import LossFeedbackMixin, TrlMismatchError, pair_losses
from service.trainers.trl import RouterReward
from service.trainers.values import Accepted, Feedback, Missing, RewardItem, RewardResult, Scored

torch = pytest.importorskip("torch", reason="needs torch")


def test_losses_by_hand() -> None:
    # One pair of two tokens each; the second response's last token is padding.
    logprobs = torch.tensor([[-1.0, -1.0], [-2.0, -9.0]])
    reference = torch.tensor([[-1.5, -1.5], [-2.5, -7.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    # Log-ratios: first 1.0, second 0.5.
    first_is_better = pair_losses(logprobs, reference, mask, torch.tensor([2.0, 1.0]), 0.1, "sigmoid")
    assert first_is_better.tolist() == pytest.approx([math.log1p(math.exp(-0.1 * 0.5))])
    second_is_better = pair_losses(logprobs, reference, mask, torch.tensor([1.0, 2.0]), 0.1, "sigmoid")
    assert second_is_better.tolist() == pytest.approx([math.log1p(math.exp(0.1 * 0.5))])
    squared = pair_losses(logprobs, reference, mask, torch.tensor([1.0, 1.0]), 0.1, "ipo")
    assert squared.tolist() == pytest.approx([(0.5 - 5.0) ** 2])
    with pytest.raises(TrlMismatchError, match="loss_type is 'hinge'"):
        pair_losses(logprobs, reference, mask, torch.tensor([1.0, 1.0]), 0.1, "hinge")


class FakeRouter:
    """Answers the client's calls as told, and keeps the feedback."""

    def __init__(self, *results: RewardResult) -> None:
        self.results = list(results)
        self.given: list[Feedback] = []

    def reward_many(self, items: list[RewardItem]) -> list[RewardResult]:
        assert len(items) == len(self.results)
        return self.results

    def feedback_many(self, items: list[Feedback]) -> list[Any]:
        self.given.extend(items)
        return [Accepted(str(item.decision_id), "1-0", False) for item in items]


class Like:
    """A trainer with the methods of TRL's online DPO trainer, as far as they matter; two pairs, one token each."""

    extra = 0.0
    penalty = 0.0
    forwards = 2

    def __init__(self, reward_funcs: list[Any]) -> None:
        self.reward_funcs = reward_funcs
        self.beta = 1.0
        self.args = SimpleNamespace(loss_type="sigmoid", gradient_accumulation_steps=2)
        self.logged: dict[str, float] = {}

    def _forward(self, model: Any, prompt_ids: Any, prompt_mask: Any, completion_ids: Any, completion_mask: Any) -> Any:
        return model * torch.arange(4.0).unsqueeze(1)

    def _calculate_rewards_from_functions(self, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        given = [function(prompts=prompts, completions=completions) for function in self.reward_funcs]
        return torch.tensor([sum(reward or 0.0 for reward in row) for row in zip(*given, strict=True)])

    def training_step(self, model: Any, inputs: Any) -> Any:
        mask = torch.ones(4, 1)
        found = [self._forward(scale, None, None, None, mask) for scale in (1.0, 0.5)[: self.forwards]]
        rewards = self._calculate_rewards_from_functions(["p", "q", "p", "q"], list("abcd"), None)
        rewards[0] -= self.penalty
        sums = [(each * mask.bool()).sum(1) for each in found]
        chosen_first = rewards[:2] >= rewards[2:]
        logits = (sums[0] - sums[-1])[:2] - (sums[0] - sums[-1])[2:]
        losses = -torch.nn.functional.logsigmoid(torch.where(chosen_first, logits, -logits))
        return (losses.mean() + self.extra) / self.args.gradient_accumulation_steps

    def log(self, logs: dict[str, float]) -> None:
        self.logged = logs


def scored(name: str, *rewards: float, recorded: bool = True) -> Scored:
    return Scored(name, "r", "rm-a", rewards, None, None, 0.5, "bayesian", 0, False, recorded)


def trainer(*results: RewardResult, base: type = Like, others: tuple[Any, ...] = ()) -> tuple[Any, FakeRouter]:
    router = FakeRouter(*results)
    client: Any = router
    made = type("Trainer", (LossFeedbackMixin, base), {})([RouterReward(client=client), *others])
    return made, router


def test_each_pairs_loss_goes_to_its_decision() -> None:
    made, router = trainer(scored("d1", 2.0, 1.0), scored("d2", 1.0, 2.0))
    made.training_step(None, None)
    # Log-ratios are 0, .5, 1 and 1.5: the first pair lost by 1, the second won by 1.
    losses = [math.log1p(math.e), math.log1p(1 / math.e)]
    assert made.last_pair_losses == pytest.approx(losses)
    assert [(item.decision_id, item.run) for item in router.given] == [("d1", "r"), ("d2", "r")]
    assert [item.loss for item in router.given] == pytest.approx(losses)
    made.log({"loss": 1.0})
    assert made.logged["reward_router/losses_posted"] == 2
    assert made.logged["reward_router/share/rm-a"] == 1.0
    made.log({})
    assert "reward_router/share/rm-a" not in made.logged


def test_a_pair_without_a_reward_has_a_constant_loss_and_sends_none() -> None:
    made, router = trainer(Missing("no_worker", "away"), scored("d2", 1.0, 2.0))
    made.training_step(None, None)
    assert made.last_pair_losses == pytest.approx([math.log(2), math.log1p(1 / math.e)])
    assert [item.decision_id for item in router.given] == ["d2"]
    assert made.loss_counts.dropped == 1


def test_a_pair_that_another_function_judged_stays_in_the_training_and_sends_none() -> None:
    def other(**_: Any) -> list[float]:
        return [0.0, 0.0, 1.0, 0.0]

    made, router = trainer(Missing("no_worker", "away"), scored("d2", 1.0, 2.0), others=(other,))
    made.training_step(None, None)
    assert made.last_pair_losses == pytest.approx([math.log1p(1 / math.e)] * 2)
    assert [item.decision_id for item in router.given] == ["d2"]


def test_a_pair_whose_order_is_not_the_models_sends_none() -> None:
    made, router = trainer(scored("d1", 2.0, 1.0), scored("d2", 1.0, 1.0), base=type("P", (Like,), {"penalty": 5.0}))
    made.training_step(None, None)
    assert router.given == []
    assert made.loss_counts.overruled == 2  # the penalty turned the first, the second is a tie


def test_an_unrecorded_decision_gets_no_feedback() -> None:
    made, router = trainer(scored("d1", 2.0, 1.0, recorded=False), scored("d2", 1.0, 2.0))
    made.training_step(None, None)
    assert [item.decision_id for item in router.given] == ["d2"]


def test_a_trainer_with_another_loss_is_refused_before_anything_is_sent() -> None:
    made, router = trainer(scored("d1", 2.0, 1.0), scored("d2", 1.0, 2.0), base=type("P", (Like,), {"extra": 0.5}))
    with pytest.raises(TrlMismatchError, match=r"TRL .*mean of the pairs' losses is 0\.8.* trainer's loss is 1\.3"):
        made.training_step(None, None)
    assert router.given == []


def test_a_trainer_that_works_otherwise_is_refused() -> None:
    made, _ = trainer(scored("d1", 2.0, 1.0), scored("d2", 1.0, 2.0), base=type("P", (Like,), {"forwards": 1}))
    with pytest.raises(TrlMismatchError, match="ran _forward 1 times"):
        made.training_step(None, None)


def test_a_trainer_without_the_methods_is_refused_when_it_is_made() -> None:
    with pytest.raises(TrlMismatchError, match="there is no _forward"):
        trainer(base=object)

    class Renamed(Like):
        def _forward(self, model: Any, ids: Any) -> Any:  # type: ignore[override]
            return ids

    with pytest.raises(TrlMismatchError, match=r"_forward takes \(model, ids\), not \(model, prompt_ids"):
        trainer(base=Renamed)


def test_exactly_one_router_is_needed() -> None:
    with pytest.raises(ValueError, match="holds 0 RouterReward"):
        type("Trainer", (LossFeedbackMixin, Like), {})([lambda **_: [0.0]])
