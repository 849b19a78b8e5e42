"""Runs docker-compose.yml from the images that `make images` has built, without Docker: on the host's network, each
service's process in namespaces of its own over the image's files.

What a service's entry says of its container is done by the kernel as Docker would: user, read-only root, tmpfs,
volumes, dropped capabilities, no new privileges. Addresses and names are stood in for as `tests.support.compose` says.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.support.compose import ComposeStack, Config, Image


def said(*command: str) -> str:
    """Output of a program that must succeed."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class BuiltImage:
    """An image of buildah's, mounted; a context manager that unmounts it.

    Args:
        name: of the image.
    """

    def __init__(self, name: str) -> None:
        self._container = said("buildah", "from", "--pull-never", name)
        self.root = Path(said("buildah", "mount", self._container))
        self.config: Config = json.loads(said("buildah", "inspect", "--type", "image", name))["Docker"]["config"]

    def close(self) -> None:
        """Unmount it, and drop what was written to it."""
        said("buildah", "rm", self._container)

    def image(self) -> Image:
        """What it starts with, as the stack wants it."""
        check = self.config.get("Healthcheck")
        environment = dict(line.split("=", 1) for line in self.config["Env"])
        return Image(
            (self.root,),
            tuple(self.config["Entrypoint"]),
            tuple(self.config["Cmd"]),
            environment,
            None
            if check is None
            else {
                "test": check["Test"],
                "retries": check["Retries"],
                "start_period": f"{check['StartPeriod'] // 10**9}s",
            },
        )


class ContainerStack(ComposeStack):
    """`ComposeStack` whose services of ours run in what was built; others as plain processes.

    Args: as of `ComposeStack`; images of ours have one folder in `path`: the root of their files.
    """

    def confined(self, name: str, words: list[str]) -> list[str]:
        """Return the command that runs words in the container of a service, from nothing but its entry and image."""
        service, image = self._services[name], self._image(name)
        assert image is not None
        (root,) = image.path
        mounts = self._mounts(name)
        lines = ["set -e"]
        for target, source in mounts.items():
            _make_target(root / target.lstrip("/"), source)
        for volume in service.get("volumes", []):
            place = shlex.quote(str(root) + volume["target"])
            lines.append(f"mount --bind {shlex.quote(str(mounts[volume['target']]))} {place}")
            if volume.get("read_only"):
                lines.append(f"mount -o remount,bind,ro {place}")
        lines += [f"mount -t tmpfs -o mode=1777 tmpfs {root}{target.partition(':')[0]}" for target in service["tmpfs"]]
        lines += [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
        if service.get("read_only"):
            lines.append(f"mount -o remount,bind,ro {root}")
        user, _, group = str(service.get("user") or self._users[name]).partition(":")
        confine = ["chroot", str(root), "/usr/bin/setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
        if "ALL" in service.get("cap_drop", []):
            confine += ["--bounding-set=-all", "--inh-caps=-all"]
        if any(word.startswith("no-new-privileges") for word in service.get("security_opt", [])):
            confine.append("--no-new-privs")
        environment = [f"{key}={value}" for key, value in self._environment(name, image, mounts).items()]
        run = shlex.join([*confine, "/usr/bin/env", "-i", f"--chdir={self._folders[name]}", *environment, *words])
        lines += [f"exec {run}"]
        script = f"mount --bind {root} {root}\n" + "\n".join(lines)
        return ["/usr/bin/unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", script]

    _users: dict[str, str]
    _folders: dict[str, str]

    def of(self, built: Mapping[str, BuiltImage]) -> ContainerStack:
        """Take from built images what the configuration does not say; returns itself."""
        self._users, self._folders = {}, {}
        for name, service in self._services.items():
            image = built.get(service["image"].rpartition(":")[0])
            if image is not None:
                self._users[name] = image.config["User"]
                self._folders[name] = image.config["WorkingDir"]
        return self

    def _command(self, name: str, image: Image, words: list[str]) -> list[str]:
        return self.confined(name, words) if name in self._users else super()._command(name, image, words)

    def _translate(self, name: str, text: str, mounts: Mapping[str, Path]) -> str:
        return super()._translate(name, text, {} if name in self._users else mounts)

    def _environment(self, name: str, image: Image, mounts: Mapping[str, Path]) -> dict[str, str]:
        out = super()._environment(name, image, mounts)
        if name in self._users:
            out |= {"HOME": "/home/router", "PATH": image.environment["PATH"]}
        return out

    def _mounts(self, name: str) -> dict[str, Path]:
        known = name in self._mounted
        mounts = super()._mounts(name)
        if not known and name in self._users:
            user, _, group = self._users[name].partition(":")
            for volume in self._services[name].get("volumes", []):
                # A new volume takes the owner of the image's folder; what was copied into it belongs to nobody else.
                if volume["type"] == "volume":
                    said("chown", "-R", f"{user}:{group}", str(mounts[volume["target"]]))
        return mounts

    def status(self, name: str) -> dict[str, str]:
        """Lines of /proc/PID/status of a service."""
        pid = self._running[name].process.pid
        return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())

    def root_of(self, name: str) -> str:
        """The folder that a service's process takes for `/`."""
        return os.readlink(f"/proc/{self._running[name].process.pid}/root")

    def inside(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run words in a service's container."""
        command = self.confined(name, list(words))
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def _make_target(place: Path, source: Path) -> None:
    """Make what a mount needs to be mounted on, as an engine does."""
    if source.is_dir():
        place.mkdir(parents=True, exist_ok=True)
    elif not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
