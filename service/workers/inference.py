"""`ModelThread`: one thread in which a model works, fed from event loops.

Whatever waits is taken at once, so that requests which come together share forward passes. Used by the small workers.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import torch

from service.workers.server import ApiError

Work = TypeVar("Work")
Made = TypeVar("Made")

_END: Final = None


@dataclass(frozen=True, slots=True)
class Job(Generic[Work, Made]):
    """Something to do; the future belongs to the event loop `loop`."""

    work: Work
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Made]


class ModelThread(Generic[Work, Made]):
    """Runs a model in a thread of its own.

    Args:
        name: of the thread.
        serve: does the jobs that wait, by `settle`, in the thread.
        threads: torch's threads for one operation; torch's default when None.
    """

    def __init__(
        self, name: str, serve: Callable[[Sequence[Job[Work, Made]]], None], *, threads: int | None = None
    ) -> None:
        self._name = name
        self._serve = serve
        self._threads = threads
        self._jobs: queue.SimpleQueue[Job[Work, Made] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Finish what is queued and end the thread."""
        self._jobs.put(_END)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def submit(self, work: Work) -> asyncio.Future[Made]:
        """Queue some work; the future is of the running loop, and fails with `ApiError` where the model does."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Made] = loop.create_future()
        self._jobs.put(Job(work, loop, future))
        return future

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        going = True
        while going:
            jobs, going = self._waiting()
            if jobs:
                self._serve(jobs)

    def _waiting(self) -> tuple[list[Job[Work, Made]], bool]:
        """Wait for a job, then take all that are there; False after the last one."""
        job = self._jobs.get()
        jobs: list[Job[Work, Made]] = []
        while job is not _END:
            if not job.future.cancelled():
                jobs.append(job)
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return jobs, True
        return jobs, False


def settle(jobs: Sequence[Job[Work, Made]], make: Callable[[Sequence[Work]], Sequence[Made]]) -> None:
    """Do some jobs at once; where the model fails, all of them do, and the thread lives on."""
    try:
        with torch.inference_mode():
            made = make([job.work for job in jobs])
    except RuntimeError as error:
        failure = ApiError(f"the model failed: {error}", status=500, kind="InternalServerError")
        for job in jobs:
            job.loop.call_soon_threadsafe(_fail, job.future, failure)
        return
    for job, one in zip(jobs, made, strict=True):
        job.loop.call_soon_threadsafe(_resolve, job.future, one)


def _resolve(future: asyncio.Future[Made], made: Made) -> None:
    if not future.done():
        future.set_result(made)


def _fail(future: asyncio.Future[Made], error: ApiError) -> None:
    if not future.done():
        future.set_exception(error)
