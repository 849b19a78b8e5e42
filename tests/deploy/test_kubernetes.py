"""deploy/kubernetes as a cluster would read it: rendered by kubectl, validated against Kubernetes' own schemas, and
compared with the product: its settings, metrics, routes, times and commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from service.cli.manifests import WORKER_PORT, rule_worker
from service.cli.vllm_serve import serve_words
from service.errors import ConfigurationError
from service.pool import load_pool
from service.settings import Settings, read_settings
from service.telemetry import Telemetry
from tests.support.kubernetes import (
    FOLDER,
    Manifest,
    Pod,
    allowed,
    of_kind,
    pod_templates,
    render,
    render_with,
    selects,
)

MODELS = FOLDER.parents[1] / "deploy/models"
WORKERS = ("published-1x80gb", "published-1x80gb-judge", "published-4x80gb")
COMPONENTS = ("redis", "checkpoint", "monitoring", "offline")
VERSIONS = ("1.31", "1.34", "1.37")
"""Versions of Kubernetes: an older one, and the newest whose schemas the package carries."""

EXTERNAL_SECRET = {"reward-router": {"api-keys", "store-url", "hf-token", "judge-api-key"}}
"""What docs/kubernetes.md lets an operator create by hand."""


def command(pool: Path, out: Path) -> None:
    """Run `reward-router manifests`."""
    from typer.testing import CliRunner

    from service.cli import app

    result = CliRunner().invoke(app, ["manifests", "--pool", str(pool), "--out", str(out)])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def example() -> list[Manifest]:
    return render(FOLDER / "overlays/published")


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    return render_with(tmp_path_factory.mktemp("k8s"), *COMPONENTS, resources=["workers/published-4x80gb"])


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_fits_kubernetes_own_schema(everything: list[Manifest], version: str) -> None:
    native = [part for part in everything if "monitoring.coreos.com" not in part["apiVersion"]]
    assert len(native) > 20
    for part in native:
        kubernetes_validate.validate(part, version, strict=True)


def test_the_schema_refuses_a_misspelt_field(everything: list[Manifest]) -> None:
    wrong = json.loads(json.dumps(of_kind(everything, "Deployment")["reward-router"]))
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.37", strict=True)


def test_monitors_select_services_that_are_there_by_ports_that_they_have(everything: list[Manifest]) -> None:
    monitors = of_kind(everything, "ServiceMonitor")
    services = of_kind(everything, "Service").values()
    jobs = {}
    for name, monitor in monitors.items():
        selected = [s for s in services if selects(monitor["spec"]["selector"], s["metadata"]["labels"])]
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["path"] == "/metrics"
        assert selected
        assert all(endpoint["port"] in {port["name"] for port in s["spec"]["ports"]} for s in selected)
        jobs[name] = endpoint["relabelings"][0]["replacement"]
    configured = yaml.safe_load((FOLDER.parent / "prometheus/prometheus.yml").read_text())
    # Rules and dashboard ask for these jobs.
    assert set(jobs.values()) <= {job["job_name"] for job in configured["scrape_configs"]}


# What names what.


@pytest.mark.parametrize("which", ["example", "everything"])
def test_every_reference_leads_somewhere(which: str, request: pytest.FixtureRequest) -> None:
    manifests = request.getfixturevalue(which)
    maps, claims = of_kind(manifests, "ConfigMap"), of_kind(manifests, "PersistentVolumeClaim")
    accounts = of_kind(manifests, "ServiceAccount")
    for name, template in pod_templates(manifests).items():
        spec = template["spec"]
        assert spec.get("serviceAccountName", "default") in {"default", *accounts}
        volumes = {v["name"]: v for v in spec.get("volumes", ())}
        made = of_kind(manifests, "StatefulSet").get(name, {}).get("spec", {}).get("volumeClaimTemplates", ())
        for volume in volumes.values():
            assert volume.get("configMap", {}).get("name", next(iter(maps))) in maps
            assert volume.get("persistentVolumeClaim", {}).get("claimName") in {None, *claims}
        for container in spec["containers"]:
            for mount in container.get("volumeMounts", ()):
                assert mount["name"] in {*volumes, *(claim["metadata"]["name"] for claim in made)}
            for source in container.get("envFrom", ()):
                assert source["configMapRef"]["name"] in maps
            for variable in container.get("env", ()):
                secret = variable.get("valueFrom", {}).get("secretKeyRef")
                assert secret is None or secret["key"] in EXTERNAL_SECRET[secret["name"]]
            ports = {port["name"] for port in container["ports"]}
            probes = [container[kind] for kind in ("startupProbe", "livenessProbe", "readinessProbe")]
            assert {probe["httpGet"]["port"] for probe in probes if "httpGet" in probe} <= ports


@pytest.mark.parametrize("kind", ["Service", "PodDisruptionBudget", "NetworkPolicy"])
def test_what_selects_pods_selects_some_of_one_component(everything: list[Manifest], kind: str) -> None:
    templates = pod_templates(everything).values()
    for name, part in of_kind(everything, kind).items():
        spec = part["spec"]
        selector = spec.get("podSelector", spec["selector"] if kind != "NetworkPolicy" else None)
        selector = selector if "matchLabels" in selector else {"matchLabels": selector}
        chosen = [t for t in templates if selects(selector, t["metadata"]["labels"])]
        assert len({t["metadata"]["labels"]["app.kubernetes.io/component"] for t in chosen}) == 1, name
        if kind == "Service":
            (template,) = chosen
            named = {port["name"] for c in template["spec"]["containers"] for port in c["ports"]}
            assert {port["targetPort"] for port in spec["ports"]} <= named


def test_each_pod_may_be_evicted_one_at_a_time(everything: list[Manifest]) -> None:
    budgets = of_kind(everything, "PodDisruptionBudget").values()
    for name, template in pod_templates(everything).items():
        if name == "reward-router-redis":
            # A budget for a single pod would only stop its node from being drained.
            continue
        (budget,) = [b for b in budgets if selects(b["spec"]["selector"], template["metadata"]["labels"])]
        assert budget["spec"]["maxUnavailable"] == 1


def test_no_pod_may_do_more_than_it_has_to(everything: list[Manifest]) -> None:
    for name, template in pod_templates(everything).items():
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["requests"]
            assert spec["securityContext"]["runAsNonRoot"] is True, name
            assert context["readOnlyRootFilesystem"] is True, name


def test_a_worker_may_write_where_its_variables_say(everything: list[Manifest]) -> None:
    workers = of_kind(everything, "StatefulSet")
    for name, template in pod_templates(everything).items():
        for container in template["spec"]["containers"]:
            if container["name"] != "vllm":
                continue
            context = template["spec"]["securityContext"]
            # The user of vLLM's image; the group makes a new volume writable.
            assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (2000, 0, 2000)
            own = {volume["name"] for volume in template["spec"]["volumes"] if "emptyDir" in volume}
            own |= {claim["metadata"]["name"] for claim in workers[name]["spec"]["volumeClaimTemplates"]}
            writable = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in own]
            environment = {variable["name"]: variable.get("value") for variable in container["env"]}
            for variable in ("HOME", "HF_HOME", "VLLM_CACHE_ROOT"):
                assert any(Path(environment[variable]).is_relative_to(path) for path in writable), variable
            assert {"/tmp", "/dev/shm"} <= set(writable)


# The gateway's settings, metrics and times.


def gateway_environment(manifests: list[Manifest]) -> dict[str, str]:
    """What the gateway's container would find in its environment, with the secrets of the docs."""
    secrets = {
        "api-keys": '["KEY"]',
        "store-url": "redis://reward-router-redis:6379/0",
        "hf-token": "TOKEN",
        "judge-api-key": "J",
    }
    (container,) = of_kind(manifests, "Deployment")["reward-router"]["spec"]["template"]["spec"]["containers"]
    maps = of_kind(manifests, "ConfigMap")
    environment = {k: v for ref in container["envFrom"] for k, v in maps[ref["configMapRef"]["name"]]["data"].items()}
    for variable in container["env"]:
        secret = variable.get("valueFrom", {}).get("secretKeyRef")
        environment[variable["name"]] = variable["value"] if secret is None else secrets[secret["key"]]
    return environment


