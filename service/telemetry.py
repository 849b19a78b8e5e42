"""Metrics with stable names and units (docs/metrics.md), and structured logs that never hold prompts or responses.

One `Telemetry` per process, on its own registry; built in `gateway` and handed down. Where several processes serve one
port, each writes its values to files, and any of them answers a scrape for all (prometheus_client's multiprocess mode):
counters and histograms are sums, and each gauge says how its values are put together.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

_STAGE_BUCKETS = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

STAGES = ("encode", "draw", "worker", "store", "total")
"""Values of the label `stage`."""


class Distribution:
    """The numbers of one histogram, observed from one thread: the library's own takes several times as long.

    Args:
        bounds: upper bounds of the buckets, ascending; the last one, infinity, is added.
    """

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, amount: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, amount)] += 1
        self._sum += amount

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound and cumulative count of every bucket."""
        return list(zip([*map(str, map(float, self._bounds)), "+Inf"], accumulate(self._counts), strict=True))

    def move_into(self, histogram: Histogram) -> None:
        """Add what was observed since the last call to a histogram of the library with the same buckets."""
        for value, count in zip(histogram._buckets, self._counts, strict=True):
            if count:
                value.inc(count)
        histogram._sum.inc(self._sum)
        self._counts, self._sum = [0] * len(self._counts), 0.0

    @property
    def total(self) -> float:
        """Sum of the values."""
        return self._sum


class _Histograms(Collector):
    """Distributions as one metric: by the value of one label, or a single one without labels (key "")."""

    def __init__(self, name: str, text: str, label: str | None, by_value: dict[str, Distribution]) -> None:
        self._name, self._text, self._label, self._by_value = name, text, label, by_value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """What a scrape sees."""
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label] if self._label else [])
        for value, distribution in self._by_value.items():
            family.add_metric([value] if self._label else [], distribution.buckets(), distribution.total)
        yield family


