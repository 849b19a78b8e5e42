"""What a server must show before it stands for the transformer: it takes our longest text, and repeats the references.

`probe` says what is wrong in words for the operator; `service.encoders.health` keeps a server without traffic until its
probe has passed. Knows the references that were exported with the weights; nothing of runs or requests.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from service.encoders.client import StateClient
from service.encoders.reading import Reading
from service.encoders.wire import EMBEDDINGS_PATH, WireError
from service.scorers.health import NoSuchPathError, ProbeError, exchange
from service.scorers.transport.replica import Replica
from service.scorers.wire import MODELS_PATH, UNREADABLE, ModelList

RELATIVE_TOLERANCE: Final = 0.08
"""Largest |served − reference| / |reference| of a state. A server in float32 stays below 1e-5, one in bfloat16 below
0.05 (docs/encoders.md); other weights, other pooling or normalised states are apart by about 1."""

UNIT_SLACK: Final = 1e-2
"""How far from 1 a norm may be that counts as normalised: bfloat16 carries eight bits."""


async def probe(client: StateClient, reading: Reading, replica: Replica, *, deadline: float) -> None:
    """Ask one server what it must show before it is used.

    Args:
        client: what was configured.
        reading: the transformer's, with its references.
        replica: one of the client's.
        deadline: absolute `loop.time()` for the whole probe.

    Raises:
        UnreachableError: no answer now.
        ProbeError: another model, too short a context, or states that are not the references'.
    """
    await _check_models(client, reading, replica, deadline)
    ids = reading.references.ids
    body = await _embed(replica, client.request(ids), deadline)
    try:
        states = client.read(body, len(ids))
    except WireError as error:
        raise ProbeError(str(error)) from error
    problem = compare(states, reading.references.states)
    if problem is not None:
        raise ProbeError(problem)


async def ready(client: StateClient, reading: Reading, replica: Replica, *, deadline: float) -> None:
    """Encode the shortest reference and compare: `/health` stays 200 while vLLM sleeps or shuts down, and another
    server may stand behind the same address by now.

    Raises:
        UnreachableError: the server is not ready.
        ProbeError: it answered what an encoder does not answer, or states that are not the reference's.
    """
    ids = reading.references.ids
    shortest = min(range(len(ids)), key=lambda index: len(ids[index]))
    body = await _embed(replica, client.request([ids[shortest]]), deadline)
    try:
        states = client.read(body, 1)
    except WireError as error:
        raise ProbeError(str(error)) from error
    problem = compare(states, reading.references.states[shortest : shortest + 1])
    if problem is not None:
        raise ProbeError(problem)


def compare(states: NDArray[np.float32], references: NDArray[np.float32]) -> str | None:
    """Why these states cannot stand for the references, both (R, dim); None where they can."""
    worst = float(relative_error(states, references).max())
    if worst <= RELATIVE_TOLERANCE:
        return None
    norms = np.linalg.norm(states, axis=1)
    units = references / np.linalg.norm(references, axis=1, keepdims=True)
    if np.abs(norms - 1).max() <= UNIT_SLACK and float(relative_error(states, units).max()) <= RELATIVE_TOLERANCE:
        return (
            "its states are normalised to length 1, and the raw ones were asked for: it ignores `use_activation` (vLLM "
            "before 0.12); serve the exported directory, whose modules.json says so, or use a newer vLLM"
        )
    return (
        f"its states differ from the checkpoint's by {worst:.3g} of their length (at most {RELATIVE_TOLERANCE}): other "
        "weights, another pooling, or a precision that is too low; serve the directory that "
        "`reward-router encoder export` wrote for this checkpoint"
    )


def relative_error(states: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
    """|s − r| / |r| of each row: (R, dim) twice to (R,). Infinite where a state is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.linalg.norm(states - references, axis=1) / np.linalg.norm(references, axis=1)
    return np.where(np.isfinite(error), error, np.inf).astype(np.float32)


async def _check_models(client: StateClient, reading: Reading, replica: Replica, deadline: float) -> None:
    body = await exchange(replica, "GET", MODELS_PATH, b"", deadline)
    try:
        models = msgspec.json.decode(body, type=ModelList).data
    except UNREADABLE as error:
        raise ProbeError(f"{MODELS_PATH} does not list models: {error}") from error
    wanted = client.config.model
    found = next((model for model in models if wanted in (None, model.id)), None)
    if found is None:
        names = ", ".join(model.id for model in models) or "nothing"
        raise ProbeError(f"serves {names}, not {wanted!r}: check the name behind # in the encoder's setting")
    if found.max_model_len is not None and found.max_model_len < reading.max_tokens:
        raise ProbeError(
            f"takes at most {found.max_model_len} tokens, and this encoder reads up to {reading.max_tokens}: start it "
            f"with --max-model-len {reading.max_tokens} or more"
        )


async def _embed(replica: Replica, body: bytes, deadline: float) -> bytes:
    try:
        return await exchange(replica, "POST", EMBEDDINGS_PATH, body, deadline)
    except NoSuchPathError as error:
        raise ProbeError(f"{error} (is it an embedding server? --runner pooling --convert embed)") from error
