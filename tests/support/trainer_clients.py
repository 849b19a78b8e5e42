"""The trainers' own client code, loaded without their GPU dependencies.

`make trainer-wheels` puts OpenRLHF's and LLaMA-Factory's wheels and slime's sources into `.data/trainer-clients`. Only
the modules that talk to a reward server are loaded; the packages around them are stubs that find their files and run
nothing.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / ".data/trainer-clients"


def unpacked_wheel(name: str, target: Path) -> Path:
    """The folder that holds the package of a wheel; skips where there is no such wheel."""
    wheels = sorted((FOLDER / "wheels").glob(f"{name}-*.whl"))
    if not wheels:
        pytest.skip(f"needs {name}'s wheel: make trainer-wheels")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        wheel.extractall(target)
    return next(path.parent for path in target.rglob(f"{name}/__init__.py"))


def slime_sources() -> Path:
    """slime's checkout; skips where there is none."""
    found = FOLDER / "slime"
    if not (found / "slime/rollout/rm_hub/__init__.py").exists():
        pytest.skip("needs slime's sources: make trainer-wheels")
    return found


class Anything(ModuleType):
    """A module that has every name: stands for what a client module imports and does not use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class ImpatientAsyncio:
    """`asyncio`, but that its `sleep` notes the time and does not take it: clients pause for seconds between tries."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        """Let others run."""
        self.pauses.append(seconds)
        await asyncio.sleep(0.01)


@contextmanager
def loaded(folder: Path, module: str, *, anything: Sequence[str] = ()) -> Iterator[Any]:
    """The real module of that name below `folder`, its packages being stubs.

    Args:
        folder: that holds the top package.
        module: dotted name.
        anything: modules that it imports and that are stood for by `Anything`.
    """
    before = set(sys.modules)
    packages = module.split(".")
    top = packages[0]
    for depth in range(1, len(packages)):
        name = ".".join(packages[:depth])
        stub = ModuleType(name)
        stub.__path__ = [str(folder.joinpath(*packages[:depth]))]
        sys.modules[name] = stub
    for name in anything:
        sys.modules[name] = Anything(name)
    try:
        yield importlib.import_module(module)
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] == top:
                del sys.modules[name]
