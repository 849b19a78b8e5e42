"""A scripted judge: an OpenAI-compatible server for tests, with log-probabilities, text and whatever goes wrong."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from tests.service.scorers.worker_servers import Json
from tests.support.asgi import lifespan

Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]


class ScriptedJudge:
    """An ASGI server whose verdicts are scripted. It keeps what it was asked.

    The log-odds of response A are the difference of `quality`, by default length, plus `bias`. `answer` maps a request
    to (status, body) or (status, body, headers); a body that is not bytes is sent as JSON.
    """

    def __init__(self, name: str = "judge-model") -> None:
        self.name = name
        self.requests: list[Json] = []
        self.headers: list[dict[str, str]] = []
        self.quality: Callable[[str], float] = lambda text: float(len(text))
        self.bias = 0.0
        self.logprobs = True
        self.delay = 0.0
        self.answer: Callable[[Json], Answer] = self.verdict
        self.models: Answer = (
            200,
            {"object": "list", "data": [{"id": name, "object": "model", "max_model_len": 4096}]},
        )
        self.in_flight = 0
        self.most_in_flight = 0

    @property
    def questions(self) -> list[Json]:
        """What it was asked apart from probes."""
        return [request for request in self.requests if not is_probe(request)]

    def odds(self, request: Json) -> float:
        """Log-odds of response A."""
        shown = responses_of(request)
        return self.quality(shown[0]) - self.quality(shown[1]) + self.bias

    def verdict(self, request: Json) -> Answer:
        """An honest answer in the style that is asked for."""
        shown = responses_of(request)
        if not shown:
            return 200, completion("pong")
        if len(shown) == 1:
            grade = max(1, min(9, round(self.quality(shown[0]))))
            return 200, self.styled(request, str(grade), {str(grade): 1.0})
        p = 1 / (1 + math.exp(-self.odds(request)))
        label = "A" if p > 0.5 else "B" if p < 0.5 else "C"
        return 200, self.styled(request, label, {"A": p, "B": 1 - p})

    def styled(self, request: Json, label: str, probabilities: dict[str, float]) -> Json:
        """An answer with log-probabilities or as text."""
        if "[[" in request["messages"][0]["content"].rpartition("<<<END")[2]:
            return completion(f"Let me see.\n[[{label}]]")
        return completion(label, probabilities if self.logprobs and request.get("logprobs") else None)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        body = await Request(scope, receive).body()
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        if scope["path"] == "/v1/models":
            answer = self.models
        elif scope["path"] == "/v1/chat/completions":
            answer = await self._complete(json.loads(body))
        else:
            answer = 404, {"error": {"message": f"no {scope['path']}"}}
        status, said, *more = answer
        content = said if isinstance(said, bytes) else json.dumps(said).encode()
        headers = {"content-type": "application/json", "content-length": str(len(content)), **(more[0] if more else {})}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": content})

    async def _complete(self, request: Json) -> Answer:
        self.requests.append(request)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.delay)
        finally:
            self.in_flight -= 1
        return self.answer(request)


def responses_of(request: Json) -> list[str]:
    """The responses in a request, in the order in which they are shown."""
    message = request["messages"][0]["content"]
    return re.findall(r"^<<<RESPONSE(?: [AB])? (?:\w+)>>>\n(.*?)\n<<<END RESPONSE", message, re.DOTALL | re.MULTILINE)


def is_probe(request: Json) -> bool:
    """Return True if it is a question of health checks."""
    message = request["messages"][0]["content"]
    return message == "ping" or "I like bananas." in message or "2 + 2 = 4." in message


def completion(
    text: str | None,
    probabilities: dict[str, float] | None = None,
    *,
    finish: str = "stop",
    **fields: Any,
) -> Json:
    """A chat completion as vLLM writes it."""
    logprobs = None
    if probabilities is not None:
        tops = [
            {"token": token, "logprob": math.log(max(p, 1e-30)), "bytes": None} for token, p in probabilities.items()
        ]
        logprobs = {"content": [{"token": text, "logprob": 0.0, "bytes": None, "top_logprobs": tops}]}
    message = {"role": "assistant", "content": text, **fields}
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish}
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
