"""The tables of docs/settings.md and docs/metrics.md, made from the code they describe.

`python -m tests.docs.tables` writes both pages, and the JSON schema of the scorer protocol; `test_docs` fails when
they are out of date.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from service.scorers.http.wire import Info, ScoreReply, ScoreRequest
from service.settings import Settings
from service.telemetry import Telemetry

ROOT = Path(__file__).parents[2]

SETTINGS_HEAD = """# Settings

Each is an environment variable; `reward-router serve` and `up` have options for the common ones. Lists are JSON
(`REWARD_ROUTER_API_KEYS='["KEY"]'`). An empty variable counts as not set.

| variable | default | meaning |
|---|---|---|
"""

METRICS_HEAD = """# Metrics

`GET /metrics`, Prometheus' text format. Names and units are stable. Label values are bounded: routes, stages, models,
open runs (`max_runs`), stable codes. Reward stages: `encode` and `draw` (per batch of waiting instances), `worker`
(asking RMs, fallbacks included), `store` (saving decisions), `total` (a request, from parsed body to reply).

| metric | type | labels | meaning |
|---|---|---|---|
"""


def settings_page() -> str:
    """docs/settings.md."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = field.get_default()
        shown = "" if default is None or default == () else str(getattr(default, "value", default))
        rows.append(f"| `REWARD_ROUTER_{name.upper()}` | {f'`{shown}`' if shown else '–'} | {field.description} |\n")
    return SETTINGS_HEAD + "".join(rows)


def metrics_page() -> str:
    """docs/metrics.md."""
    rows = []
    for collector in Telemetry().registry._collector_to_names:
        for family in collector.collect():
            name = family.name + ("_total" if family.type == "counter" else "")
            names = getattr(collector, "_labelnames", None) or [getattr(collector, "_label", None)]
            labels = ", ".join(f"`{label}`" for label in names if label) or "–"
            rows.append(f"| `{name}` | {family.type} | {labels} | {family.documentation} |\n")
    return METRICS_HEAD + "".join(sorted(rows))


def protocol_schema() -> str:
    """docs/scorer-protocol.json."""
    (request, reply, info), definitions = msgspec.json.schema_components(
        (ScoreRequest, ScoreReply, Info), ref_template="#/$defs/{name}"
    )
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The scorer protocol of reward-router",
        "description": "Bodies of POST /score (ScoreRequest, ScoreReply) and GET /info (Info).",
        "anyOf": [request, reply, info],
        "$defs": definitions,
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (ROOT / "docs/scorer-protocol.json").write_text(protocol_schema(), "utf-8")
    (ROOT / "docs/settings.md").write_text(settings_page(), "utf-8")
    (ROOT / "docs/metrics.md").write_text(metrics_page(), "utf-8")
