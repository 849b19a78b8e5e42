"""`reward-router manifests`: the workers of a pool file as a kustomize folder, and the pool file of its gateways.

Knows Kubernetes' words and `service.cli.vllm_serve`, from which the commands come: a worker is started there with the
flags that `reward-router up` gives it here. Writes files and talks to no cluster. docs/kubernetes.md says the rest.
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
from service.cli.vllm_serve import serve_environment, serve_words
from service.errors import ConfigurationError
from service.pool import Entry, ModelEntry, PoolFile, load_pool
from service.scorers.entry import ScorerEntry

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

USER = {"runAsNonRoot": True, "runAsUser": 2000, "runAsGroup": 0}
"""The image's own user `vllm`; by default the image runs as root."""

GPU_RESOURCE = "nvidia.com/gpu"
"""What NVIDIA's device plugin calls a GPU; `nvidia.com/gpu.shared` where it shares them in time."""

CACHE_SIZE = "40Gi"
"""Weights of 8 billion parameters take 16 GB; while they are downloaded a file may be there twice."""

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
        "kustomization.yaml": [kustomization(any(not model.urls for model in parsed.reward_models))],
        "pool.yaml": [gateway_pool(parsed)],
        "workers.yaml": [part for model in parsed.reward_models if not model.urls for part in worker(model, choices)],
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


def service_name(model: ModelEntry) -> str:
    """Return the name of the StatefulSet and its Service. Names of Services begin with a letter."""
    return f"rm-{slug(model.name).removeprefix('rm-')}"


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
    names = [service_name(model) for model in pool.reward_models]
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
            models.append(_elsewhere(model))
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


def _elsewhere(entry: ScorerEntry) -> Manifest:
    """The entry of a scorer that is no reward model.

    Raises:
        ConfigurationError: it has no `urls`.
    """
    if not entry.urls:
        raise ConfigurationError(
            f"scorer {entry.name!r} is of kind {entry.kind} and has no `urls`: manifests are written for reward models "
            "only; say where it is served"
        )
    given: Manifest = entry.model_dump(mode="json", exclude_defaults=True)
    return given


def replica_urls(model: ModelEntry) -> list[str]:
    """One address for each pod of the StatefulSet, in the gateways' own namespace."""
    service = service_name(model)
    return [f"http://{service}-{index}.{service}:{WORKER_PORT}" for index in range(model.replicas)]


def worker(model: ModelEntry, choices: Choices) -> list[Manifest]:
    """StatefulSet, headless Service and disruption budget of one RM.

    Raises:
        ConfigurationError: the pod could not find the model.
    """
    if model.model is None:
        raise ConfigurationError(
            f"model {model.name!r} is not one of the Hugging Face hub: a pod has no files of this machine; give it "
            "`model`, or serve it yourself and give its `urls`"
        )
    name = service_name(model)
    labels = LABELS | {"reward-router/model": slug(model.name)}
    selector = {"matchLabels": labels}
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
    stateful_set: Manifest = {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "serviceName": name,
            "replicas": model.replicas,
            "podManagementPolicy": "Parallel",
            "selector": selector,
            "template": {"metadata": {"labels": labels}, "spec": _pod(model, choices)},
            "volumeClaimTemplates": [
                {
                    "metadata": {"name": "weights"},
                    "spec": {
                        "accessModes": ["ReadWriteOnce"],
                        "resources": {"requests": {"storage": choices.cache_size}},
                    },
                }
            ],
        },
    }
    return [stateful_set, service, budget]


def _pod(model: ModelEntry, choices: Choices) -> Manifest:
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


def _container(model: ModelEntry, choices: Choices) -> Manifest:
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
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [
            {"name": "weights", "mountPath": "/weights"},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
