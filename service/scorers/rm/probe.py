"""What a worker must show before its arm is used: it serves the model, gives raw logits, and reads the same text as we.

`probe_replica` says what is wrong in words for the operator; `health` beside it keeps a replica without traffic until
its probe has passed. `readiness` is the small part of it that health checks repeat. Both go past the breaker, on
connections of their own, and change nothing but what a refused connection changes (`Replica.check`).
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import Final

import msgspec

from service.scorers.health import ProbeError, UnreachableError, exchange
from service.scorers.rm.answers import read_rewards
from service.scorers.rm.client import VllmArm
from service.scorers.rm.render import MessagesRendering, RenderError, Rendering, encode
from service.scorers.transport.exchange import AnswerError
from service.scorers.transport.replica import Replica
from service.scorers.wire import (
    CLASSIFY_PATH,
    MODELS_PATH,
    PROBE_PROMPT,
    PROBE_RESPONSE,
    TOKENIZE_PATH,
    UNREADABLE,
    Message,
    ModelList,
    ServedModel,
    TokenizeReply,
    TokenizeRequest,
    sigmoid,
)

RELATIVE_TOLERANCE: Final = 0.01
"""How far two answers about the same text may be apart: bfloat16 carries eight bits, batch shapes change the rest."""

ABSOLUTE_TOLERANCE: Final = 0.01
"""The same near zero. A second BOS changes a reward by about 0.2."""

AWKWARD_PROMPT: Final = "  Café, \u201cnaïve\u201d 東京 🙂\n\n\tdef f(x):\n        return x**2  # 12345.678  \n"
AWKWARD_RESPONSE: Final = "It's 3.14;  <b>two</b> spaces…\r\nand an end\n"
"""A conversation that tokenizers with other settings cut otherwise: spaces at both ends, digits, accents, no ASCII."""


@dataclass(frozen=True, slots=True)
class ReplicaProbe:
    """What one replica answered.

    Attributes:
        url: the replica's origin.
        served: the models that `/v1/models` lists.
        max_model_len: tokens that it says it reads at most; None if it does not say.
        raw: reward of the probe conversation with `use_activation: false`; None if it was not given.
        default: the same without the flag; sigmoid(raw) for one label.
        problems: why the replica must not be used; empty when nothing was found.
        warnings: what could not be made certain.
        unavailable: why the probe could not be ended; None when it was. No problem of the worker's settings.
    """

    url: str
    served: tuple[str, ...] = ()
    max_model_len: int | None = None
    raw: float | None = None
    default: float | None = None
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    unavailable: str | None = None

    @property
    def ok(self) -> bool:
        """It answered everything, without problems."""
        return not self.problems and self.unavailable is None


async def probe(arm: VllmArm, *, deadline: float) -> tuple[ReplicaProbe, ...]:
    """`probe_replica` of every replica of the arm, all at once.

    Args:
        arm: what was configured.
        deadline: absolute `loop.time()` for the whole probe.

    Returns:
        One report per replica, in the order of the arm's URLs. Never raises for what a worker does.
    """
    return tuple(await asyncio.gather(*(probe_replica(arm, replica, deadline=deadline) for replica in arm.replicas)))


async def probe_replica(
    arm: VllmArm, replica: Replica, *, deadline: float, rendering: Rendering | None = None
) -> ReplicaProbe:
    """Ask one replica what it must show before it is used.

    Checks that the model is served, that it reads as many tokens as configured, that `use_activation: false` is obeyed
    (the default answer must be the sigmoid of the raw one), and that a text templated here earns the same reward as the
    conversation templated by the worker; where token ids are sent, also that a worker with `/tokenize` makes the same
    ids of an awkward conversation.

    Args:
        arm: what was configured.
        replica: one of the arm's.
        deadline: absolute `loop.time()` for the whole probe.
        rendering: tried instead of the arm's.

    Returns:
        The report. Never raises for what a worker does.
    """
    model = arm.config.served_model
    rendering = rendering or arm.rendering
    served: tuple[str, ...] = ()
    raw = default = unavailable = length = None
    problems: list[str] = []
    warnings: list[str] = []
    try:
        models, unlisted = await _served_models(replica, deadline)
        served = tuple(one.id for one in models)
        if unlisted is not None:
            warnings.append(unlisted)
        elif model not in served:
            raise ProbeError(f"serves {', '.join(served) or 'nothing'}, not {model!r}: check the served model name")
        length = next((one.max_model_len for one in models if one.id == model), None)
        _judge_length(arm, length, rendering, problems, warnings)
        raw = await _classify(arm, replica, rendering, deadline, use_activation=False)
        default = await _classify(arm, replica, rendering, deadline, use_activation=None)
        _judge_activation(raw, default, problems, warnings, several=arm.config.heads is not None)
        if not isinstance(rendering, MessagesRendering):
            await _compare_templates(arm, replica, raw, deadline, problems, warnings)
        if rendering.counts_tokens:
            await _compare_ids(arm, replica, rendering, deadline, problems)
    except UnreachableError as error:
        unavailable = str(error)
    except ProbeError as error:
        problems.append(str(error))
    return ReplicaProbe(replica.url, served, length, raw, default, tuple(problems), tuple(warnings), unavailable)


async def readiness(arm: VllmArm, replica: Replica, *, deadline: float) -> None:
    """Score the probe conversation: `/health` stays 200 while vLLM sleeps or shuts down.

    Raises:
        UnreachableError: the replica is not ready; the message says why.
        ProbeError: it answered what a reward model does not answer.
    """
    await _classify(arm, replica, arm.rendering, deadline, use_activation=False)


def _judge_length(
    arm: VllmArm, served: int | None, rendering: Rendering, problems: list[str], warnings: list[str]
) -> None:
    configured = arm.config.max_model_len
    if served is not None and configured is not None and served < configured:
        problems.append(
            f"reads at most {served} tokens, and max_model_len of {arm.name!r} is {configured}: lower it, or start the "
            f"worker with --max-model-len {configured}"
        )
    elif served is None and configured is None and rendering.counts_tokens:
        warnings.append(
            "how many tokens it reads is not known, so that over-long texts are found only when it refuses them: set "
            f"max_model_len of {arm.name!r} in the pool file"
        )


def _judge_activation(raw: float, default: float, problems: list[str], warnings: list[str], *, several: bool) -> None:
    if several or _close(default, sigmoid(raw)):
        # Of several labels the default may be a softmax, sigmoids or the logits: the head's number alone tells nothing.
        return
    if not _close(default, raw):
        problems.append(f"the default answer {default:.4g} is neither the raw {raw:.4g} nor its sigmoid")
    elif 0.0 < raw < 1.0:
        # Either the flag is ignored and both are sigmoids, or the model is configured to give raw logits anyway.
        warnings.append(
            f"the answers with and without use_activation are both {raw:.4g}: the worker may ignore the flag (vLLM "
            "before 0.16) and send sigmoids; routing still works, margins are squeezed"
        )


async def _compare_templates(
    arm: VllmArm, replica: Replica, raw: float, deadline: float, problems: list[str], warnings: list[str]
) -> None:
    try:
        own = await _classify(arm, replica, MessagesRendering(), deadline, use_activation=False)
    except UnreachableError:
        raise
    except ProbeError as error:
        warnings.append(f"the template could not be compared with the worker's own: {error}")
        return
    if not _close(own, raw):
        problems.append(
            f"the text templated here earns {raw:.4g}, the same conversation templated by the worker {own:.4g}: the "
            "template or its special tokens differ; use the model's own template, or rendering mode 'messages'"
        )


async def _compare_ids(
    arm: VllmArm, replica: Replica, rendering: Rendering, deadline: float, problems: list[str]
) -> None:
    """A worker without `/tokenize` has only the rewards to be compared by."""
    (own,) = rendering.prepare([[(AWKWARD_PROMPT, AWKWARD_RESPONSE)]])
    if isinstance(own, RenderError):
        problems.append(str(own))
        return
    request = TokenizeRequest(
        model=arm.config.served_model,
        messages=[Message("user", AWKWARD_PROMPT), Message("assistant", AWKWARD_RESPONSE)],
        add_generation_prompt=False,
    )
    try:
        body = await exchange(replica, "POST", TOKENIZE_PATH, msgspec.json.encode(request), deadline)
        theirs = msgspec.json.decode(body, type=TokenizeReply).tokens
    except UnreachableError:
        raise
    except (ProbeError, *UNREADABLE):
        return
    (ours,) = own.contents
    if ours != theirs:
        common = min(len(ours), len(theirs))
        at = next((index for index in range(common) if ours[index] != theirs[index]), common)
        problems.append(
            f"of one conversation the tokenizer here makes {len(ours)} ids, the worker's {len(theirs)}; number {at} "
            "differs: name the RM's own `tokenizer` and chat template, or use rendering 'messages'"
        )


async def _served_models(replica: Replica, deadline: float) -> tuple[list[ServedModel], str | None]:
    """The listed models, or why there is no list: vLLM's key and proxies may guard it and leave `/classify` open."""
    try:
        body = await exchange(replica, "GET", MODELS_PATH, b"", deadline)
        return msgspec.json.decode(body, type=ModelList).data, None
    except UnreachableError:
        raise
    except (ProbeError, *UNREADABLE) as error:
        return [], f"the served models cannot be listed: {error}"


async def _classify(
    arm: VllmArm, replica: Replica, rendering: Rendering, deadline: float, *, use_activation: bool | None
) -> float:
    try:
        request = encode(
            rendering, arm.config.served_model, [(PROBE_PROMPT, PROBE_RESPONSE)], use_activation=use_activation
        )
    except RenderError as error:
        raise ProbeError(str(error)) from error
    body = await exchange(replica, "POST", CLASSIFY_PATH, request, deadline)
    try:
        return read_rewards(body, 1, arm.config.heads).rewards[0]
    except AnswerError as error:
        raise ProbeError(str(error)) from error


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)
