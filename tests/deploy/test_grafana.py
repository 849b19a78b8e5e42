"""The dashboard and its provisioning: up to date, well-formed, and only about metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.telemetry import Telemetry

reward_routing = pytest.importorskip(
    "deploy.grafana.reward_routing", reason="needs grafana-foundation-sdk (the extra `dev`)"
)

from grafana_foundation_sdk.cog.plugins import register_default_plugins  # noqa: E402 - after importorskip
from grafana_foundation_sdk.models.dashboard import Dashboard  # noqa: E402

from deploy.grafana.panels import OPTIONAL, ROWS  # noqa: E402

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "deploy" / "grafana"


def every_panel(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Panels and row headings, those inside of collapsed rows too."""
    return [inner for panel in document["panels"] for inner in (panel, *(panel.get("panels") or ()))]


def shown() -> list[dict[str, Any]]:
    """The panels of the committed file that show data."""
    document = json.loads(reward_routing.PATH.read_text("utf-8"))
    return [panel for panel in every_panel(document) if panel["type"] != "row"]


def test_the_file_is_what_the_code_makes() -> None:
    written = reward_routing.PATH.read_text("utf-8")
    assert written == reward_routing.render(), "run `make dashboard`"


def test_the_file_is_a_dashboard_to_the_library_s_own_reader() -> None:
    register_default_plugins()
    document = json.loads(reward_routing.PATH.read_text("utf-8"))
    read = Dashboard.from_json(document)
    assert read.title == "Reward routing"
    assert len(read.panels or []) == len(document["panels"])


def test_every_declared_panel_is_there_once_with_its_queries() -> None:
    declared = {panel.title: [query.expr for query in panel.queries] for row in ROWS for panel in row.panels}
    assert {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in shown()} == declared
    assert len(shown()) == sum(len(row.panels) for row in ROWS) == len(declared)


def test_panels_have_ids_of_their_own_and_lie_side_by_side() -> None:
    document = json.loads(reward_routing.PATH.read_text("utf-8"))
    ids = [panel["id"] for panel in every_panel(document)]
    assert sorted(ids) == list(range(1, len(ids) + 1))
    taken: set[tuple[int, int]] = set()
    for panel in document["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_every_panel_asks_the_chosen_prometheus_and_explains_itself() -> None:
    for panel in shown():
        assert panel["datasource"]["uid"] == "${datasource}"
        assert len(panel["description"]) > 20, panel["title"]
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def test_every_metric_of_the_dashboard_is_one_of_the_gateway_s_with_the_labels_that_are_asked_for() -> None:
    known: dict[str, set[str]] = {}
    telemetry = Telemetry()
    for collector in telemetry.registry._collector_to_names:
        for family in collector.collect():
            labels = set(getattr(collector, "_labelnames", ()) or ()) | {getattr(collector, "_label", None) or ""}
            names = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
            known.update({family.name + suffix: labels | {"le", "instance"} for suffix in names})
    found = 0
    for panel in shown():
        for target in panel["targets"]:
            for name, matchers in re.findall(r"(reward_router_\w+)(\{[^}]*\})?", target["expr"]):
                assert name in known, f"{panel['title']}: {name}"
                assert set(re.findall(r"(\w+)=~?\"", matchers)) <= known[name], f"{panel['title']}: {name}{matchers}"
                found += 1
    assert found > 40


def test_runbooks_that_panels_name_exist() -> None:
    names = [name for panel in shown() for name in re.findall(r"RewardRouter\w+", panel["description"])]
    assert len(names) >= 8
    for name in names:
        assert (ROOT / "docs" / "runbooks" / f"{name}.md").exists(), name


def test_only_panels_with_a_reason_may_be_empty() -> None:
    titles = {panel["title"] for panel in shown()}
    assert set(OPTIONAL) <= titles
    assert all(len(reason) > 20 for reason in OPTIONAL.values())
    assert len(OPTIONAL) < len(titles) / 4


def test_single_numbers_are_red_only_where_that_is_bad() -> None:
    """Without thresholds of its own Grafana shows everything from 80 on in red."""
    steps = {
        panel["title"]: [
            (step["value"], step["color"]) for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        ]
        for panel in shown()
        if panel["type"] == "stat"
    }
    assert len(steps) == 8
    assert steps["Rewards per second"] == [(None, "green")]
    assert steps["Failed requests"][-1] == (0.05, "red")
    assert steps["Store"] == [(None, "red"), (1, "green")]


def test_provisioning_names_one_prometheus_and_the_folder_of_dashboards() -> None:
    [source] = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text("utf-8"))["datasources"]
    scrape = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text("utf-8"))["global"]["scrape_interval"]
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == scrape
    [provider] = yaml.safe_load((GRAFANA / "provisioning/dashboards/reward-routing.yml").read_text("utf-8"))[
        "providers"
    ]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
