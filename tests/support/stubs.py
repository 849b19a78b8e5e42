"""Packages that a trainer imports and that our tests do not use, with every name that is asked of them.

Imports the standard library only, since the processes of a ray cluster import it by its file's folder: `prepare` is the
hook with which they begin. Called by `gym_scoring`, `ray_scoring` and the pages' tests.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Collection
from types import ModuleType
from typing import Any

VARIABLE = "STUBBED_PACKAGES"
"""Of the environment: names with blanks between, for `prepare`."""


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that are imported and not used, with every name that is asked of them.

    Args:
        names: of packages; what lies below them is found too.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = tuple(names)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Return a package for the names."""
        if any(name == one or name.startswith(f"{one}.") for one in self._names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Return a module whose every name is an exception."""

        class Stub(ModuleType):
            def __getattr__(self, name: str) -> Any:
                if name.startswith("__"):
                    raise AttributeError(name)
                return type(name, (Exception,), {})

        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing."""


def prepare() -> None:
    """Let the stubs that the environment names be imported."""
    sys.meta_path.insert(0, Stubs(os.environ[VARIABLE].split()))
