"""The process in which a rule runs: `python -m service.workers.rules.child`. Foreign code runs here and nowhere else.

Reads questions from standard input and writes outcomes to what was standard output, each as four bytes of length and
msgpack. What the rule prints goes to standard error. `service.workers.rules.processes` starts it, bounds the time of
each question, and kills it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO, Final

import msgspec

LENGTH: Final = struct.Struct(">I")

Fact = str | float | bool | None

Rule = Callable[[list[dict[str, str]], str, str | None, dict[str, Fact]], float | bool | None]
"""(messages, response, reference, metadata) to the reward; None where the rule does not apply."""

REWARD: Final = "reward"
ABSTAINED: Final = "abstained"
ERROR: Final = "rule_error"
MEMORY: Final = "rule_memory"


class Spec(msgspec.Struct):
    """What a process is started with: the rule, its options, and its memory in bytes."""

    rule: str
    options: dict[str, object]
    memory_bytes: int


class Question(msgspec.Struct):
    """One response that is to be scored."""

    messages: list[dict[str, str]]
    response: str
    reference: str | None
    metadata: dict[str, Fact]


class Outcome(msgspec.Struct):
    """What became of a question: `kind` is `reward`, `abstained` or the code of a failure."""

    kind: str
    reward: float = 0.0
    message: str = ""


def run(rule: Rule, question: Question) -> Outcome:
    """Return what the rule says, or how it failed."""
    try:
        said = rule(question.messages, question.response, question.reference, question.metadata)
    except MemoryError:
        return Outcome(MEMORY, message="the rule needs more memory than it has (--memory-mb)")
    except RecursionError:
        return Outcome(ERROR, message="RecursionError")
    except Exception as error:  # noqa: BLE001 - foreign code: whatever it raises is the input's failure
        # The kind alone: a message may quote the response.
        return Outcome(ERROR, message=f"the rule raised {type(error).__name__}")
    if said is None:
        return Outcome(ABSTAINED)
    try:
        reward = float(said)
    except (TypeError, ValueError):
        return Outcome(ERROR, message=f"the rule returned {type(said).__name__}; return a number, a bool or None")
    if reward != reward or reward in (float("inf"), float("-inf")):
        return Outcome(ERROR, message=f"the rule returned {reward}; return a finite number")
    return Outcome(REWARD, reward)


def read(stream: BinaryIO) -> bytes | None:
    """Return the next message; None at the end of the stream."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    body = stream.read(length)
    return body if len(body) == length else None


def write(stream: BinaryIO, value: object) -> None:
    """Send one message."""
    body = msgspec.msgpack.encode(value)
    stream.write(LENGTH.pack(len(body)) + body)
    stream.flush()


def main() -> None:
    """Load the rule, say that it is there, and answer until the input ends."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _die_with_parent()
    given = read(sys.stdin.buffer)
    if given is None:
        return
    spec = msgspec.msgpack.decode(given, type=Spec)
    _bound(spec.memory_bytes)
    # Loaded inside the bounds, since the file is foreign code too.
    from service.workers.rules.load import RuleLoadError, load_rule

    try:
        rule = load_rule(spec.rule, spec.options)
    except RuleLoadError as error:
        write(out, Outcome(ERROR, message=str(error)))
        return
    write(out, Outcome(REWARD))
    decoder = msgspec.msgpack.Decoder(Question)
    while (body := read(sys.stdin.buffer)) is not None:
        outcome = run(rule, decoder.decode(body))
        write(out, outcome)
        if outcome.kind == MEMORY:
            # What it holds now is not known: another process goes on.
            return


def _bound(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError, OSError):
        # macOS refuses it; a container's limit holds there.
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def _die_with_parent() -> None:
    """On Linux, end with the worker even while the rule hangs."""
    pr_set_pdeathsig = 1
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    main()
