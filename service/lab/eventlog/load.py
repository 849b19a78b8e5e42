"""A file of events as arrays for off-policy evaluation, and as events for a fold.

Knows files of this package and the arrays of `router_core.ope`. Called by the command `ope`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from router_core.attempts import ASKED, Attempt, Outcome, answers, excluded, first_choice, reads_all
from router_core.combine import Answers, margins_of
from router_core.ope import LoggedData, SequenceLog, available_propensities, numbered, one_reward_per_row, with_shadows
from router_core.policies import propensity_without
from router_core.records import TIE, Event, Source
from service.errors import ConfigurationError
from service.lab.eventlog.export import read_events, read_header
from service.lab.eventlog.record import Header, LoggedEvent
from service.usecases.audit_choice import is_audited
from service.usecases.decisions import StoredDecision, event_from


@dataclass(frozen=True, slots=True)
class EventLog:
    """A whole file in memory.

    Attributes:
        header: what it says about itself.
        events: in log order.
    """

    header: Header
    events: tuple[LoggedEvent, ...]

    @property
    def usable(self) -> NDArray[np.bool_]:
        """(N,) True where the event has a first choice and a reward of it, and stands for its decision."""
        usable = [event.first_reward is not None for event in self.events]
        return np.array(usable, dtype=np.bool_) & self.telling

    @property
    def telling(self) -> NDArray[np.bool_]:
        """(N,) True for one event of each decision: the first gold, else the audit."""
        best: dict[str, int] = {}
        for index, event in enumerate(self.events):
            standing = best.get(event.decision_id)
            if standing is None or (event.source is not Source.AUDIT and self.events[standing].source is Source.AUDIT):
                best[event.decision_id] = index
        telling = np.zeros(len(self.events), dtype=np.bool_)
        telling[list(best.values())] = True
        return telling


def load_log(path: Path) -> EventLog:
    """Read a file that `export` has written.

    Raises:
        ConfigurationError: it is none.
    """
    if not path.is_file():
        raise ConfigurationError(f"{path} does not exist: write it with `reward-router export RUN --out {path}`")
    header = read_header(path)
    K = len(header.pool)
    return EventLog(header, tuple(_of_pool(event, K) for event in read_events(path)))


def _of_pool(event: LoggedEvent, K: int) -> LoggedEvent:
    """The event with every arm of the run: one that came later was never asked, and nobody knew what it is worth."""
    decision = event.decision
    missing = K - len(decision.offsets)
    if missing <= 0:
        return event
    wide = msgspec.structs.replace(
        decision,
        offsets=[*decision.offsets, *[0.5] * missing],
        means=[*decision.means, *[-math.inf] * (K - len(decision.means))],
        sds=[*decision.sds, *[0.0] * (K - len(decision.sds))],
        propensities=[*decision.propensities, *[0.0] * (K - len(decision.propensities))],
        floors=[*decision.floors, *[0.0] * (K - len(decision.floors))] if decision.floors else [],
    )
    return replace(event, decision=wide)


def logged_data(log: EventLog, rows: slice = slice(None)) -> LoggedData:
    """The usable events of a part of the log, as arrays.

    The action of a row is the arm that was asked first, its reward what came back in the end, also where that arm
    failed and another one answered. Propensities are of that first choice, among the arms that were not known to be
    away; and where instances were shadowed or audited, the probability that the arm's reward is in the log at all.
    Audited decisions without feedback are a sample: `LoggedData.inclusion`.

    Args:
        log: the file.
        rows: which events of it.
    """
    chosen = [event for event, usable in zip(log.events[rows], log.usable[rows], strict=True) if usable]
    later = {event.decision_id: event for event in log.events if event.source is Source.AUDIT and event.after_gold}
    k = len(log.header.pool)
    decisions = [event.decision for event in chosen]
    arm = np.array([_first_arm(decision.attempts) for decision in decisions], dtype=np.int64)
    available = np.ones((len(chosen), k), dtype=np.bool_)
    for row, decision in enumerate(decisions):
        available[row] = _in_pool(log.header, decision)
        available[row, excluded(decision.attempts, 0)] = False
    rewards = one_reward_per_row(arm, np.array([event.first_reward for event in chosen], dtype=np.float64), k)
    for row, event in enumerate(chosen):
        _tell_shadows(event, available[row], rewards[row])
        if event.decision_id in later:
            _tell_shadows(later[event.decision_id], available[row], rewards[row], event.first_reward)
    asked = available_propensities(
        _matrix([decision.propensities for decision in decisions], k),
        _matrix([decision.means for decision in decisions], k),
        _matrix([decision.sds for decision in decisions], k),
        _matrix([decision.floors or [0.0] * k for decision in decisions], k),
        available,
    )
    inclusion, shadowed = _chances(log, chosen)
    asked = with_shadows(asked, arm, available, rewards, shadowed)
    contexts = np.frombuffer(b"".join([decision.x for decision in decisions]), "<f4")
    return LoggedData(
        log.header.pool,
        contexts.reshape(len(chosen), log.header.d),
        arm,
        asked,
        available,
        rewards,
        numbered(decision.sticky or row for row, decision in enumerate(decisions)),
        inclusion,
    )


def _in_pool(header: Header, decision: StoredDecision) -> NDArray[np.bool_]:
    """(K,) True for the arms that were in the pool, and for those that were asked all the same."""
    inside = np.zeros(len(header.pool), dtype=np.bool_)
    inside[list(header.asked_at(decision.time_ms))] = True
    inside[[attempt.arm for attempt in decision.attempts]] = True
    return inside


def _chances(
    log: EventLog, events: Sequence[LoggedEvent]
) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Return the probabilities with which these decisions came into the log, and with which all arms were asked there.

    A decision comes by feedback, of which a share f is never missing at random, or by an audit, of known probability p:
    f + (1 − f)p. f is the share of the audited decisions that have feedback as well. An audit that is there alone has
    asked; beside feedback, it asks with probability p, and the shadow rate with the share seen among those that were
    not chosen for an audit.

    Args:
        log: all of it.
        events: one of each decision.

    Returns:
        (N,) and (N,); None for both where no decision was audited, and for the first where all have feedback.
    """
    audited = {event.decision_id for event in log.events if event.source is Source.AUDIT}
    if not audited:
        return None, None
    gold = {event.decision_id for event in log.events if event.source is not Source.AUDIT}
    share = len(audited & gold) / len(audited)
    p = np.array([0.0 if (it := event.decision.inclusion) is None else it for event in events])
    known = np.array([event.decision.inclusion is not None for event in events])
    others = [event for event in events if not is_audited(event.decision_id, event.decision)]
    rate = sum([event.decision.shadows is not None for event in others]) / max(len(others), 1)
    alone = np.array([event.decision_id not in gold for event in events])
    inclusion = None if share == 1.0 else np.where(known, share + (1.0 - share) * p, 1.0)
    return inclusion, np.where(alone, 1.0, p + (1.0 - p) * rate)


