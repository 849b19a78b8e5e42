"""`reward-router manifests`: the workers of a pool file as a kustomize folder, and the pool file of its gateways.

Knows Kubernetes' words, and has the commands from `service.cli.vllm_serve` and `service.cli.rule_serve`: a worker is
started there with the flags that `reward-router up` gives it here. Writes files and talks to no cluster.
docs/kubernetes.md says the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from service.cli.pin import warn_moving
from service.cli.rule_serve import rule_words
from service.cli.vllm_serve import serve_environment, serve_words
from service.errors import ConfigurationError
from service.pool import Entry, ModelEntry, PoolFile, load_pool
from service.scorers.entry import ScorerEntry
from service.scorers.judge.entry import JudgeEntry
from service.scorers.rule.entry import RuleEntry
from service.scorers.vllm_entry import VllmEntry

WORKER_PORT = 8000
"""Port of every worker; the network policies of deploy/kubernetes/base name it."""

LONGEST_NAME = 52
"""Characters of a StatefulSet's name: Kubernetes adds a hash of eleven to make a label of 63 of it."""

GATEWAY_FIELDS = ("served_name", "rendering", "chat_template", "tokens_per_request", "max_in_flight", "max_model_len",
                  "reward_scale", "reward_shift", "head", "heads", "reward_limit", "applies", "timeout_seconds",
                  "requests_per_minute", "tokens_per_minute", "api_key_env")  # fmt: skip
"""What gateways read of a model, besides its name and where it is."""

IMAGE = "vllm/vllm-openai:v0.26.0"
"""Image of the workers: the one of docker-compose.yml."""

RULE_IMAGE = "reward-router-worker"
"""Image of rules' workers: the Dockerfile's target `worker`; `images` of the overlay names a registry."""

USER = {"runAsNonRoot": True, "runAsUser": 2000, "runAsGroup": 0}
"""The image's own user `vllm`; by default the image runs as root."""

GPU_RESOURCE = "nvidia.com/gpu"
"""What NVIDIA's device plugin calls a GPU; `nvidia.com/gpu.shared` where it shares them in time."""

CACHE_SIZE = "40Gi"
"""Weights of 8 billion parameters take 16 GB; while they are downloaded a file may be there twice."""

