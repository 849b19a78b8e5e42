"""What the Dockerfile builds, once per session: tests/deploy runs it as processes."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.compose import Image

UNREACHABLE = ("from versions: none", "Could not fetch URL", "NewConnectionError", "Temporary failure")


@pytest.fixture(scope="session")
def gateway_bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Executables of the gateway's image: its build steps, run here. Skips where packages cannot be had.

    GATEWAY_BIN names those of an earlier run, so that they need not be built again.
    """
    if made := os.environ.get("GATEWAY_BIN"):
        return Path(made)
    pytest.importorskip("dockerfile_parse", reason="needs reward-router[dev]")
    from tests.support.compose import StackError, build

    try:
        return build("trim-gateway", tmp_path_factory.mktemp("image"))
    except StackError as error:
        if any(word in str(error) for word in UNREACHABLE):
            pytest.skip(f"the package index cannot be reached: {str(error)[-300:]}")
        raise


@pytest.fixture(scope="session")
def images(valkey_binary: Path, gateway_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Image]:
    """Executables that stand for the images. The gateway's is what the Dockerfile installs, without torch.

    Prometheus' is the machine's own, if it has one; Grafana and vLLM are left out.
    """
    from tests.support.compose import Image, dockerfile_image
    from tests.support.compose_parts import valkey_image

    found = {
        "reward-router": dockerfile_image("gateway", gateway_bin),
        "reward-router-worker": dockerfile_image("worker", Path(sys.executable).parent),
        "valkey/valkey": valkey_image(valkey_binary, tmp_path_factory.mktemp("valkey-image")),
    }
    if shutil.which("prometheus") and shutil.which("wget"):
        found["prom/prometheus"] = Image((), ("prometheus",), extra=("--web.listen-address={address}:9090",))
    return found
