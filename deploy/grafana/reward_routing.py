"""Makes deploy/grafana/dashboards/reward-routing.json of `deploy.grafana.panels`, with Grafana Labs' foundation SDK.

`python -m deploy.grafana.reward_routing` writes the file; a test fails when it is out of date. Knows Grafana's format
and no metric but those that list a variable's values.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from deploy.grafana.panels import ROWS, Kind, Panel, Row

TITLE = "Reward routing"
UID = "reward-routing"

PATH = Path(__file__).parent / "dashboards" / "reward-routing.json"
"""The file that Grafana is provisioned with."""

HEIGHT = 8
"""Height of a panel in Grafana's grid; a single number takes half."""

DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
"""The Prometheus that is chosen at the top of the page."""

RUNS = "label_values(reward_router_posterior_version_events, run)"
MODELS = "label_values(reward_router_worker_calls_total, model)"

_FILL = {Kind.LINES: 0, Kind.STACKED: 30, Kind.SHARES: 60}


def build() -> dict[str, Any]:
    """The dashboard as a JSON document."""
    page = (
        dashboard.Dashboard(TITLE)
        .uid(UID)
        .description("Which reward model is asked, what it is believed to be worth, and whether everything works.")
        .tags(["reward-router"])
        .editable()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .timezone("browser")
        .refresh("30s")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(_choice("run", "Run", RUNS))
        .with_variable(_choice("model", "Reward model", MODELS))
        .annotation(
            dashboard.AnnotationQuery()
            .name("Alerts")
            .datasource(DATASOURCE)
            .enable(True)
            .icon_color("red")
            .expr('ALERTS{alertname=~"RewardRouter.*", alertstate="firing"}')
        )
    )
    for row in ROWS:
        _add(page, row)
    document: dict[str, Any] = json.loads(json.dumps(page.build(), cls=JSONEncoder))
    _number(document["panels"])
    return document


def render() -> str:
    """The text of the file."""
    return json.dumps(build(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _choice(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """A variable of several values, at first all."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _add(page: dashboard.Dashboard, row: Row) -> None:
    """Put a row at the end; the panels of a collapsed one lie inside it, the others behind it."""
    heading = dashboard.Row(row.title).collapsed(row.collapsed)
    for panel in row.panels if row.collapsed else ():
        heading = heading.with_panel(_panel(panel))
    page.with_row(heading)
    for panel in () if row.collapsed else row.panels:
        page.with_panel(_panel(panel))


def _panel(panel: Panel) -> Any:
    make: dict[Kind, Callable[[Panel], Any]] = {Kind.STAT: _stat, Kind.STATES: _states}
    builder = (
        make.get(panel.kind, _lines)(panel)
        .title(panel.title)
        .description(panel.description)
        .datasource(DATASOURCE)
        .unit(panel.unit)
        .span(panel.width)
        .height(HEIGHT // 2 if panel.kind is Kind.STAT else HEIGHT)
    )
    if panel.empty:
        builder = builder.no_value(panel.empty)
    for index, query in enumerate(panel.queries):
        builder = builder.with_target(
            prometheus.Dataquery()
            .datasource(DATASOURCE)
            .expr(query.expr)
            .legend_format(query.legend or "__auto")
            .range()
            .ref_id(chr(ord("A") + index))
        )
    return builder


def _stat(panel: Panel) -> stat.Panel:
    steps = [Threshold(value=value, color=colour) for value, colour in panel.colours]
    return (
        stat.Panel()
        .graph_mode(BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
    )


def _states(_: Panel) -> statetimeline.Panel:
    states = {
        "0": ValueMappingResult(text="down", color="red", index=0),
        "1": ValueMappingResult(text="up", color="green", index=1),
    }
    return statetimeline.Panel().mappings([ValueMap(options=states)])


def _lines(panel: Panel) -> timeseries.Panel:
    builder = (
        timeseries.Panel()
        .line_width(1)
        .fill_opacity(_FILL[panel.kind])
        .show_points(VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs([])
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    if panel.kind is not Kind.LINES:
        builder = builder.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
    return builder.max(1.0).min(0.0) if panel.kind is Kind.SHARES else builder


def _number(panels: list[dict[str, Any]], start: int = 1) -> int:
    """Give every panel an id, in order; the next free one."""
    for panel in panels:
        panel["id"] = start
        start = _number(panel.get("panels") or [], start + 1)
    return start


if __name__ == "__main__":
    PATH.write_text(render(), "utf-8")
