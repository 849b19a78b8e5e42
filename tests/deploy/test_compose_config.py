"""What docker-compose.yml says, as Docker Compose itself reads it: settings, networks, secrets, flags, mounts."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dockerfile_parse", reason="needs reward-router[dev]")

from router_core.encoder.export import serve_command
from service.cli.vllm_serve import ENVIRONMENT, serve_words
from service.errors import ConfigurationError
from service.pool import PoolFile, load_pool
from service.scorers.entry import ScorerEntry
from service.scorers.vllm_entry import VllmEntry
from service.settings import Settings
from tests.support.compose import COMPOSE_FILE, ROOT, Config, StackError, compose_config

SECRETS = {"GATEWAY_API_KEY": "a-key", "GRAFANA_ADMIN_PASSWORD": "a-password"}
ENV_EXAMPLE = ROOT / ".env.example"
GPU_POOLS = {"gpu": ROOT / "deploy/models/1x24gb.yaml", "judge": ROOT / "deploy/models/1x80gb-judge.yaml"}
PROFILES = ("cpu", "gpu", "judge")


@dataclass(frozen=True, slots=True)
class Served:
    """A profile's configuration and the pool file whose models it serves with vLLM."""

    config: Config
    pool: PoolFile

    @property
    def services(self) -> dict[str, Config]:
        found: dict[str, Config] = self.config["services"]
        return found

    @property
    def weights(self) -> str:
        """The service that downloads: alone on its network."""
        (name,) = (name for name, service in self.services.items() if nets(service) == {"downloads"})
        return name


@pytest.fixture(scope="module")
def cpu() -> Config:
    """Profile `cpu`."""
    return compose_config("cpu", variables=SECRETS)


@pytest.fixture(scope="module")
def gpu() -> Config:
    """Profile `gpu`."""
    return compose_config("gpu", variables=SECRETS)


@pytest.fixture(scope="module")
def judge() -> Config:
    """Profile `judge`."""
    return compose_config("judge", variables=SECRETS)


@pytest.fixture(scope="module", params=PROFILES)
def services(request: pytest.FixtureRequest) -> dict[str, Config]:
    """The services of each profile in turn."""
    found: dict[str, Config] = request.getfixturevalue(request.param)["services"]
    return found


def example_variables() -> set[str]:
    """Names that .env.example sets."""
    return {line.partition("=")[0] for line in ENV_EXAMPLE.read_text().splitlines() if line and line[0] != "#"}


def workers(services: dict[str, Config]) -> dict[str, Config]:
    """The services that serve models or rules."""
    locked = {"workers", "rules", "referees"}
    return {name: service for name, service in services.items() if nets(service) & locked and not gateway(service)}


def gateway(service: Config) -> bool:
    """Return True if it is a gateway."""
    return "REWARD_ROUTER_STORE_URL" in (service.get("environment") or {})


def nets(service: Config) -> set[str]:
    """Names of its networks."""
    return set(service.get("networks") or {})


def test_every_service_belongs_to_a_profile_so_that_half_a_stack_never_starts() -> None:
    assert compose_config(variables=SECRETS)["services"] == {}


@pytest.mark.parametrize("secret", sorted(SECRETS))
def test_without_a_secret_compose_refuses_and_names_it(secret: str) -> None:
    left = {name: value for name, value in SECRETS.items() if name != secret}
    with pytest.raises(StackError, match=f"set {secret} in .env"):
        compose_config("cpu", variables=left)


def test_env_example_has_exactly_the_variables_that_the_file_takes() -> None:
    files = [COMPOSE_FILE, *(ROOT / "deploy/compose").glob("*.yml")]
    taken = {name for file in files for name in re.findall(r"(?<!\$)\$\{(\w+)", file.read_text())}
    assert taken == example_variables()


def test_env_example_holds_the_files_own_defaults(tmp_path: Path) -> None:
    empty = tmp_path / "empty.env"
    empty.touch()
    for profile in PROFILES:
        without = compose_config(profile, variables=SECRETS, env_file=empty)
        assert without == compose_config(profile, variables=SECRETS)


def test_every_variable_of_the_gateway_is_a_setting_and_its_value_fits(services: dict[str, Config]) -> None:
    (found,) = (service for service in services.values() if gateway(service))
    given = {name: value for name, value in found["environment"].items() if name.startswith("REWARD_ROUTER_")}
    known = {f"REWARD_ROUTER_{name.upper()}" for name in Settings.model_fields}
    assert set(given) <= known
    with pytest.MonkeyPatch.context() as patch:
        for name in known & set(os.environ):
            patch.delenv(name)
        for name, value in given.items():
            patch.setenv(name, value)
        settings = Settings(host="0.0.0.0")
    assert settings.api_keys == (SECRETS["GATEWAY_API_KEY"],)
    # An empty variable is none: `${CHECKPOINT:-}` must not become the path of a checkpoint.
    assert settings.checkpoint is None
    grace = float(found["stop_grace_period"].removesuffix("s"))
    assert grace > settings.request_timeout_seconds + 1