RULE_USER = {"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001}
"""The user of our own images."""

GATEWAY_LABELS = {"app.kubernetes.io/name": "reward-router", "app.kubernetes.io/component": "gateway"}
"""Labels of the gateways' pods."""

RULE_LABELS = {"app.kubernetes.io/name": "reward-router", "app.kubernetes.io/component": "rule"}
"""Labels of rules' pods: a rule is foreign code, and has a policy of its own that lets it reach nothing."""

RULE_BASE_MB = 512
"""Memory of a rule's worker beside its processes, in MiB."""

LABELS = {"app.kubernetes.io/name": "reward-router", "app.kubernetes.io/component": "worker"}
"""Labels of every worker's pods and Service: what the network policies select."""

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Choices:
    """What a cluster decides and a pool file does not know.

    Attributes:
        image: of vLLM.
        gpu_resource: what a container asks for; its device plugin's name.
        shared_gpus: whether that is a share of a GPU, so that `gpu_share` holds; else each replica has whole GPUs.
        cache_size: of the volume for one replica's weights.
    """

    image: str = IMAGE
    gpu_resource: str = GPU_RESOURCE
    shared_gpus: bool = False
    cache_size: str = CACHE_SIZE


def manifests(
    pool: Annotated[Path, typer.Option(help="Pool file, with `model` (of the Hugging Face hub) or `urls`.")],
    out: Annotated[Path, typer.Option(help="Folder to write; deploy/kubernetes/base is what goes with it.")],
    image: Annotated[str, typer.Option(help="Image of the workers.")] = IMAGE,
    gpu_resource: Annotated[str, typer.Option(help="Name of the GPU resource.")] = GPU_RESOURCE,
    shared_gpus: Annotated[
        bool, typer.Option("--shared-gpus", help="The resource is a share of a GPU: keep `gpu_share`.")
    ] = False,
    cache_size: Annotated[str, typer.Option(help="Volume for the weights of one replica.")] = CACHE_SIZE,
) -> None:
    """Write the Kubernetes manifests of a pool's workers, and the pool file for the gateways in front of them."""
    parsed = load_pool(pool)
    warn_moving(parsed, pool)
    choices = Choices(image, gpu_resource, shared_gpus, cache_size)
    head = f"# Made by `reward-router manifests` from {pool.name}. Change that file, or patch this one in an overlay.\n"
    files = {
        "kustomization.yaml": [kustomization(bool(parsed.to_serve or _rules(parsed)))],
        "pool.yaml": [gateway_pool(parsed)],
        "workers.yaml": [
            *(part for model in parsed.to_serve for part in worker(model, choices)),
            *(part for rule in _rules(parsed) for part in rule_worker(rule)),
            *([rule_policy()] if _rules(parsed) else []),
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, parts in files.items():
        if parts:
            text = yaml.dump_all(parts, Dumper=_Plain, sort_keys=False, width=120, allow_unicode=True)
            (out / name).write_text(head + text, "utf-8")
    Console().print(f"wrote {out}: add it to the `resources` of an overlay", highlight=False, soft_wrap=True)


class _Plain(yaml.SafeDumper):
    """YAML without anchors: each part can be read, and patched, by itself."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def slug(name: str) -> str:
    """A model's name as part of a DNS name.

    >>> slug("Skywork/Qwen3_0.6B")
    'skywork-qwen3-0-6b'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[: LONGEST_NAME - 3].strip("-")


def _rules(pool: PoolFile) -> list[RuleEntry]:
    """Rules that are to be served."""
    return [entry for entry in pool.scorers if isinstance(entry, RuleEntry) and not entry.urls]


def service_name(model: ScorerEntry) -> str:
    """Return the name of the StatefulSet and its Service. Names of Services begin with a letter."""
    name = f"{model.kind}-{slug(model.name).removeprefix(f'{model.kind}-')}"
    return name[:LONGEST_NAME].rstrip("-")


def kustomization(has_workers: bool) -> Manifest:
    """The folder's list: the workers, and the gateways' pool file as a ConfigMap whose changes make new pods."""
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["workers.yaml"] if has_workers else [],
        "configMapGenerator": [{"name": "reward-router-pool", "files": ["pool.yaml"]}],
    }


def gateway_pool(pool: PoolFile) -> Manifest:
    """The pool as gateways see it: every replica by the name of its pod, since they choose among replicas themselves.

    A tokenizer that gateways need is named by `model` and `revision`, the ones that the worker serves.

    Raises:
        ConfigurationError: two models would have one Service, or a file of this machine is named.
    """
    judges = [entry for entry in pool.to_serve if not isinstance(entry, ModelEntry)]
    names = [service_name(model) for model in (*pool.reward_models, *judges, *_rules(pool))]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ConfigurationError(f"models of the pool would share the Kubernetes name {twice[0]!r}: rename one")
    own = pool.model_dump(mode="json", exclude_defaults=True, include={"name", "over_long", "combine", "audit"})
    referees = {"referees": _as_seen(pool.referees)} if pool.referees else {}
    return {**own, "models": _as_seen(pool.models), **referees}


def _as_seen(entries: Sequence[Entry]) -> list[Manifest]:
    models: list[Manifest] = []
    for model in entries:
        if not isinstance(model, ModelEntry):
            models.append(_as_asked(model))
            continue
        tokenizes = model.rendering in ("tokens", "auto")
        path = str(model.path) if tokenizes and model.tokenizer is None and model.path is not None else ""
        for field, value in (
            ("chat_template", model.chat_template), ("tokenizer", model.tokenizer or ""), ("path", path),
        ):  # fmt: skip
            if value.startswith("/"):
                raise ConfigurationError(
                    f"model {model.name!r}: `{field}` {value} is a file of this machine, which a pod does not have; "
                    "name a tokenizer of the hub, or leave it out: `rendering: messages` lets the worker use its own"
                )
        urls = list(model.urls) or replica_urls(model)
        given = model.model_dump(mode="json", exclude_defaults=True, include=set(GATEWAY_FIELDS))
        if tokenizes:
            source = {"model": model.model, "revision": model.revision}
            named = source if model.tokenizer is None else {"tokenizer": model.tokenizer}
            given |= {field: value for field, value in named.items() if value is not None}
        models.append({"name": model.name, "urls": urls} | given)
    return models


def _as_asked(entry: ScorerEntry) -> Manifest:
    """The entry of a scorer that is no reward model: what starts it is left out.

    Raises:
        ConfigurationError: it has no `urls`, and is no judge of the hub.
    """
    if isinstance(entry, JudgeEntry) and not entry.urls:
        entry = entry.served_at(replica_urls(entry))
    if isinstance(entry, RuleEntry) and not entry.urls:
        entry = entry.served_at(replica_urls(entry))
    if not entry.urls:
        raise ConfigurationError(
            f"scorer {entry.name!r} is of kind {entry.kind} and has no `urls`: manifests are written for reward "
            "models, judges and rules; say where it is served"
        )
    starting = {*VllmEntry.model_fields, *RuleEntry.model_fields} - {*ScorerEntry.model_fields} - {"model"}
    given: Manifest = entry.model_dump(mode="json", exclude_defaults=True, exclude=starting)
    return given


def replica_urls(entry: ScorerEntry) -> list[str]:
    """One address for each pod of the StatefulSet, in the gateways' own namespace. A rule has one pod."""
    service = service_name(entry)
    replicas = entry.replicas if isinstance(entry, VllmEntry) else 1
    return [f"http://{service}-{index}.{service}:{WORKER_PORT}" for index in range(replicas)]


def worker(model: VllmEntry, choices: Choices) -> list[Manifest]:
    """StatefulSet, headless Service and disruption budget of one RM or judge.

    Raises:
        ConfigurationError: the pod could not find the model.
    """
    if model.model is None:
        raise ConfigurationError(
            f"model {model.name!r} is not one of the Hugging Face hub: a pod has no files of this machine; give it "
            "`model`, or serve it yourself and give its `urls`"
        )
    stateful_set, *rest = _workload(model, LABELS, model.replicas, _pod(model, choices))
    stateful_set["spec"]["volumeClaimTemplates"] = [
        {
            "metadata": {"name": "weights"},
            "spec": {
                "accessModes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": choices.cache_size}},
            },
        }
    ]
    return [stateful_set, *rest]


