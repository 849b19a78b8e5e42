"""The protocol layer of our own workers, as raw ASGI: vLLM's `/classify`, `/v1/models`, `/tokenize`, `/health`,
`/ping`, `/version`, and of `/metrics` the load.

Reads and checks requests, writes replies and errors in vLLM's words. What a text is worth it asks a `Backend`:
`service.workers.recorded` and `service.workers.cpu` are the two. Knows no gateway, no store and no torch.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, Protocol, runtime_checkable

import msgspec
import uvicorn

from service.errors import ConfigurationError
from service.scorers.transport.load import write_load
from service.scorers.wire import (
    CLASSIFY_PATH,
    METRICS_PATH,
    MODELS_PATH,
    TOKENIZE_PATH,
    UNREADABLE,
    ClassifiedReply,
    ClassifyReply,
    ClassifyRequest,
    ErrorBody,
    ErrorReply,
    Message,
    ModelList,
    ServedModel,
    TextPart,
    TokenizeReply,
    TokenizeRequest,
    Usage,
    sigmoid,
)

MAX_BODY_BYTES: Final = 32 * 1024 * 1024
"""Largest request body; vLLM has no bound."""

KEEP_ALIVE_SECONDS: Final = 5
"""Idle connections are closed after this, as vLLM's server does."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class ApiError(Exception):
    """A request that gets an error reply: HTTP status, vLLM's `type`, the message, and the parameter at fault."""

    def __init__(self, message: str, *, status: int = 400, kind: str = "BadRequestError", param: str | None = None):
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param


Content = str | list[int] | list[tuple[str, str]]
"""What is scored: a text, token ids, or a conversation of (role, text) turns."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The raw logit of one content, how many tokens it had, and the logits of the model's further labels."""

    logit: float
    prompt_tokens: int
    others: tuple[float, ...] = ()

    def probs(self, *, raw: bool) -> list[float]:
        """Return what `/classify` says: logits, or as vLLM a sigmoid of one label and a softmax of several."""
        logits = [self.logit, *self.others]
        if raw:
            return logits
        if not self.others:
            return [sigmoid(self.logit)]
        weights = [math.exp(logit - max(logits)) for logit in logits]
        return [weight / sum(weights) for weight in weights]


class Backend(Protocol):
    """What a worker does besides speaking the protocol."""

    @property
    def models(self) -> Sequence[ServedModel]:
        """The served models; the first answers requests that name none."""

    async def start(self) -> None:
        """Load what is needed; `/health` answers when this has returned."""

    async def stop(self) -> None:
        """Release it."""

    async def score(self, model: str, contents: Sequence[Content], *, add_special_tokens: bool) -> list[Scored]:
        """The logit of each content, in order.

        Raises:
            ApiError: what the reply shall say.
        """

    def raw_by_default(self, model: str) -> bool:
        """Return True if the model gives raw logits whatever the request says (`problem_type: regression`)."""


@runtime_checkable
class TokenizingBackend(Protocol):
    """A backend that also answers `/tokenize`."""

    async def tokenize(
        self, model: str, content: Content, *, add_generation_prompt: bool, add_special_tokens: bool
    ) -> list[int]:
        """The token ids of a content, whatever their number.

        Raises:
            ApiError: what the reply shall say.
        """