def test_workers_are_on_a_network_with_nobody_but_the_gateway_and_no_way_out(
    cpu: Config, gpu: Config, judge: Config
) -> None:
    for config in (cpu, gpu, judge):
        assert config["networks"]["workers"]["internal"] is True
        found = workers(config["services"])
        assert len(found) >= 4
        for name, worker in found.items():
            assert ("workers" in nets(worker)) == ("--rule" not in worker["command"]), name
            assert len(nets(worker)) == 1, name
            assert "ports" not in worker, name


def test_a_rule_shares_a_network_with_the_gateway_alone_and_writes_nowhere(cpu: Config) -> None:
    services = cpu["services"]
    rules = [name for name, worker in workers(services).items() if "--rule" in worker["command"]]
    assert rules == ["checker", "sums"]
    for name in rules:
        rule = services[name]
        assert all(cpu["networks"][net]["internal"] is True for net in nets(rule))
        assert {other for other in services if nets(services[other]) & nets(rule)} == {name, "gateway"}
        assert (rule["read_only"], rule["cap_drop"], rule["user"]) == (True, ["ALL"], "10001:10001")
        assert rule["security_opt"] == ["no-new-privileges:true"]
        assert not rule.get("volumes")
        # Neither the store's address nor a key.
        assert not rule.get("environment")
        assert {"mem_limit", "pids_limit", "cpus"} <= set(rule)


def test_prometheus_reaches_workers_only_with_the_override(gpu: Config) -> None:
    override = ROOT / "deploy/compose/worker-metrics.yml"
    opened = compose_config("gpu", variables=SECRETS, files=[COMPOSE_FILE, override])["services"]
    assert nets(gpu["services"]["prometheus"]) == {"monitoring"}
    assert nets(opened["prometheus"]) == {"monitoring", "workers"}
    (mount,) = (volume for volume in opened["prometheus"]["volumes"] if volume["target"] == "/etc/prometheus/targets")
    import yaml

    (groups,) = (yaml.safe_load(file.read_text()) for file in Path(mount["source"]).iterdir())
    targets = {group["targets"][0]: group["labels"]["model"] for group in groups}
    assert targets == {model.urls[0].removeprefix("http://"): model.name for model in pool_of(gpu).models}


def test_store_and_monitoring_have_no_way_out_and_only_the_edge_publishes(services: dict[str, Config]) -> None:
    networks = compose_config("cpu", "gpu", variables=SECRETS)["networks"]
    assert {name for name, network in networks.items() if network.get("internal")} == {
        "workers",
        "rules",
        "referees",
        "store",
        "monitoring",
    }
    assert nets(services["redis"]) == {"store"}
    for name, service in services.items():
        if "ports" in service:
            assert "edge" in nets(service), name
            assert {port["host_ip"] for port in service["ports"]} == {"127.0.0.1"}, name


def test_redis_keeps_what_was_acknowledged_and_never_evicts(services: dict[str, Config]) -> None:
    redis = services["redis"]
    words = redis["command"]
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--appendfsync"] == "everysec"
    assert options["--maxmemory-policy"] == "noeviction"
    (volume,) = redis["volumes"]
    assert (volume["type"], volume["target"]) == ("volume", options["--dir"])


def test_images_name_a_version(services: dict[str, Config]) -> None:
    for name, service in services.items():
        tag = service["image"].rpartition(":")[2]
        assert tag != "latest", name
        assert tag == "local" or re.search(r"\d+\.\d+", tag), f"{name}: {service['image']}"


def test_what_is_mounted_exists_and_is_read_only(services: dict[str, Config]) -> None:
    for name, service in services.items():
        for volume in service.get("volumes", []):
            if volume["type"] == "bind":
                assert Path(volume["source"]).exists(), f"{name}: {volume['source']}"
                assert volume["read_only"] is True, name


def test_what_waits_for_health_waits_for_something_with_a_health_check(services: dict[str, Config]) -> None:
    for name, service in services.items():
        for dependency, wanted in service.get("depends_on", {}).items():
            if dependency not in services:
                assert (dependency, wanted["required"]) == ("encoder-files", False), name
                continue
            other = services[dependency]
            if wanted["condition"] == "service_healthy":
                # The worker image has one of its own; test_dockerfile.py.
                assert "healthcheck" in other or other["build"]["target"] == "worker", f"{name} -> {dependency}"
            if wanted["condition"] == "service_completed_successfully":
                assert other.get("restart", "no") == "no", f"{name} -> {dependency}"


