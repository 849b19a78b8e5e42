"""The images that `make images` has built: what is in them, and the profile `cpu` from them."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("dockerfile_parse", reason="needs reward-router[dev]")

from deploy.images.build import IMAGES, size_of
from tests.support.compose import Image, compose_config
from tests.support.compose_parts import SECRETS, ask, valkey_image
from tests.support.containers import BuiltImage, ContainerStack


def _missing() -> str:
    if os.geteuid() != 0 or shutil.which("buildah") is None:
        return "needs root and buildah"
    for name in IMAGES.values():
        if subprocess.run(["buildah", "inspect", "--type", "image", name], capture_output=True, check=False).returncode:
            return f"needs {name}: run `make images`"
    return ""


pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(_missing()), reason=_missing() or "-")]

LARGEST_GATEWAY = 300e6
"""Bytes of all files of the gateway's image."""

UP_SECONDS = 1200.0
"""The demo's reward models are trained in it, unless `DEMO_POOL` spares that."""

PAIR = {"prompt": "What is 17 + 25?", "responses": ["17 + 25 = 41", "17 + 25 = 42"]}


@pytest.fixture(scope="module")
def built() -> Iterator[dict[str, BuiltImage]]:
    """Both images by the names that the compose file gives them."""
    found = {"reward-router": BuiltImage(IMAGES["gateway"]), "reward-router-worker": BuiltImage(IMAGES["worker"])}
    yield found
    for image in found.values():
        image.close()


@pytest.fixture(scope="module")
def stack(
    built: dict[str, BuiltImage], valkey_binary: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ContainerStack]:
    """The profile `cpu`, up, with two processes of the gateway."""
    folder = tmp_path_factory.mktemp("containers")
    if made := os.environ.get("DEMO_POOL"):
        shutil.copytree(made, folder / "volumes" / "demo" / "demo")
    images: dict[str, Image] = {name: image.image() for name, image in built.items()}
    images["valkey/valkey"] = valkey_image(valkey_binary, tmp_path_factory.mktemp("valkey-image"))
    config = copy.deepcopy(compose_config("cpu", variables={**SECRETS, "WORKERS": "2"}))
    with ContainerStack(config, folder, images, network=os.getpid() % 120).of(built) as stack:
        stack.up(UP_SECONDS)
        yield stack


@pytest.mark.parametrize("name", ["reward-router", "reward-router-worker"])
def test_an_image_has_a_numbered_user_and_a_health_check(name: str, built: dict[str, BuiltImage]) -> None:
    config = built[name].config
    assert config["User"] == "10001:10001"
    assert config["Healthcheck"]["Test"][:2] == ["CMD", "python"]
    assert config["Entrypoint"] == ["reward-router"]


def test_the_gateways_image_is_small_and_has_no_installer(built: dict[str, BuiltImage]) -> None:
    assert size_of("gateway") < LARGEST_GATEWAY
    (site,) = built["reward-router"].root.glob("opt/venv/lib/python3*/site-packages")
    assert not [name for name in ("torch", "pip", "setuptools", "hf_xet") if (site / name).exists()]


def test_the_gateways_image_lists_what_is_in_it(built: dict[str, BuiltImage]) -> None:
    folder = built["reward-router"].root / "usr/share/reward-router"
    listed = json.loads((folder / "sbom.cdx.json").read_text())
    assert listed["bomFormat"] == "CycloneDX"
    (site,) = built["reward-router"].root.glob("opt/venv/lib/python3*/site-packages")
    installed = {path.name.partition("-")[0].lower().replace("_", "-") for path in site.glob("*.dist-info")}
    assert {one["name"].lower().replace("_", "-").replace(".", "-") for one in listed["components"]} >= installed
    # What is known against them, or why nobody could be asked.
    assert (folder / "audit.json").exists() or (folder / "audit.log").read_text()


def test_the_profile_comes_up_in_its_order_and_routes_a_pair(stack: ContainerStack) -> None:
    assert stack.order.index("demo-pool") < stack.order.index("rm-code") < stack.order.index("gateway")
    status, reward = ask(stack.url("gateway"), "/reward", PAIR)
    assert status == 200, reward
    assert (reward["recorded"], reward["model"], reward["preferred"]) == (True, "rm-arithmetic", 1)


@pytest.mark.parametrize("name", ["gateway", "rm-code", "checker"])
def test_a_service_runs_confined_in_its_image(name: str, stack: ContainerStack) -> None:
    status = stack.status(name)
    assert set(status["Uid"].split()) == {"10001"}
    assert set(status["Gid"].split()) == {"10001"}
    assert {int(status[kind], 16) for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert stack.root_of(name) != "/"
    write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('x')"
    for place in ("/opt/venv/x", "/home/router/x", "/var/lib/reward-router/x"):
        done = stack.inside(name, "python", "-c", write, place)
        assert "Read-only file system" in done.stderr, (place, done.stderr)
    assert stack.inside(name, "python", "-c", write, "/tmp/x").returncode == 0


def test_all_services_end_within_their_grace(stack: ContainerStack) -> None:
    assert -signal.SIGKILL not in stack.down().values()
