"""What goes to the gateway and comes back, as values; and the errors of the client.

    RouterClientError
    ├── RouterUnavailableError   nobody answered, or only with 429/502/503/504, until the deadline
    ├── RouterRefusedError       a final 4xx or 500: asking again would change nothing
    └── RouterProtocolError      the answer is not what the gateway's API promises

Knows the words of `docs/api.md` and the standard library; knows no HTTP. The helpers for trainers and `client` build
on it. None of this needs the server's packages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from service.trainers.conversation import Said, as_sent

RETRIED_CODES = frozenset(
    {
        "over_capacity",
        "store_unavailable",
        "not_ready",
        "deadline_exceeded",
        "no_worker",
        "worker_unavailable",
        "worker_timeout",
    }
)
"""Codes of items of a batch that may be sent again; the others are final."""

INVALID = "validation"
"""Code of an item that cannot be sent; the gateway's own for a field that is out of its bounds."""

UNAVAILABLE = "unavailable"
"""`Missing.code` where the gateway itself did not answer before the deadline."""

NO_REWARD = "no_reward"
"""Code of a response without a reward where the gateway gave null and named no code; also the gateway's own while a
reward model's scale is not known yet."""

FATAL_CODES = frozenset({"unauthorized", "not_found", "method_not_allowed", "bad_request", "run_conflict"})
"""Codes that concern the training as a whole: a wrong key, run or policy. Others are about one instance."""


class RouterClientError(Exception):
    """Base of what the client raises."""


class RouterUnavailableError(RouterClientError):
    """No reward, or no acknowledgement, could be had before the deadline.

    Args:
        message: the reason in words; where it is that of one response, it names the code.
        code: stable code of the reason.
    """

    def __init__(self, message: str, code: str = UNAVAILABLE) -> None:
        super().__init__(message)
        self.message = message
        self.code = code

    def __reduce__(self) -> tuple[type[RouterUnavailableError], tuple[object, ...]]:
        """Errors travel between the processes of a trainer."""
        return type(self), (self.message, self.code)


