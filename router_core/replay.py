"""Recorded pairs through the policies, in process: what would each have earned on this stream?

Also the bookkeeping that the replay over HTTP shares (`tabulate`, `summarise`, `report`), so that both print the same
figures. Knows nothing of files or networks. Called by `service.cli` and `loadtests`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_core.errors import DatasetError, FeedbackError
from router_core.policies import Policy, draw, majority_verdict, make_policy
from router_core.posterior import FoldSettings, fold, start
from router_core.prior import Prior
from router_core.records import TIE, Event, Feedback, LabelledPair, Signal

Array = NDArray[np.float64]

PRIOR_SEPARATOR = ":"
"""`bayesian:paper` is the policy `bayesian` with the prior form `paper`."""


@dataclass(frozen=True, slots=True)
class Table:
    """A recorded stream as arrays.

    Attributes:
        pool: K names.
        verdicts: (N, K) int64.
        labels: (N,) int64.
        correctness: (N, K) in {0, 0.5, 1}.
    """

    pool: tuple[str, ...]
    verdicts: NDArray[np.int64]
    labels: NDArray[np.int64]
    correctness: Array


@dataclass(frozen=True, slots=True)
class Trace:
    """What one policy did on the stream, S seeds by N instances, in the stream's own order (not the seeds' orders).

    Attributes:
        correct: (S, N) in {0, 0.5, 1}: was the verdict that the policy gave right.
        asked: (S, N) int64: the asked arm, −1 where all were.
        calls_per_instance: RM calls.
    """

    correct: Array
    asked: NDArray[np.int64]
    calls_per_instance: float


@dataclass(frozen=True, slots=True)
class PolicySummary:
    """One row of the table.

    Attributes:
        accuracy: mean over seeds and instances.
        ci95: normal interval from the variance over instances and over seeds.
        calls_per_instance: RM calls.
        regret: mean per instance of (best arm's correctness − the policy's).
    """

    accuracy: float
    ci95: tuple[float, float]
    calls_per_instance: float
    regret: float


def tabulate(pairs: Sequence[LabelledPair], pool: Sequence[str]) -> Table:
    """The stream as arrays.

    Raises:
        DatasetError: no pairs, or an RM of the pool that was not asked about one of them.
    """
    if not pairs:
        raise DatasetError("no pairs to replay: the data file is empty")
    for pair in pairs:
        missing = [name for name in pool if name not in pair.verdicts]
        if missing:
            raise DatasetError(f"pair {pair.id!r} holds no verdict of {', '.join(missing)}: leave it out of --pool")
    verdicts = np.array([[pair.verdicts[name] for name in pool] for pair in pairs], dtype=np.int64)
    labels = np.array([pair.label for pair in pairs], dtype=np.int64)
    correctness = np.where(verdicts == TIE, 0.5, (verdicts == labels[:, None]).astype(np.float64))
    return Table(tuple(pool), verdicts, labels, correctness)


def replay(
    table: Table,
    x: NDArray[np.float32],
    policy_names: Sequence[str],
    *,
    priors: Callable[[str | None], Prior],
    signal: Signal,
    seeds: Sequence[int],
    settings: FoldSettings | None = None,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Trace]:
    """Every policy over the stream, once per seed; a seed fixes the order of the stream and the draws.

    Feedback arrives at once, before the next instance is drawn.

    Args:
        table: the stream.
        x: (N, d) float32 contexts.
        policy_names: as `make_policy`; `bayesian:FORM` overrides the prior form.
        priors: the prior of a form, or of the default one for None.
        signal: `preference` or `reward` (the asked RM's correctness).
        seeds: one pass each.
        settings: where the log is cut.
        on_step: told how many instances were done since the last call; for progress bars.

    Raises:
        FeedbackError: the signal cannot be had from recorded pairs.
        UnknownPolicyError: a policy that does not exist.
    """
    if signal is Signal.LOSS:
        raise FeedbackError("signal is 'loss': recorded pairs hold no DPO loss; replay 'preference' or 'reward'")
    traces = {}
    for name in policy_names:
        policy, form = parse_policy(name, table.pool)
        prior = priors(form)
        passes = [_one_pass(table, x, policy, prior, signal, seed, settings, on_step) for seed in seeds]
        traces[name] = Trace(
            np.stack([correct for correct, _ in passes]),
            np.stack([asked for _, asked in passes]),
            float(len(table.pool) if policy.asks_all else 1),
        )
    return traces


def parse_policy(name: str, pool: Sequence[str]) -> tuple[Policy, str | None]:
    """The policy of a name, and the prior form that it overrides (`bayesian:paper`).

    Raises:
        UnknownPolicyError: no such policy.
    """
    base, separator, form = name.partition(PRIOR_SEPARATOR)
    if separator and base == "bayesian":
        return make_policy(base, pool), form
    return make_policy(name, pool), None


def _one_pass(
    table: Table,
    x: NDArray[np.float32],
    policy: Policy,
    prior: Prior,
    signal: Signal,
    seed: int,
    settings: FoldSettings | None,
    on_step: Callable[[int], None] | None,
) -> tuple[Array, NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    n = len(table.labels)
    order = rng.permutation(n)
    offsets = prior.offsets(x)
    state = start(prior, settings)
    correct, asked = np.empty(n), np.empty(n, np.int64)
    for step, i in enumerate(order, start=1):
        if policy.asks_all:
            verdict = majority_verdict(table.verdicts[i].tolist())
            asked[i] = -1
            correct[i] = 0.5 if verdict == TIE else float(verdict == table.labels[i])
        else:
            rows = slice(i, i + 1)
            arm = int(draw(policy.beliefs(x[rows], offsets[rows], state), rng).ranking[0, 0])
            asked[i], correct[i] = arm, table.correctness[i, arm]
            value = float(table.labels[i]) if signal is Signal.PREFERENCE else float(correct[i])
            event = Event(
                arm,
                x[i].tobytes(),
                float(offsets[i, arm]),
                int(table.verdicts[i, arm]),
                Feedback(signal, value),
                str(i),
            )
            state = fold(state, [event])
        if on_step is not None and (step % 64 == 0 or step == n):
            on_step(step % 64 or 64)
    return correct, asked


def summarise(trace: Trace, table: Table) -> PolicySummary:
    """Accuracy with its interval, calls and regret of one policy."""
    accuracy = float(trace.correct.mean())
    variance = float(trace.correct.mean(axis=0).var()) / trace.correct.shape[1]
    if len(trace.correct) > 1:
        variance += float(trace.correct.mean(axis=1).var(ddof=1)) / len(trace.correct)
    half = 1.96 * variance**0.5
    oracle = float(table.correctness.max(axis=1).mean())
    return PolicySummary(
        accuracy, (max(accuracy - half, 0.0), min(accuracy + half, 1.0)), trace.calls_per_instance, oracle - accuracy
    )


def report(traces: Mapping[str, Trace], table: Table) -> dict[str, object]:
    """The JSON of `reward-router replay`."""
    singles = table.correctness.mean(axis=0)
    best = int(singles.argmax())
    return {
        "n": len(table.labels),
        "policies": {
            name: {
                "accuracy": row.accuracy,
                "ci95": list(row.ci95),
                "calls_per_instance": row.calls_per_instance,
                "regret": row.regret,
            }
            for name, row in ((name, summarise(trace, table)) for name, trace in traces.items())
        },
        "oracle": float(table.correctness.max(axis=1).mean()),
        "best_single": {"model": table.pool[best], "accuracy": float(singles[best])},
    }
