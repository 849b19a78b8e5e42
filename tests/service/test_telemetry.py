"""Our own histograms say what the library's would."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.telemetry import _STAGE_BUCKETS, STAGES, Telemetry


def samples(text: str, name: str) -> dict[tuple[str, str, str], float]:
    """(series, stage, le) -> value."""
    return {
        (sample.name, sample.labels.get("stage", ""), sample.labels.get("le", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if family.name == name and not sample.name.endswith("_created")
    }


def test_a_stage_s_histogram_equals_the_library_s_also_on_the_bounds_and_beyond_the_last() -> None:
    ours, registry = Telemetry(), CollectorRegistry()
    theirs = Histogram("reward_router_stage_seconds", "x", ["stage"], buckets=_STAGE_BUCKETS, registry=registry)
    for stage in STAGES:
        theirs.labels(stage)
    for value in (0.0, _STAGE_BUCKETS[0], 0.00007, 0.3, _STAGE_BUCKETS[-1], 11.0):
        ours.stage["worker"].observe(value)
        theirs.labels("worker").observe(value)
    name = "reward_router_stage_seconds"
    assert samples(ours.render().decode(), name) == samples(generate_latest(registry).decode(), name)


def test_the_batch_sizes_are_a_histogram_without_labels() -> None:
    telemetry = Telemetry()
    for size in (1, 3, 2000):
        telemetry.choice_batch.observe(size)
    found = samples(telemetry.render().decode(), "reward_router_choice_batch_size")
    assert found["reward_router_choice_batch_size_sum", "", ""] == 2004
    assert found["reward_router_choice_batch_size_bucket", "", "4.0"] == 2
    assert found["reward_router_choice_batch_size_bucket", "", "+Inf"] == 3