def rule_worker(rule: RuleEntry) -> list[Manifest]:
    """StatefulSet, headless Service and disruption budget of a built-in rule; its process has no volume and no key.

    Raises:
        ConfigurationError: the rule is a file of this machine.
    """
    if rule.builtin is None:
        raise ConfigurationError(
            f"rule {rule.name!r} is a file of this machine, which a pod does not have: build an image with it (FROM "
            "reward-router-worker), serve it yourself and give its `urls`"
        )
    memory = f"{rule.processes * rule.memory_mb + RULE_BASE_MB}Mi"
    health = {"httpGet": {"path": "/health", "port": "http"}}
    container: Manifest = {
        "name": "rule",
        "image": RULE_IMAGE,
        "args": list(rule_words(rule, host="0.0.0.0", port=WORKER_PORT)),
        "ports": [{"name": "http", "containerPort": WORKER_PORT}],
        "startupProbe": health | {"periodSeconds": 2, "timeoutSeconds": 5, "failureThreshold": 60},
        "readinessProbe": health | {"periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3},
        "livenessProbe": health | {"periodSeconds": 10, "timeoutSeconds": 10, "failureThreshold": 6},
        # Foreign code: it gets no more of a node than this.
        "resources": {
            "requests": {"cpu": "500m", "memory": memory},
            "limits": {"cpu": str(rule.processes + 1), "memory": memory, "ephemeral-storage": "1Gi"},
        },
        "securityContext": _confined(),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    pod: Manifest = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}, **RULE_USER},
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "256Mi"}}],
    }
    return _workload(rule, RULE_LABELS, 1, pod)


