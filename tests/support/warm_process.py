"""Runs of one module's `main`, each in a fork of a process that has imported what they need once.

Importing a trainer takes seconds of processor time; its runs on tiny models take a fraction of one.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class WarmProcess:
    """`python -m MODULE`, imported once; a context manager that ends it.

    Args:
        module: has `warm`, which imports what runs need, and `main`.
        folder: for what the runs print.
    """

    def __init__(self, module: str, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm_process", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def run(self, arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
        """Run `main` with these arguments; what it has printed and its exit status."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        words = [str(argument) for argument in arguments]
        paths = [self._folder / "stdout", self._folder / "stderr"]
        self._process.stdin.write(json.dumps([words, *map(str, paths)]) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        return subprocess.CompletedProcess(words, status, *[path.read_text() for path in paths])


def _serve(module: Any) -> None:
    """Fork for every line of standard input, and print the exit status."""
    module.warm()
    for line in sys.stdin:
        words, out, err = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_status_of(module, words, out, err))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201 - the answer to the parent


def _status_of(module: Any, words: list[str], out: str, err: str) -> int:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv[1:] = words
    try:
        module.main()
    except BaseException:  # noqa: BLE001 - as the interpreter ends on what nobody has caught
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    _serve(importlib.import_module(sys.argv[1]))
