"""The command, with and without the server's packages."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
sys.argv = ["reward-router", "models", "--help"]
from service.entry import main
main()
"""


def run_without(package: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED.format(package=package)], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_light_installation_is_told_what_to_install() -> None:
    done = run_without("typer")
    assert done.returncode == 2
    assert "'typer'" in done.stderr
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
