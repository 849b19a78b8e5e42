"""A small worker that runs a generative model on the CPU with transformers: OpenAI's chat completions, for judges.

For laptops and CI; `vllm serve` is for the rest. One thread runs the model. Requests for one token that wait together
are one forward pass; longer answers are generated one after the other. `reward-router worker --judge` runs it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jinja2
import msgspec
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.errors import ConfigurationError
from service.scorers.judge.wire import (
    CHAT_PATH,
    TOP_LOGPROBS,
    Answer,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChoiceLogprobs,
    TokenLogprob,
    TopToken,
)
from service.scorers.wire import MODELS_PATH, UNREADABLE, ErrorBody, ErrorReply, Message, ModelList, ServedModel, Usage
from service.workers.cpu import batches
from service.workers.inference import Job, ModelThread, settle
from service.workers.server import ApiError, Receive, Scope, Send, check_headers, expect, read_body

DEFAULT_TOKENS: Final = 256
"""`max_tokens` of a request that says none."""


@dataclass(frozen=True, slots=True)
class GeneratingModel:
    """A loaded model. `model` and `tokenizer` are transformers' own objects."""

    name: str
    model: Any
    tokenizer: Any
    max_length: int


@dataclass(frozen=True, slots=True)
class Written:
    """What the model wrote: one token per row of `logprobs`.

    Attributes:
        ids: (t,) token ids.
        logprobs: (t, vocabulary) log-probabilities.
        ended: the model ended by itself.
    """

    ids: list[int]
    logprobs: torch.Tensor
    ended: bool


@dataclass(frozen=True, slots=True)
class _Question:
    """What is to be answered, and how."""

    ids: list[int]
    max_tokens: int
    temperature: float

    @property
    def for_one_token(self) -> bool:
        """True if a forward pass is all that it takes."""
        return self.max_tokens == 1 and self.temperature == 0.0


