"""How the trainers' code gets here: once per version, never half, and never at the cost of the tests' run."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.fetch_trainers import SOURCES, STAMP, TRAINERS, Source, Trainer, fetch, fetch_source, is_there

ROOT = Path(__file__).resolve().parents[3]
TOY = Trainer("toy", ("toytrainer==1.0",), light=True, seconds=60)


def save_wheel(folder: Path, version: str) -> None:
    """A package of one module that knows its version."""
    about = f"toytrainer-{version}.dist-info"
    with zipfile.ZipFile(folder / f"toytrainer-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toytrainer.py", f"version = {version!r}\n")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: toytrainer\nVersion: {version}\n")
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", f"toytrainer.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n")


@pytest.fixture
def shelf(tmp_path: Path) -> list[str]:
    """What makes pip look into a folder with two versions, and nowhere else."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for version in ("1.0", "2.0"):
        save_wheel(wheels, version)
    return ["--no-index", "--find-links", str(wheels)]


def test_what_is_there_is_not_fetched_again(shelf: list[str], tmp_path: Path) -> None:
    assert fetch(TOY, tmp_path / "clients", shelf) is None
    assert is_there(TOY, tmp_path / "clients")
    assert (tmp_path / "clients/toy/toytrainer.py").read_text() == "version = '1.0'\n"
    # pip would refuse now; it is not asked.
    assert fetch(TOY, tmp_path / "clients", ["--no-index"]) is None


def test_another_version_takes_the_place_of_the_first(shelf: list[str], tmp_path: Path) -> None:
    newer = dataclasses.replace(TOY, requirements=("toytrainer==2.0",))
    assert fetch(TOY, tmp_path / "clients", shelf) is None
    assert not is_there(newer, tmp_path / "clients")
    assert fetch(newer, tmp_path / "clients", shelf) is None
    assert (tmp_path / "clients/toy/toytrainer.py").read_text() == "version = '2.0'\n"
    assert [path.name for path in (tmp_path / "clients/toy").glob("*.dist-info")] == ["toytrainer-2.0.dist-info"]


def test_a_refusal_says_why_and_leaves_what_was_there(shelf: list[str], tmp_path: Path) -> None:
    missing = dataclasses.replace(TOY, requirements=("toytrainer==3.0",))
    assert fetch(TOY, tmp_path / "clients", shelf) is None
    assert "toytrainer==3.0" in (fetch(missing, tmp_path / "clients", shelf) or "")
    assert not is_there(missing, tmp_path / "clients")
    assert is_there(TOY, tmp_path / "clients")
    assert [path.name for path in (tmp_path / "clients").iterdir()] == ["toy"]


def test_fetching_is_given_up_in_time(shelf: list[str], tmp_path: Path) -> None:
    hasty = dataclasses.replace(TOY, seconds=0.01)
    assert fetch(hasty, tmp_path / "clients", shelf) == "pip took more than 0.01 s"
    assert not is_there(hasty, tmp_path / "clients")


def test_the_command_ends_well_though_nothing_can_be_had(tmp_path: Path) -> None:
    words = ["-m", "tests.support.fetch_trainers", "light", "--folder", tmp_path, "--pip-args=--no-index"]
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120, check=True, cwd=ROOT
    )
    light = [trainer.requirements[0] for trainer in TRAINERS if trainer.light]
    said = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in said] == light
    assert all("its tests are skipped: ERROR" in line for line in said)


def test_every_version_is_pinned() -> None:
    for trainer in TRAINERS:
        assert all(re.fullmatch(r"[\w-]+==[\w.]+", requirement) for requirement in trainer.requirements)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A repository of two files, one of which is wanted."""
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "wanted.py").write_text("version = 1\n")
    (repository / "other.py").write_text("")

    def git(*words: str) -> str:
        who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        done = subprocess.run(["git", *who, *words], cwd=repository, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    return Source("toy", repository.as_uri(), git("rev-parse", "HEAD"), ("wanted.py",), 60)


def test_a_source_that_is_not_on_pypi_comes_from_its_repository(source: Source, tmp_path: Path) -> None:
    assert fetch_source(source, tmp_path / "clients") is None
    assert is_there(source, tmp_path / "clients")
    assert sorted(path.name for path in (tmp_path / "clients/toy").iterdir()) == [STAMP, "wanted.py"]
    # git would find nothing now; it is not asked.
    assert fetch_source(dataclasses.replace(source, repository="file:///nowhere"), tmp_path / "clients") is None


def test_a_source_that_cannot_be_had_says_why(source: Source, tmp_path: Path) -> None:
    for missing in ({"repository": "file:///nowhere"}, {"commit": "0" * 40}, {"paths": ("third.py",)}):
        assert fetch_source(dataclasses.replace(source, **missing), tmp_path / "clients")
    assert list((tmp_path / "clients").iterdir()) == []


def test_what_a_source_needs_comes_by_pip(source: Source, shelf: list[str], tmp_path: Path) -> None:
    needy = dataclasses.replace(source, requirements=("toytrainer==1.0",))
    assert fetch_source(needy, tmp_path / "clients", shelf) is None
    assert (tmp_path / "clients/toy/toytrainer.py").is_file()
    assert (tmp_path / "clients/toy/wanted.py").is_file()
    assert not is_there(source, tmp_path / "clients")


def test_sources_are_pinned_to_a_commit() -> None:
    for source in SOURCES:
        assert re.fullmatch(r"[0-9a-f]{40}", source.commit)
        assert "LICENSE" in source.paths
        assert all("==" in requirement for requirement in source.requirements)