def test_every_variable_of_ours_is_a_setting_with_a_value_that_it_takes(
    everything: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = gateway_environment(everything)
    ours = {key.removeprefix("REWARD_ROUTER_").lower() for key in environment if key.startswith("REWARD_ROUTER_")}
    assert "checkpoint" in ours
    assert ours <= set(Settings.model_fields)
    for key in list(os.environ):
        if key.startswith("REWARD_ROUTER_"):
            monkeypatch.delenv(key)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    settings = read_settings()
    assert settings.api_keys == ("KEY",)
    assert settings.host == "0.0.0.0"


def test_a_pod_is_given_time_for_all_that_it_finishes(everything: list[Manifest]) -> None:
    spec = of_kind(everything, "Deployment")["reward-router"]["spec"]["template"]["spec"]
    settings = Settings(_env_file=None)  # type: ignore[call-arg]
    leaves_service = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    # As service.cli.serve tells uvicorn; then the lifespan waits for shadow calls and the store's last word.
    in_flight = int(settings.request_timeout_seconds) + 1
    after = settings.worker_timeout_seconds + settings.store_timeout_seconds
    assert spec["terminationGracePeriodSeconds"] >= leaves_service + in_flight + after + 5


def test_probes_wait_longer_than_the_store_may_take(everything: list[Manifest]) -> None:
    (container,) = of_kind(everything, "Deployment")["reward-router"]["spec"]["template"]["spec"]["containers"]
    store = Settings(_env_file=None).store_timeout_seconds  # type: ignore[call-arg]
    assert container["readinessProbe"]["timeoutSeconds"] > store
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz", "a store that is away restarts no gateway"


def metric_names() -> set[str]:
    """Every metric that the gateway exports, as Prometheus calls it."""
    return {
        name
        for family in Telemetry().registry.collect()
        for name in (family.name, family.name + "_total" * (family.type == "counter"))
    }


def test_the_autoscaler_looks_at_the_processor_and_with_monitoring_at_a_metric_that_is_exported(
    example: list[Manifest], everything: list[Manifest]
) -> None:
    (alone,) = of_kind(example, "HorizontalPodAutoscaler").values()
    assert [metric["type"] for metric in alone["spec"]["metrics"]] == ["Resource"]
    (both,) = of_kind(everything, "HorizontalPodAutoscaler").values()
    assert both["spec"]["metrics"][0] == alone["spec"]["metrics"][0]
    pods = both["spec"]["metrics"][1]["pods"]
    assert pods["metric"]["name"] in metric_names()
    adapter = yaml.safe_load((FOLDER / "components/monitoring/adapter-values.yaml").read_text())
    (rule,) = adapter["rules"]["custom"]
    assert rule["name"]["as"] == pods["metric"]["name"]
    assert re.match(r"\w+", rule["seriesQuery"]).group() in metric_names()  # type: ignore[union-attr]
    assert re.fullmatch(rule["name"]["matches"], pods["metric"]["name"])
    target = both["spec"]["scaleTargetRef"]
    assert target["name"] in of_kind(everything, target["kind"])
    assert "replicas" not in of_kind(everything, "Deployment")["reward-router"]["spec"], "the autoscaler owns it"


def prometheus_rule() -> str:
    """What the command of docs/kubernetes.md gives to kubectl."""
    page = (FOLDER.parents[1] / "docs/kubernetes.md").read_text()
    (command,) = re.findall(r"^    (\{ cat .*\n.*; \}) \| kubectl .* apply -f -$", page, re.MULTILINE)
    done = subprocess.run(["sh", "-ec", command], cwd=FOLDER.parents[1], capture_output=True, text=True, check=True)
    return done.stdout


def test_alert_rules_become_a_prometheus_rule_by_the_command_of_the_docs() -> None:
    rule = yaml.safe_load(prometheus_rule())
    assert rule["kind"] == "PrometheusRule"
    assert rule["spec"] == yaml.safe_load((FOLDER.parent / "prometheus/rules/reward-router.yml").read_text())


# Workers.


@pytest.mark.parametrize("name", WORKERS)
def test_workers_are_started_as_up_starts_them(name: str, tmp_path: Path) -> None:
    manifests = render_with(tmp_path, resources=[f"workers/{name}"])
    pool = load_pool(MODELS / f"{name.removeprefix('published-')}.yaml")
    started = {t["spec"]["containers"][0]["args"][1]: t["spec"]["containers"][0] for t in _worker_pods(manifests)}
    assert set(started) == {model.source for model in pool.to_serve}
    sets = of_kind(manifests, "StatefulSet").values()
    assert sum(s["spec"]["replicas"] for s in sets) == sum(model.replicas for model in pool.to_serve)
    for model in pool.to_serve:
        container = started[model.source]
        here = list(serve_words(model, "cuda", host="0.0.0.0", port=WORKER_PORT))
        # A pod has a whole GPU, and so vLLM's own share of it.
        at = here.index("--gpu-memory-utilization")
        del here[at : at + 2]
        assert container["command"] == ["vllm"]
        assert container["args"] == here
        assert container["resources"]["limits"] == {"nvidia.com/gpu": str(model.tensor_parallel)}


@pytest.mark.parametrize("name", WORKERS)
def test_gateways_ask_every_worker_pod_by_its_own_name(name: str, tmp_path: Path) -> None:
    manifests = render_with(tmp_path, resources=[f"workers/{name}"])
    (data,) = [m["data"] for n, m in of_kind(manifests, "ConfigMap").items() if n.startswith("reward-router-pool")]
    (tmp_path / "pool.yaml").write_text(data["pool.yaml"])
    pool = load_pool(tmp_path / "pool.yaml")
    source = load_pool(MODELS / f"{name.removeprefix('published-')}.yaml")
    assert [model.name for model in pool.models] == [model.name for model in source.models]
    services = of_kind(manifests, "Service")
    pods = {
        f"{name}-{index}.{part['spec']['serviceName']}": part["spec"]["template"]
        for name, part in of_kind(manifests, "StatefulSet").items()
        for index in range(part["spec"]["replicas"])
    }
    asked = [url for model in pool.models for url in model.urls]
    assert {url.removeprefix("http://").removesuffix(f":{WORKER_PORT}") for url in asked} == set(pods)
    for model in pool.models:
        for url in model.urls:
            host = url.removeprefix("http://").removesuffix(f":{WORKER_PORT}")
            service = services[host.partition(".")[2]]["spec"]
            assert service["clusterIP"] == "None"
            assert service["publishNotReadyAddresses"] is True
            assert service["selector"].items() <= pods[host]["metadata"]["labels"].items()
            args = pods[host]["spec"]["containers"][0]["args"]
            assert args[args.index("--served-model-name") + 1] == model.served
            (port,) = pods[host]["spec"]["containers"][0]["ports"]
            assert args[args.index("--port") + 1] == str(port["containerPort"]) == str(WORKER_PORT)


RULES = """
models:
- {name: rm, urls: ["http://gpu:8000"]}
- {name: judge, kind: judge, model: Qwen/Qwen3-8B, revision: main, dtype: bfloat16, gpu_share: 0.3}
- name: hosted
  kind: judge
  urls: ["https://judge.example.com/v1"]
  model: big
  api_key_env: JUDGE_API_KEY
- {name: sums, kind: rule, builtin: math, processes: 2, memory_mb: 700, applies: {metadata.task: math}}
"""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """A pool of several kinds, as `reward-router manifests` writes it."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "pool.yaml").write_text(RULES)
    command(folder / "pool.yaml", folder / "written")
    return render_with(folder, "offline", resources=["workers/mixed"], also={"workers/mixed": folder / "written"})


def test_manifests_of_a_pool_of_several_kinds_fit_the_schema(mixed: list[Manifest]) -> None:
    for part in mixed:
        kubernetes_validate.validate(part, VERSIONS[-1], strict=True)
    test_no_pod_may_do_more_than_it_has_to(mixed)
    test_each_pod_may_be_evicted_one_at_a_time(mixed)
    test_what_selects_pods_selects_some_of_one_component(mixed, "NetworkPolicy")
    test_what_selects_pods_selects_some_of_one_component(mixed, "Service")


def test_gateways_are_told_of_judges_and_rules_and_nothing_of_how_they_are_started(
    mixed: list[Manifest], tmp_path: Path
) -> None:
    (data,) = [m["data"] for n, m in of_kind(mixed, "ConfigMap").items() if n.startswith("reward-router-pool")]
    (tmp_path / "pool.yaml").write_text(data["pool.yaml"])
    _, judge, hosted, rule = load_pool(tmp_path / "pool.yaml").models
    assert (judge.urls, judge.served) == (("http://judge-judge-0.judge-judge:8000",), "Qwen/Qwen3-8B")
    assert (hosted.urls, hosted.key({"JUDGE_API_KEY": "k"})) == (("https://judge.example.com",), "k")
    assert (rule.urls, rule.applies) == (("http://rule-sums-0.rule-sums:8000",), {"metadata.task": "math"})
    assert not {"gpu_share", "dtype", "builtin", "processes"} & {*data["pool.yaml"].replace(":", " ").split()}
    (container,) = of_kind(mixed, "Deployment")["reward-router"]["spec"]["template"]["spec"]["containers"]
    (key,) = (variable for variable in container["env"] if variable["name"] == hosted.api_key_env)
    assert key["valueFrom"]["secretKeyRef"]["optional"] is True


def test_a_judge_is_served_by_vllm_as_a_generative_model(mixed: list[Manifest]) -> None:
    (container,) = pod_templates(mixed)["judge-judge"]["spec"]["containers"]
    assert container["args"][:2] == ["serve", "Qwen/Qwen3-8B"]
    assert "--runner" not in container["args"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "1"}


def test_a_rules_pod_reaches_nothing_writes_nowhere_and_is_asked_by_gateways_only(mixed: list[Manifest]) -> None:
    template = pod_templates(mixed)["rule-sums"]
    spec = template["spec"]
    (container,) = spec["containers"]
    assert container["image"] == "reward-router-worker"
    assert container["args"][:3] == ["worker", "--rule", "math"]
    assert not {"env", "envFrom"} & set(container)
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert [(mount["name"], mount["mountPath"]) for mount in container["volumeMounts"]] == [("tmp", "/tmp")]
    assert spec["volumes"][0]["emptyDir"]["sizeLimit"]
    # Two processes of 700 MiB, and the server.
    assert container["resources"]["limits"]["memory"] == "1912Mi"
    rule, rules = Pod(template["metadata"]["labels"]), policies(mixed)
    assert allowed(rules, GATEWAY, rule, 8000)
    for other in (NEIGHBOUR, TRAINER, IMPOSTOR, PROMETHEUS, WORKER):
        assert not allowed(rules, other, rule, 8000), other
    for target, port in ((HUB, 443), (METADATA, 80), (GATEWAY, 8080), (REDIS, 6379), (WORKER, 8000), (TRAINER, 80)):
        assert not allowed(rules, rule, target, port), target
    assert not allowed(rules, rule, Pod({"k8s-app": "kube-dns"}, "kube-system"), 53, "UDP")


def test_a_rule_of_a_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_text("models: [{name: own, kind: rule, file: rules.py:own}]")
    with pytest.raises(ConfigurationError, match="'own' is a file of this machine"):
        rule_worker(load_pool(tmp_path / "pool.yaml").models[0])  # type: ignore[arg-type]


def _worker_pods(manifests: list[Manifest]) -> list[Any]:
    found = pod_templates(manifests).values()
    return [t for t in found if t["metadata"]["labels"]["app.kubernetes.io/component"] == "worker"]


@pytest.mark.parametrize("name", WORKERS)
def test_the_committed_workers_are_what_the_command_writes(name: str, tmp_path: Path) -> None:
    command(MODELS / f"{name.removeprefix('published-')}.yaml", tmp_path)
    committed = {path.name: path.read_text() for path in (FOLDER / "workers" / name).iterdir()}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == committed


# Who may talk to whom.

GATEWAY = Pod({"app.kubernetes.io/name": "reward-router", "app.kubernetes.io/component": "gateway"})
WORKER = Pod({"app.kubernetes.io/name": "reward-router", "app.kubernetes.io/component": "worker"})
REDIS = Pod({"app.kubernetes.io/name": "reward-router", "app.kubernetes.io/component": "redis"})
NEIGHBOUR = Pod({"app": "trainer"})
TRAINER = Pod({"app": "trainer"}, namespace="training")
IMPOSTOR = Pod(GATEWAY.labels, namespace="training")
PROMETHEUS = Pod({"app.kubernetes.io/name": "prometheus"}, namespace="monitoring")
HUB, METADATA = Pod(ip="18.244.0.1"), Pod(ip="169.254.169.254")


def policies(manifests: list[Manifest]) -> list[Manifest]:
    return list(of_kind(manifests, "NetworkPolicy").values())


def test_only_gateways_reach_workers_and_the_store(example: list[Manifest]) -> None:
    rules = policies(example)
    assert allowed(rules, GATEWAY, WORKER, 8000)
    assert allowed(rules, GATEWAY, REDIS, 6379)
    for other in (NEIGHBOUR, TRAINER, IMPOSTOR, PROMETHEUS, WORKER, REDIS):
        assert not allowed(rules, other, WORKER, 8000), other
        assert not allowed(rules, other, REDIS, 6379), other
    assert not allowed(rules, GATEWAY, WORKER, 22)
    for caller in (NEIGHBOUR, TRAINER, PROMETHEUS):
        assert allowed(rules, caller, GATEWAY, 8080)
        assert not allowed(rules, caller, GATEWAY, 9090)


def test_workers_reach_the_model_hub_only_and_offline_nothing(
    example: list[Manifest], everything: list[Manifest]
) -> None:
    assert allowed(policies(example), WORKER, HUB, 443)
    for rules in (policies(example), policies(everything)):
        assert not allowed(rules, WORKER, METADATA, 443)
        assert not allowed(rules, WORKER, TRAINER, 443)
        assert not allowed(rules, WORKER, GATEWAY, 8080)
        assert not allowed(rules, WORKER, REDIS, 6379)
    assert not allowed(policies(everything), WORKER, HUB, 443)
    names = {v["name"]: v.get("value") for v in _worker_pods(everything)[0]["spec"]["containers"][0]["env"]}
    assert names["HF_HUB_OFFLINE"] == "1"


def test_monitoring_lets_prometheus_and_nobody_else_scrape_workers(everything: list[Manifest]) -> None:
    rules = policies(everything)
    assert allowed(rules, PROMETHEUS, WORKER, 8000)
    for other in (NEIGHBOUR, TRAINER, Pod({"app": "x"}, "monitoring"), Pod(PROMETHEUS.labels, "training")):
        assert not allowed(rules, other, WORKER, 8000), other


# The Prometheus operator's own kinds.


@pytest.mark.slow
def test_monitors_and_rules_fit_the_operators_own_models(everything: list[Manifest]) -> None:
    v1 = pytest.importorskip("cloudcoil.models.prometheus_operator.v1", reason="needs reward-router[dev]")
    rule = yaml.safe_load(prometheus_rule())
    for part in (*of_kind(everything, "ServiceMonitor").values(), rule):
        model = getattr(v1, part["kind"]).model_validate(part)
        # The models ignore fields that they do not know: what comes back must be what went in.
        assert model.model_dump(mode="json", by_alias=True, exclude_unset=True) == part
