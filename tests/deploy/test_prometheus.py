"""Prometheus' configuration and alert rules: checked by promtool, tested at the boundary minute, with runbooks."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import yaml

from service.telemetry import Telemetry
from tests.support.prometheus import FOLDER, ROOT, tool

RULES = FOLDER / "rules" / "reward-router.yml"
CASES = FOLDER / "tests" / "reward-router.test.yml"
RUNBOOKS = ROOT / "docs" / "runbooks"


def rules() -> list[dict[str, Any]]:
    """Every alert."""
    groups = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def names() -> list[str]:
    """Every alert's name."""
    return [rule["alert"] for rule in rules()]


def promtool(*words: str) -> str:
    """What it says, when it is content."""
    done = subprocess.run(
        [tool("promtool"), *words], capture_output=True, text=True, timeout=60, check=False, cwd=FOLDER
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_accepts_the_configuration_and_its_rules() -> None:
    assert f"{len(rules())} rules found" in promtool("check", "config", "prometheus.yml")


def test_alerts_fire_when_they_should_and_not_a_minute_before() -> None:
    assert "SUCCESS" in promtool("test", "rules", str(CASES.relative_to(FOLDER)))


def test_promtool_would_notice_an_alert_that_does_not_fire(tmp_path: Any) -> None:
    """The test of the tests: with a threshold out of reach the same cases fail."""
    (tmp_path / "rules").mkdir()
    (tmp_path / "tests").mkdir()
    text = RULES.read_text("utf-8").replace("log_lag_events) > 1000", "log_lag_events) > 1000000")
    (tmp_path / "rules" / RULES.name).write_text(text, "utf-8")
    (tmp_path / "tests" / CASES.name).write_text(CASES.read_text("utf-8"), "utf-8")
    done = subprocess.run(
        [tool("promtool"), "test", "rules", f"tests/{CASES.name}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert "RewardRouterLogLag" in done.stdout + done.stderr


@pytest.mark.parametrize("name", names())
def test_every_alert_is_tested_both_ways(name: str) -> None:
    cases = [
        case
        for test in yaml.safe_load(CASES.read_text("utf-8"))["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == name
    ]
    assert any(case["exp_alerts"] for case in cases), f"no case in which {name} fires"
    assert any(not case["exp_alerts"] for case in cases), f"no case in which {name} keeps quiet"


@pytest.mark.parametrize("name", names())
def test_every_alert_has_a_runbook_with_the_four_parts(name: str) -> None:
    [rule] = [rule for rule in rules() if rule["alert"] == name]
    assert rule["annotations"]["runbook_url"] == f"{{{{ $externalLabels.runbooks }}}}/{name}.md"
    assert rule["labels"]["severity"] in ("warning", "critical")
    page = (RUNBOOKS / f"{name}.md").read_text("utf-8")
    assert page.startswith(f"# {name}\n")
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == ["Meaning", "Impact", "Diagnosis", "Mitigation"]


def test_there_is_no_runbook_without_its_alert() -> None:
    assert {path.stem for path in RUNBOOKS.glob("RewardRouter*.md")} == set(names())


def test_every_alert_stands_in_the_page_of_the_dashboards() -> None:
    page = (ROOT / "docs" / "dashboards.md").read_text("utf-8")
    for name in names():
        assert f"[`{name}`](runbooks/{name}.md)" in page, name


def test_every_metric_of_the_alerts_is_one_of_the_gateway_s() -> None:
    known = {family.name + ("_total" if family.type == "counter" else "") for family in Telemetry().registry.collect()}
    found = re.findall(r"reward_router_\w+", " ".join(rule["expr"] for rule in rules()))
    assert len(found) >= 9
    assert set(found) <= known


def test_the_compose_file_mounts_what_is_here_and_prometheus_meets_the_gateway_by_its_name() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]
    prometheus, grafana = services["prometheus"], services["grafana"]
    assert "./deploy/prometheus:/etc/prometheus:ro" in prometheus["volumes"]
    assert "--config.file=/etc/prometheus/prometheus.yml" in prometheus["command"]
    assert "./deploy/grafana/provisioning:/etc/grafana/provisioning:ro" in grafana["volumes"]
    assert "./deploy/grafana/dashboards:/var/lib/grafana/dashboards:ro" in grafana["volumes"]
    assert set(prometheus["networks"]) & set(services["gateway"]["networks"]) & set(grafana["networks"])
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text("utf-8"))
    [discovery] = next(job for job in config["scrape_configs"] if job["job_name"] == "gateway")["dns_sd_configs"]
    assert (discovery["names"], discovery["port"]) == (["gateway"], 8080)
