"""What the dashboard "Reward routing" shows: rows of panels, their queries, units and explanations.

Plain values; knows metrics' names and nothing of Grafana's format. `deploy.grafana.reward_routing` makes JSON of it,
and tests/deploy asks a real Prometheus every query. Gauges of a run or a worker are the same on every gateway but for
delay, so they are not summed; counters are.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

RUN = '{run=~"$run"}'
"""Matcher of metrics with the label `run`."""

RUN_MODEL = '{run=~"$run", model=~"$model"}'
"""Matcher of metrics with both labels."""

MODEL = '{model=~"$model"}'
"""Matcher of metrics with the label `model`."""

FAILED = '{status=~"5.."}'
"""Matcher of the requests that failed."""

APPLIED = '{run=~"$run", outcome="applied"}'
"""Matcher of the feedback that was new."""

VLLM = '{job="vllm"}'
"""Matcher of what vLLM's own servers export."""


class Kind(Enum):
    """How a panel draws its series."""

    STAT = "one number"
    LINES = "lines"
    STACKED = "stacked areas"
    SHARES = "stacked areas that sum up to 100 %"
    STATES = "up or down over time"


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression and the name of its series in Grafana's legend format."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Attributes:
        title: unique in the dashboard.
        description: what it means and when to act.
        unit: of the values, in Grafana's words.
        queries: what it shows.
        kind: how.
        width: of 24 columns.
        colours: of a single number: from which value on, ascending; the first one has no bound.
        optional: why it may rightly be empty while the gateway is in use; "" for a panel that must not be.
        empty: what is shown where there is no series.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = Kind.LINES
    width: int = 8
    colours: tuple[tuple[float | None, str], ...] = ((None, "green"),)
    optional: str = ""
    empty: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]
    collapsed: bool = False


def rate(metric: str, by: str, matcher: str = "") -> str:
    """Increase of a counter per second, summed over everything but the labels `by`."""
    return f"sum by ({by}) (rate(reward_router_{metric}{matcher}[$__rate_interval]))"


def total(metric: str, matcher: str = "") -> str:
    """Increase of a counter per second, summed over everything."""
    return f"sum(rate(reward_router_{metric}{matcher}[$__rate_interval]))"


