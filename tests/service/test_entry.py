"""The command, with and without the server's packages."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCKED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
sys.argv = ["reward-router", {command!r}, "--help"]
from service.entry import main
main()
"""


def run_without(package: str, command: str = "models") -> subprocess.CompletedProcess[str]:
    source = BLOCKED.format(package=package, command=command)
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("package", "command"), [("typer", "models"), ("yaml", "serve")])
def test_a_light_installation_is_told_what_to_install(package: str, command: str) -> None:
    done = run_without(package, command)
    assert done.returncode == 2
    assert f"'{package}'" in done.stderr
    assert "pip install 'reward-router[server]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_with_everything_there_the_command_runs() -> None:
    done = run_without("a_package_that_nobody_needs")
    assert done.returncode == 0, done.stderr
    assert "models" in done.stdout


def test_a_missing_part_of_our_own_is_no_matter_of_installation() -> None:
    done = run_without("router_core")
    assert done.returncode == 1
    assert "No module named 'router_core" in done.stderr


def test_a_command_imports_no_other_commands_packages() -> None:
    done = run_without("fastapi", "worker")
    assert done.returncode == 0, done.stderr
