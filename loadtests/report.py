"""What all benchmarks share: facts of the machine, tables for people, JSON for programs.

Knows nothing of what is measured. Called by every module of `loadtests`.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

_BLAS_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

_PACKAGES = ("numpy", "uvicorn", "uvloop", "httptools", "msgspec", "hiredis", "fastapi", "aiohttp", "torch", "scipy")


def use_one_blas_thread() -> None:
    """Start this process afresh with one thread for linear algebra, unless it has been.

    The library reads its variables when it is loaded, which an import above has done already.
    """
    if all(os.environ.get(name) == "1" for name in _BLAS_VARIABLES):
        return
    environment = {**os.environ, **dict.fromkeys(_BLAS_VARIABLES, "1")}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def machine() -> dict[str, Any]:
    """Cores, load, linear algebra library and versions; no host name and no path."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "blas": f"{blas['name']} {blas['version']}",
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS", "library's default"),
        "versions": versions,
    }


def describe(facts: dict[str, Any]) -> str:
    """One line about the machine, for people."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"{facts['cores']} cores, {facts['cpu']}, load average {facts['load_average']} at the start; "
        f"Python {facts['python']}, {facts['blas']} with {facts['blas_threads']} thread(s); {versions}"
    )


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table: the first column to the left, the others to the right."""
    shown = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        shown.add_row(*(cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row))
    Console(width=None if sys.stdout.isatty() else 140).print(shown)


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write the figures, if a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.machine()
    return platform.machine()