def complete(decision: StoredDecision, inside: NDArray[np.bool_] | None = None) -> bool:
    """Return True if every arm that could be asked has answered, whatever the policy believed: it was shadowed, or asks
    everyone.

    Args:
        decision: what was stored.
        inside: (K,) True for the arms that were in the pool; None: all.
    """
    arms = range(len(decision.offsets)) if inside is None else np.flatnonzero(inside).tolist()
    there = set(arms) - set(_closed(decision.attempts))
    chosen = decision.shadows is not None or asks_everyone(decision)
    return chosen and there <= {answer.arm for answer in decision.heard}


def asks_everyone(decision: StoredDecision) -> bool:
    """Return True if the policy asked every arm, whatever it believed."""
    return decision.arm is None and not decision.multiplier


def sequence_log(log: EventLog) -> tuple[SequenceLog, NDArray[np.int64]]:
    """The decisions of the log as sequences of arms, without its logging policy; and which events they are.

    Left out are single responses, ties, and decisions at which an arm that was asked before the reply did not answer,
    or not about all responses.

    Args:
        log: of a run with preferences.
    """
    K = len(log.header.pool)
    telling = log.telling
    kept = [index for index, event in enumerate(log.events) if telling[index] and _tells_sequences(event)]
    decisions = [log.events[index].decision for index in kept]
    N, n = len(kept), max((decision.n for decision in decisions), default=2)
    verdicts, answered = np.full((N, K), TIE, np.int64), np.zeros((N, K), np.bool_)
    scores, there = np.full((N, K, n), np.nan), np.ones((N, K), np.bool_)
    arms, chances = np.full((N, K), -1, np.int64), np.ones((N, K))
    for row, decision in enumerate(decisions):
        there[row] = _in_pool(log.header, decision)
        there[row, _closed(decision.attempts)] = False
        asked = [attempt.arm for attempt in answers(decision.attempts)]
        arms[row, : len(asked)] = asked
        chances[row, : len(asked)] = [attempt.chance for attempt in answers(decision.attempts)]
        chances[row, 0] = _first_chance(decision)
        for answer in decision.heard:
            verdicts[row, answer.arm], answered[row, answer.arm] = answer.verdict, True
            scores[row, answer.arm, : decision.n] = answer.rewards
    whole = np.array([complete(decision, _in_pool(log.header, decision)) for decision in decisions], dtype=np.bool_)
    everyone = np.array([asks_everyone(decision) for decision in decisions], dtype=np.bool_)
    share = float(whole[~everyone].mean()) if (~everyone).any() else 0.0
    numbers = np.array([decision.n for decision in decisions], dtype=np.int64)
    found = SequenceLog(
        Answers(verdicts, answered, margins_of(scores), numbers),
        np.array([int(log.events[index].feedback.value) for index in kept], dtype=np.int64),
        arms,
        chances,
        there,
        whole,
        np.where(everyone, 1.0, share),
        None,
    )
    return found, np.array(kept, dtype=np.int64)


