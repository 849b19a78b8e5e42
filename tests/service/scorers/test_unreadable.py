"""Answers and bodies that no parser likes: the one input, or the one request, fails in words, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from starlette.requests import Request

from router_core.records import Instance, LabelledPair
from service.encoders.wire import EmbeddingsAnswer, WireError, decode_answer
from service.scorers.http.client import HttpConfig, HttpScorer
from service.scorers.judge.client import JudgeConfig, JudgeScorer
from service.scorers.judge.dialogue import ChatOptions
from service.scorers.judge.rubrics import load_rubric
from service.scorers.protocol import Scored, Scorer, WorkerError
from service.scorers.rm.client import ArmConfig, VllmArm
from service.scorers.rm.render import PlainTemplate, TemplateRendering
from service.scorers.transport.http import HttpPool
from service.workers.recorded import recorded_app
from tests.service.scorers.http.test_client import Service
from tests.service.scorers.judge_server import ScriptedJudge
from tests.service.scorers.worker_servers import ScriptedWorker, Serve, soon

BAD = "POISON"
DEEP = b"[" * 3000 + b"]" * 3000
LATIN = (
    '{"results": [{"rewards": [1.0, 2.0], "abstain": "é"}], "choices": [{"message": {"content": "é"}}], "error": "é"}'
)
UNREADABLE = {
    "an answer too deep": b'{"x": ' + DEEP + b"}",
    "an error too deep": b'{"error": ' + DEEP + b"}",
    "latin-1": LATIN.encode("latin-1"),
}


class Spoiled:
    """An ASGI server that answers requests with `BAD` in them as told, and hands on the others."""

    def __init__(self, app: Any, status: int, content: bytes) -> None:
        self._app, self._status, self._content = app, status, content

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = await Request(scope, receive).body()

        async def again() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        if BAD.encode() not in body:
            await self._app(scope, again, send)
            return
        headers = [(b"content-length", str(len(self._content)).encode())]
        await send({"type": "http.response.start", "status": self._status, "headers": headers})
        await send({"type": "http.response.body", "body": self._content})


def an_rm(url: str) -> Scorer:
    return VllmArm(ArmConfig(name="s", urls=(url,), rendering=TemplateRendering(PlainTemplate())))


def a_service(url: str) -> Scorer:
    return HttpScorer(HttpConfig(name="s", kind="http", urls=(url,)))


def a_judge(url: str) -> Scorer:
    options = ChatOptions("judge-model")
    return JudgeScorer(JudgeConfig(name="s", urls=(url,), options=options, rubric=load_rubric("helpfulness")))


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE.keys())
@pytest.mark.parametrize("status", [200, 400, 500])
@pytest.mark.parametrize(("app", "make"), [(ScriptedWorker, an_rm), (Service, a_service), (ScriptedJudge, a_judge)])
async def test_an_unreadable_answer_is_the_error_of_its_input(
    serve: Serve, app: Callable[[], Any], make: Callable[[str], Scorer], status: int, content: bytes
) -> None:
    scorer = make(serve(Spoiled(app(), status, content)))
    instances = [Instance("p", (text, "b")) for text in ("x", BAD, "yy", "zzz")]
    outcomes = await scorer.score(instances, deadline=soon(20))
    await scorer.close()
    assert [isinstance(outcome, Scored) for outcome in outcomes] == [True, False, True, True]
    assert isinstance(outcomes[1], WorkerError)


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_unreadable_answer_of_the_encoder_is_told(content: bytes) -> None:
    with pytest.raises(WireError):
        decode_answer(content, 1, 4, msgspec.json.Decoder(EmbeddingsAnswer))


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE.keys())
async def test_our_own_workers_refuse_such_bodies_in_words(serve: Serve, content: bytes) -> None:
    pair = LabelledPair("1", Instance("p", ("a", "b")), 0, {"rm": (1.0, 0.0)}, {"rm": 0})
    pool = HttpPool(serve(recorded_app([pair], "rm")))
    for body in (content, b'{"unknown": ' + content + b', "input": "\xe9"}'):
        response = await pool.request("POST", "/classify", body, deadline=soon())
        assert (response.status, b'"message":' in response.body) == (400, True)
    await pool.close()
