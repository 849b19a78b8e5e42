"""A reward model of several labels on a real vLLM: labels are transformers' own logits, and heads make the reward."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs reward-router[train]")

import torch
from transformers import AutoConfig, LlamaForSequenceClassification

from router_core.records import Instance
from service.scorers.protocol import Scored
from service.scorers.rm.answers import Heads
from service.scorers.rm.client import ArmConfig, VllmArm
from service.scorers.rm.probe import probe
from service.scorers.rm.render import MessagesRendering, PlainTemplate, Rendering, TemplateRendering
from tests.service.scorers.worker_servers import soon
from tests.vllm.conftest import RM, SERVED, OneServer, VllmServer
from tests.vllm.reference import TOLERANCE, Reference, some_items

pytestmark = pytest.mark.slow

LABELS = 3
WEIGHTS = {"helpful": 0.7, "honest": 0.0, "safe": -0.3}


@pytest.fixture(scope="session")
def attributes(demo_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three labels with random weights and the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("attributes")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_models / RM / name, folder / name)
    config = AutoConfig.from_pretrained(demo_models / RM)
    config.num_labels = LABELS
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.mul_(20.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def server(one_server: OneServer, attributes: Path) -> VllmServer:
    """vLLM with that model, healthy."""
    return one_server.serve(attributes)


def arm_for(server: VllmServer, heads: Heads | None, rendering: Rendering | None = None) -> VllmArm:
    config = ArmConfig(
        name="rm", urls=(server.url,), model=SERVED, heads=heads, rendering=rendering or MessagesRendering()
    )
    return VllmArm(config)


@pytest.mark.parametrize("rendering", [MessagesRendering(), TemplateRendering(PlainTemplate())])
async def test_labels_are_transformers_logits(server: VllmServer, attributes: Path, rendering: Rendering) -> None:
    items = some_items(16)
    groups = [Instance(prompt, (response, "another one")) for prompt, response in items]
    expected = Reference(attributes).labels([(one.prompt, text) for one in groups for text in one.responses])
    assert max(abs(value) for row in expected for value in row) > 1
    arm = arm_for(server, Heads(weights=WEIGHTS), rendering)
    (report,) = await probe(arm, deadline=soon(60))
    assert report.problems == ()
    told = await arm.score(groups, deadline=soon(60))
    await arm.close()
    for index, one in enumerate(told):
        assert isinstance(one, Scored)
        logits = expected[2 * index : 2 * index + 2]
        for label, name in enumerate(WEIGHTS):
            assert one.components[name] == pytest.approx([row[label] for row in logits], abs=TOLERANCE)
        rewards = [sum(w * value for w, value in zip(WEIGHTS.values(), row, strict=True)) for row in logits]
        assert one.rewards == pytest.approx(rewards, abs=TOLERANCE)


async def test_one_head_is_the_reward(server: VllmServer, attributes: Path) -> None:
    prompt, response = some_items(1)[0]
    (expected,) = Reference(attributes).labels([(prompt, response)])
    arm = arm_for(server, Heads(head=2))
    (told,) = await arm.score([Instance(prompt, (response,))], deadline=soon(60))
    await arm.close()
    assert isinstance(told, Scored)
    assert told.rewards == pytest.approx([expected[2]], abs=TOLERANCE)
    assert told.components["head_0"] == pytest.approx([expected[0]], abs=TOLERANCE)


async def test_labels_that_nobody_named_are_refused_at_registration(server: VllmServer) -> None:
    arm = arm_for(server, None)
    (report,) = await probe(arm, deadline=soon(60))
    await arm.close()
    assert any("set `head` or `heads`" in problem for problem in report.problems)