def quantile(q: float, by: str = "", matcher: str = "") -> str:
    """A quantile of the stages' times."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {rate('stage_seconds_bucket', labels, matcher)})"


NOT_ABSTAINED = '{reason!~"abstained|too_long"}'
"""Reasons of those that were wanted or asked and failed; who abstains does not."""

FALLBACKS = f"({total('fallbacks_total', NOT_ABSTAINED)} or vector(0))"
"""Attempts per second that failed and went on to another RM; the metric is absent until the first one."""

ANSWERED = total("worker_calls_total", '{outcome="ok"}')
"""Attempts per second that an RM answered."""

OVERVIEW = Row(
    "Overview",
    (
        Panel(
            "Rewards per second",
            "Instances that were answered with a reward, all gateways together.",
            "ops",
            (Query(total("decisions_total", RUN)),),
            Kind.STAT,
            3,
        ),
        Panel(
            "95 % of requests within",
            "Time from the parsed body to the reply; the reward model's own time is most of it.",
            "s",
            (Query(quantile(0.95, matcher='{stage="total"}')),),
            Kind.STAT,
            3,
        ),
        Panel(
            "Failed requests",
            "Share of requests answered with a 5xx. Runbook: RewardRouterErrors.",
            "percentunit",
            (Query(f"({total('requests_total', FAILED)} or vector(0)) / {total('requests_total')}"),),
            Kind.STAT,
            3,
            ((None, "green"), (0.01, "orange"), (0.05, "red")),
        ),
        Panel(
            "Fallbacks",
            "Share of attempts to ask a reward model that went on to the next-best draw. Runbook: "
            "RewardRouterFallbackRate.",
            "percentunit",
            (Query(f"{FALLBACKS} / ({FALLBACKS} + {ANSWERED})"),),
            Kind.STAT,
            3,
            ((None, "green"), (0.02, "orange"), (0.1, "red")),
        ),
        Panel(
            "Reward models that can be asked",
            "Reward models of which some gateway can ask at least one worker.",
            "none",
            (Query("sum(max by (model) (reward_router_worker_up))"),),
            Kind.STAT,
            3,
            ((None, "red"), (1, "green")),
        ),
        Panel(
            "Gateways",
            "Gateways that answer Prometheus.",
            "none",
            (Query('sum(up{job="gateway"})'),),
            Kind.STAT,
            3,
            ((None, "red"), (1, "green")),
        ),
        Panel(
            "Store",
            "Whether every gateway reaches the store. Runbook: RewardRouterStoreUnreachable.",
            "bool_yes_no",
            (Query("min(reward_router_store_up)"),),
            Kind.STAT,
            3,
            ((None, "red"), (1, "green")),
        ),
        Panel(
            "Events learned",
            "Feedbacks in the posteriors of the chosen runs.",
            "short",
            (Query(f"sum(max by (run) (reward_router_posterior_version_events{RUN}))"),),
            Kind.STAT,
            3,
        ),
    ),
)

ROUTING = Row(
    "Routing",
    (
        Panel(
            "Share per reward model",
            "Whose draw was the largest. A share that moves slowly is learning; one that jumps has seen a burst of "
            "feedback, or another kind of prompts.",
            "percentunit",
            (
                Query(
                    f"{rate('draws_total', 'model', RUN_MODEL)} / on () group_left {total('draws_total', RUN)}",
                    "{{model}}",
                ),
            ),
            Kind.SHARES,
            12,
        ),
        Panel(
            "Mean reward per reward model",
            "Mean learned reward of the feedback that each reward model got: with preferences, how often it was right.",
            "short",
            (Query(f"max by (run, model) (reward_router_mean_reward{RUN_MODEL})", "{{model}} ({{run}})"),),
            Kind.LINES,
            12,
        ),
        Panel(
            "Posterior mean per reward model",
            "What the router expects of each reward model on the newest requests: the uppermost line is asked most, "
            "where the sd is small.",
            "short",
            (Query(f"avg by (run, model) (reward_router_posterior_mean{RUN_MODEL})", "{{model}} ({{run}})"),),
            Kind.LINES,
            12,
        ),
        Panel(
            "Posterior sd per reward model",
            "How unsure the router is of that. It shrinks with feedback; one that stays high belongs to a reward model "
            "that is hardly asked.",
            "short",
            (Query(f"avg by (run, model) (reward_router_posterior_sd{RUN_MODEL})", "{{model}} ({{run}})"),),
            Kind.LINES,
            12,
        ),
    ),
)

TRAFFIC = Row(
    "Traffic",
    (
        Panel(
            "Requests per second",
            "By route and HTTP status; 422 and 409 are the caller's, 5xx are ours.",
            "reqps",
            (Query(rate("requests_total", "route, status"), "{{route}} {{status}}"),),
        ),
        Panel(
            "Rewards per second by policy",
            "Instances by run and policy. `majority` and `uwo` ask every reward model for each of them.",
            "ops",
            (Query(rate("decisions_total", "run, policy", RUN), "{{run}} {{policy}}"),),
            Kind.STACKED,
        ),
        Panel(
            "Requests in flight",
            "Requests being answered, per gateway; max_in_flight bounds it (429 above).",
            "short",
            (Query("max by (instance) (reward_router_requests_in_flight)", "{{instance}}"),),
        ),
    ),
)

LATENCY = Row(
    "Latency",
    (
        Panel(
            "Requests: 50, 95, 99 %",
            "Time from the parsed body to the reply.",
            "s",
            tuple(Query(quantile(q, matcher='{stage="total"}'), f"{q:.0%}") for q in (0.5, 0.95, 0.99)),
        ),
        Panel(
            "95 % per stage",
            "encode and draw: of a batch of waiting instances; worker: asking reward models, fallbacks included; "
            "store: saving decisions.",
            "s",
            (Query(quantile(0.95, "stage"), "{{stage}}"),),
        ),
        Panel(
            "Mean per stage",
            "Where the time goes; `total` holds the others and what is between them.",
            "s",
            (
                Query(
                    f"{rate('stage_seconds_sum', 'stage')} / {rate('stage_seconds_count', 'stage')}",
                    "{{stage}}",
                ),
            ),
        ),
        Panel(
            "Instances per draw",
            "Mean number of waiting instances that were encoded and drawn together; it grows with load.",
            "short",
            (Query(f"{total('choice_batch_size_sum')} / {total('choice_batch_size_count')}", "mean"),),
        ),
    ),
)

WORKERS = Row(
    "Workers and fallbacks",
    (
        Panel(
            "Workers",
            "Whether each worker is asked, by the gateway that sees it worst. Runbooks: RewardRouterWorkerDown, "
            "RewardRouterModelDown.",
            "none",
            (Query(f"min by (model, url) (reward_router_worker_up{MODEL})", "{{model}} {{url}}"),),
            Kind.STATES,
            12,
        ),
        Panel(
            "Fallbacks per second",
            "Instances that went on from this reward model to the next-best draw, and why. Runbook: "
            "RewardRouterFallbackRate.",
            "ops",
            (Query(rate("fallbacks_total", "model, reason", MODEL), "{{model}} {{reason}}"),),
            Kind.STACKED,
            12,
            empty="none so far",
        ),
        Panel(
            "Instances per second by worker outcome",
            "What each reward model answered: ok, or the code of the failure.",
            "ops",
            (Query(rate("worker_calls_total", "model, outcome", MODEL), "{{model}} {{outcome}}"),),
        ),
        Panel(
            "Latency per worker",
            "Smoothed time of a request to each worker, mean over the gateways.",
            "s",
            (Query(f"avg by (model, url) (reward_router_worker_latency_seconds{MODEL})", "{{model}} {{url}}"),),
        ),
        Panel(
            "Requests in flight per worker",
            "Requests that each worker has not answered; worker_max_in_flight bounds it per gateway.",
            "short",
            (Query(f"sum by (model, url) (reward_router_worker_requests_in_flight{MODEL})", "{{model}} {{url}}"),),
        ),
        Panel(
            "Encoder servers",
            "Whether each server of the encoder is asked, by the gateway that sees it worst. Runbook: "
            "RewardRouterEncoderDown.",
            "none",
            (Query("min by (url) (reward_router_encoder_up)", "{{url}}"),),
            Kind.STATES,
            12,
            optional="there is no series where the encoder runs in the gateway, the default",
            empty="the encoder is local",
        ),
        Panel(
            "Single responses per second",
            "Of trainers that send one response at a time: choices made, and choices that were followed because the "
            "prompt had one.",
            "ops",
            (Query(rate("sticky_choices_total", "outcome", RUN), "{{outcome}}"),),
            width=12,
            optional="there is no series until a caller has sent a single response whose choice sticks",
            empty="none so far",
        ),
    ),
)

LEARNING = Row(
    "Feedback and learning",
    (
        Panel(
            "Feedback by outcome",
            "applied: in the log. duplicate: sent again, harmless. conflict, unknown, expired, out_of_range, invalid: "
            "refused. Runbook: RewardRouterNoFeedback.",
            "ops",
            (Query(rate("feedback_total", "outcome", RUN), "{{outcome}}"),),
        ),
        Panel(
            "Feedback per reward",
            "Applied feedbacks per instance that was answered; late feedback can make it more than 1 for a while.",
            "percentunit",
            (
                Query(
                    f"{rate('feedback_total', 'run', APPLIED)} / {rate('decisions_total', 'run', RUN)}",
                    "{{run}}",
                ),
            ),
        ),
        Panel(
            "Log lag",
            "Events in the log that a gateway's posterior has not folded. Runbook: RewardRouterLogLag.",
            "short",
            (Query(f"max by (instance, run) (reward_router_log_lag_events{RUN})", "{{run}} at {{instance}}"),),
        ),
        Panel(
            "Events learned per run",
            "The posterior's version; the same on every gateway, but for the lag.",
            "short",
            (Query(f"max by (run) (reward_router_posterior_version_events{RUN})", "{{run}}"),),
        ),
        Panel(
            "Drift of the covariance",
            "Largest entry of precision × covariance − I at the last refresh: rounding, bounded by the refreshes.",
            "sci",
            (Query(f"max by (run) (reward_router_posterior_drift{RUN})", "{{run}}"),),
        ),
        Panel(
            "Learners that stopped",
            "More than 0: a gateway has given up on the run's log. Runbook: RewardRouterLearnerStopped.",
            "none",
            (Query(f"max by (instance, run) (reward_router_learner_errors_total{RUN})", "{{run}} at {{instance}}"),),
        ),
    ),
)

STORE = Row(
    "Store",
    (
        Panel(
            "Store as each gateway sees it",
            "Whether the store answered when the gateway was scraped. Runbook: RewardRouterStoreUnreachable.",
            "none",
            (Query("min by (instance) (reward_router_store_up)", "{{instance}}"),),
            Kind.STATES,
        ),
        Panel(
            "Failed store calls per second",
            "By operation. save_decisions: rewards were refused or answered unrecorded; apply_feedback: feedback was "
            "refused with 503 and must be sent again.",
            "ops",
            (Query(rate("store_errors_total", "operation"), "{{operation}}"),),
            optional="there is no series until a call has failed",
            empty="none so far",
        ),
        Panel(
            "Rewards without a saved decision",
            "Only with on_store_unavailable=answer: feedback on them is answered 404.",
            "ops",
            (Query(total("unrecorded_decisions_total"), "all gateways"),),
        ),
    ),
)

SHADOW = Row(
    "Shadow",
    (
        Panel(
            "Shadowed instances per second",
            "recorded, late (feedback came first), skipped (too many at once), failed.",
            "ops",
            (Query(rate("shadows_total", "outcome", RUN), "{{outcome}}"),),
            width=12,
            optional="there is no series while shadow_rate is 0, the default",
            empty="shadow_rate is 0",
        ),
        Panel(
            "Instances per second asked in the shadow",
            "By reward model and outcome.",
            "ops",
            (Query(rate("shadow_calls_total", "model, outcome", MODEL), "{{model}} {{outcome}}"),),
            width=12,
            optional="there is no series while shadow_rate is 0, the default",
            empty="shadow_rate is 0",
        ),
    ),
    collapsed=True,
)

_AUDITS_ONLY = "the series exists only with `audit` in the pool file"

AUDITS = Row(
    "Audits",
    (
        Panel(
            "Audits per second",
            "By outcome: recorded taught something, abstained found no referee. Waiting: chosen and not refereed.",
            "short",
            (
                Query(rate("audits_total", "outcome", RUN), "{{outcome}}"),
                Query(f"max(reward_router_audits_waiting{RUN})", "waiting"),
            ),
            optional=_AUDITS_ONLY,
            width=12,
            empty="no audits",
        ),
        Panel(
            "Audited accuracy",
            "How often each reward model is right, by the referee. `reward-router report RUN` has bounds, kinds of "
            "text and what rewards follow.",
            "percentunit",
            (Query(f"max by (run, model) (reward_router_audited_accuracy{RUN_MODEL})", "{{run}} {{model}}"),),
            optional=_AUDITS_ONLY,
            width=12,
            empty="no audits",
        ),
    ),
    collapsed=True,
)

_VLLM_ONLY = "vLLM exports it, and our own CPU and recorded workers do not; the job `vllm` has to have targets"

VLLM_SERVERS = Row(
    "vLLM servers",
    (
        Panel(
            "Requests running and waiting",
            "Waiting requests that stay: the server is too small for its share.",
            "short",
            (
                Query(f"sum by (instance) (vllm:num_requests_running{VLLM})", "{{instance}} running"),
                Query(f"sum by (instance) (vllm:num_requests_waiting{VLLM})", "{{instance}} waiting"),
            ),
            optional=_VLLM_ONLY,
        ),
        Panel(
            "95 % of vLLM requests within",
            "vLLM's own measure: the difference to the worker's latency above is the network and the gateway.",
            "s",
            (
                Query(
                    "histogram_quantile(0.95, sum by (le, instance) "
                    f"(rate(vllm:e2e_request_latency_seconds_bucket{VLLM}[$__rate_interval])))",
                    "{{instance}}",
                ),
            ),
            optional=_VLLM_ONLY,
        ),
        Panel(
            "Prompt tokens per second",
            "What each server reads; compare it with its waiting requests to see what it can take.",
            "short",
            (Query(f"sum by (instance) (rate(vllm:prompt_tokens_total{VLLM}[$__rate_interval]))", "{{instance}}"),),
            optional=_VLLM_ONLY,
        ),
    ),
    collapsed=True,
)

ROWS = (OVERVIEW, ROUTING, TRAFFIC, LATENCY, WORKERS, LEARNING, STORE, SHADOW, AUDITS, VLLM_SERVERS)
"""The dashboard from top to bottom."""

OPTIONAL = {panel.title: panel.optional for row in ROWS for panel in row.panels if panel.optional}
"""Panels that may be empty while the gateway is in use, and why."""