def rule_policy() -> Manifest:
    """The policy of all rules' pods: gateways may ask them, and they may reach nothing, not even names."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "reward-router-rules"},
        "spec": {
            "podSelector": {"matchLabels": RULE_LABELS},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {
                    "from": [{"podSelector": {"matchLabels": GATEWAY_LABELS}}],
                    "ports": [{"protocol": "TCP", "port": WORKER_PORT}],
                }
            ],
            "egress": [],
        },
    }


def _workload(entry: ScorerEntry, own: Manifest, replicas: int, pod: Manifest) -> list[Manifest]:
    """StatefulSet, headless Service and disruption budget of pods that gateways know by name."""
    name = service_name(entry)
    labels = own | {"reward-router/model": slug(entry.name)}
    selector = {"matchLabels": labels}
    stateful_set: Manifest = {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "serviceName": name,
            "replicas": replicas,
            "podManagementPolicy": "Parallel",
            "selector": selector,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    service: Manifest = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            # Every pod has a name of its own, also while it starts: the gateways find out themselves who can be asked.
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": labels,
            "ports": [{"name": "http", "port": WORKER_PORT, "targetPort": "http"}],
        },
    }
    budget: Manifest = {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": name, "labels": labels},
        "spec": {"maxUnavailable": 1, "unhealthyPodEvictionPolicy": "AlwaysAllow", "selector": selector},
    }
    return [stateful_set, service, budget]


def _confined() -> Manifest:
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


def _pod(model: VllmEntry, choices: Choices) -> Manifest:
    return {
        "automountServiceAccountToken": False,
        # vLLM answers what is in flight with 500 at SIGTERM; gateways send it elsewhere at once. Nothing to wait for.
        "terminationGracePeriodSeconds": 30,
        "securityContext": {
            "seccompProfile": {"type": "RuntimeDefault"},
            # The volume of the weights belongs to this group; a large one is gone through once.
            "fsGroup": USER["runAsUser"],
            "fsGroupChangePolicy": "OnRootMismatch",
            **USER,
        },
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [_container(model, choices)],
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }


def _container(model: VllmEntry, choices: Choices) -> Manifest:
    placed = model if choices.shared_gpus else model.model_copy(update={"gpu_share": None})
    # What vLLM and the libraries below it compile is kept with the weights, for the next start.
    environment = {"HOME": "/weights", "HF_HOME": "/weights", "VLLM_CACHE_ROOT": "/weights/vllm"}
    environment |= serve_environment(placed, "cuda", (), {})
    health = {"httpGet": {"path": "/health", "port": "http"}}
    gpus = {choices.gpu_resource: str(model.tensor_parallel)}
    return {
        "name": "vllm",
        "image": choices.image,
        "command": ["vllm"],
        "args": list(serve_words(placed, "cuda", host="0.0.0.0", port=WORKER_PORT)),
        "env": [
            *({"name": key, "value": value} for key, value in environment.items()),
            # For models that the hub gives to some only.
            {
                "name": "HF_TOKEN",
                "valueFrom": {"secretKeyRef": {"name": "reward-router", "key": "hf-token", "optional": True}},
            },
        ],
        "ports": [{"name": "http", "containerPort": WORKER_PORT}],
        # The first start downloads the weights and compiles: up to an hour.
        "startupProbe": health | {"periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 360},
        # For roll-outs only: gateways score a tiny conversation on every replica themselves.
        "readinessProbe": health | {"periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3},
        "livenessProbe": health | {"periodSeconds": 10, "timeoutSeconds": 10, "failureThreshold": 6},
        "resources": {"requests": {"cpu": "2", "memory": "8Gi"} | gpus, "limits": gpus},
        "securityContext": _confined(),
        "volumeMounts": [
            {"name": "weights", "mountPath": "/weights"},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
