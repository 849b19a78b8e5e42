"""Workers of `up` that leave are started again, ever more slowly; the gateway asks other RMs meanwhile.

Knows child processes and a clock. `service.cli.up` calls `tick` while it waits for Ctrl-C.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from rich.console import Console

from service.cli.processes import Child, answers

FIRST_PAUSE_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 60.0
"""Before a worker that has left is started again; twice as long each time."""

STEADY_SECONDS: Final = 600.0
"""A worker that has lived this long starts afresh: its next failure is not the sequel of the last one."""


@dataclass(slots=True)
class _Watched:
    """One worker.

    Attributes:
        child: its process.
        since: when it was started last.
        failures: since it was steady.
        due: when it is to be started again; None while it runs.
        starting: it was started again and does not answer yet.
    """

    child: Child
    since: float
    failures: int = 0
    due: float | None = None
    starting: bool = False


class Supervisor:
    """Starts workers again. Call it from the thread that started them: children end with that.

    Args:
        workers: to be watched; they run.
        console: where each failure is reported.
        clock: monotonic seconds.
    """

    def __init__(
        self, workers: Sequence[Child], console: Console, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._clock = clock
        self._watched = [_Watched(worker, clock()) for worker in workers]

    @property
    def workers(self) -> tuple[Child, ...]:
        """Those that are watched."""
        return tuple(one.child for one in self._watched)

    def tick(self) -> None:
        """Look at every worker once: note who has left, start again whose pause is over.

        On each GPU one at a time: vLLM measures the free memory while it starts.
        """
        now = self._clock()
        for one in self._watched:
            if one.starting and one.child.health is not None and answers(one.child.health):
                one.starting = False
            if one.due is not None and now >= one.due:
                if self._gpus_taken(one):
                    continue
                one.child.start_again()
                one.since, one.due, one.starting = now, None, one.child.health is not None
            elif one.due is None and (status := one.child.process.poll()) is not None:
                one.failures = 0 if now - one.since >= STEADY_SECONDS else one.failures
                pause = min(FIRST_PAUSE_SECONDS * 2**one.failures, LONGEST_PAUSE_SECONDS)
                one.failures += 1
                one.starting = False
                one.due = now + pause
                self._console.print(
                    f"{one.child.name} left with status {status}, is started again in {pause:g} s; its log is "
                    f"{one.child.log}, the end of it:\n{one.child.last_words()}",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )

    def _gpus_taken(self, one: _Watched) -> bool:
        """Return True if another one is starting on a GPU of this one."""
        return any(
            other.starting and not set(other.child.gpus).isdisjoint(one.child.gpus)
            for other in self._watched
            if other is not one
        )
