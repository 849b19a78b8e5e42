"""Fetches trainers' own code, for the tests that run it: `python -m tests.support.fetch_trainers light|all|sources`.

Knows which version of which trainer is tested, and what it needs to be imported; installs it with pip, without
dependencies, into `.data/trainer-clients/NAME`, never into the environment. What is there in the right version is left
alone. What cannot be fetched is said, and its tests are skipped: a missing network never fails a run. slime, NeMo RL
and ROLL are not on PyPI: their files come from their repositories, by git. Called by the Makefile (`trainer-wheels`,
`trainer-clients`, `trainer-sources`); read by the tests, for the folders and the versions.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".data" / "trainer-clients"

STAMP = ".fetched"
"""File beside a trainer's packages that says which they are."""

IMPATIENT = ("--retries", "1", "--timeout", "20")
"""Options of pip, so that a registry that cannot be reached is given up within seconds."""


@dataclass(frozen=True, slots=True)
class Trainer:
    """One trainer as it is on PyPI.

    Args:
        name: of its folder.
        requirements: the trainer, pinned, and then what its reward code imports and our environment has not.
        light: a few megabytes: `make test` fetches it. The others come with `make trainer-clients`.
        seconds: after which fetching is given up.
        options: more for pip.
    """

    name: str
    requirements: tuple[str, ...]
    light: bool
    seconds: float
    options: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """Which is tested."""
        return self.requirements[0].partition("==")[2]

    @property
    def stamp(self) -> str:
        """What the folder has when it is right: packages, and the Python that some of them were built for."""
        python = f"python {sys.version_info.major}.{sys.version_info.minor}"
        return "\n".join((python, *self.requirements, *self.options)) + "\n"


# OpenRLHF's wheel is tagged for one Python and one platform, and holds Python only.
ANYWHERE = "--only-binary=:all: --implementation cp --python-version 3.11 --platform manylinux1_x86_64 --platform any"

TRAINERS = (
    Trainer("openrlhf", ("openrlhf==0.11.2",), True, 60, tuple(ANYWHERE.split())),
    Trainer("llamafactory", ("llamafactory==0.9.5",), True, 60),
    Trainer(
        "areal",
        (
            "areal==1.0.4",
            "hydra-core==1.3.8",
            "omegaconf==2.4.0",
            "antlr4-python3-runtime==4.9.3",
            "colorlog==6.12.0",
            "lark==1.3.1",
            "orjson==3.13.0",
            "tenacity==9.2.1",
            "torchdata==0.11.0",
        ),
        True,
        120,
    ),
    Trainer(
        "verl",
        (
            "verl==0.9.1",
            "ray==2.60.0",
            "tensordict==0.15.3",
            "hydra-core==1.3.8",
            "omegaconf==2.4.0",
            "antlr4-python3-runtime==4.9.3",
            "codetiming==1.4.0",
            "cloudpickle==3.1.2",
            "msgpack==1.2.4",
            "protobuf==7.36.2",
            "orjson==3.13.0",
            "pyvers==0.2.3",
        ),
        False,
        300,
    ),
    Trainer(
        "swift",
        (
            "ms-swift==4.6.0",
            "modelscope==1.40.2",
            "modelscope_hub==0.5.1",
            "dacite==1.9.2",
            "json_repair==0.64.6",
            "addict==2.4.0",
            "attrdict==2.0.1",
            "binpacking==2.0.1",
            "einops==0.8.2",
            "cryptography==50.0.2",
            "cffi==2.1.1",
            # For a training (`loadtests.training`); the tests run it beside our own transformers.
            "datasets==4.8.4",
            "peft==0.20.0",
            "transformers==5.19.0",
            "trl==0.29.1",
        ),
        False,
        300,
    ),
    Trainer(
        "skyrl_gym",
        ("skyrl-gym==0.4.0", "skyrl==0.4.0", "omegaconf==2.4.0", "antlr4-python3-runtime==4.9.3"),
        True,
        60,
        # It asks for a Python newer than ours; what our tests run of it works on this one.
        ("--ignore-requires-python",),
    ),
    Trainer(
        "verifiers",
        (
            "verifiers==0.4.0",
            "openai==2.54.0",
            "anthropic==1.0.0",
            "distro==1.9.0",
            "docstring_parser==0.18.0",
            "gepa==0.1.4",
            "jiter==0.19.0",
            "loguru==0.7.3",
            "mcp==2.0.0",
            "msgpack==1.2.4",
            "prime-pydantic-config==0.4.3",
            "pyzmq==27.3.0",
            "renderers==0.1.12",
            "sniffio==1.3.1",
            "tenacity==9.2.1",
            "tomli_w==1.2.0",
            "tomlkit==0.15.2",
            "tyro==1.0.17",
        ),
        False,
        300,
    ),
    Trainer(
        "atropos",
        (
            "atroposlib==0.4.0",
            "distro==1.9.0",
            "jiter==0.19.0",
            "jsonlines==4.0.0",
            "markdown==3.11.3",
            "openai==3.57.0",
            "platformdirs==4.14.8",
            "protobuf==7.36.2",
            "pydantic_cli==10.0.0",
            "sniffio==1.3.1",
            "tenacity==9.2.1",
            "wandb==0.31.0",
        ),
        False,
        300,
    ),
    Trainer(
        "nemo_gym",
        (
            "nemo-gym==0.7.0",
            "ray==2.60.0",
            "antlr4-python3-runtime==4.9.3",
            "cloudpickle==3.1.2",
            "devtools==0.13.0",
            "distro==1.9.0",
            "executing==2.3.0",
            "asttokens==3.0.2",
            "hydra-core==1.3.8",
            "itsdangerous==2.2.0",
            "jiter==0.19.0",
            "mlflow-skinny==3.17.2",
            "msgpack==1.2.4",
            "omegaconf==2.4.0",
            "openai==2.44.0",
            "orjson==3.13.0",
            "platformdirs==4.14.8",
            "protobuf==7.36.2",
            "sniffio==1.3.1",
            "pydot==4.0.1",
            "python-multipart==0.0.34",
            "wandb==0.31.0",
            "yappi==1.7.6",
        ),
        False,
        300,
        # It asks for a Python newer than ours; what our tests run of it works on this one.
        ("--ignore-requires-python",),
    ),
)