class RouterRefusedError(RouterClientError):
    """The gateway refused for good.

    Args:
        status: HTTP status; 0 where the refusal is that of one item of a batch.
        code: the stable code of `docs/api.md`; "" where the answer was not the gateway's.
        message: what the gateway said.
        details: more for programs.
    """

    def __init__(self, status: int, code: str, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(f"{message} ({' '.join(word for word in (str(status or ''), code) if word)})")
        self.status = status
        self.code = code
        self.message = message
        self.details = dict(details or {})

    def __reduce__(self) -> tuple[type[RouterRefusedError], tuple[object, ...]]:
        """Errors travel between the processes of a trainer."""
        return type(self), (self.status, self.code, self.message, self.details)


class RouterProtocolError(RouterClientError):
    """The answer is not what `docs/api.md` promises: is the URL that of a gateway?"""


@dataclass(frozen=True, slots=True)
class RewardItem:
    """One instance: a prompt and its responses, all of which ONE reward model scores.

    Args:
        prompt: its text, or the messages of a chat.
        responses: at least one; each a text, or the messages that end the chat.
        run: overrides the client's run.
        policy: overrides the client's policy.
        reference: what a right answer looks like, for scorers that compare.
        metadata: flat facts, for scorers that need them.
    """

    prompt: Said
    responses: tuple[Said, ...]
    run: str | None = None
    policy: str | None = None
    reference: str | None = None
    metadata: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.responses:
            raise ValueError("responses is empty: give at least one response per prompt")
        _require_said(self.prompt, self.responses)

    def document(self) -> dict[str, Any]:
        """The item as the API takes it.

        Raises:
            ValueError: `run`, `policy` or `reference` is not a string, or messages cannot be read.
        """
        names = _names(run=self.run, policy=self.policy, reference=self.reference)
        return {**_content(self.prompt, self.responses), **names, **_present(metadata=self.metadata)}


@dataclass(frozen=True, slots=True)
class Scored:
    """The rewards of one instance and where they come from; the fields are those of `docs/api.md`."""

    decision_id: str
    run: str
    model: str
    rewards: tuple[float | None, ...]
    preferred: int | None
    margin: float | None
    propensity: float
    policy: str
    posterior_version: int
    fallback: bool
    recorded: bool
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Every field of the reply that has no name above."""

    @property
    def ok(self) -> bool:
        """There are rewards."""
        return True

    @property
    def failures(self) -> tuple[str | None, ...]:
        """Stable code per response that has no reward; None where there is one."""
        told = self.extra.get("failure") or [None] * len(self.rewards)
        return tuple(
            None if reward is not None else code or NO_REWARD for reward, code in zip(self.rewards, told, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Missing:
    """No reward could be had for this instance, and why. There is no number in it that could be taken for one."""

    code: str
    message: str

    @property
    def ok(self) -> bool:
        """There are no rewards."""
        return False


RewardResult = Scored | Missing


@dataclass(frozen=True, slots=True)
class Feedback:
    """Feedback on one decision: exactly one of `preferred`, `loss` and `reward`, the field of the run's signal.

    Args:
        decision_id: of the decision; or else
        prompt: with `responses`, the content of the latest decision that is meant.
        responses: in the order in which they were sent.
        preferred: index of the better response.
        loss: the pair's DPO loss.
        reward: how well the asked RM did, in [0, 1].
        run: overrides the client's run.

    Scalars of NumPy, torch and the like are taken for the numbers that they hold. What is not a finite number is told
    when the feedback is sent, so that in a batch it costs its own item alone.

    Raises:
        ValueError: not exactly one of the three.
    """

    decision_id: str | None = None
    prompt: str | None = None
    responses: tuple[str, ...] | None = None
    preferred: int | None = None
    loss: float | None = None
    reward: float | None = None
    run: str | None = None

    def __post_init__(self) -> None:
        given = _present(preferred=self.preferred, loss=self.loss, reward=self.reward)
        if len(given) != 1:
            raise ValueError(f"feedback holds {sorted(given) or 'nothing'}: give one of preferred, loss and reward")
        [(name, value)] = given.items()
        with suppress(ValueError):
            object.__setattr__(self, name, _number(name, value))

    def named(self, decision_id: str, run: str | None = None) -> Feedback:
        """The same feedback on that decision."""
        return replace(self, decision_id=decision_id, prompt=None, responses=None, run=run or self.run)

    def document(self) -> dict[str, Any]:
        """The item as the API takes it.

        Raises:
            ValueError: neither id nor content, a name or text that is not one, or a value that is not a finite number.
        """
        given = _present(preferred=self.preferred, loss=self.loss, reward=self.reward)
        value: dict[str, Any] = {name: _number(name, number) for name, number in given.items()}
        value.update(_names(run=self.run))
        if self.decision_id is not None:
            return {**_names(decision_id=self.decision_id), **value}
        if self.prompt is None or self.responses is None:
            raise ValueError("feedback names no decision: give decision_id, or prompt and responses")
        _require_said(self.prompt, self.responses)
        return {**_content(self.prompt, self.responses), **value}


@dataclass(frozen=True, slots=True)
class Accepted:
    """The feedback is in the run's log, exactly once."""

    decision_id: str
    event_id: str
    duplicate: bool

    @property
    def ok(self) -> bool:
        """It was accepted."""
        return True


@dataclass(frozen=True, slots=True)
class Declined:
    """The feedback changed nothing, and why."""

    code: str
    message: str

    @property
    def ok(self) -> bool:
        """It was not accepted."""
        return False


FeedbackResult = Accepted | Declined


def scored_from(document: Mapping[str, Any]) -> Scored:
    """The reply of `/reward`, or one of `/reward/batch`.

    Raises:
        RouterProtocolError: a field is missing or of another type.
    """
    try:
        rewards = tuple(None if reward is None else float(reward) for reward in document["rewards"])
        return Scored(
            str(document["decision_id"]),
            str(document["run"]),
            str(document["model"]),
            rewards,
            document["preferred"],
            document["margin"],
            float(document["propensity"]),
            str(document["policy"]),
            int(document["posterior_version"]),
            bool(document["fallback"]),
            bool(document["recorded"]),
            {name: value for name, value in document.items() if name not in Scored.__slots__},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RouterProtocolError(f"a reward has no readable {error}: is the URL that of a reward router?") from error


def accepted_from(document: Mapping[str, Any]) -> Accepted:
    """The reply of `/feedback`, or one of `/feedback/batch`.

    Raises:
        RouterProtocolError: a field is missing.
    """
    try:
        return Accepted(str(document["decision_id"]), str(document["event_id"]), bool(document["duplicate"]))
    except (KeyError, TypeError) as error:
        raise RouterProtocolError(f"an acknowledgement has no readable {error}") from error


def sound(text: str) -> str:
    """The text as UTF-8 can carry it: half a surrogate pair, which some tokenizers decode to, becomes `?`."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def items_of(prompts: Sequence[Said], responses: Sequence[Sequence[Said]]) -> list[RewardItem]:
    """One item per prompt.

    Raises:
        ValueError: not as many lists of responses as prompts.
    """
    return [RewardItem(prompt, tuple(texts)) for prompt, texts in zip(prompts, responses, strict=True)]


def _present(**words: Any) -> dict[str, Any]:
    return {name: value for name, value in words.items() if value is not None}


def _names(**words: Any) -> dict[str, str]:
    """The names that are given.

    Raises:
        ValueError: one is not a string.
    """
    given = _present(**words)
    for name, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} is {value!r:.50}: give a string")
    return given


def _content(prompt: Said, responses: Sequence[Said]) -> dict[str, Any]:
    """Return prompt and responses as the API takes them."""
    said = [as_sent(one, f"responses[{k}]", "assistant") for k, one in enumerate(responses)]
    return {"prompt": _sound(as_sent(prompt)), "responses": [_sound(one) for one in said]}


def _sound(said: Any) -> Any:
    """Return texts, wherever they stand, as UTF-8 can carry them."""
    if isinstance(said, str):
        return sound(said)
    if isinstance(said, Mapping):
        return {name: _sound(value) for name, value in said.items()}
    return [_sound(one) for one in said]


def _require_said(prompt: Any, responses: Any) -> None:
    for name, said in (("prompt", prompt), *((f"responses[{k}]", r) for k, r in enumerate(responses))):
        if not isinstance(said, str | list | tuple):
            raise ValueError(f"{name} is {said!r:.50}: give its text, or a list of messages with role and content")
        as_sent(said, name)


def _number(name: str, value: Any) -> int | float:
    """The number that a scalar of Python, NumPy, torch or the like holds; an index where `name` is `preferred`.

    Raises:
        ValueError: it holds no finite number, several, or a fraction where an index is meant.
    """
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} is {value!r:.50}: feedback must be one number ({error})") from error
    if isinstance(value, bool | str | bytes):
        raise ValueError(f"{name} is {value!r:.50}: feedback must be a number")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} is {value!r:.50}: feedback must be a number ({error})") from error
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}: feedback must be a finite number; leave it out instead")
    if name != "preferred":
        return number
    if not number.is_integer():
        raise ValueError(f"preferred is {number}: feedback must be the index of a response, a whole number")
    return int(number)
