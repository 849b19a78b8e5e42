"""The trainers' own client code, loaded without their GPU dependencies.

`tests.support.fetch_trainers` puts trainers into `.data/trainer-clients`. Only the modules that talk to a reward server
are loaded; the packages around them are stubs that find their files and run nothing.
"""

from __future__ import annotations

import asyncio
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.fetch_trainers import FOLDER, Source, is_there, trainer_named


def client_folder(name: str) -> Path:
    """Where a trainer's packages lie; skips where they were not fetched."""
    trainer = trainer_named(name)
    if not is_there(trainer):
        target = "trainer-wheels" if trainer.light else "trainer-clients"
        pytest.skip(f"{trainer.requirements[0]} is not there: `make {target}` fetches it where PyPI can be reached")
    return FOLDER / name


def source_folder(source: Source) -> Path:
    """Where a source's files lie; skips where they were not fetched."""
    if not is_there(source):
        pytest.skip(
            f"{source.name} at {source.commit[:7]} is not there: `make trainer-sources` fetches it where its "
            "repository can be reached"
        )
    return FOLDER / source.name


def page_block(page: str, words: str) -> str:
    """The Python on a trainer's page that holds these words."""
    text = (Path(__file__).resolve().parents[2] / "docs/trainers" / page).read_text("utf-8")
    [found] = [one for one in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if words in one]
    return str(found)


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