@dataclass(frozen=True, slots=True)
class Source:
    """Some files of a trainer that is not on PyPI.

    Args:
        name: of its folder.
        repository: what git fetches from.
        commit: which is tested, all 40 digits.
        paths: files and folders that are wanted.
        seconds: after which one step of fetching is given up.
        requirements: what they import beside what `verl` has, pinned.
    """

    name: str
    repository: str
    commit: str
    paths: tuple[str, ...]
    seconds: float
    requirements: tuple[str, ...] = ()

    @property
    def stamp(self) -> str:
        """What the folder has when it is right."""
        return "\n".join((self.commit, *self.paths, *self.requirements)) + "\n"


SLIME = Source(
    "slime",
    "https://github.com/THUDM/slime",
    "624b824a898ab0ec1fcb4d373004c7f3852bf515",
    ("LICENSE", "slime/rollout/rm_hub/__init__.py", "slime/utils/misc.py", "slime/utils/types.py"),
    60,
)
"""`rm_hub`, which asks for rewards, and what it imports."""

NEMO_RL = Source(
    "nemo_rl",
    "https://github.com/NVIDIA-NeMo/RL",
    "7ea279abfbeb698b092856d0dab61e7cf39bc909",
    ("LICENSE", "nemo_rl"),
    120,
)
ROLL = Source(
    "roll",
    "https://github.com/alibaba/ROLL",
    "8eb27cc2dc34c4d1310b169d9b86d339004d811a",
    ("LICENSE", "roll"),
    120,
    ("more-itertools==11.2.1",),
)
SOURCES = (SLIME, NEMO_RL, ROLL)


def trainer_named(name: str) -> Trainer:
    """One of `TRAINERS`."""
    return next(trainer for trainer in TRAINERS if trainer.name == name)


def is_there(trainer: Trainer | Source, folder: Path = FOLDER) -> bool:
    """Return True if the folder has this version for this Python."""
    stamp = folder / trainer.name / STAMP
    return stamp.is_file() and stamp.read_text("utf-8") == trainer.stamp


