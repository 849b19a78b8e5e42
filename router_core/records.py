"""The values that travel through the router: what is scored, how it was judged, what was learned from it.

Plain frozen values without behaviour beyond their own invariants; every other module may import this one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

TIE = -1
"""Verdict of an RM whose best two rewards are as good as equal, and of a group with one response."""

TIE_TOLERANCE = 2.0**-20
"""Two rewards closer than this, relative to the larger one or absolutely, are a tie.

A worker's logit is a float32: 24 bits, a sum of terms of order one. The order of summation, which batch shapes change,
moves its last three or four bits, so that a difference of 2⁻²⁰ (10⁻⁶) says nothing. Bfloat16 models move more, but
their rewards do differ when they differ: a coarser tolerance would make ties of what such an RM has ranked.
"""

MAX_ABS_SCORE = 1e6
"""Largest size of a score that any reward model could mean: logits and grades stay below 10³. Beyond it lies a fault.
Bounds what workers answer and what data files hold."""


class Signal(StrEnum):
    """The kind of feedback of a run. A run never mixes kinds."""

    LOSS = "loss"
    """Per-pair DPO loss (the paper's); any finite number, lower is better."""
    PREFERENCE = "preference"
    """Index of the response that is better; the reward is the RM's `credit`."""
    REWARD = "reward"
    """A number in [0, 1] that already says how well the asked RM did."""


Fact = str | float | bool | None
"""Value of an instance's metadata."""


class ToolCall(NamedTuple):
    """A call of a tool in an assistant's message: the tool's name, its arguments as JSON, and the call's id."""

    name: str
    arguments: str = ""
    id: str = ""


class Message(NamedTuple):
    """One message of a conversation.

    Attributes:
        role: who speaks: system, user, assistant, tool, or another name.
        text: what is said.
        name: of the speaker or the tool; "" for none.
        calls: tools that the message calls.
        answers: id of the call that a tool's message answers; "" for none.
    """

    role: str
    text: str
    name: str = ""
    calls: tuple[ToolCall, ...] = ()
    answers: str = ""


Turns = tuple[Message, ...]
"""A part of a conversation, in order."""

Said = str | Turns
"""A prompt or a response: a text stands for one message, of the user or of the assistant."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One prompt with n >= 1 responses: what one scorer is asked about. Two responses is the normal case.

    Attributes:
        prompt: the prompt's text; of a longer conversation its turns as text, which the context is made of.
        responses: (n,) texts.
        reference: what a right answer looks like, for scorers that compare; never part of the context.
        metadata: flat facts about the instance, for scorers that need them; never part of the context.
        turns: messages of the prompt; None where it is one user message, which `prompt` holds.
        answers: per response its messages, None for one that is one assistant message; None where all are.
    """

    prompt: str
    responses: tuple[str, ...]
    reference: str | None = None
    metadata: Mapping[str, Fact] = field(default_factory=dict, hash=False)
    turns: Turns | None = None
    answers: tuple[Turns | None, ...] | None = None

    def items(self) -> list[tuple[Said, Said]]:
        """Return (prompt, response) for each response, as turns where they are turns."""
        prompt: Said = self.turns or self.prompt
        if self.answers is None:
            return [(prompt, response) for response in self.responses]
        return [(prompt, turns or text) for turns, text in zip(self.answers, self.responses, strict=True)]


@dataclass(frozen=True, slots=True)
class LabelledPair:
    """One recorded preference pair: an instance, which response is better, and what each RM said of it.

    `label` is the index of the best response. `scores[name]` holds that RM's score per response; `abstained` the RMs
    that were asked and do not apply to it; any other RM that is missing was not asked. `group` is what must not be
    split between training and test.
    """

    id: str
    instance: Instance
    label: int
    scores: Mapping[str, tuple[float, ...]]
    verdicts: Mapping[str, int]
    domain: str = ""
    subset: str = ""
    group: str = ""
    abstained: frozenset[str] = frozenset()

    @property
    def part(self) -> str:
        """Return the name under which reports count the pair: its subset, else its domain, else `(none)`."""
        return self.subset or self.domain or "(none)"

    def correctness(self, model: str) -> float:
        """Return the module's `correctness` of the RM.

        Raises:
            KeyError: the RM was not asked.
        """
        return correctness(self.verdicts[model], self.scores.get(model), len(self.instance.responses), self.label)

    def credit(self, model: str) -> float:
        """Return what is learned of the RM from this label: `credit` of its scores, or of its verdict.

        The same as `correctness` for two responses. A verdict without scores leaves the order of the others open.

        Raises:
            KeyError: the RM was not asked.
        """
        n, verdict = len(self.instance.responses), self.verdicts[model]
        if n > 2 and model in self.scores:
            rewards: Sequence[float] = self.scores[model]
        else:
            rewards = [float(i == verdict) for i in range(n)]
        share = credit(rewards, self.label)
        return 0.5 if share is None else share


@dataclass(frozen=True, slots=True)
class Feedback:
    """One raw feedback: the kind, and the number that came with it (for `preference`: the index, as a float)."""

    signal: Signal
    value: float


class Shadow(NamedTuple):
    """What another RM than the asked one said of the same instance: its arm, its offset o_k(x) and its credit."""

    arm: int
    offset: float
    credit: float | None


class Source(StrEnum):
    """Who says which response is better."""

    TRAINER = "trainer"
    """The trainer's feedback. A preference is gold."""
    PERSON = "person"
    """A person who was shown the responses: gold."""
    AUDIT = "audit"
    """A referee, which may be wrong."""


class Audit(NamedTuple):
    """A referee's verdict on a decision that was chosen with known probability (docs/audits.md).

    Attributes:
        referee: its name.
        verdict: the response that it prefers; TIE where it prefers none.
        probability: with which the decision was chosen, in (0, 1].
        trust: how often the operator expects the referee to be right, in [1/2, 1].
        after_gold: True where gold was there first; then the event's feedback is gold, and teaches the arms that the
            audit was the first to ask.
        earned: credit against gold of the RM that was asked first, where the event has no arm; None: unknown.
        taught: (arm, credit against `verdict`) of every arm that an earlier event of this audit has taught; only in the
            event of gold that came later.
    """

    referee: str
    verdict: int
    probability: float
    trust: float = 0.9
    after_gold: bool = False
    earned: float | None = None
    taught: tuple[tuple[int, float | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """One accepted feedback, or audit, as the run's log holds it.

    `x` is the context as little-endian float32 bytes, exactly as it was when the RM was drawn; `offset` the calibrated
    probability o_k(x) of the asked arm at that time (0 for priors without offset). `credit` is what a preference says
    of the asked RM (`records.credit`); None where it says nothing, or where the signal is another. `shadows` holds
    (arm, offset, credit) of every other RM that was asked as well, each arm once; only a `preference` can be learned
    from for them.

    An audit is an event with the preference of its referee. Gold and an audit of one decision are two events, and the
    later one carries `audit`, so that the referee can be judged:

    | event | source | feedback and credits | audit |
    |---|---|---|---|
    | feedback alone | trainer, person | gold's | None |
    | audit alone | audit | the referee's | yes |
    | audit after gold | audit | gold's; the arms that gold did not teach, or none | with `after_gold` |
    | gold after audit | trainer, person | gold's | with `taught` |
    """

    arm: int
    x: bytes
    offset: float
    credit: float | None
    feedback: Feedback
    decision_id: str = ""
    shadows: tuple[tuple[int, float, float | None], ...] = ()
    source: Source = Source.TRAINER
    audit: Audit | None = None


def credit(rewards: Sequence[float], preferred: int) -> float | None:
    """Return the share of the other responses that an RM puts below the preferred one; a tie counts one half.

    A preference for response i of n implies n − 1 pairs, i before each other one, and this is the RM's mean
    correctness over them (docs/math/router.md, "Several responses"). An RM that knows nothing earns 1/2 on average,
    whatever n is. A response without a reward (NaN) is compared with nothing. None where nothing is compared with the
    preferred response, as for a single one: a preference says nothing there.

    Args:
        rewards: (n,) the RM's.
        preferred: index of the preferred response.

    >>> credit([0.1, 0.7], 1), credit([0.5, 0.5], 0), credit([3.0, 2.0, 1.0, 2.0], 1), credit([1.0], 0)
    (1.0, 0.5, 0.5, None)
    >>> credit([math.nan, 0.7, 0.1], 1), credit([math.nan, 0.7], 0), credit([math.nan, 0.7], 1)
    (1.0, None, None)
    """
    mine = rewards[preferred]
    others = [reward for i, reward in enumerate(rewards) if i != preferred and reward == reward]
    if mine != mine or not others:
        return None
    return sum([0.5 if _ties(reward, mine) else float(reward < mine) for reward in others]) / len(others)


def correctness(verdict: int, scores: Sequence[float] | None, n: int, label: int) -> float:
    """Return the probability that an RM chooses the best response, where ties are broken evenly.

    1 if its verdict is the label, 1/w if w responses tie for its best and the label is one of them, else 0. A tie whose
    winners no scores tell is one of all n responses.

    >>> correctness(1, None, 3, 1), correctness(TIE, [1.0, 2.0, 2.0], 3, 1), correctness(TIE, None, 4, 1)
    (1.0, 0.5, 0.25)
    """
    if verdict != TIE:
        return float(verdict == label)
    winners = leaders_of(scores) if scores else []
    return chance_of(winners if len(winners) > 1 else range(n), label)


def chance_of(winners: Collection[int], preferred: int) -> float:
    """Return the probability that an even choice among the winners is the preferred response.

    >>> chance_of([1, 2], 2), chance_of([1, 2], 0)
    (0.5, 0.0)
    """
    return 1.0 / len(winners) if preferred in winners else 0.0


def leaders_of(rewards: Sequence[float]) -> list[int]:
    """Indices of the responses whose reward ties with the largest, in order; see `TIE_TOLERANCE`.

    NaN is no reward, and ties with nothing.

    >>> leaders_of([0.5, 0.7, 0.7 + 1e-9])
    [1, 2]
    """
    best = max([reward for reward in rewards if reward == reward], default=math.nan)
    return [index for index, reward in enumerate(rewards) if _ties(reward, best)]


def _ties(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=TIE_TOLERANCE, abs_tol=TIE_TOLERANCE)


def verdict_of(rewards: Sequence[float]) -> int:
    """Index of the response with the largest reward; TIE when another one ties with it, or when there is only one.

    A response without a reward (NaN) is compared with nothing.

    >>> verdict_of([0.1, 0.7]), verdict_of([0.5, 0.5 + 1e-9]), verdict_of([1.0]), verdict_of([1.0, math.nan])
    (1, -1, -1, -1)
    """
    if sum([reward == reward for reward in rewards]) < 2:
        return TIE
    leaders = leaders_of(rewards)
    return leaders[0] if len(leaders) == 1 else TIE