class Telemetry:
    """The process's metrics. Label values are bounded: routes, stages, models, runs (`max_runs`), stable codes.

    Args:
        shared: the process is one of several at one port. Values of closed runs stay then: the files forget nothing.
            The environment variable PROMETHEUS_MULTIPROC_DIR must name a folder before this module is imported.
    """

    def __init__(self, *, shared: bool = False) -> None:
        self.registry = CollectorRegistry()
        self._shared = shared
        self._watched: list[tuple[Gauge, Callable[[], float]]] = []
        self._kept: list[tuple[Distribution, Histogram]] = []
        common: dict[str, Any] = {"registry": self.registry, "namespace": "reward_router"}
        self.requests = Counter("requests_total", "Requests answered.", ["route", "status"], **common)
        self.refused_connections = Counter(
            "refused_connections_total",
            "Connections closed before a request was whole, by the error's code.",
            ["code"],
            **common,
        )
        self.in_flight = Gauge("requests_in_flight", "Requests being answered.", multiprocess_mode="livesum", **common)
        self.stage = self._histograms(
            "stage_seconds", "Time per stage of a reward request.", _STAGE_BUCKETS, "stage", STAGES
        )
        self.choice_batch = self._histogram("choice_batch_size", "Instances encoded and drawn together.")
        self.encoder_texts = self._histogram(
            "encoder_texts", "Texts that one micro-batch asked an encoder over vLLM about."
        )
        self.encoder_up = Gauge(
            "encoder_up",
            "1 while the encoder's server is asked; nothing where the encoder is local.",
            ["url"],
            multiprocess_mode="livemin",
            **common,
        )
        self.draws = Counter(
            "draws_total", "Instances for which the RM had the largest draw.", ["run", "model"], **common
        )
        self.drawn = cache(self.draws.labels)
        """`draws.labels`, by one look-up."""
        self.decisions = Counter("decisions_total", "Instances answered with a reward.", ["run", "policy"], **common)
        self.decided = cache(self.decisions.labels)
        """`decisions.labels`, by one look-up."""
        self.price = Counter(
            "price_total",
            "Price of all calls before the reply, in units of the cheapest RM; divided by decisions, the mean price of "
            "an instance.",
            ["run", "policy"],
            **common,
        )
        self.paid = cache(self.price.labels)
        """`price.labels`, by one look-up."""
        self.calls = Counter("worker_calls_total", "Instances an RM was asked about.", ["model", "outcome"], **common)
        self.called = cache(self.calls.labels)
        """`calls.labels`, by one look-up."""
        self.fallbacks = Counter(
            "fallbacks_total",
            "Instances that went on from this RM to the next-best draw.",
            ["model", "reason"],
            **common,
        )
        self.shadows = Counter(
            "shadows_total",
            "Instances to be shadowed: recorded, late (feedback came first), skipped (too many at once), failed.",
            ["run", "outcome"],
            **common,
        )
        self.shadow_calls = Counter(
            "shadow_calls_total",
            "Instances an RM was asked about in the shadow of another, not counted as worker calls.",
            ["model", "outcome"],
            **common,
        )
        self.shadows_in_flight = Gauge(
            "shadows_in_flight", "Instances being shadowed.", multiprocess_mode="livesum", **common
        )
        self.audits = Counter(
            "audits_total",
            "Decisions that were chosen for an audit: recorded, abstained (no referee applies), away (asked again "
            "later), late (another gateway came first), dropped (too many or too long waiting), alone (one response of "
            "a prompt only), unreadable, failed.",
            ["run", "outcome"],
            **common,
        )
        self.audit_calls = Counter(
            "audit_calls_total",
            "Instances that a scorer was asked about in an audit, not counted as worker calls.",
            ["model", "outcome"],
            **common,
        )
        self.audit_price = Counter(
            "audit_price_total", "Price of the audits, in units of the cheapest RM.", ["run"], **common
        )
        self.audits_waiting = Gauge(
            "audits_waiting",
            "Decisions that are chosen for an audit and not refereed.",
            ["run"],
            multiprocess_mode="livemostrecent",
            **common,
        )
        self.audit_errors = Counter("audit_errors_total", "Failures of the background auditor.", **common)
        self.audited_accuracy = Gauge(
            "audited_accuracy",
            "How often a scorer is right, by the referee's verdicts on random audits.",
            ["run", "model"],
            multiprocess_mode="livemostrecent",
            **common,
        )
        self.accuracy_fall = Gauge(
            "accuracy_fall",
            "Evidence that a scorer's audited accuracy has fallen; 1 or more is an alarm.",
            ["run", "model"],
            multiprocess_mode="livemostrecent",
            **common,
        )
        self.length_excess = Gauge(
            "length_excess",
            "By how much a scorer's rewards follow the length of responses more than the referee's do, at least: lower "
            "bound of the difference of the correlations.",
            ["run", "model"],
            multiprocess_mode="livemostrecent",
            **common,
        )
        self.referee_accuracy = Gauge(
            "referee_accuracy",
            "How often a referee is right, by gold.",
            ["run", "referee"],
            multiprocess_mode="livemostrecent",
            **common,
        )
        self.referee_shortfall = Gauge(
            "referee_shortfall",
            "By how much a referee is less often right than `audit.trust` says, at least; above 0 it is.",
            ["run", "referee"],
            multiprocess_mode="livemostrecent",
            **common,
        )
        self.judgements = Counter(
            "judgements_total",
            "Audited decisions that people judged, by what became of it.",
            ["run", "outcome"],
            **common,
        )
        self.feedback = Counter("feedback_total", "Feedbacks by what became of them.", ["run", "outcome"], **common)
        self.sticky = Counter(
            "sticky_choices_total",
            "Single responses whose prompt's choice sticks: made (the first of them), followed.",
            ["run", "outcome"],
            **common,
        )
        self.trainer_texts = Counter(
            "trainer_texts_total",
            "Samples scored on trainers' own paths, by the chat template that was taken off: its name; plain (none), "
            "messages, raw (as the URL says), unknown.",
            ["run", "template"],
            **common,
        )
        self.unrecorded = Counter("unrecorded_decisions_total", "Rewards answered without a saved decision.", **common)
        self.store_errors = Counter("store_errors_total", "Store calls that failed.", ["operation"], **common)
        self.learner_errors = Counter("learner_errors_total", "Failures of the background learner.", ["run"], **common)
        self.log_lag = Gauge(
            "log_lag_events",
            "Events in the log that the posterior has not folded.",
            ["run"],
            multiprocess_mode="livemax",
            **common,
        )
        self.version = Gauge(
            "posterior_version_events",
            "Events the posterior has learned from.",
            ["run"],
            multiprocess_mode="livemin",
            **common,
        )
        self.drift = Gauge(
            "posterior_drift",
            "Largest entry of precision x covariance - I at the last refresh.",
            ["run"],
            multiprocess_mode="livemax",
            **common,
        )
        self.mean_reward = Gauge(
            "mean_reward",
            "Mean learned reward of an RM.",
            ["run", "model"],
            multiprocess_mode="livemostrecent",
            **common,
        )
        self.posterior_mean = Gauge(
            "posterior_mean",
            "What the posterior expects of an RM on the instances of late: mean of its offset and x'mu.",
            ["run", "model"],
            multiprocess_mode="livemostrecent",
            **common,
        )
        self.posterior_sd = Gauge(
            "posterior_sd",
            "How unsure the posterior is of that: mean standard deviation of the draws, v sqrt(x'Sx).",
            ["run", "model"],
            multiprocess_mode="livemostrecent",
            **common,
        )
        self.snapshots = Counter("snapshots_total", "Snapshots written.", ["run"], **common)
        self.background_failures = Counter(
            "background_failures_total", "Background tasks that ended by a fault of the gateway.", ["task"], **common
        )
        self.health_check_errors = Gauge(
            "health_check_errors",
            "Health checks that failed by a fault of the gateway, so far.",
            multiprocess_mode="livesum",
            **common,
        )
        self.worker_up = Gauge(
            "worker_up",
            "1 while the replica's circuit is closed.",
            ["model", "url"],
            multiprocess_mode="livemin",
            **common,
        )
        self.worker_in_flight = Gauge(
            "worker_requests_in_flight",
            "Requests that the replica has not answered.",
            ["model", "url"],
            multiprocess_mode="livesum",
            **common,
        )
        self.worker_latency = Gauge(
            "worker_latency_seconds",
            "Smoothed time of a request to the replica.",
            ["model", "url"],
            multiprocess_mode="livemax",
            **common,
        )
        self.judge_comparisons = Gauge(
            "judge_comparisons",
            "Pairs that the judge compared, each in both orders, since the start.",
            ["model"],
            multiprocess_mode="livesum",
            **common,
        )
        self.judge_position_bias = Gauge(
            "judge_position_bias",
            "Mean probability that the judge gives to the response shown first, less one half; 0 means no bias.",
            ["model"],
            multiprocess_mode="livemostrecent",
            **common,
        )
        self.judge_consistency = Gauge(
            "judge_consistency",
            "Share of the judge's comparisons in which both orders prefer the same response.",
            ["model"],
            multiprocess_mode="livemostrecent",
            **common,
        )
        self.learner_waiting = Gauge(
            "learner_waiting",
            "1 while the learner cannot read its log, and waits for the store.",
            ["run"],
            multiprocess_mode="livemax",
            **common,
        )
        self.store_refused = Gauge(
            "store_refused",
            "1 while nothing is saved, since the store would lose acknowledged data.",
            multiprocess_mode="livemax",
            **common,
        )
        self.store_up = Gauge(
            "store_up", "1 if the store answered when this was scraped.", multiprocess_mode="livemin", **common
        )

    def _histograms(
        self, name: str, text: str, buckets: Sequence[float], label: str, values: Sequence[str]
    ) -> Mapping[str, Distribution]:
        """Return the histogram's parts by the value of its label."""
        parts = {value: Distribution(buckets) for value in values}
        if self._shared:
            histogram = Histogram(
                name, text, [label], buckets=buckets, registry=self.registry, namespace="reward_router"
            )
            self._kept += [(part, histogram.labels(value)) for value, part in parts.items()]
            return parts
        self.registry.register(_Histograms(f"reward_router_{name}", text, label, parts))
        return parts

    def _histogram(self, name: str, text: str) -> Distribution:
        """Return a histogram of sizes."""
        whole = Distribution(_SIZE_BUCKETS)
        if self._shared:
            histogram = Histogram(name, text, buckets=_SIZE_BUCKETS, registry=self.registry, namespace="reward_router")
            self._kept.append((whole, histogram))
            return whole
        self.registry.register(_Histograms(f"reward_router_{name}", text, None, {"": whole}))
        return whole

    def watch(self, gauge: Gauge, read: Callable[[], float]) -> None:
        """Let a gauge show what `read` returns when it is looked at."""
        if self._shared:
            self._watched.append((gauge, read))
        else:
            gauge.set_function(read)

    def tell_watched(self) -> None:
        """Write down what is not written as it happens, for scrapes that another process answers."""
        for distribution, histogram in self._kept:
            distribution.move_into(histogram)
        for gauge, read in self._watched:
            gauge.set(read())

    def open_run(self, run: str, policy: str, pool: Sequence[str], outcomes: Sequence[str]) -> None:
        """Show a run's counters as 0 before they first count: Prometheus cannot see a rise from nothing.

        Args:
            run: that was opened.
            policy: of the requests that name none.
            pool: names of its RMs.
            outcomes: what can become of a feedback.
        """
        for outcome in outcomes:
            self.feedback.labels(run, outcome)
        self.learner_errors.labels(run)
        self.learner_waiting.labels(run)
        self.decided(run, policy)
        self.paid(run, policy)
        for model in pool:
            self.drawn(run, model)
            self.called(model, "ok")

    def forget_run(self, run: str) -> None:
        """Drop a closed run's label values, so that their number stays bounded."""
        if self._shared:
            return
        for metric in (
            self.decisions,
            self.price,
            self.draws,
            self.shadows,
            self.audits,
            self.audit_price,
            self.audited_accuracy,
            self.accuracy_fall,
            self.length_excess,
            self.referee_accuracy,
            self.referee_shortfall,
            self.judgements,
            self.audits_waiting,
            self.sticky,
            self.trainer_texts,
            self.feedback,
            self.learner_errors,
            self.learner_waiting,
            self.log_lag,
            self.version,
            self.drift,
            self.mean_reward,
            self.posterior_mean,
            self.posterior_sd,
            self.snapshots,
        ):
            metric.remove_by_labels({"run": run})
        self.drawn.cache_clear()
        self.decided.cache_clear()
        self.paid.cache_clear()

    def forget_scorers(self, run: str, names: Sequence[str]) -> None:
        """Drop what was believed of a run's scorers that are asked no more; what they were asked stays counted."""
        if self._shared:
            return
        for name in names:
            for metric in (self.mean_reward, self.posterior_mean, self.posterior_sd, self.audited_accuracy):
                metric.remove_by_labels({"run": run, "model": name})

    def render(self) -> bytes:
        """The metrics in Prometheus' text format, of all processes at the port."""
        if not self._shared:
            return generate_latest(self.registry)
        self.tell_watched()
        everybody = CollectorRegistry()
        MultiProcessCollector(everybody)  # type: ignore[no-untyped-call]
        return generate_latest(everybody)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, event, and the fields given as `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        """Render one record."""
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: str) -> None:
    """Send structured logs to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