def fetch(trainer: Trainer, folder: Path, pip_words: Sequence[str] = ()) -> str | None:
    """Put the trainer's packages into `folder/NAME`, where they are not there yet.

    Args:
        trainer: which.
        folder: of all trainers.
        pip_words: more options of pip.

    Returns:
        Why it could not be had; None if it is there.
    """
    words = (*trainer.options, *pip_words)
    return _put(trainer, folder, lambda coming: _pip(trainer.requirements, coming, trainer.seconds, words))


def fetch_source(source: Source, folder: Path, pip_words: Sequence[str] = ()) -> str | None:
    """Put the source's files into `folder/NAME`, where they are not there yet; the arguments are those of `fetch`.

    Returns:
        Why they could not be had; None if they are there.
    """

    def get(coming: Path) -> str | None:
        failure = _check_out(source, coming)
        if failure is None and source.requirements:
            failure = _pip(source.requirements, coming, source.seconds, pip_words)
        return failure

    return _put(source, folder, get)


def _put(trainer: Trainer | Source, folder: Path, get: Callable[[Path], str | None]) -> str | None:
    """Let `get` fill a new folder, which takes the old one's place if it could."""
    if is_there(trainer, folder):
        return None
    target, coming = folder / trainer.name, folder / f"{trainer.name}.coming"
    shutil.rmtree(coming, ignore_errors=True)
    coming.mkdir(parents=True)
    failure = get(coming)
    if failure is None:
        (coming / STAMP).write_text(trainer.stamp, "utf-8")
        shutil.rmtree(target, ignore_errors=True)
        coming.rename(target)
    shutil.rmtree(coming, ignore_errors=True)
    return failure


def _pip(requirements: Sequence[str], target: Path, seconds: float, options: Sequence[str]) -> str | None:
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    words += ["--no-compile", *IMPATIENT, "--target", str(target), *options, *requirements]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"pip took more than {seconds:g} s"
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return (errors or done.stderr.splitlines() or [f"pip ended with {done.returncode}"])[-1]


def _check_out(source: Source, target: Path) -> str | None:
    """The wanted files alone; git's own folder does not stay."""
    steps = (
        ("init", "--quiet"),
        ("fetch", "--quiet", "--depth", "1", "--filter=blob:none", source.repository, source.commit),
        ("remote", "add", "origin", source.repository),
        ("config", "remote.origin.promisor", "true"),
        ("checkout", "--quiet", source.commit, "--", *source.paths),
    )
    for step in steps:
        try:
            done = subprocess.run(
                ["git", *step],
                cwd=target,
                env={**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_DIR": str(target / ".git")},
                capture_output=True,
                text=True,
                timeout=source.seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"git {step[0]} took more than {source.seconds:g} s"
        except FileNotFoundError:
            return "git is not installed"
        if done.returncode:
            return (done.stderr.strip().splitlines() or [f"git {step[0]} ended with {done.returncode}"])[-1]
    shutil.rmtree(target / ".git")
    return None


def main() -> None:
    """Fetch what is missing, and say what became of it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("which", choices=["light", "all", "sources"])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--mirrors", default="", help="NAME=REPOSITORY …: where sources are fetched from instead")
    parser.add_argument("--pip-args", default="", help="more options of pip, as one word")
    given = parser.parse_args()
    pip_words = shlex.split(given.pip_args)
    for trainer in () if given.which == "sources" else TRAINERS:
        if (given.which == "light" and not trainer.light) or is_there(trainer, given.folder):
            continue
        _say(trainer.requirements[0], fetch(trainer, given.folder, pip_words))
    mirrors = dict(word.split("=", 1) for word in shlex.split(given.mirrors))
    for source in () if given.which == "light" else SOURCES:
        if not is_there(source, given.folder):
            nearer = replace(source, repository=mirrors.get(source.name, source.repository))
            _say(f"{source.name} at {source.commit[:7]}", fetch_source(nearer, given.folder, pip_words))


def _say(what: str, failure: str | None) -> None:
    outcome = "fetched" if failure is None else f"not fetched, so its tests are skipped: {failure}"
    sys.stdout.write(f"{what}: {outcome}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
