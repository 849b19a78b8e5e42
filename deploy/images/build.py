"""Build the gateway's and the worker's image from the Dockerfile with buildah: `python -m deploy.images.build`.

Needs root and Debian's packages `buildah` and, where python:3.11-slim-bookworm cannot be pulled, `mmdebstrap`: then a
base of Debian's packages stands in for it (`base.sh`). pip in the build is told what pip here is told: its
configuration, and the certificates, constraints and folders that the configuration names, are mounted into it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = "docker.io/library/python:3.11-slim-bookworm"
STAND_IN = "localhost/python:3.11-slim-bookworm"
IMAGES = {"gateway": "localhost/reward-router", "worker": "localhost/reward-router-worker"}


def base_image() -> str:
    """Return the base: pulled, or made here once."""
    if not _fails("buildah", "inspect", "--type", "image", STAND_IN):
        return STAND_IN
    if not _fails("buildah", "pull", "--quiet", PUBLISHED):
        return PUBLISHED
    print(f"{PUBLISHED} cannot be pulled: making {STAND_IN} of Debian's packages (minutes)")
    subprocess.run([ROOT / "deploy/images/base.sh", STAND_IN], check=True)
    return STAND_IN


def pip_options(folder: Path) -> list[str]:
    """Return options of `buildah build` that give its pip the configuration of ours.

    Args:
        folder: for the file that is mounted.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings: dict[str, str] = {}
    for name, value in re.findall(r"^(?:global|:env:)\.([a-z-]+)='(.*)'$", listed, re.M):
        settings.setdefault(name, value.replace("\\n", " "))
    file = folder / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    mounts = {file: Path("/etc/pip.conf")}
    for word in " ".join(settings.values()).split():
        # The pages of a local index lead to files beside them.
        path = Path(word.removeprefix("file://")).parent if word.startswith("file://") else Path(word)
        if path.is_absolute() and path.exists():
            mounts[path] = path
    return [word for source, target in mounts.items() for word in ("--volume", f"{source}:{target}:ro")]


def build(target: str, base: str, options: Sequence[str]) -> None:
    """Build one stage of the Dockerfile as an image."""
    began = time.monotonic()
    command = [
        *("buildah", "build", "--quiet", "--layers", "--format", "docker", "--network", "host"),
        *("--build-arg", f"PYTHON_IMAGE={base}", "--target", target, "--tag", IMAGES[target], *options, str(ROOT)),
    ]
    subprocess.run(command, check=True, env={**os.environ, "BUILDAH_ISOLATION": "chroot"})
    print(f"{IMAGES[target]}: {time.monotonic() - began:.0f} s, {size_of(target) / 1e6:.0f} MB")


def size_of(target: str) -> int:
    """Return the bytes of all files of an image."""
    container = _said("buildah", "from", "--pull-never", IMAGES[target])
    try:
        return int(
            _said("du", "--summarize", "--one-file-system", "--bytes", _said("buildah", "mount", container)).split()[0]
        )
    finally:
        _said("buildah", "rm", container)


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _fails(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode != 0


def main() -> None:
    """Build what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m deploy.images.build", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=tuple(IMAGES), help="one image [default: both]")
    parser.add_argument("--audit", choices=("report", "strict"), default="report", help="see the Dockerfile")
    options = parser.parse_args()
    base = base_image()
    with tempfile.TemporaryDirectory() as folder:
        given = [*pip_options(Path(folder)), "--build-arg", f"AUDIT={options.audit}"]
        for target in [options.only] if options.only else IMAGES:
            build(target, base, given)


if __name__ == "__main__":
    main()
