"""What a server must be, so that it does not lose what was acknowledged: asked at the start, and watched.

Knows the words of INFO and CONFIG GET, and judges what they say; sends nothing that changes data. `RedisStore` asks the
questions, `service.gateway` starts the watch, `/readyz` shows what it found.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import hiredis

from service.errors import ServiceError
from service.stores.resp import Arg, Reply

WATCH_SECONDS = 30.0
"""Pause between two surveys of a store that may be used: a setting changed by hand is noticed within this time."""

AGAIN_SECONDS = 1.0
"""Pause while the store is away or refused: one that came back, or was mended, is asked before long."""

QUESTIONS: tuple[tuple[Arg, ...], ...] = (
    ("INFO",),
    ("CONFIG", "GET", "appendfsync"),
    ("CONFIG", "GET", "save"),
    ("CONFIG", "GET", "proc-title-template"),
)
"""What a survey sends. Managed services forbid CONFIG; what it would say is then not known, and not judged."""

EMBEDDED_TITLE = "{title} {listen-addr} embedded in reward-router"
"""Process title of the embedded store, by which every gateway knows that its owner flushes the append-only file."""

_LEAST_VERSION = (7, 0)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What one server says of itself; None where it does not say.

    `version` is the Redis version that it is compatible with; `maxmemory` is in bytes, 0 for no limit; `save` holds the
    points of RDB snapshots, "" for none.
    """

    version: str | None = None
    replica: bool = False
    maxmemory: int | None = None
    eviction: str | None = None
    append_only: bool | None = None
    appendfsync: str | None = None
    save: str | None = None
    embedded: bool = False
    """It is our embedded store, whose owner flushes the append-only file to disk."""
    silent: bool = False
    """INFO was refused: nothing is known."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a store may not be used, and what may lose data one day; sentences with a remedy, in a fixed order."""

    refusals: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Surveyed(Protocol):
    """The part of a store that is watched."""

    async def survey(self) -> Sequence[ServerFacts]:
        """Ask every server of the store that takes writes what it is."""

    def refuse(self, reason: str | None) -> None:
        """Save nothing from now on, for this reason; None: save again."""


def read_facts(replies: Sequence[Reply]) -> ServerFacts:
    """Read the replies to `QUESTIONS`; an error reply leaves what it would have said unknown."""
    info, fsync, save, title = replies
    if isinstance(info, hiredis.ReplyError):
        return ServerFacts(silent=True)
    said = dict(line.split(":", 1) for line in info.decode(errors="replace").splitlines() if ":" in line)
    return ServerFacts(
        version=said.get("redis_version"),
        replica=said.get("role") == "slave",
        maxmemory=_number(said, "maxmemory"),
        eviction=said.get("maxmemory_policy"),
        append_only=None if "aof_enabled" not in said else said["aof_enabled"] == "1",
        appendfsync=_configured(fsync),
        save=_configured(save),
        embedded=_configured(title) == EMBEDDED_TITLE,
    )


def _number(said: Mapping[str, str], name: str) -> int | None:
    value = said.get(name, "")
    return int(value) if value.isdecimal() else None


def _configured(reply: Reply) -> str | None:
    """Value of the one parameter that CONFIG GET was asked for; None where it was refused or is not known there."""
    if isinstance(reply, hiredis.ReplyError) or len(reply) != 2:
        return None
    return str(reply[1].decode(errors="replace"))


def judge(facts: ServerFacts) -> Verdict:
    """Say what is wrong with a server."""
    if facts.silent:
        return Verdict(
            warnings=(
                "the store does not answer INFO, so its eviction policy and persistence are not known: allow the "
                "user INFO and CONFIG GET",
            )
        )
    eviction, appending = _judge_eviction(facts), _judge_persistence(facts)
    refusals = [*_judge_kind(facts), *eviction.refusals]
    return Verdict(tuple(refusals), (*eviction.warnings, *appending))


def _judge_kind(facts: ServerFacts) -> list[str]:
    found = []
    if facts.replica:
        found.append(
            "the store is a replica, which keeps nothing that is written to it: point store_url at the primary"
        )
    if facts.version is not None and _parse_version(facts.version) < _LEAST_VERSION:
        found.append(f"the store is compatible with Redis {facts.version} only: use Valkey, or Redis 7.0 or newer")
    return found


