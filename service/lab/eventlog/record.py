"""One event of an exported log, and what a file says about itself.

Knows the stored decision and the fold's rewards; knows no file format and no store. Called by the other modules of this
package.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import msgspec

from router_core.attempts import Attempt, Outcome, answers
from router_core.feedback import SignalAccumulator, SignalStatistics
from router_core.posterior import NO_ARM
from router_core.prior import LOSS_SCALES, PriorForm
from router_core.records import Feedback, Signal, Source
from service.errors import ConfigurationError
from service.specification import decode
from service.stores.acts import POOL
from service.stores.protocol import LogEntry
from service.usecases.decisions import StoredAudit, StoredDecision, Told, decode_decision, event_from, told_by

SCHEMA_VERSION = 4
"""Version of the exported files' schema."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file of events says about itself.

    Attributes:
        run: whose log it is.
        fingerprint: the run's, as the gateway stored it: pool, signal, prior, dimension, origin, hyper-parameters.
        first_position: events of the log before the first one here; None where that is not known (`--since`).
        exact_rewards: whether the column `reward` is what the fold learned from. Losses are scaled by what came
            before, so a log whose beginning is gone cannot tell; its rewards are empty then.
        created_by: program and version.
        pools: the changes of the run's pool that the store knows of, oldest first: `time_ms`, `version`, the names of
            all arms by index, the arms that are asked from then on, prices and terms.
        schema_version: `SCHEMA_VERSION` of the program that wrote it.
    """

    run: str
    fingerprint: Mapping[str, Any]
    first_position: int | None
    exact_rewards: bool
    created_by: str
    pools: Sequence[Mapping[str, Any]] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def pool(self) -> tuple[str, ...]:
        """Model names, in arm order: of every arm that the run ever asked."""
        return tuple(self.pools[-1]["names"] if self.pools else self.fingerprint["pool"])

    def asked_at(self, time_ms: int) -> frozenset[int]:
        """Return the arms that were in the pool at a time."""
        before = [change for change in self.pools if change["time_ms"] <= time_ms]
        return frozenset(before[-1]["asked"] if before else range(len(self.fingerprint["pool"])))

    @property
    def d(self) -> int:
        """The length of a context."""
        return int(self.fingerprint["d"])

    @property
    def signal(self) -> Signal:
        """The run's kind of feedback."""
        return Signal(self.fingerprint["signal"])

    @property
    def form(self) -> PriorForm:
        """The run's prior form."""
        return PriorForm(self.fingerprint["prior"])

    def to_json(self) -> str:
        """One line."""
        names = ("run", "fingerprint", "first_position", "exact_rewards", "created_by", "pools", "schema_version")
        return json.dumps({name: getattr(self, name) for name in names}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, source: object) -> Header:
        """Read `to_json` back.

        Raises:
            ConfigurationError: it is none, or of a later version; `source` names the file.
        """
        try:
            header = cls(**json.loads(text))
            complete = all(key in header.fingerprint for key in ("pool", "d", "signal", "prior"))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{source} is no event log of reward-router: {error}") from error
        if not complete or header.schema_version != SCHEMA_VERSION:
            raise ConfigurationError(
                f"{source} was written by {header.created_by} in schema version {header.schema_version}, and this "
                f"program reads {SCHEMA_VERSION}: use that version, or export again"
            )
        return header


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """One event: the decision, the feedback, and what the fold makes of both.

    Attributes:
        event_id: its place in the log, "milliseconds-sequence" of when the feedback was accepted.
        decision_id: what the feedback named.
        decision: all that was stored of it.
        feedback: kind and raw value.
        learned: (arm, reward) of every scorer that the fold learns about from this event. Empty while a loss signal
            warms up, for a preference about a single response, and where it cannot be told (`Header.exact_rewards`).
        source: who says it: trainer, person, or audit.
        after_gold: True for an audit or a person that came after the trainer's feedback, which `feedback` is for an
            audit.
    """

    event_id: str
    decision_id: str
    decision: StoredDecision
    feedback: Feedback
    learned: tuple[tuple[int, float], ...] = ()
    source: Source = Source.TRAINER
    after_gold: bool = False

    @property
    def told(self) -> Told:
        """What the entry of the log says."""
        return Told(self.source, self.feedback, self.after_gold)

    @property
    def reward(self) -> float | None:
        """What the fold learns about the scorer whose answer the caller got; None where that is nothing."""
        return dict(self.learned).get(NO_ARM if self.decision.arm is None else self.decision.arm)

    @property
    def first_reward(self) -> float | None:
        """What came back for asking the first arm, from another one where it failed; None where there is no first arm.

        Further calls of a cascade leave it as it is: it is what the first choice earned alone.
        """
        if not self.decision.multiplier:
            return self.reward
        return dict(self.learned).get(answers(self.decision.attempts)[0].arm)

    @property
    def feedback_time_ms(self) -> int:
        """When the feedback was accepted, Unix time."""
        return int(self.event_id.partition("-")[0])