class WorkerApp:
    """An ASGI application that answers as vLLM's pooling server does.

    Args:
        backend: started and stopped with the application's lifespan.
        clock: seconds since the epoch, for `created`.
    """

    def __init__(self, backend: Backend, *, clock: Callable[[], float] = time.time) -> None:
        self._backend = backend
        self._clock = clock
        self._requests = msgspec.json.Decoder(ClassifyRequest)
        self._scoring: dict[str, int] = dict.fromkeys((model.id for model in backend.models), 0)
        self._encoder = msgspec.json.Encoder()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point: `http` and `lifespan`."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            raise RuntimeError(f"no {scope['type']} here")

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        await self._backend.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._backend.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 200
        try:
            body = await self._route(scope, receive)
        except ApiError as error:
            status = error.status
            body = self._encoder.encode(ErrorReply(ErrorBody(str(error), error.kind, error.param, error.status)))
        kind = b"text/plain; version=0.0.4" if scope["path"] == METRICS_PATH else b"application/json"
        headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _route(self, scope: Scope, receive: Receive) -> bytes:
        path, method = scope["path"], scope["method"]
        if path == CLASSIFY_PATH:
            expect(method, "POST")
            return await self._classify(scope, receive)
        if path in ("/health", "/ping"):
            return b""
        if path == "/version":
            expect(method, "GET")
            return self._encoder.encode({"version": own_version()})
        if path == MODELS_PATH:
            expect(method, "GET")
            return self._encoder.encode(ModelList(list(self._backend.models)))
        if path == METRICS_PATH:
            expect(method, "GET")
            return write_load(self._scoring)
        if path == TOKENIZE_PATH and isinstance(self._backend, TokenizingBackend):
            expect(method, "POST")
            return await self._tokenize(self._backend, scope, receive)
        raise ApiError("Not Found", status=404, kind="NotFoundError")

    async def _classify(self, scope: Scope, receive: Receive) -> bytes:
        request_id = check_headers(scope["headers"])
        try:
            request = self._requests.decode(await read_body(receive))
        except UNREADABLE as error:
            raise ApiError(f"The body is not a classify request: {error}") from error
        model = self._model(request.model)
        if request.truncate_prompt_tokens is not None:
            raise ApiError("This worker never truncates; shorten the input.", param="truncate_prompt_tokens")
        contents = _contents(request)
        special = request.add_special_tokens if request.add_special_tokens is not None else request.messages is None
        self._scoring[model] += len(contents)
        try:
            scored = await self._backend.score(model, contents, add_special_tokens=special)
        finally:
            self._scoring[model] -= len(contents)
        raw = request.use_activation is False or self._backend.raw_by_default(model)
        tokens = sum(item.prompt_tokens for item in scored)
        reply = ClassifyReply(
            id=f"classify-{request_id or uuid.uuid4().hex}",
            object="list",
            created=int(self._clock()),
            model=model,
            data=[
                ClassifiedReply(index, "LABEL_0", item.probs(raw=raw), 1 + len(item.others))
                for index, item in enumerate(scored)
            ],
            usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
        )
        return self._encoder.encode(reply)

    async def _tokenize(self, backend: TokenizingBackend, scope: Scope, receive: Receive) -> bytes:
        check_headers(scope["headers"])
        try:
            request = msgspec.json.decode(await read_body(receive), type=TokenizeRequest)
        except UNREADABLE as error:
            raise ApiError(f"The body is not a tokenize request with messages: {error}") from error
        model = self._model(request.model)
        (content,) = _contents(ClassifyRequest(messages=request.messages))
        ids = await backend.tokenize(
            model,
            content,
            add_generation_prompt=request.add_generation_prompt,
            add_special_tokens=request.add_special_tokens,
        )
        limit = next(served.max_model_len for served in self._backend.models if served.id == model)
        return self._encoder.encode(TokenizeReply(ids, len(ids), limit or 0))

    def _model(self, name: str | None) -> str:
        models = self._backend.models
        if name is None:
            return models[0].id
        if not any(model.id == name for model in models):
            raise ApiError(f"The model `{name}` does not exist.", status=404, kind="NotFoundError", param="model")
        return name


def run_worker(app: App, *, host: str = "127.0.0.1", port: int = 8101, log_level: str = "info") -> None:
    """Serve the worker until SIGINT or SIGTERM; requests in flight are answered first.

    Raises:
        ConfigurationError: it did not start.
    """
    server = uvicorn.Server(worker_config(app, host=host, port=port, log_level=log_level))
    server.run()
    if not server.started:
        raise ConfigurationError("the worker did not start: its log says why")


def worker_config(app: App, *, host: str, port: int, log_level: str = "info") -> uvicorn.Config:
    """How workers are served: uvicorn with httptools, and uvloop where there is one."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http="httptools",
        lifespan="on",
        access_log=False,
        log_level=log_level,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )


def own_version() -> str:
    """Return this package's version."""
    try:
        return version("reward-router")
    except PackageNotFoundError:
        return "0"


def expect(method: str, wanted: str) -> None:
    """Refuse another method."""
    if method != wanted:
        raise ApiError("Method Not Allowed", status=405)


def check_headers(headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """Refuse what is not JSON; return the caller's request id."""
    request_id = None
    json_type = False
    for name, value in headers:
        if name == b"content-type":
            json_type = value.split(b";", 1)[0].strip().lower() == b"application/json"
        elif name == b"x-request-id":
            request_id = value.decode("latin-1")
    if not json_type:
        raise ApiError("Unsupported Media Type: Only 'application/json' is allowed")
    return request_id


async def read_body(receive: Receive) -> bytes:
    """Return the whole body, within its bound."""
    message = await receive()
    body: bytes = message.get("body", b"")
    if not message.get("more_body"):
        return body
    parts = [body]
    size = len(body)
    while message.get("more_body"):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError("The client went away.", status=499)
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise ApiError(f"The body is larger than {MAX_BODY_BYTES} bytes.", status=413)
        parts.append(part)
    return b"".join(parts)


def _contents(request: ClassifyRequest) -> list[Content]:
    if request.messages is not None:
        if not request.messages:
            raise ApiError("messages is empty.", param="messages")
        return [[(message.role, _text(message)) for message in request.messages]]
    given = request.input
    if given is None:
        raise ApiError("Either input or messages must be given.", param="input")
    if isinstance(given, str):
        return [given]
    if not given:
        raise ApiError("input is empty.", param="input")
    texts = [item for item in given if isinstance(item, str)]
    if len(texts) == len(given):
        return list(texts)
    ids = [item for item in given if isinstance(item, int)]
    if len(ids) == len(given):
        return [ids]
    lists = [item for item in given if isinstance(item, list)]
    if len(lists) == len(given):
        return list(lists)
    raise ApiError("input mixes texts, token ids and lists of token ids.", param="input")


def _text(message: Message) -> str:
    parts = [TextPart("text", message.content)] if isinstance(message.content, str) else message.content or []
    if any(part.type != "text" for part in parts):
        raise ApiError("This worker reads text parts only.", param="messages")
    # Its models know no tools: a call is words.
    calls = [f"{call.function.name}({call.function.arguments})" for call in message.tool_calls or []]
    return "\n".join([*[part.text for part in parts if part.text or not calls], *calls])
