"""What a judge's servers are asked by the health monitor: if they serve its model, and first a known comparison.

No tokens are spent while all goes well: `GET /v1/models` is enough. After failures a server must also complete a token.
A new one must give a verdict that can be read, which decides for `verdict: auto` how verdicts are read.
`service.scorers.health` does the rest.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import msgspec

from router_core.records import Instance
from service.scorers.health import NoSuchPathError, ProbeError, exchange, settle
from service.scorers.judge.client import JudgeScorer
from service.scorers.judge.rubrics import Mode, RubricError, Style, load_rubric
from service.scorers.judge.verdicts import VerdictError
from service.scorers.judge.wire import CHAT_PATH
from service.scorers.transport.breaker import BreakerState
from service.scorers.transport.exchange import AnswerError
from service.scorers.transport.replica import Replica
from service.scorers.wire import MODELS_PATH, UNREADABLE, ModelList

KNOWN: Final = Instance(
    "What is 2 + 2?", ("2 + 2 = 4.", "I like bananas."), reference="4", metadata={"task": "arithmetic"}
)
"""The comparison of probes. How a judge decides it is its own affair; that it can be read is ours."""

_log = logging.getLogger(__name__)


class JudgeChecks:
    """Implements `service.scorers.health.Checks` for one judge."""

    def __init__(self, judge: JudgeScorer) -> None:
        self._judge = judge
        self._decided = judge.config.verdict != "auto"
        self.name = judge.name
        self.replicas = judge.replicas

    async def ready(self, replica: Replica, deadline: float) -> None:
        await self._serves(replica, deadline)
        breaker = replica.breaker
        if breaker.state is not BreakerState.CLOSED or breaker.consecutive_failures:
            await self._complete(replica, self._judge.dialogue.probe(), deadline)

    async def probe(self, replica: Replica, deadline: float) -> None:
        await settle(replica, self._probe(replica, deadline))

    async def _probe(self, replica: Replica, deadline: float) -> None:
        await self._serves(replica, deadline)
        await self._give_verdict(replica, deadline)

    async def _serves(self, replica: Replica, deadline: float) -> None:
        """Ask which models the server has; one that does not say is believed.

        Raises:
            ProbeError: not the judge's.
        """
        until = min(deadline, asyncio.get_running_loop().time() + self._judge.config.answer_seconds)
        try:
            listed = msgspec.json.decode(await exchange(replica, "GET", MODELS_PATH, b"", until), type=ModelList)
        except (*UNREADABLE, NoSuchPathError):
            return
        model = self._judge.config.options.model
        served = {one.id: one for one in listed.data}
        if model not in served:
            names = ", ".join(sorted(served)[:10]) or "nothing"
            raise ProbeError(f"serves {names}, not {model!r}: check `model` in the pool file")
        replica.max_model_len = served[model].max_model_len

    async def _give_verdict(self, replica: Replica, deadline: float) -> None:
        """Ask about a known comparison, from text too where `auto` has not been decided.

        Raises:
            ProbeError: no verdict can be read.
        """
        judge = self._judge
        try:
            await self._verdict(replica, judge.style, deadline)
        except VerdictError as error:
            if self._decided:
                raise ProbeError(f"no verdict on a known comparison: {error}") from error
            reason = str(error)
        else:
            self._decided = True
            return
        try:
            await self._verdict(replica, Style.BRACKETS, deadline)
        except VerdictError as error:
            raise ProbeError(f"no verdict on a known comparison: {reason}; from text: {error}") from error
        if not self._decided:
            self._decided, judge.style = True, Style.BRACKETS
            fields = {"model": self.name, "url": replica.url, "reason": reason}
            _log.info("a judge's verdicts are read from text", extra={"fields": fields})

    async def _verdict(self, replica: Replica, style: Style, deadline: float) -> None:
        judge = self._judge
        mode = judge.config.mode
        shown = (0, 1) if mode is Mode.PAIRWISE else (0,)
        try:
            message = judge.config.rubric.write(KNOWN, shown, style, judge.secret)
        except RubricError:
            # It needs metadata that only real instances have.
            message = load_rubric("helpfulness").write(KNOWN, shown, style, judge.secret)
        answer = await self._complete(replica, judge.dialogue.body(message, style), deadline)
        try:
            judge.dialogue.number_of(judge.dialogue.read(answer, 1), mode, style)
        except AnswerError as error:
            raise ProbeError(str(error)) from error

    async def _complete(self, replica: Replica, body: bytes, deadline: float) -> bytes:
        return await exchange(replica, "POST", CHAT_PATH, body, deadline)