def test_every_service_is_confined() -> None:
    services = compose_config(*PROFILES, "encoder", variables=SECRETS)["services"]
    for name, service in services.items():
        assert service["user"].partition(":")[0] not in ("", "0", "root"), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_vllm_is_its_images_user_and_writes_at_home() -> None:
    services = compose_config("gpu", "judge", "encoder", variables=SECRETS)["services"]
    found = {name: service for name, service in services.items() if "vllm" in service["image"]}
    assert {"weights", "encoder", "judge"} < set(found)
    for name, service in found.items():
        assert service["user"] == "2000:0", name
        assert service["tmpfs"] == ["/tmp:exec"], name
        # A new volume takes over the owner of the image's folder that it hides: `vllm` owns its home and `.cache`.
        writable = {volume["target"] for volume in service["volumes"] if not volume.get("read_only")}
        assert writable <= {"/home/vllm", "/home/vllm/.cache"}, name
        assert any(Path(service["environment"]["HOME"], ".cache").is_relative_to(path) for path in writable), name


def pool_of(config: Config) -> Any:
    """The pool file that the profile's gateway mounts."""
    (found,) = (service for service in config["services"].values() if gateway(service))
    (mount,) = (volume for volume in found["volumes"] if volume["target"] == "/etc/reward-router/pool.yaml")
    assert found["command"][:3] == ["serve", "--pool", mount["target"]]
    return load_pool(Path(mount["source"]))


@pytest.mark.parametrize("profile", PROFILES)
def test_the_pool_file_names_every_worker_at_the_address_it_listens_on(
    profile: str, request: pytest.FixtureRequest
) -> None:
    config = request.getfixturevalue(profile)
    addresses = set()
    for name, worker in workers(config["services"]).items():
        words = worker["command"]
        assert words[words.index("--host") + 1] == "0.0.0.0", name
        addresses.add(f"http://{name}:{words[words.index('--port') + 1]}")
    assert {url for scorer in pool_of(config).scorers for url in scorer.urls} == addresses


@pytest.fixture(params=sorted(GPU_POOLS))
def vllm(request: pytest.FixtureRequest) -> Served:
    """Each profile whose workers are vLLM's, and the pool file of deploy/models that it serves."""
    return Served(request.getfixturevalue(request.param), load_pool(GPU_POOLS[request.param]))


def test_vllm_gets_the_flags_and_environment_that_up_would_give_it(vllm: Served) -> None:
    served = {model.name: model for model in vllm.pool.to_serve}
    assert [model.name for model in pool_of(vllm.config).models] == list(served)
    for model in pool_of(vllm.config).models:
        service = vllm.services[re.match(r"http://([\w-]+):", model.urls[0])[1]]  # type: ignore[index]
        here = served[model.name]
        expected = serve_words(here, "cuda", host="0.0.0.0", port=8000)
        assert (*service["entrypoint"][1:], *service["command"]) == expected
        assert service["environment"].items() >= ENVIRONMENT.items()
        starting = {*VllmEntry.model_fields} - {*ScorerEntry.model_fields} - {"model"}
        if model.kind == "rm":
            starting.remove("revision")
        asked = here.model_dump(exclude={*starting, "urls"})
        assert model.model_dump(exclude={*starting, "urls"}) == asked, model.name


def test_vllm_starts_one_after_the_other_on_its_gpu_once_the_weights_are_there(vllm: Served) -> None:
    names = [re.match(r"http://([\w-]+):", model.urls[0])[1] for model in pool_of(vllm.config).models]  # type: ignore[index]
    for before, name in zip([vllm.weights, *names], names, strict=False):
        ((dependency, wanted),) = vllm.services[name]["depends_on"].items()
        assert dependency == before
        done = "service_completed_successfully" if before == vllm.weights else "service_healthy"
        assert wanted["condition"] == done
        (device,) = vllm.services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["device_ids"], device["capabilities"]) == ("nvidia", ["0"], ["gpu"])


def test_the_weights_are_downloaded_where_offline_workers_look_for_them(vllm: Served) -> None:
    weights = vllm.services[vllm.weights]
    wanted = {f"hf download {model.model} --revision {model.revision}" for model in vllm.pool.to_serve}
    assert set(weights["command"][0].splitlines()) == wanted
    (cache,) = weights["volumes"]
    assert weights["environment"]["HF_HOME"] == cache["target"]
    for name, worker in workers(vllm.services).items():
        mounted = {volume["target"]: volume for volume in worker["volumes"]}
        found = mounted[worker["environment"]["HF_HOME"]]
        assert (found["source"], found["read_only"]) == (cache["source"], True), name
        assert worker["environment"]["HF_HUB_OFFLINE"] == "1", name


