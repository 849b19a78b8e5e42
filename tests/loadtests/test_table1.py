"""The parts of the end-to-end table: tasks and their checkers, the policy, the DPO step, the table's arithmetic."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from loadtests.table1.judge import Checker, Pair, Verdict
from loadtests.table1.rows import table_rows, unseen_rows
from loadtests.table1.signal import signal_quality, z_scores
from loadtests.table1.summary import estimate, summarise
from loadtests.table1.task import Task
from loadtests.table1.tasks import FAMILIES, Split, check, demonstrate, draw_task, draw_tasks, split_of
from router_core.feedback import LossScale, SignalAccumulator, SignalStatistics
from router_core.records import Feedback, Signal

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from loadtests.table1.campaign import source_digest  # noqa: E402
from loadtests.table1.dpo import dpo_losses, train_online  # noqa: E402 - torch may be absent
from loadtests.table1.measure import draw_test_tasks  # noqa: E402
from loadtests.table1.policy import Policy, causal_mask, collate, log_probabilities, sample  # noqa: E402
from loadtests.table1.recipe import DpoConfig, PolicyConfig, Recipe, digest_of, unseen  # noqa: E402
from loadtests.table1.sft import new_policy  # noqa: E402
from loadtests.table1.vocabulary import Codec, build_tokenizer  # noqa: E402
from router_core.torch_threads import torch_threads  # noqa: E402

SHAPE = PolicyConfig(width=32, layers=2)


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(build_tokenizer())


@pytest.fixture(scope="module")
def policy(codec: Codec) -> Policy:
    return new_policy(codec, SHAPE, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_right_demonstrations_pass_the_checker_and_wrong_ones_do_not(family: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        task = draw_task(family, rng, Split.SFT)
        assert check(task, demonstrate(task, rng, 1.0))
        assert not check(task, demonstrate(task, rng, 0.0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["", "=", "[", "def", "(", "def f ( x ) : return", "\x00", "[ , ]", "1 " * 500])
def test_checkers_answer_about_any_text(family: str, text: str) -> None:
    assert not check(draw_task(family, np.random.default_rng(1), Split.TEST), text)


def test_code_is_checked_by_what_it_does() -> None:
    task = Task("code", "", (0, "solve", "n", 3))  # n plus 3
    assert check(task, "def solve ( n ) : return 3 + n")
    assert not check(task, "def solve ( n ) : return n + 4")
    assert not check(task, "def other ( n ) : return n + 3")


@pytest.mark.parametrize(
    "source",
    [
        "def solve ( n ) : return __import__ ( 'os' )",
        "def solve ( n ) : return n . real",
        "def solve ( n ) : return [ n for n in n ]",
        "def solve ( n , m = 3 ) : return n + 3",
        "import os",
        "def solve ( n ) : return solve ( n )",
        "def solve ( n ) : return 9 ** 9 ** 9",
    ],
)
def test_code_beyond_plain_expressions_is_refused_unrun(source: str) -> None:
    assert not check(Task("code", "", (0, "solve", "n", 3)), source)


def test_every_prompt_has_one_split_and_all_splits_are_used() -> None:
    rng = np.random.default_rng(2)
    drawn = {split: {task.prompt for task in draw_tasks(60, rng, split)} for split in Split}
    assert all(split_of(prompt) is split for split, prompts in drawn.items() for prompt in prompts)
    assert len(set().union(*drawn.values())) == sum(map(len, drawn.values()))


def test_texts_survive_the_tokenizer(codec: Codec) -> None:
    rng = np.random.default_rng(3)
    for task in draw_tasks(100, rng, Split.TEST):
        answer = demonstrate(task, rng, 0.5)
        assert codec.text(codec.response(answer)) == answer
        assert codec.pad not in codec.prompt(task.prompt)


def test_padding_does_not_change_a_probability(codec: Codec, policy: Policy) -> None:
    rng = np.random.default_rng(4)
    tasks = draw_tasks(6, rng, Split.TEST)
    prompts = [codec.prompt(task.prompt) for task in tasks]
    responses = [codec.response(demonstrate(task, rng, 0.5)) for task in tasks]
    together = log_probabilities(policy, collate(prompts, responses, codec.pad))
    alone = [
        log_probabilities(policy, collate([p], [r], codec.pad)).item() for p, r in zip(prompts, responses, strict=True)
    ]
    assert together.tolist() == pytest.approx(alone, abs=1e-4)


def test_sampling_with_the_cache_takes_the_likeliest_token_of_a_fresh_pass(codec: Codec, policy: Policy) -> None:
    prompts = [codec.prompt(task.prompt) for task in draw_tasks(4, np.random.default_rng(5), Split.TEST)]
    drawn = sample(policy, prompts, pad=codec.pad, end=codec.end, temperature=0.0, generator=torch.Generator())
    for prompt, response in zip(prompts, drawn, strict=True):
        batch = collate([prompt], [response[:-1]], codec.pad)
        logits, _ = policy(batch.ids, batch.positions, causal_mask(batch.real))
        assert logits[0, len(prompt) - 1 :].argmax(1).tolist() == response


def test_dpo_loss_by_hand() -> None:
    ratio = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    losses = dpo_losses(ratio, torch.tensor([1, 0]), 0.5)
    assert losses.tolist() == pytest.approx([math.log(1 + math.e), math.log(2)])


def test_online_dpo_moves_the_policy_towards_what_the_judge_prefers(codec: Codec, policy: Policy) -> None:
    before = copy.deepcopy(policy.state_dict())
    config = DpoConfig(steps=12, prompts=16, learning_rate=3e-3, beta=0.5, curve_every=100)
    trained, history = train_online(policy, codec, _WantsNumbers(), config, 0, draw_test_tasks(1, 0))
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    first = [pair[4] for pair in history.pairs if pair[0] == 0 and pair[4] is not None]
    assert first == pytest.approx([math.log(2)] * len(first), abs=1e-4)  # nothing learned yet: π = π₀
    assert _numbers_sampled(trained, codec) > 1.3 * _numbers_sampled(policy, codec)


def _numbers_sampled(policy: Policy, codec: Codec) -> float:
    prompts = [codec.prompt(task.prompt) for task in draw_test_tasks(10, 0)]
    generator = torch.Generator().manual_seed(0)
    drawn = sample(policy, prompts, pad=codec.pad, end=codec.end, temperature=1.0, generator=generator)
    return float(np.mean([_numbers(codec.text(ids)) for ids in drawn]))


def _numbers(text: str) -> int:
    return sum(word.isdigit() for word in text.split(" "))


class _WantsNumbers:
    """A judge whose wish can be learned in a few steps from random weights."""

    seconds = 0.0

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        counts = [[_numbers(text) for text in pair.responses] for pair in pairs]
        return [Verdict(None if a == b else int(b > a), "test", 1, "") for a, b in counts]

    def learn(self, pairs: Sequence[Pair], verdicts: Sequence[Verdict], losses: Sequence[float]) -> None:
        assert all(verdict.preferred is not None for verdict in verdicts)
        assert len(pairs) == len(losses)


def test_a_pair_has_a_truth_only_with_one_right_response() -> None:
    task = Task("arithmetic", "", (2, "+", 3))
    assert Pair(task, ("2 + 3 = 5", "2 + 3 = 6")).truth() == 0
    assert Pair(task, ("2 + 3 = 6", "2 + 3 = 5")).truth() == 1
    assert Pair(task, ("2 + 3 = 6", "2 + 3 = 7")).truth() is None


def test_the_checker_as_judge_is_never_wrong_and_leaves_the_rest_open() -> None:
    task = Task("arithmetic", "", (2, "+", 3))
    pairs = [Pair(task, ("2 + 3 = 5", "1")), Pair(task, ("1", "2 + 3 = 5")), Pair(task, ("1", "2"))]
    assert [verdict.preferred for verdict in Checker().judge(pairs)] == [0, 1, None]


def test_z_scores_are_those_that_the_posterior_learns_from() -> None:
    rng = np.random.default_rng(6)
    arms, losses = rng.integers(2, size=60), rng.normal(size=60)
    folded = SignalAccumulator(SignalStatistics.empty(2), LossScale.Z)
    wanted = [
        folded.observe(int(arm), Feedback(Signal.LOSS, float(loss)), credit=None)
        for arm, loss in zip(arms, losses, strict=True)
    ]
    assert z_scores([str(arm) for arm in arms], [float(x) for x in losses]) == pytest.approx(wanted)


def test_a_loss_that_tells_right_from_wrong_has_auc_one_and_a_blind_one_a_half() -> None:
    rng = np.random.default_rng(7)
    right = rng.random(3000) < 0.6
    telling = [[i, "code", "rm", bool(r), 0.2 + 0.01 * i % 0.01 if r else 0.9] for i, r in enumerate(right)]
    blind = [[i, "code", "rm", bool(r), float(rng.normal())] for i, r in enumerate(right)]
    assert min(signal_quality([{"pairs": telling}]).auc) > 0.99
    assert np.mean(signal_quality([{"pairs": blind}]).auc) == pytest.approx(0.5, abs=0.04)


def test_intervals_and_paired_differences_by_hand() -> None:
    found = estimate([0.4, 0.5, 0.6])
    assert found.mean == pytest.approx(0.5)
    assert found.half_width == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)  # t(0.975, 2 degrees)
    assert math.isnan(estimate([0.4]).half_width)
    runs = [_run("bayesian", seed, 0.5 + seed / 10) for seed in range(3)]
    runs += [_run("random", seed, 0.4 + seed / 10) for seed in range(3)]
    ours, other = summarise(runs)
    assert ours.difference is None
    assert other.difference is not None
    assert other.difference.mean == pytest.approx(-0.1)
    assert other.difference.half_width == pytest.approx(0.0, abs=1e-9)  # the seeds move both rows alike
    assert other.verdicts is not None
    assert other.verdicts.mean == pytest.approx(0.5)


def _run(policy: str, seed: int, accuracy: float) -> dict[str, object]:
    shares = dict.fromkeys(FAMILIES, accuracy)
    pairs = [(0, "code", "rm", True, 0.1), (0, "code", "rm", False, 0.9), (0, "code", "rm", None, None)]
    return {
        "row": policy, "policy": policy, "seed": seed, "accuracy": shares, "greedy": shares, "pairs": pairs,
        "calls": 3, "seconds": 1.0, "service_seconds": 0.5, "audits": 0, "curve": [],
    }  # fmt: skip


def test_the_table_has_every_row_of_the_paper() -> None:
    rows = table_rows(("a", "b", "c", "d"))
    assert [row.title for row in rows if not row.extra] == [
        "SFT", "RM0", "RM1", "RM2", "RM3", "Majority", "Random", "UWO", "LASER", "w/o offline", "w/o online",
        "BayesianRouter",
    ]  # fmt: skip


def test_the_second_table_has_what_was_decided() -> None:
    recipe, rows = unseen(Recipe()), unseen_rows()
    assert recipe.audits == 0.05
    assert [family for family, share in zip(FAMILIES, recipe.offline.shares, strict=True) if share] == [
        "arithmetic", "strings",
    ]  # fmt: skip
    assert {row.policy for row in rows if row.audited} == {
        "bayesian", "bayesian:none", "bayesian:paper", "stacked", "cascade:1.5",
    }  # fmt: skip
    assert {"offline", "laser", "uwo"} <= {row.policy for row in rows if not row.audited}


def test_a_digest_changes_with_any_field_of_the_recipe() -> None:
    recipe = Recipe()
    assert digest_of(recipe) == digest_of(Recipe())
    assert digest_of(recipe) != digest_of(Recipe(dpo=DpoConfig(beta=0.2)))
    assert digest_of(recipe) != digest_of(Recipe(signal="preference"))


def test_results_of_older_code_are_kept_under_another_name(tmp_path: Path) -> None:
    source = tmp_path / "router_core" / "prior.py"
    source.parent.mkdir()
    source.write_text("LAMBDA0 = 20\n", "utf-8")
    before = source_digest(tmp_path)
    assert source_digest(tmp_path) == before
    source.write_text("LAMBDA0 = 100\n", "utf-8")
    assert source_digest(tmp_path) != before
    assert source_digest() == source_digest() != before
