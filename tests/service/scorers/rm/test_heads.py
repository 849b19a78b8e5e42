"""Reward models of several labels: one head or a weighted sum is the reward, all heads are components."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from router_core.records import Instance
from service.errors import ConfigurationError
from service.pool import load_pool
from service.scorers.protocol import Scored, WorkerProtocolError
from service.scorers.rm.answers import Heads
from service.scorers.rm.build import build_reward_model
from service.scorers.rm.client import ArmConfig, VllmArm
from service.scorers.rm.probe import probe
from service.scorers.rm.render import PlainTemplate, TemplateRendering
from service.settings import Settings
from tests.service.scorers.worker_servers import Json, ScriptedWorker, Serve, soon, texts_of


class ManyLabels(ScriptedWorker):
    """Answers with the label i worth i + the length of the text, as vLLM does of a model with three labels."""

    def lengths(self, request: Json) -> tuple[int, Any]:
        data = [
            {"index": index, "label": "LABEL_2", "probs": [len(text) + 0.0, len(text) + 1.0, 2.0], "num_classes": 3}
            for index, text in enumerate(texts_of(request))
        ]
        return 200, {"data": data}


def arm_for(url: str, **options: Any) -> VllmArm:
    return VllmArm(ArmConfig(name="rm", urls=(url,), **options))


@pytest.mark.parametrize(
    ("heads", "rewards", "names"),
    [
        (Heads(head=1), [2.0, 5.0, 2.0], ["head_0", "head_1", "head_2"]),
        (
            Heads(weights={"helpful": 1.0, "honest": 0.0, "safe": -0.5}),
            [0.0, 3.0, 0.0],
            ["helpful", "honest", "safe"],
        ),
    ],
)
async def test_heads_make_the_reward_and_are_all_told(
    serve: Serve, heads: Heads, rewards: list[float], names: list[str]
) -> None:
    # Equal responses are asked once, and a request holds one conversation: the heads find their way back.
    arm = arm_for(serve(ManyLabels()), heads=heads)
    (told,) = await arm.score([Instance("p", ("a", "four", "a"))], deadline=soon())
    assert isinstance(told, Scored)
    assert told.rewards == rewards
    assert told.components == dict(zip(names, ([1.0, 4.0, 1.0], [2.0, 5.0, 2.0], [2.0] * 3), strict=True))
    await arm.close()


async def test_heads_of_a_batch_go_to_their_instances(serve: Serve) -> None:
    arm = arm_for(serve(ManyLabels()), heads=Heads(head=2), rendering=TemplateRendering(PlainTemplate()))
    first, second = await arm.score([Instance("p", ("a", "bb")), Instance("p", ("ccc",))], deadline=soon())
    assert isinstance(first, Scored)
    assert isinstance(second, Scored)
    assert (first.rewards, second.rewards) == ([2.0, 2.0], [2.0])
    assert [value - first.components["head_0"][0] for value in second.components["head_0"]] == [2.0]
    await arm.close()


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        (None, "3 classes; a reward model has one (of several labels? set `head` or `heads`)"),
        (Heads(head=3), "3 labels, and `head` in the pool file is 3: count from 0"),
        (Heads(weights={"a": 1.0, "b": 1.0}), "3 labels, and `heads` in the pool file names 2"),
    ],
)
async def test_labels_that_were_not_expected_are_named(serve: Serve, heads: Heads | None, words: str) -> None:
    arm = arm_for(serve(ManyLabels()), heads=heads)
    (error,) = await arm.score([Instance("p", ("a",))], deadline=soon())
    assert isinstance(error, WorkerProtocolError)
    assert words in str(error)
    (report,) = await probe(arm, deadline=soon())
    assert words in report.problems[0]
    await arm.close()


async def test_a_worker_of_several_labels_passes_its_probe(serve: Serve) -> None:
    arm = arm_for(serve(ManyLabels()), heads=Heads(head=0))
    (report,) = await probe(arm, deadline=soon())
    assert report.ok
    assert report.raw == 4.0
    await arm.close()


async def test_the_pool_file_names_the_heads(serve: Serve, tmp_path: Path) -> None:
    url = serve(ManyLabels())
    file = tmp_path / "pool.yaml"
    file.write_text(f"models: [{{name: rm, urls: ['{url}'], heads: {{z: 1, a: 2, m: 0}}, reward_scale: 2}}]")
    (entry,) = load_pool(file).reward_models
    arm = build_reward_model(entry, Settings(), watched=False)
    (told,) = await arm.score([Instance("p", ("a",))], deadline=soon())
    assert told == Scored([10.0], 0, {"z": [1.0], "a": [2.0], "m": [2.0]})
    await arm.close()
    for wrong in ("head: 1, heads: {a: 1}", "heads: {a: 0}", "heads: {a: .nan}"):
        file.write_text(f"models: [{{name: rm, path: rm, {wrong}}}]")
        with pytest.raises(ConfigurationError, match="head"):
            load_pool(file)