def fold_events(log: EventLog, rows: slice = slice(None)) -> list[Event]:
    """A part of the log as the fold takes it."""
    return [event_from(event.decision_id, event.decision, event.told) for event in log.events[rows]]


def _tell_shadows(
    event: LoggedEvent, available: NDArray[np.bool_], rewards: NDArray[np.float64], first: float | None = None
) -> None:
    """Add to a row's rewards (K,) what each available arm would have given, had it been asked first.

    That is what it said in the shadow; and for an arm that failed, there or before, what the arm gave that was asked
    instead of it in the end: the best draw that could answer is the same, whichever failing arm comes before it. What
    left before anybody asked it has told nothing.

    Args:
        event: of the answers.
        available: (K,) arms that could be asked.
        rewards: (K,) of the row, changed here.
        first: what came back for the first arm, where an earlier event says it.
    """
    decision = event.decision
    if decision.shadows is None:
        return
    # Who read a part of the responses is followed by others, as who failed.
    partly = {answer.arm for answer in decision.heard if not reads_all(answer) and answer.arm != decision.arm}
    rewards[[*partly]] = np.nan
    for arm, reward in event.learned:
        if arm not in partly:
            rewards[arm] = reward
    failed = available & np.isnan(rewards)
    failed[_untold(decision.attempts, decision.shadows)] = False
    rewards[failed] = event.first_reward if first is None else first


def _first_arm(attempts: Sequence[Attempt]) -> int:
    first = first_choice(attempts)
    assert first is not None, "a usable event has an answer"
    return first.arm


def _untold(attempts: Sequence[Attempt], shadows: Sequence[Attempt]) -> list[int]:
    """Return the arms that the first one was chosen among, and that left before anybody asked them."""
    left = [attempt for attempt in attempts if attempt.turn > 0] + [*shadows]
    return [attempt.arm for attempt in left if attempt.outcome in (Outcome.AWAY, Outcome.ABSENT)]


def _tells_sequences(event: LoggedEvent) -> bool:
    decision = event.decision
    told = [attempt for attempt in decision.attempts if attempt.outcome in ASKED]
    whole = all(one.outcome is Outcome.ANSWERED and reads_all(one) for one in told)
    return decision.n > 1 and event.feedback.value >= 0 and whole


def _first_chance(decision: StoredDecision) -> float:
    """Probability of the arm that was asked first, among those that could be."""
    if asks_everyone(decision):
        return 1.0
    gone, arm = excluded(decision.attempts, 0), _first_arm(decision.attempts)
    if not gone:
        return decision.propensities[arm]
    floors = np.array(decision.floors or [0.0] * len(decision.means))
    return propensity_without(np.array(decision.means), np.array(decision.sds), floors, gone, arm)


def _closed(attempts: Sequence[Attempt]) -> list[int]:
    """Return the arms that could not be asked at some turn."""
    return [attempt.arm for attempt in attempts if attempt.outcome in (Outcome.AWAY, Outcome.ABSENT)]


def _matrix(rows: Sequence[Sequence[float]], k: int) -> NDArray[np.float64]:
    return np.array(rows, dtype=np.float64).reshape(len(rows), k)
