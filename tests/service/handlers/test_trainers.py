"""`/get_reward`, `/v1/score/evaluation` and `/remote_rm`: each trainer's words in, each trainer's words out."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from router_core.records import Instance
from service.errors import ConfigurationError
from service.scorers.admission import Ticket
from service.scorers.protocol import Scored, WorkerError, WorkerUnavailableError
from tests.support.arms import ScriptedArm
from tests.support.gateway import Gateway, open_gateway, until

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PATHS = ("/get_reward", "/v1/score/evaluation", "/remote_rm")

BODIES: dict[str, dict[str, Any]] = {
    "/get_reward": {"query": ["p1 answer"], "prompts": ["p1"], "labels": ["l"]},
    "/v1/score/evaluation": {"model": "model", "messages": ["p1 answer"]},
    "/remote_rm": {"prompt": "p1", "response": " answer", "label": None},
}


@pytest.fixture
async def gateway(valkey_server: ValkeyProcess) -> AsyncIterator[Gateway]:
    """Three RMs, the signal of trainers that score single responses."""
    async with open_gateway(valkey_server.url, signal="reward", trainer_patience_seconds=0) as opened:
        yield opened


def asked(gateway: Gateway) -> list[tuple[str, str]]:
    return [item for arm in gateway.arms for call in arm.calls for item in call]


# OpenRLHF ------------------------------------------------------------------------------------------------------------


async def test_openrlhf_the_prompt_is_cut_off_the_query(gateway: Gateway) -> None:
    reply = await gateway.client.ok(
        "/get_reward", {"query": ["Why? Because."], "prompts": ["Why?"], "labels": ["42"], "later": 1}
    )
    assert asked(gateway) == [("Why?", " Because.")]
    assert reply["rewards"] == reply["scores"] == [9.0]


async def test_the_index_is_of_the_scorer_that_was_asked(gateway: Gateway) -> None:
    first = gateway.arms[0]
    first.gate = asyncio.Event()
    call = asyncio.create_task(gateway.client.ok(f"/get_reward?policy=single:{first.name}", BODIES["/get_reward"]))

    async def under_way() -> bool:
        return bool(first.calls)

    await until(under_way, "asked")
    others = [{"name": arm.name} for arm in gateway.arms[1:]]
    pool = {"models": [{"name": first.name, "model": "other/weights"}, *others]}
    await gateway.client.ok("/admin/pool", {"pool": pool})
    first.gate.set()
    assert (await call)["extra_logs"]["rm_index"] == [0.0]


async def test_openrlhf_logs_are_numbers_and_the_rm_an_index(gateway: Gateway) -> None:
    reply = await gateway.client.ok("/get_reward", BODIES["/get_reward"])
    logs = reply["extra_logs"]
    assert all(isinstance(value, float) for values in logs.values() for value in values)
    (index,) = logs["rm_index"]
    names = [arm.name for arm in gateway.arms]
    assert [logs[f"rm_asked/{name}"] for name in names] == [[float(k == index)] for k in range(3)]
    assert gateway.arms[int(index)].calls
    said = [reply["rewards"] if k == index else [0.0] for k in range(3)]
    assert [logs[f"rm_component/{name}"] for name in names] == said
    assert [logs[f"rm_answered/{name}"] for name in names] == [[float(k == index)] for k in range(3)]
    assert 0 < logs["rm_propensity"][0] < 1


async def test_openrlhf_an_empty_batch_is_an_empty_answer(gateway: Gateway) -> None:
    for body in ({"query": [], "prompts": [], "labels": []}, {"query": []}):
        assert await gateway.client.ok("/get_reward", body) == {"rewards": [], "scores": [], "extra_logs": {}}


async def test_openrlhf_a_templated_prompt_is_scored_as_the_conversation_it_is(gateway: Gateway) -> None:
    prompt = CHATML.format("Why?")
    await gateway.client.ok("/get_reward", {"query": [prompt + "Because.<|im_end|>"], "prompts": [prompt]})
    assert asked(gateway) == [("Why?", "Because.")]


async def test_openrlhf_a_prompt_that_was_truncated_leaves_the_raw_text(gateway: Gateway) -> None:
    await gateway.client.ok("/get_reward", {"query": ["tail of a prompt. Because."], "prompts": ["head and tail"]})
    assert asked(gateway) == [("", "tail of a prompt. Because.")]


async def test_openrlhf_raw_text_is_left_alone_where_the_url_says_so(gateway: Gateway) -> None:
    prompt = CHATML.format("Why?")
    query = prompt + "Because.<|im_end|>"
    await gateway.client.ok("/get_reward?text=raw&policy=single:rm-a", {"query": [query], "prompts": [prompt]})
    await gateway.client.ok("/get_reward?text=raw&policy=single:rm-a", {"query": [query]})
    assert asked(gateway) == [(prompt, "Because.<|im_end|>"), ("", query)]


async def test_openrlhf_samples_of_one_prompt_that_come_one_by_one_meet_one_rm(gateway: Gateway) -> None:
    bodies = [
        {"query": [f"prompt {p} response {r}"], "prompts": [f"prompt {p}"], "labels": [None]}
        for p in range(16)
        for r in range(4)
    ]
    replies = await asyncio.gather(*(gateway.client.ok("/get_reward", body) for body in bodies))
    index = [reply["extra_logs"]["rm_index"][0] for reply in replies]
    assert all(len(set(index[p * 4 : p * 4 + 4])) == 1 for p in range(16))
    assert len(set(index)) > 1


async def test_openrlhf_lists_that_do_not_fit_are_refused(gateway: Gateway) -> None:
    response = await gateway.client.post("/get_reward", {"query": ["a", "b"], "prompts": ["a"]})
    assert (response.status, response.error["code"]) == (422, "validation")
    assert "prompts holds 1" in response.error["message"]


# LLaMA-Factory -------------------------------------------------------------------------------------------------------


async def test_llamafactory_a_batch_of_texts_gets_a_score_each(gateway: Gateway) -> None:
    texts = [CHATML.format(f"Question {i}?") + "x" * i + "<|im_end|>\n" for i in range(5)]
    reply = await gateway.client.ok("/v1/score/evaluation", {"model": "model", "messages": texts})
    assert reply["scores"] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert sorted(asked(gateway)) == [(f"Question {i}?", "x" * i) for i in range(5)]
    assert set(reply["models"]) <= {arm.name for arm in gateway.arms}
    assert (await gateway.client.ok("/v1/score/evaluation", {"messages": []}))["scores"] == []


async def test_llamafactory_is_waited_for_because_its_client_does_not_try_again(valkey_server: ValkeyProcess) -> None:
    arm = ScriptedArm("rm")
    arm.error = WorkerUnavailableError("away")
    async with open_gateway(valkey_server.url, arms=[arm], trainer_patience_seconds=30) as gateway:

        async def heal() -> None:
            await until(lambda: arm.calls, "the RM is asked")
            arm.error = None

        reply, _ = await asyncio.gather(
            gateway.client.ok("/v1/score/evaluation", BODIES["/v1/score/evaluation"]), heal()
        )
        assert reply["scores"] == [9.0]


# slime ---------------------------------------------------------------------------------------------------------------


async def test_slime_the_body_is_the_reward(gateway: Gateway) -> None:
    response = await gateway.client.post("/remote_rm", BODIES["/remote_rm"])
    assert response.body == b"7.0"
    assert response.headers["content-type"] == "application/json"


async def test_slime_a_reward_key_makes_it_an_object(gateway: Gateway) -> None:
    reply = await gateway.client.ok("/remote_rm?reward_key=score", BODIES["/remote_rm"])
    assert reply["score"] == 7.0
    assert gateway.decision(reply["decision_id"]).rewards == [7.0]
    assert reply["model"] in {arm.name for arm in gateway.arms}


async def test_slime_prompts_may_be_messages_or_templated(gateway: Gateway) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    for prompt in (messages, messages[1:], CHATML.format("Why?"), "Why?"):
        await gateway.client.ok("/remote_rm?policy=single:rm-a", {"prompt": prompt, "response": "So.<|im_end|>"})
    assert asked(gateway) == [("System: Be brief.\n\nUser: Why?", "So.")] + [("Why?", "So.")] * 3


async def test_slime_a_message_with_an_image_is_refused_by_name(gateway: Gateway) -> None:
    prompt = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]
    response = await gateway.client.post("/remote_rm", {"prompt": prompt, "response": "a"})
    assert (response.status, response.error["code"]) == (422, "validation")
    assert "image_url" in response.error["message"]


# All of them ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
async def test_the_url_names_run_policy_and_scale(gateway: Gateway, path: str) -> None:
    run = gateway.run + "-other"
    for _ in range(2):
        await gateway.client.ok(f"{path}?run={run}&policy=single:rm-b&normalize=false", BODIES[path])
    assert [len(arm.calls) for arm in gateway.arms] == [0, 2, 0]
    assert (await gateway.client.get(f"/posterior?run={run}")).status == 200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("query", "names"),
    [("runn=a", "runn"), ("normalize=maybe", "maybe"), ("text=x", "text"), ("run=a&run=b", "twice"), ("run=", "empty")],
)
async def test_a_url_that_makes_no_sense_is_refused(gateway: Gateway, path: str, query: str, names: str) -> None:
    response = await gateway.client.post(f"{path}?{query}", BODIES[path])
    assert (response.status, response.error["code"]) == (422, "validation")
    assert names in response.error["message"]


@pytest.mark.parametrize("path", PATHS)
async def test_no_reward_is_an_error_that_may_be_retried_never_a_zero(gateway: Gateway, path: str) -> None:
    for arm in gateway.arms:
        arm.available = False
    response = await gateway.client.post(path, BODIES[path])
    assert (response.status, response.error["code"]) == (503, "no_worker")
    assert "retry-after" in response.headers


@pytest.mark.parametrize("path", PATHS)
async def test_an_unknown_scale_is_an_error_that_may_be_retried_until_it_is_known(gateway: Gateway, path: str) -> None:
    tries = [await gateway.client.post(f"{path}?normalize=true", BODIES[path]) for _ in range(4)]
    if path == "/v1/score/evaluation":
        # Its text has no prompt, so nothing sticks: another RM may be asked each time.
        assert {response.status for response in tries} <= {200, 503}
    else:
        assert [response.status for response in tries] == [503, 503, 503, 200]
    assert (tries[0].error["code"], tries[0].headers["retry-after"]) == ("no_reward", "1")


@pytest.mark.parametrize("path", PATHS)
async def test_what_every_rm_refuses_is_final_and_logged_once(
    gateway: Gateway, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    for arm in gateway.arms:
        arm.refuses = lambda text: "answer" in text
    for _ in range(2):
        response = await gateway.client.post(path, BODIES[path])
        assert (response.status, response.error["code"]) == (422, "worker_rejected")
    (record,) = [record for record in caplog.records if "has no reward for a sample" in record.message]
    fields = record.__dict__["fields"]
    assert (fields["route"], fields["code"]) == (path, "worker_rejected")
    assert "worker_rejected" in record.message


async def test_of_two_failures_in_a_batch_the_final_one_is_told(gateway: Gateway) -> None:
    gateway.arms[0].refuses = lambda text: text == "bad"
    gateway.arms[1].available = gateway.arms[2].available = False
    body = {"messages": ["good", "bad"]}
    response = await gateway.client.post("/v1/score/evaluation?policy=single:rm-a", body)
    assert (response.status, response.error["code"]) == (422, "worker_rejected")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "bad_request"),
        (b"{}", 422, "validation"),
        (b"[1]", 422, "validation"),
        (b"\xff", 400, "bad_request"),
    ],
)
async def test_a_body_that_is_no_request_is_refused(
    gateway: Gateway, path: str, body: bytes, status: int, code: str
) -> None:
    response = await gateway.client.request("POST", path, body)
    assert (response.status, response.error["code"]) == (status, code)


@pytest.mark.parametrize("path", PATHS)
async def test_other_methods_are_refused(gateway: Gateway, path: str) -> None:
    response = await gateway.client.get(path)
    assert (response.status, response.error["code"]) == (405, "method_not_allowed")


@pytest.mark.parametrize("path", PATHS)
async def test_a_key_may_stand_in_the_url_as_a_password(valkey_server: ValkeyProcess, path: str) -> None:
    async with open_gateway(valkey_server.url, api_keys=("secret:key",), wait=False) as gateway:

        async def status(header: str) -> int:
            return (await gateway.client.post(path, BODIES[path], authorization=header)).status

        def basic(words: str) -> str:
            return "Basic " + base64.b64encode(words.encode()).decode()

        assert await status(basic("any:secret:key")) == 200
        assert await status("Bearer secret:key") == 200
        for wrong in (basic("any:other"), basic("secret:key"), "Basic !!!", "Basic", "Basic " + "a" * 5):
            assert await status(wrong) == 401


async def test_the_openapi_page_has_them(gateway: Gateway) -> None:
    document = (await gateway.client.get("/openapi.json")).json
    for path in PATHS:
        for suffix in ("", "/feedback"):
            assert document["paths"][path + suffix]["post"]["requestBody"]["content"]["application/json"]["example"]


# Feedback without an id ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
async def test_feedback_names_the_decision_by_what_the_trainer_sent(gateway: Gateway, path: str) -> None:
    await gateway.client.ok(path, BODIES[path])
    values = {"reward": 0.75} if path == "/remote_rm" else {"reward": [0.75]}
    reply = await gateway.client.ok(f"{path}/feedback", {**BODIES[path], **values})
    first = reply if path == "/remote_rm" else reply["results"][0]
    assert first["duplicate"] is False
    (event,) = gateway.events()
    assert (event.decision_id, event.feedback.value) == (first["decision_id"], 0.75)
    again = await gateway.client.ok(f"{path}/feedback", {**BODIES[path], **values})
    assert (again if path == "/remote_rm" else again["results"][0])["duplicate"] is True
    assert len(gateway.events()) == 1


async def test_feedback_lists_have_a_value_per_sample(gateway: Gateway) -> None:
    body = {"query": ["a 1", "a 2"], "prompts": ["a", "a"]}
    await gateway.client.ok("/get_reward", body)
    response = await gateway.client.post("/get_reward/feedback", {**body, "reward": [1.0]})
    assert (response.status, response.error["details"]["field"]) == (422, "reward")
    results = (await gateway.client.ok("/get_reward/feedback", {**body, "reward": [1.0, 0.0]}))["results"]
    assert [result["duplicate"] for result in results] == [False, False]


async def test_feedback_of_a_templated_sample_needs_no_more_than_the_sample(gateway: Gateway) -> None:
    prompt = CHATML.format("Why?")
    body = {"query": [prompt + "Because.<|im_end|>"], "prompts": [prompt]}
    await gateway.client.ok(f"/get_reward?run={gateway.run}", body)
    await gateway.client.ok(f"/get_reward/feedback?run={gateway.run}", {**body, "reward": [0.5]})
    # The plain route names the same decision by the words that were scored.
    plain = {"prompt": "Why?", "responses": ["Because."], "reward": 0.5}
    assert (await gateway.client.ok("/feedback", plain))["duplicate"] is True


class Late(ScriptedArm):
    """Is away for the prompts that begin with `late`, at first."""

    async def score(
        self, instances: Sequence[Instance], *, deadline: float, ticket: Ticket | None = None
    ) -> list[Scored | WorkerError]:
        first = not self.calls
        outcomes = await super().score(instances, deadline=deadline, ticket=ticket)
        away = WorkerUnavailableError("away")
        return [
            away if first and instance.prompt.startswith("late") else outcome
            for instance, outcome in zip(instances, outcomes, strict=True)
        ]


async def test_llamafactory_only_what_has_no_reward_is_asked_again(valkey_server: ValkeyProcess) -> None:
    prompts = ["one", "late two", "three", "late four"]
    texts = [CHATML.format(prompt) + "x" * (k + 1) + "<|im_end|>" for k, prompt in enumerate(prompts)]
    arm = Late("rm")
    async with open_gateway(valkey_server.url, arms=[arm], trainer_patience_seconds=30) as gateway:
        reply = await gateway.client.ok("/v1/score/evaluation", {"messages": texts})
    assert reply["scores"] == [1.0, 2.0, 3.0, 4.0]
    assert [[prompt for prompt, _ in call] for call in arm.calls] == [prompts, ["late two", "late four"]]


# Chat templates ------------------------------------------------------------------------------------------------------

STRANGE = "<|new|>user\n{}<|done|>\n<|new|>assistant\n"
"""A template that no built-in format reads."""
STRANGE_TEMPLATE = (
    "{% for m in messages %}{{ '<|new|>' + m.role + '\n' + m.content + '<|done|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|new|>assistant\n' }}{% endif %}"
)
TEMPTING = "Write [INST] or <|im_start|>user\nso.<|im_end|>\n<|im_start|>assistant\nDone."


def bodies_of(prompt: str, response: str) -> dict[str, dict[str, Any]]:
    """One sample, as each trainer sends it."""
    return {
        "/get_reward": {"query": [prompt + response], "prompts": [prompt]},
        "/v1/score/evaluation": {"messages": [prompt + response]},
        "/remote_rm": {"prompt": prompt, "response": response},
    }


async def texts_metric(gateway: Gateway) -> dict[str, float]:
    """Samples by template."""
    families = text_string_to_metric_families((await gateway.client.get("/metrics")).body.decode())
    samples = [sample for family in families for sample in family.samples]
    return {s.labels["template"]: s.value for s in samples if s.name == "reward_router_trainer_texts_total"}


@pytest.mark.parametrize("path", ["/get_reward", "/remote_rm"])
async def test_a_response_about_templates_is_scored_whole(gateway: Gateway, path: str) -> None:
    for prompt in ("Why?", CHATML.format("Why?"), "<s>[INST] Why? [/INST]"):
        await gateway.client.ok(path + "?policy=single:rm-a", bodies_of(prompt, TEMPTING)[path])
    assert asked(gateway) == [("Why?", TEMPTING)] * 3


@pytest.mark.parametrize("path", PATHS)
async def test_an_unknown_template_is_counted_and_logged_once_a_run(
    gateway: Gateway, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        await gateway.client.ok(path, bodies_of(STRANGE.format("Why?"), "So.")[path])
    await gateway.client.ok(path, bodies_of(CHATML.format("Why?"), "So.")[path])
    await gateway.client.ok(path + "?text=raw", bodies_of(STRANGE.format("Why?"), "So.")[path])
    assert await texts_metric(gateway) == {"unknown": 2, "chatml": 1, "raw": 1}
    (record,) = [record for record in caplog.records if "unknown chat template" in record.message]
    assert "chat_templates" in record.message
    assert record.__dict__["fields"] == {"run": gateway.run}


@pytest.mark.parametrize("path", PATHS)
async def test_an_unknown_template_is_refused_where_the_operator_says_so(
    valkey_server: ValkeyProcess, path: str
) -> None:
    async with open_gateway(valkey_server.url, signal="reward", on_unknown_template="refuse") as gateway:
        strange, known = (bodies_of(t.format("Why?"), "So.")[path] for t in (STRANGE, CHATML))
        response = await gateway.client.post(path, strange)
        assert (response.status, response.error["code"]) == (422, "validation")
        assert "name the policy's tokenizer directory" in response.error["message"]
        await gateway.client.ok(path, known)
        await gateway.client.ok(path + "?text=raw", strange)


@pytest.mark.parametrize("path", PATHS)
async def test_the_operators_template_is_learned(valkey_server: ValkeyProcess, path: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.jinja"
    file.write_text(STRANGE_TEMPLATE, "utf-8")
    async with open_gateway(valkey_server.url, signal="reward", chat_templates=(file,)) as gateway:
        await gateway.client.ok(path, bodies_of(STRANGE.format("Why?"), "So.<|done|>")[path])
        assert asked(gateway) == [("Why?", "So.")]
        assert await texts_metric(gateway) == {str(file): 1}


async def test_a_template_file_that_says_nothing_stops_the_start(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"chat_templates: .*nowhere.*name a tokenizer's directory"):
        async with open_gateway(valkey_server.url, chat_templates=(tmp_path / "nowhere.jinja",)):
            pass


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "prompt is []: give"),
        ([{"role": "user"}], "prompt[0] has no content"),
        ([{"role": None, "content": "Why?"}], "prompt[0].role is None: give"),
    ],
)
async def test_slime_messages_that_say_nothing_are_refused(gateway: Gateway, prompt: Any, words: str) -> None:
    response = await gateway.client.post("/remote_rm", {"prompt": prompt, "response": "So."})
    assert (response.status, response.error["code"]) == (422, "validation")
    assert words in response.error["message"]
    assert asked(gateway) == []


async def test_slime_messages_of_share_gpt_are_read(gateway: Gateway) -> None:
    await gateway.client.ok("/remote_rm", {"prompt": [{"from": "human", "value": "Why?"}], "response": "So."})
    assert asked(gateway) == [("Why?", "So.")]
