"""The recorded worker over HTTP: same content, same score, in both renderings; the rest is refused in vLLM's words."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from router_core.dataset import load_pairs
from service.errors import ConfigurationError
from service.scorers.protocol import WorkerRejectedError, WorkerUnavailableError
from service.scorers.rm.client import ArmConfig, VllmArm
from service.scorers.rm.probe import probe
from service.scorers.rm.render import MessagesRendering, PlainTemplate, TemplateRendering
from service.scorers.transport.http import HttpPool
from service.scorers.wire import sigmoid
from service.workers.recorded import recorded_app
from tests.service.scorers.worker_servers import Json, Serve, soon
from tests.support.arms import score_items

ROWS = [
    {
        "id": f"row/{number}",
        "prompt": f"Question {number}?\n",
        "response_a": f"good “{number}”",
        "response_b": f"bad {number}",
        "label": "a",
        "rm": {
            "rm-a": {"score_a": 0.25 * number, "score_b": -1.5, "verdict": "a"},
            "rm-b": {"score_a": -2.0, "score_b": 3.0 + number, "verdict": "b"},
        },
    }
    for number in range(1, 5)
]


@pytest.fixture
def pairs(tmp_path: Path) -> list[Any]:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return load_pairs(file)


async def post(url: str, body: Any, *, path: str = "/classify") -> tuple[int, Json]:
    pool = HttpPool(url)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await pool.request("POST", path, content, deadline=soon())
    await pool.close()
    return response.status, json.loads(response.body)


@pytest.mark.parametrize("rendering", [MessagesRendering(), TemplateRendering(PlainTemplate())])
async def test_every_recorded_score_comes_back_by_content_and_model(
    serve: Serve, pairs: list[Any], rendering: Any
) -> None:
    url = serve(recorded_app(pairs, ["rm-a", "rm-b"]))
    items = [(pair.instance.prompt, response) for pair in pairs for response in pair.instance.responses]
    for model in ("rm-a", "rm-b"):
        arm = VllmArm(ArmConfig(name=model, urls=(url,), rendering=rendering))
        assert await score_items(arm, items, deadline=soon()) == [
            score for pair in pairs for score in pair.scores[model]
        ]
        await arm.close()


async def test_content_that_was_not_recorded_is_a_404_that_the_client_quotes(serve: Serve, pairs: list[Any]) -> None:
    arm = VllmArm(ArmConfig(name="rm-a", urls=(serve(recorded_app(pairs, "rm-a")),)))
    with pytest.raises(WorkerRejectedError, match="No recorded score of `rm-a`"):
        await score_items(arm, [("Question 1?\n", "never seen")], deadline=soon())
    await arm.close()


@pytest.mark.parametrize("rendering", [MessagesRendering(), TemplateRendering(PlainTemplate())])
async def test_it_passes_the_registration_probe(serve: Serve, pairs: list[Any], rendering: Any) -> None:
    arm = VllmArm(ArmConfig(name="rm-b", urls=(serve(recorded_app(pairs, ["rm-a", "rm-b"])),), rendering=rendering))
    (report,) = await probe(arm, deadline=soon())
    assert (report.ok, report.warnings, report.raw, report.served) == (True, (), 0.0, ("rm-a", "rm-b"))
    await arm.close()


async def test_the_default_answer_is_the_sigmoid_and_the_reply_has_vllm_s_fields(
    serve: Serve, pairs: list[Any]
) -> None:
    url = serve(recorded_app(pairs, "rm-b"))
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Question 1?\n"}]},
        {"role": "assistant", "content": "bad 1"},
    ]
    status, body = await post(url, {"model": "rm-b", "messages": messages, "input": "ignored"})
    assert status == 200
    assert body["data"] == [{"index": 0, "label": "LABEL_0", "probs": [sigmoid(4.0)], "num_classes": 1}]
    assert (body["object"], body["model"], body["id"][:9]) == ("list", "rm-b", "classify-")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "rm-z", "input": "x"}, 404, "The model `rm-z` does not exist."),
        ({"model": "rm-a"}, 400, "Either input or messages"),
        ({"model": "rm-a", "input": []}, 400, "empty"),
        ({"model": "rm-a", "messages": []}, 400, "empty"),
        ({"model": "rm-a", "input": ["x", 1]}, 400, "mixes"),
        ({"model": "rm-a", "input": [1, 2]}, 400, "not token ids"),
        ({"model": "rm-a", "input": "x", "truncate_prompt_tokens": 5}, 400, "never truncates"),
        ({"model": "rm-a", "messages": [[{"role": "user", "content": "x"}]]}, 400, "not a classify request"),
        (b"{", 400, "not a classify request"),
        (b"\xff", 400, ""),
    ],
)
async def test_wrong_requests_are_refused_in_vllm_s_words(
    serve: Serve, pairs: list[Any], body: Any, status: int, words: str
) -> None:
    answered, reply = await post(serve(recorded_app(pairs, "rm-a")), body)
    assert answered == reply["error"]["code"] == status
    assert words in reply["error"]["message"]
    assert set(reply["error"]) == {"message", "type", "param", "code"}


async def test_the_other_endpoints_answer_as_vllm_does(serve: Serve, pairs: list[Any]) -> None:
    pool = HttpPool(serve(recorded_app(pairs, "rm-a")))

    async def get(path: str) -> tuple[int, bytes]:
        response = await pool.request("GET", path, deadline=soon())
        return response.status, response.body

    assert await get("/health") == await get("/ping") == (200, b"")
    assert "version" in json.loads((await get("/version"))[1])
    assert [model["id"] for model in json.loads((await get("/v1/models"))[1])["data"]] == ["rm-a"]
    assert (await get("/nowhere"))[0] == 404
    assert (await get("/classify"))[0] == 405
    await pool.close()


async def test_one_hundred_concurrent_requests_each_get_their_own_answer(serve: Serve, pairs: list[Any]) -> None:
    arm = VllmArm(ArmConfig(name="rm-a", urls=(serve(recorded_app(pairs, "rm-a", delay_seconds=0.005)),)))
    wanted = [pairs[number % 4] for number in range(50)]
    found = await asyncio.gather(
        *(
            score_items(arm, [(pair.instance.prompt, text) for text in pair.instance.responses], deadline=soon())
            for pair in wanted
        )
    )
    assert found == [list(pair.scores["rm-a"]) for pair in wanted]
    await arm.close()


def test_a_model_that_was_not_recorded_is_refused_with_the_names_that_were(pairs: list[Any]) -> None:
    with pytest.raises(ConfigurationError, match="rm-a, rm-b"):
        recorded_app(pairs, "rm-z")
    with pytest.raises(ConfigurationError, match="at least one model"):
        recorded_app(pairs, [])


def test_it_needs_no_torch() -> None:
    code = "import sys, service.workers.recorded, service.scorers.rm.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def published_file() -> Path:
    file = Path(os.environ.get("RB9_DEV", Path(__file__).resolve().parents[4] / "shared" / "data" / "rb9_dev.jsonl"))
    if not file.exists():
        pytest.skip("needs the file of recorded pairs; name it in RB9_DEV")
    return file


async def test_a_file_of_real_recorded_pairs_is_served_whole(serve: Serve, published_file: Path) -> None:
    pairs = load_pairs(published_file)
    model = "FsfairX-LLaMA3-RM-v0.1"
    arm = VllmArm(
        ArmConfig(name=model, urls=(serve(recorded_app(pairs, model)),), rendering=TemplateRendering(PlainTemplate()))
    )
    items = [(pair.instance.prompt, response) for pair in pairs for response in pair.instance.responses]
    assert await score_items(arm, items, deadline=soon(30)) == [score for pair in pairs for score in pair.scores[model]]
    await arm.close()


async def until_ready(arm: VllmArm, process: asyncio.subprocess.Process) -> None:
    """Return when the worker answers. Starting Python and its imports may take many seconds on a busy machine."""
    async with asyncio.timeout(120):
        while not (await probe(arm, deadline=soon(10)))[0].ok:
            assert process.returncode is None, "the worker process ended"
            await asyncio.sleep(0.05)
    # The refusals of its start have opened the breaker, as they should.
    arm.replicas[0].admit()


async def test_a_worker_process_answers_until_it_is_told_to_end(tmp_path: Path, refused_url: str) -> None:
    port = refused_url.rsplit(":", 1)[1]
    code = (
        "import sys; from router_core.dataset import load_pairs; from service.workers.recorded import recorded_app; "
        "from service.workers.server import run_worker; "
        "run_worker(recorded_app(load_pairs(sys.argv[1]), 'rm-a'), port=int(sys.argv[2]), log_level='critical')"
    )
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n")
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(file), port)
    arm = VllmArm(ArmConfig(name="rm-a", urls=(refused_url,)))
    try:
        await until_ready(arm, process)
        assert await score_items(arm, [("Question 1?\n", "bad 1")], deadline=soon(30)) == [-1.5]
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
    with pytest.raises(WorkerUnavailableError):
        await score_items(arm, [("Question 1?\n", "bad 1")], deadline=soon())
    await arm.close()