class RewardFollower:
    """Turns log entries into events, keeping the statistics that the fold keeps.

    Args:
        header: of the run.
    """

    def __init__(self, header: Header) -> None:
        self._header = header
        scale = LOSS_SCALES[header.form]
        self._signal = SignalAccumulator(SignalStatistics.empty(len(header.pool)), scale)

    def event(self, entry: LogEntry) -> LoggedEvent:
        """Return the next event of the log.

        Raises:
            ConfigurationError: the entry cannot be read.
        """
        try:
            decision = decode_decision(entry.payload)
            told = told_by(decision, entry.value)
        except ValueError as error:
            raise ConfigurationError(
                f"event {entry.event_id} of run {self._header.run!r} cannot be read ({error}): export with the version "
                "of the gateway that wrote it"
            ) from error
        return LoggedEvent(
            entry.event_id,
            entry.decision_id,
            decision,
            told.feedback,
            self.learned(entry.decision_id, decision, told),
            told.source,
            told.after_gold,
        )

    def learned(self, decision_id: str, decision: StoredDecision, told: Told) -> tuple[tuple[int, float], ...]:
        """Return (arm, reward) of what the fold learns, in its order; the statistics move on.

        A referee's verdict stands for what it teaches, which also depends on how far the referee is right.
        """
        event, feedback = event_from(decision_id, decision, told), told.feedback
        own = [(event.arm, event.offset, event.credit)] if event.arm != NO_ARM else []
        out = []
        for arm, offset, credit in [*own, *sorted(event.shadows, key=itemgetter(0))]:
            reward = self._signal.observe(arm, feedback, credit=credit, offset=offset)
            if reward is not None and self._header.exact_rewards:
                out.append((arm, reward))
        return tuple(out)


def pools_of(acts: Sequence[LogEntry]) -> list[dict[str, Any]]:
    """Return what a header says of changes of the pool."""
    found = []
    for act in acts:
        if act.value != POOL:
            continue
        specification = decode(act.payload)
        found.append(
            {
                "time_ms": int(act.event_id.partition("-")[0]),
                "version": specification.version,
                "names": specification.names,
                "asked": [k for k, arm in enumerate(specification.arms) if not arm.retired],
                "prices": [arm.entry.get("price", 1.0) for arm in specification.arms],
                "routing": msgspec.structs.asdict(specification.routing),
                "audit": specification.pool.get("audit"),
            }
        )
    return found


def new_header(
    run: str,
    fingerprint: bytes,
    first_position: int | None,
    *,
    from_first_event: bool,
    acts: Sequence[LogEntry] = (),
) -> Header:
    """The header of a new file.

    Args:
        run: whose log it is.
        fingerprint: as the store keeps it.
        first_position: see `Header`.
        from_first_event: whether every event of the run will be read, though not all need be written.
        acts: of the run's operators.

    Raises:
        ConfigurationError: the fingerprint is another program's.
    """
    text = json.dumps(
        {
            "run": run,
            "fingerprint": json.loads(fingerprint),
            "first_position": first_position,
            "exact_rewards": True,
            "pools": pools_of(acts),
            "created_by": f"reward-router {importlib.metadata.version('reward-router')}",
        }
    )
    header = Header.from_json(text, f"the store's run {run!r}")
    return replace(header, exact_rewards=from_first_event or header.signal is not Signal.LOSS)


def require_same_run(existing: Header, header: Header, source: object) -> None:
    """Raises ConfigurationError unless both are of the same run, started in the same way."""
    if (existing.run, existing.fingerprint) != (header.run, header.fingerprint):
        raise ConfigurationError(
            f"{source} holds run {existing.run!r}, started with other settings than run {header.run!r} of this store: "
            "export to another file"
        )


def model_of(pool: Sequence[str], arm: int | None) -> str | None:
    """Return the name of the scorer whose answer the caller got; None where several were combined."""
    return None if arm is None else pool[arm]


def event_of_row(row: Mapping[str, Any], x: bytes) -> LoggedEvent:
    """Return the event of a file's row.

    Args:
        row: the columns as Python values; means are floats.
        x: the context's bytes.

    Raises:
        KeyError: a column is missing.
    """
    made = ("x", "rewards", "attempts", "shadows", "audit")
    fields = {name: row[name] for name in StoredDecision.__struct_fields__ if name not in made}
    shadows = row["shadows"]
    fields |= {
        "x": x,
        "rewards": _numbers(row["rewards"]),
        "attempts": [_attempt(one) for one in row["attempts"]],
        "shadows": None if shadows is None else [_attempt(one) for one in shadows],
        "audit": None if row["audit"] is None else _audit(row["audit"]),
    }
    return LoggedEvent(
        row["event_id"],
        row["decision_id"],
        StoredDecision(**fields),
        Feedback(Signal(row["signal"]), float(row["value"])),
        tuple((one["arm"], one["reward"]) for one in row["learned"]),
        Source(row["source"]),
        row["after_gold"],
    )


def _audit(row: Mapping[str, Any]) -> StoredAudit:
    signs = {name: [*values] for name, values in dict(row["signs"]).items()}
    return StoredAudit(**{**row, "rewards": _numbers(row["rewards"]), "signs": signs})


def _attempt(row: Mapping[str, Any]) -> Attempt:
    components = {name: _numbers(values) for name, values in dict(row["components"]).items()}
    made = {"outcome": Outcome(row["outcome"]), "rewards": _numbers(row["rewards"]), "components": components}
    return Attempt(**{**row, **made})


def _numbers(values: Sequence[float | None]) -> list[float]:
    """Return NaN in the place of null, which is how JSON has it."""
    return [math.nan if value is None else value for value in values]
