"""The words of vLLM's `/v1/embeddings` as typed structs, and vectors out of its answers.

Shared by the client and by our own server (`service.workers.embedding`). Knows no transport, no model. Vectors travel
as base64 of little-endian float32: a twentieth of the work of reading decimal numbers.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from service.scorers.transport.exchange import AnswerError
from service.scorers.wire import UNREADABLE, Usage

EMBEDDINGS_PATH: Final = "/v1/embeddings"
"""The one of vLLM's two endpoints for vectors that its API key guards; `/pooling` stays open."""


class EmbeddingsRequest(msgspec.Struct, omit_defaults=True):
    """What `/v1/embeddings` takes. `use_activation: false` leaves states as they are; else they are normalised."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    embed_dtype: str | None = None
    endianness: str | None = None
    use_activation: bool | None = None
    add_special_tokens: bool | None = None


class Embedding(msgspec.Struct):
    """One vector: decimal numbers, or base64."""

    index: int
    embedding: str | list[float]
    object: str = "embedding"


class EmbeddingsAnswer(msgspec.Struct):
    """The part of a reply that the client reads."""

    data: list[Embedding]


class EmbeddingsReply(msgspec.Struct):
    """A whole reply."""

    id: str
    object: str
    created: int
    model: str
    data: list[Embedding]
    usage: Usage


class WireError(AnswerError):
    """An answer is not what `/v1/embeddings` promises; the message says how."""


def encode_request(ids: Sequence[Sequence[int]], model: str | None) -> bytes:
    """The JSON body that asks for the raw states of these token ids."""
    return msgspec.json.encode(
        EmbeddingsRequest(
            input=[list(row) for row in ids],
            model=model,
            encoding_format="base64",
            embed_dtype="float32",
            endianness="little",
            use_activation=False,
        )
    )


def decode_answer(
    body: bytes, count: int, dim: int, decoder: msgspec.json.Decoder[EmbeddingsAnswer]
) -> NDArray[np.float32]:
    """(count, dim) float32 in the order of the request. NaN and infinity are left to who uses them.

    Raises:
        WireError: not such an answer, or of another number or width.
    """
    try:
        rows = decoder.decode(body).data
    except UNREADABLE as error:
        raise WireError(f"the answer is not an embeddings reply: {error}") from error
    if len(rows) != count:
        raise WireError(f"{len(rows)} vectors for {count} texts")
    out = np.empty((count, dim), dtype=np.float32)
    seen: set[int] = set()
    for row in rows:
        if not 0 <= row.index < count or row.index in seen:
            raise WireError(f"index {row.index} is out of range or repeated")
        seen.add(row.index)
        vector = _vector(row.embedding)
        if vector.shape != (dim,):
            raise WireError(f"a vector has {vector.size} columns, expected {dim}: another model is served there")
        out[row.index] = vector
    return out


def to_base64(vector: NDArray[np.float32]) -> str:
    """Little-endian float32 in base64."""
    return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode("ascii")


def _vector(given: str | list[float]) -> NDArray[np.float32]:
    if not isinstance(given, str):
        # What float32 cannot hold becomes infinity, which users of the states refuse.
        with np.errstate(over="ignore"):
            return np.asarray(given, dtype=np.float32)
    try:
        return np.frombuffer(base64.b64decode(given, validate=True), dtype="<f4")
    except (binascii.Error, ValueError) as error:
        raise WireError(f"a vector is not base64 of float32: {error}") from error