def _parse_version(version: str) -> tuple[int, ...]:
    """Numbers of a version; (7, 0) where it cannot be read, since nobody knows what such a server lacks."""
    numbers = version.split(".")[:2]
    return tuple(map(int, numbers)) if all(number.isdecimal() for number in numbers) else _LEAST_VERSION


def _judge_eviction(facts: ServerFacts) -> Verdict:
    if facts.eviction is None or facts.eviction == "noeviction":
        return Verdict()
    remedy = "set maxmemory-policy to noeviction"
    if facts.maxmemory == 0:
        return Verdict(
            warnings=(
                f"the store's maxmemory-policy is {facts.eviction}: with a maxmemory it would drop decisions that wait "
                f"for feedback: {remedy}",
            )
        )
    return Verdict(
        (
            f"the store's maxmemory-policy is {facts.eviction}: when its memory is full it drops decisions that wait "
            f"for feedback: {remedy}",
        )
    )


def _judge_persistence(facts: ServerFacts) -> list[str]:
    remedy = "set appendonly to yes and appendfsync to everysec or always"
    if facts.append_only is None:
        return []
    if not facts.append_only and facts.save == "":
        return [f"the store keeps nothing on disk, so a restart loses everything: {remedy}"]
    if not facts.append_only:
        return [f"the store has no append-only file, so a restart loses what came after its last snapshot: {remedy}"]
    if facts.appendfsync == "no" and not facts.embedded:
        return [
            "the store's appendfsync is no, so a power cut may lose the last half minute: set it to everysec or always"
        ]
    return []


class RequirementsWatch:
    """Surveys a store again and again, refuses one that would lose data, and logs each finding once.

    Args:
        store: what is surveyed and refused.
        allow_unsafe: whether an operator insists on using the store all the same: refusals become warnings.
    """

    def __init__(self, store: Surveyed, *, allow_unsafe: bool = False) -> None:
        self._store = store
        self._allow_unsafe = allow_unsafe
        self._known = False
        self.verdict = Verdict()

    @property
    def findings(self) -> tuple[str, ...]:
        """All that is wrong with the store, refusals first."""
        return self.verdict.refusals + self.verdict.warnings

    async def check(self) -> None:
        """Survey the store once and act on what it says; a store that is away keeps its last verdict."""
        try:
            facts = await self._store.survey()
        except ServiceError:
            # Whoever uses the store meets the same error, and counts it.
            self._known = False
            return
        self._known = True
        self._act(self._judge_all(facts))

    async def run_forever(self) -> None:
        """Check until cancelled: every `WATCH_SECONDS`, and every `AGAIN_SECONDS` while the store cannot be used."""
        while True:
            usable = self._known and not self.verdict.refusals
            await asyncio.sleep(WATCH_SECONDS if usable else AGAIN_SECONDS)
            await self.check()

    def _judge_all(self, facts: Sequence[ServerFacts]) -> Verdict:
        """Judge all servers of a store as one: each sentence once."""
        verdicts = [judge(one) for one in facts]
        refusals = dict.fromkeys(sentence for verdict in verdicts for sentence in verdict.refusals)
        warnings = dict.fromkeys(sentence for verdict in verdicts for sentence in verdict.warnings)
        if self._allow_unsafe:
            return Verdict((), (*refusals, *warnings))
        return Verdict(tuple(refusals), tuple(warnings))

    def _act(self, verdict: Verdict) -> None:
        before, self.verdict = self.findings, verdict
        self._store.refuse("; ".join(verdict.refusals) or None)
        for sentence in verdict.refusals:
            if sentence not in before:
                remedy = "nothing is saved until then; allow_unsafe_store insists on it"
                _log.error("store refused", extra={"fields": {"reason": sentence, "remedy": remedy}})
        for sentence in verdict.warnings:
            if sentence not in before:
                _log.warning("store may lose data", extra={"fields": {"reason": sentence}})
        for sentence in before:
            if sentence not in self.findings:
                _log.info("store mended", extra={"fields": {"reason": sentence}})