def load_generating_model(name: str, directory: Path, *, max_length: int | None = None) -> GeneratingModel:
    """Load a causal language model with a chat template from a directory, in float32.

    Args:
        name: under which it is served.
        directory: as `save_pretrained` writes it.
        max_length: tokens at most, prompt and answer; the model's own limit when None.

    Raises:
        ConfigurationError: it cannot be loaded, or has no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"judge {name!r}: {directory} cannot be loaded: {error}") from error
    if tokenizer.chat_template is None:
        raise ConfigurationError(f"judge {name!r}: {directory} has no chat template; a judge is asked in messages")
    own_limit = getattr(model.config, "max_position_embeddings", None)
    limit = min(filter(None, (max_length, own_limit)), default=tokenizer.model_max_length)
    return GeneratingModel(name, model.eval(), tokenizer, limit)


class GeneratingApp:
    """An ASGI application that answers `/v1/chat/completions`, `/v1/models` and `/health`.

    Args:
        loaded: the model.
        threads: torch's threads for one operation.
        clock: seconds since the epoch, for `created`.
    """

    def __init__(self, loaded: GeneratingModel, *, threads: int = 1, clock: Callable[[], float] = time.time) -> None:
        self._loaded = loaded
        self._clock = clock
        self._decoder = msgspec.json.Decoder(ChatRequest)
        self._inferring: ModelThread[_Question, Written] = ModelThread("generate", self._infer, threads=threads)
        # One thread: fast tokenizers change shared state while they run and refuse a second caller.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point: `http` and `lifespan`."""
        if scope["type"] == "lifespan":
            await receive()
            self._inferring.start()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await self._inferring.stop()
            self._tokenizing.shutdown()
            await send({"type": "lifespan.shutdown.complete"})
            return
        status = 200
        try:
            body = await self._route(scope, receive)
        except ApiError as error:
            status = error.status
            body = msgspec.json.encode(ErrorReply(ErrorBody(str(error), error.kind, error.param, error.status)))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _route(self, scope: Scope, receive: Receive) -> bytes:
        path, method = scope["path"], scope["method"]
        if path == CHAT_PATH:
            expect(method, "POST")
            return await self._complete(scope, receive)
        if path == MODELS_PATH:
            expect(method, "GET")
            served = ServedModel(self._loaded.name, root=self._loaded.name, max_model_len=self._loaded.max_length)
            return msgspec.json.encode(ModelList([served]))
        if path == "/health":
            return b""
        raise ApiError("Not Found", status=404, kind="NotFoundError")

    async def _complete(self, scope: Scope, receive: Receive) -> bytes:
        check_headers(scope["headers"])
        try:
            request = self._decoder.decode(await read_body(receive))
        except UNREADABLE as error:
            raise ApiError(f"The body is not a chat completion request: {error}") from error
        self._check(request)
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(self._tokenizing, self._ids, request)
        room = self._loaded.max_length - len(ids)
        if room < 1:
            raise ApiError(
                f"This model's maximum context length is {self._loaded.max_length} tokens. However, your request has "
                f"{len(ids)} input tokens. Please reduce the length of the input messages.",
                param="input_tokens",
            )
        wanted = request.max_completion_tokens or request.max_tokens or DEFAULT_TOKENS
        written = await self._inferring.submit(_Question(ids, min(wanted, room), request.temperature or 0.0))
        return msgspec.json.encode(await loop.run_in_executor(self._tokenizing, self._reply, request, ids, written))

    def _check(self, request: ChatRequest) -> None:
        """Refuse what this worker cannot do.

        Raises:
            ApiError: says what.
        """
        if request.model is not None and request.model != self._loaded.name:
            message = f"The model `{request.model}` does not exist."
            raise ApiError(message, status=404, kind="NotFoundError", param="model")
        if request.stream or (request.n or 1) != 1:
            raise ApiError("This worker gives one whole completion: leave `stream` and `n` out.", param="stream")
        if not 0 <= (request.top_logprobs or 0) <= TOP_LOGPROBS:
            raise ApiError(f"top_logprobs must be between 0 and {TOP_LOGPROBS}.", param="top_logprobs")
        if any(wanted is not None and wanted < 1 for wanted in (request.max_tokens, request.max_completion_tokens)):
            raise ApiError("max_tokens must be at least 1.", param="max_tokens")

    def _ids(self, request: ChatRequest) -> list[int]:
        turns = [
            {
                "role": m.role,
                "content": m.content if isinstance(m.content, str) else "".join(p.text for p in m.content or []),
            }
            for m in request.messages
        ]
        tokenizer = self._loaded.tokenizer
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise ApiError(f"The chat template cannot read these messages: {error}", param="messages") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _reply(self, request: ChatRequest, ids: Sequence[int], written: Written) -> ChatCompletion:
        tokenizer = self._loaded.tokenizer
        said = written.ids[:-1] if written.ended else written.ids
        choice = Choice(
            Answer(tokenizer.decode(said, skip_special_tokens=True)),
            finish_reason="stop" if written.ended else "length",
            logprobs=self._logprobs(written, request.top_logprobs or 0) if request.logprobs else None,
        )
        return ChatCompletion(
            [choice],
            id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(self._clock()),
            model=self._loaded.name,
            usage=Usage(len(ids), len(ids) + len(written.ids), len(written.ids)),
        )

    def _logprobs(self, written: Written, count: int) -> ChoiceLogprobs:
        """Return the log-probabilities of every token, the end of the answer included."""
        decode = self._loaded.tokenizer.decode
        tokens = []
        for token, row in zip(written.ids, written.logprobs, strict=True):
            values, places = row.topk(min(count, row.shape[0]))
            tops = [
                TopToken(decode([place]), value) for value, place in zip(values.tolist(), places.tolist(), strict=True)
            ]
            tokens.append(TokenLogprob(decode([token]), float(row[token]), tops))
        return ChoiceLogprobs(tokens)

    def _infer(self, jobs: Sequence[Job[_Question, Written]]) -> None:
        """Answer what waits: those of one token together, the others one after another."""
        single = [job for job in jobs if job.work.for_one_token]
        for batch in batches([len(job.work.ids) for job in single]):
            settle([single[index] for index in batch], self._next_tokens)
        for job in jobs:
            if not job.work.for_one_token:
                settle([job], self._generate)

    def _next_tokens(self, questions: Sequence[_Question]) -> list[Written]:
        """One token for each, in one forward pass. Padding on the right is seen by no token that is read."""
        longest = max(len(one.ids) for one in questions)
        ids = torch.zeros((len(questions), longest), dtype=torch.long)
        mask = torch.zeros((len(questions), longest), dtype=torch.long)
        for row, one in enumerate(questions):
            ids[row, : len(one.ids)] = torch.tensor(one.ids)
            mask[row, : len(one.ids)] = 1
        model = self._loaded.model
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(questions)), torch.tensor([len(one.ids) - 1 for one in questions])]
        logprobs = model.lm_head(last).float().log_softmax(-1)
        ends = _end_ids(self._loaded)
        tokens = logprobs.argmax(-1).tolist()
        return [Written([token], row[None], token in ends) for token, row in zip(tokens, logprobs, strict=True)]

    def _generate(self, questions: Sequence[_Question]) -> list[Written]:
        (one,) = questions
        sampling = (
            {"do_sample": True, "temperature": one.temperature} if one.temperature > 0.0 else {"do_sample": False}
        )
        ids = torch.tensor([one.ids])
        out = self._loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=one.max_tokens,
            pad_token_id=next(iter(_end_ids(self._loaded)), 0),
            return_dict_in_generate=True,
            output_logits=True,
            **sampling,
        )
        tokens = out.sequences[0, len(one.ids) :].tolist()
        logprobs = torch.cat(out.logits).float().log_softmax(-1)
        return [Written(tokens, logprobs, tokens[-1] in _end_ids(self._loaded))]


def _text(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join([part.text for part in message.content or []])


def _end_ids(loaded: GeneratingModel) -> frozenset[int]:
    """Tokens by which the model ends its answer."""
    configured = loaded.model.generation_config.eos_token_id
    own = [configured] if isinstance(configured, int) else list(configured or [])
    if loaded.tokenizer.eos_token_id is not None:
        own.append(loaded.tokenizer.eos_token_id)
    return frozenset(own)