def test_the_gateway_reads_tokenizers_where_the_weights_were_downloaded_and_asks_no_hub(vllm: Served) -> None:
    (found,) = (service for service in vllm.services.values() if gateway(service))
    (cache,) = vllm.services[vllm.weights]["volumes"]
    (mount,) = (volume for volume in found["volumes"] if volume["target"] == found["environment"]["HF_HOME"])
    assert (mount["source"], mount["read_only"]) == (cache["source"], True)
    assert found["environment"]["HF_HUB_OFFLINE"] == "1"
    assert found["depends_on"][vllm.weights]["condition"] == "service_completed_successfully"


def test_a_judge_elsewhere_is_named_by_url_and_its_key_by_a_variable(gpu: Config) -> None:
    pool = "./deploy/compose/pool.hosted-judge.yaml"
    config = compose_config("gpu", variables=SECRETS | {"GPU_POOL": pool, "JUDGE_API_KEY": "their-key"})
    *local, judge = pool_of(config).models
    assert local == list(pool_of(gpu).models)
    assert (judge.kind, judge.urls[0].partition("://")[0]) == ("judge", "https")
    (found,) = (service for service in config["services"].values() if gateway(service))
    assert judge.key(found["environment"]) == "their-key"
    with pytest.raises(ConfigurationError, match=r"JUDGE_API_KEY .* is not set"):
        judge.key({**found["environment"], "JUDGE_API_KEY": ""})
    # The only network with a way out on which it is; workers are on none.
    assert "edge" in nets(found)
    assert not config["networks"]["edge"].get("internal")


def test_the_encoder_is_served_with_the_flags_that_its_export_prints_and_locked_in_like_a_worker() -> None:
    chosen = {"ENCODER": "vllm:http://encoder:8000", "ENCODER_READING": "/encoder/files"}
    services = compose_config("gpu", "encoder", variables=SECRETS | chosen)["services"]
    encoder, files, found = services["encoder"], services["encoder-files"], services["gateway-gpu"]
    words = [*encoder["entrypoint"], *encoder["command"]]
    printed = list(serve_command(Path("/encoder/files")))
    assert words[:3] == printed[:3]
    # What is printed is for one machine; a container listens to its network.
    assert set(printed) - {"127.0.0.1"} <= set(words)
    assert nets(encoder) == {"workers"}
    assert "ports" not in encoder
    assert encoder["environment"]["HF_HUB_OFFLINE"] == "1"

    # What is exported is what is served, and what the gateway reads.
    def place(service: Config, path: str) -> tuple[str, str]:
        (volume,) = (volume for volume in service["volumes"] if path.startswith(volume["target"] + "/"))
        return volume["source"], path.removeprefix(volume["target"])

    out = files["command"][files["command"].index("--out") + 1]
    assert place(files, out) == place(encoder, words[2])
    assert place(found, found["environment"]["REWARD_ROUTER_ENCODER_READING"]) == place(files, out)
    assert found["depends_on"]["encoder-files"]["condition"] == "service_completed_successfully"
    assert encoder["depends_on"]["encoder-files"]["condition"] == "service_completed_successfully"
    port = words[words.index("--port") + 1]
    assert found["environment"]["REWARD_ROUTER_ENCODER"] == f"vllm:http://encoder:{port}"


def test_a_checkpoint_of_ones_own_is_mounted_where_the_gateway_looks_for_it() -> None:
    chosen = {"CHECKPOINT_DIR": "./docs", "CHECKPOINT": "/checkpoint"}
    found = compose_config("gpu", variables=SECRETS | chosen)["services"]["gateway-gpu"]
    (mount,) = (volume for volume in found["volumes"] if volume["target"] == "/checkpoint")
    assert (mount["type"], mount["source"]) == ("bind", str(ROOT / "docs"))
    assert found["environment"]["REWARD_ROUTER_CHECKPOINT"] == mount["target"]


def test_prometheus_finds_the_gateway_by_one_name_in_every_profile(cpu: Config, gpu: Config, judge: Config) -> None:
    text = (ROOT / "deploy/prometheus/prometheus.yml").read_text()
    assert "gateway" in re.findall(r"names: \[(\w+)\]", text)
    assert "monitoring" in nets(cpu["services"]["gateway"])
    for config, name in ((gpu, "gateway-gpu"), (judge, "gateway-judge")):
        assert config["services"][name]["networks"]["monitoring"]["aliases"] == ["gateway"]
