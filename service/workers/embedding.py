"""A small encoder server on transformers that answers `/v1/embeddings` as vLLM's pooling server does.

For laptops and tests; `vllm serve` is for the rest. It serves a directory that `reward-router encoder export` wrote and
reads token ids only: texts are read by whoever asks (`service.encoders.reading`). Over-long input is refused, never
truncated. `reward-router encoder serve` runs it. Imports torch.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from router_core.encoder.torch import TorchBackbone
from router_core.errors import EncoderError
from service.encoders.wire import EMBEDDINGS_PATH, EmbeddingsReply, EmbeddingsRequest, to_base64
from service.encoders.wire import Embedding as Vector
from service.errors import ConfigurationError
from service.scorers.wire import UNREADABLE, ServedModel, Usage
from service.workers.server import (
    ApiError,
    Content,
    Receive,
    Scope,
    Scored,
    WorkerApp,
    check_headers,
    expect,
    read_body,
)

DEFAULT_NAME: Final = "encoder"


class EmbeddingBackend:
    """One transformer, in one thread. Implements `service.workers.server.Backend`; scores nothing."""

    def __init__(self, backbone: TorchBackbone, name: str, threads: int | None = None) -> None:
        self.backbone = backbone
        self.name = name
        self._vocabulary = int(backbone.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        self._threads = threads
        self._executor: ThreadPoolExecutor | None = None

    @property
    def models(self) -> Sequence[ServedModel]:
        return (ServedModel(self.name, root=self.name, max_model_len=self.backbone.max_tokens),)

    async def start(self) -> None:
        """Start the thread."""
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="infer", initializer=self._set_threads)

    async def stop(self) -> None:
        """End it when what is queued is done."""
        if self._executor is not None:
            self._executor.shutdown(wait=True)

    def raw_by_default(self, model: str) -> bool:
        return False

    async def score(self, model: str, contents: Sequence[Content], *, add_special_tokens: bool) -> list[Scored]:
        """An encoder has no rewards."""
        raise ApiError(
            f"The model `{model}` does not support the Classification API.", status=404, kind="NotFoundError"
        )

    async def states(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The raw states of token ids.

        Raises:
            ApiError: empty, over-long or out-of-vocabulary input.
        """
        for row in rows:
            if not row or min(row) < 0 or max(row) >= self._vocabulary:
                raise ApiError(f"Token ids must be 0 to {self._vocabulary - 1}, at least one of them.", param="input")
            if len(row) > self.backbone.max_tokens:
                raise ApiError(
                    f"This model's maximum context length is {self.backbone.max_tokens} tokens. However, your request "
                    f"has {len(row)} input tokens. Please reduce the length of the input.",
                    param="input_tokens",
                )
        return await asyncio.get_running_loop().run_in_executor(self._executor, self.backbone.embed_ids, rows)

    def _set_threads(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)


class EmbeddingApp(WorkerApp):
    """The worker's protocol, with `/v1/embeddings` in it."""

    def __init__(self, backend: EmbeddingBackend) -> None:
        super().__init__(backend)
        self._states = backend
        self._decode = msgspec.json.Decoder(EmbeddingsRequest)

    async def _route(self, scope: Scope, receive: Receive) -> bytes:
        if scope["path"] != EMBEDDINGS_PATH:
            return await super()._route(scope, receive)
        expect(scope["method"], "POST")
        return await self._embeddings(scope, receive)

    async def _embeddings(self, scope: Scope, receive: Receive) -> bytes:
        request_id = check_headers(scope["headers"])
        try:
            request = self._decode.decode(await read_body(receive))
        except UNREADABLE as error:
            raise ApiError(f"The body is not an embeddings request: {error}") from error
        model = self._model(request.model)
        rows = _rows(request.input)
        states = await self._states.states(rows)
        if request.use_activation is not False:
            states = normalised(states)
        tokens = sum(map(len, rows))
        reply = EmbeddingsReply(
            id=f"embd-{request_id or uuid.uuid4().hex}",
            object="list",
            created=int(self._clock()),
            model=model,
            data=[
                Vector(index, to_base64(row) if request.encoding_format == "base64" else row.tolist())
                for index, row in enumerate(states)
            ],
            usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
        )
        return self._encoder.encode(reply)


def embedding_app(directory: Path, *, name: str = DEFAULT_NAME, threads: int | None = None) -> EmbeddingApp:
    """The server of an exported directory, or of any in transformers format.

    Raises:
        ConfigurationError: it cannot be loaded.
    """
    try:
        backbone = TorchBackbone.load(directory, spec=f"torch:{directory}")
    except EncoderError as error:
        raise ConfigurationError(str(error)) from error
    return EmbeddingApp(EmbeddingBackend(backbone, name, threads))


def normalised(states: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1, as vLLM gives them unless told otherwise; (N, dim) twice."""
    unit: NDArray[np.float32] = states / np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-12)
    return unit


def _rows(given: str | list[str | int | list[int]]) -> list[list[int]]:
    if isinstance(given, str) or any(isinstance(row, str) for row in given):
        raise ApiError("This server reads token ids; vLLM reads texts too.", param="input")
    if not given:
        raise ApiError("input is empty.", param="input")
    rows = [row for row in given if isinstance(row, list)]
    return rows or [[token for token in given if isinstance(token, int)]]
