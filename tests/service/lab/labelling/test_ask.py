"""One RM asked about many instances: who is asked again, who is given up, and when the whole run ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from router_core.records import Instance
from service.errors import ConfigurationError, NoWorkerError
from service.lab.labelling.ask import AskPolicy, ModelAsker, is_failure, reason_kind
from service.lab.labelling.journal import Answer
from service.scorers.protocol import (
    Scored,
    WorkerError,
    WorkerInputError,
    WorkerProtocolError,
    WorkerRejectedError,
    WorkerTimeoutError,
    WorkerUnavailableError,
)
from service.scorers.wire import PROBE_PROMPT

FAST = AskPolicy(
    concurrency=3, batch=4, timeout_seconds=5, patience_seconds=0.2, attempts=3, tries=5, backoff_seconds=0.001
)


@dataclass
class FakeArm:
    """An RM that scores a text by its length; `fault` may answer an error for a group, by its prompt."""

    fault: Callable[[str], WorkerError | None] = lambda prompt: None
    name: str = "rm"
    available: bool = True
    calls: list[list[str]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    def applies(self, instance: Instance) -> bool:
        return True

    async def score(self, instances: Sequence[Instance], *, deadline: float) -> list[Scored | WorkerError]:
        self.calls.append([instance.prompt for instance in instances])
        self.in_flight += 1
        self.most_in_flight = max(self.in_flight, self.most_in_flight)
        await asyncio.sleep(0)
        self.in_flight -= 1
        return [self.fault(one.prompt) or Scored([float(len(text)) for text in one.responses]) for one in instances]

    def asked(self, prompt: str) -> int:
        return sum(call.count(prompt) for call in self.calls)


def instances(n: int) -> list[tuple[str, Instance]]:
    return [(f"key-{i}", Instance(f"p{i}", ("x" * i, "yy"))) for i in range(n)]


async def ask(arm: FakeArm, n: int, policy: AskPolicy = FAST) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}

    def record(new: Sequence[Answer]) -> None:
        for answer in new:
            assert answer.content not in answers
            answers[answer.content] = answer

    await ModelAsker(arm, policy, record, lambda: "http://rm: open").run(instances(n))
    return answers


async def test_each_instance_is_asked_once_within_the_bounds_of_batch_and_concurrency() -> None:
    arm = FakeArm()
    answers = await ask(arm, 30)
    assert [answers[f"key-{i}"].scores for i in range(30)] == [(float(i), 2.0) for i in range(30)]
    assert sum(map(len, arm.calls)) == 30
    assert max(map(len, arm.calls)) == 4
    assert arm.most_in_flight == 3


async def test_a_refusal_is_final_and_keeps_the_workers_words() -> None:
    refusal = WorkerRejectedError("too long: " + "w" * 500, details={"worker_status": 400})
    arm = FakeArm(lambda prompt: refusal if prompt == "p5" else None)
    answers = await ask(arm, 9)
    reason = answers["key-5"].reason
    assert reason is not None
    assert (reason_kind(reason), len(reason), arm.asked("p5")) == ("refused (400)", 200, 1)
    assert all(answers[f"key-{i}"].scores for i in range(9) if i != 5)


async def test_a_refusal_of_whoever_asks_ends_the_run() -> None:
    arm = FakeArm(lambda prompt: WorkerRejectedError("no key", details={"worker_status": 401}))
    with pytest.raises(ConfigurationError, match="api_key"):
        await ask(arm, 9)


@pytest.mark.parametrize("error", [WorkerTimeoutError("late"), WorkerProtocolError("NaN")])
async def test_an_instance_that_fails_alone_is_given_up_after_its_attempts(error: WorkerError) -> None:
    arm = FakeArm(lambda prompt: error if prompt == "p2" else None)
    answers = await ask(arm, 6)
    assert answers["key-2"].reason == f"{error.code.removeprefix('worker_')}: {error.message}"
    assert arm.asked("p2") == FAST.attempts
    assert sum(answer.scores is not None for answer in answers.values()) == 5


async def test_what_failed_with_a_batch_is_asked_again_alone() -> None:
    failed_once: set[str] = set()

    def fault(prompt: str) -> WorkerError | None:
        if prompt in failed_once:
            return None
        failed_once.add(prompt)
        return WorkerTimeoutError("late")

    arm = FakeArm(fault)
    answers = await ask(arm, 4)
    assert all(answer.scores for answer in answers.values())
    assert [len(call) for call in arm.calls] == [4, 1, 1, 1, 1]


async def test_a_worker_that_is_away_for_a_while_costs_no_instance() -> None:
    arm = FakeArm()
    down = False

    def fault(prompt: str) -> WorkerError | None:
        nonlocal down
        if prompt == "p4" and not down:
            down, arm.available = True, False
            asyncio.get_running_loop().call_later(0.1, setattr, arm, "available", True)
        return WorkerUnavailableError("refused") if not arm.available else None

    arm.fault = fault
    answers = await ask(arm, 20)
    assert all(answer.scores for answer in answers.values())
    assert len(answers) == 20


async def test_a_worker_that_stays_away_ends_the_run_and_what_came_is_kept() -> None:
    arm = FakeArm()
    kept: list[Answer] = []

    def record(new: Sequence[Answer]) -> None:
        kept.extend(new)
        arm.available = len(kept) < 8

    with pytest.raises(NoWorkerError, match=r"'rm' has been away for 0\.2 s \(http://rm: open\)"):
        await ModelAsker(arm, FAST, record, lambda: "http://rm: open").run(instances(40))
    assert 8 <= len(kept) < 40


async def test_a_worker_that_looks_well_and_never_answers_ends_the_run() -> None:
    arm = FakeArm(lambda prompt: WorkerUnavailableError("429 busy"))
    with pytest.raises(NoWorkerError, match=r"failed 5 times and answered nothing: 429 busy"):
        await ask(arm, 2)


async def test_an_instance_that_breaks_the_worker_each_time_is_given_up_while_others_are_answered() -> None:
    arm = FakeArm(lambda prompt: WorkerUnavailableError("dropped") if prompt == "p0" else None)
    answers = await ask(arm, 40)
    assert answers["key-0"].reason == "unavailable: dropped"
    assert arm.asked("p0") == FAST.tries
    assert sum(answer.scores is not None for answer in answers.values()) == 39


async def test_the_only_row_left_is_given_up_where_the_worker_answers_what_is_known_to_be_good() -> None:
    arm = FakeArm(lambda prompt: WorkerUnavailableError("dropped") if prompt == "p0" else None)
    answers = await ask(arm, 1)
    assert answers["key-0"].reason == "unavailable: dropped"
    assert is_failure(reason_kind(answers["key-0"].reason))
    assert arm.calls == [["p0"]] * FAST.tries + [[PROBE_PROMPT]]


async def test_an_input_on_which_the_worker_fails_alone_is_final_at_once() -> None:
    arm = FakeArm(lambda prompt: WorkerInputError("fails on this input alone") if prompt == "p1" else None)
    answers = await ask(arm, 3)
    assert answers["key-1"].reason == "failed: fails on this input alone"
    assert arm.asked("p1") == 1


async def test_a_worker_that_answers_no_row_and_no_probe_ends_the_run() -> None:
    arm = FakeArm(lambda prompt: WorkerProtocolError("NaN"))
    with pytest.raises(NoWorkerError, match="answered nothing: NaN"):
        await ask(arm, 2)


async def test_nothing_to_ask_is_no_call() -> None:
    arm = FakeArm(available=False)
    assert await ask(arm, 0) == {}
    assert arm.calls == []
