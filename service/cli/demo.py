"""`reward-router demo`: make a pool, train a checkpoint, start everything, route a stream, show what was learned.

Nothing is simulated: three reward models and a judge are real (small) transformers that the project trains once, a rule
works sums out, and all are served by real workers; the router is asked over HTTP. The checkpoint is trained on offline
data of other domains than the stream's, so that there is something left to learn online. Nobody sends feedback: another
rule, which knows the right answers, looks at a tenth of the decisions after their replies.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from router_core.attempts import ASKED
from router_core.checkpoint import Checkpoint
from router_core.demo.recipes import JUDGE, RECIPES
from router_core.records import TIE, LabelledPair, verdict_of
from service.audit_entry import AuditEntry
from service.cli.processes import interruptible
from service.cli.up import Stack, running_stack
from service.errors import ConfigurationError
from service.lab.client import GatewayClient
from service.pool import ModelEntry, PoolFile, dump_pool
from service.scorers.judge.entry import JudgeEntry
from service.scorers.rule.entry import RuleEntry
from service.settings import EMBEDDED
from service.usecases.report import RunReport
from service.workers.rules.sums import sums_rule

OFFLINE_PAIRS = 400
"""Labelled pairs that the checkpoint is trained on."""

OFFLINE_WEIGHTS = {"arithmetic": 0.5, "safety": 0.44, "code": 0.03, "format": 0.03}
"""The offline data's domains; the stream has all four alike. What is rare here is learned online."""

STREAM_PAIRS = 600
"""Pairs of the stream, unless the command says otherwise; most audits are made early in so many."""

EVALUATION_PAIRS = 240
"""Pairs the router is asked about before and after the stream, without a reference."""

BATCH = 60
"""Instances per /reward/batch of the comparisons."""

REFEREE = "checker"
"""Name of the rule that looks at audits: it compares a response with the reference."""

RULE, RULE_DOMAIN = "sums", "arithmetic"
"""Name of the rule that is asked for rewards, and the domain that it applies to."""

KINDS = ("rm", "judge", "rule")
"""Kinds of scorers in the pool, in the order of the table."""

AUDIT_RATE = 0.1
"""Share of the stream that the rule looks at."""

AUDIT_SECONDS = 60.0
"""Longest wait for the last audits."""

CONCURRENCY = 4
"""Instances in flight while streaming."""

COLOURS = ("cyan", "magenta", "yellow", "green", "red", "blue")
BAR_CELLS = 40


@dataclass(frozen=True, slots=True)
class Asked:
    """One routed pair.

    Attributes:
        domain: of the prompt.
        model: the scorer that gave the reward.
        correct: 1 where the verdict is right, ½ for a tie or where the scorer does not apply.
        timings: of the reply.
        calls: scorers that were asked.
        said: as `correct`, of each scorer that answered.
    """

    domain: str
    model: str
    correct: float
    timings: dict[str, float]
    calls: int = 1
    said: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo saw.

    Attributes:
        before: the evaluation pairs, asked before any audit.
        stream: the stream, in order of completion.
        after: the evaluation pairs again.
        others: the stream's pairs by other policies.
        report: what the audits said.
        kinds: kind by scorer, in the order of the pool.
    """

    before: list[Asked]
    stream: list[Asked]
    after: list[Asked]
    others: dict[str, list[Asked]]
    report: RunReport
    kinds: Mapping[str, str]


def demo(
    pairs: Annotated[int, typer.Option(min=50, help="Pairs of the stream.")] = STREAM_PAIRS,
    data_dir: Annotated[Path, typer.Option(help="Where the pool, the store and the logs lie.")] = Path(".data"),
    port: Annotated[int, typer.Option(help="Port of the gateway; another one if it is taken.")] = 8080,
    worker_port: Annotated[int, typer.Option(help="First port of the workers.")] = 8101,
    seed: Annotated[int, typer.Option(help="Seed of the stream.")] = 0,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    make_only: Annotated[
        bool, typer.Option("--make-only", help="Make the pool and its checkpoint, if they are not there, and stop.")
    ] = False,
) -> None:
    """Make the demo pool, start everything, route a stream without feedback, and show what audits of a tenth of it
    taught. Some minutes the first time.
    """
    interruptible()
    console = Console()
    started = time.perf_counter()
    pool, checkpoint = ensure_demo_pool(data_dir, console, None)
    if make_only:
        console.print(f"pool: {pool}\ncheckpoint: {checkpoint}", highlight=False)
        return
    from service.pool import load_pool

    with running_stack(
        load_pool(pool), checkpoint, data_dir=data_dir, host="127.0.0.1", port=port, worker_port=worker_port,
        store_url=EMBEDDED, console=console, run=demo_run(checkpoint),
    ) as stack:  # fmt: skip
        result = asyncio.run(_route(stack, pairs, seed, console))
    models = [*result.kinds]
    _show(result, models, console)
    figures = _figures(result, models)
    picture = _plot(result, models, data_dir / "demo" / "demo.png")
    if picture is not None:
        console.print(f"picture: {picture}", highlight=False)
    if json_out is not None:
        json_out.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    console.print(
        f"done in {time.perf_counter() - started:.0f} s. `reward-router up --run {result.report.run}` goes on with "
        "what was learned here, `make up` begins a new run; README.md says how to plug in your trainer.",
        highlight=False,
    )


def ensure_demo_pool(data_dir: Path, console: Console, checkpoint: Path | None) -> tuple[Path, Path]:
    """The demo pool's file and checkpoint, made if they are not there.

    Args:
        data_dir: they lie in its folder `demo`.
        console: where progress is shown.
        checkpoint: another checkpoint to be used instead of the demo's.

    Raises:
        ConfigurationError: torch or transformers is not installed.
    """
    try:
        from router_core.demo.judge import judge_training
        from router_core.demo.train import make_demo_pool
    except ImportError as error:
        raise ConfigurationError(
            f"making the demo pool needs torch and transformers ({error}): pip install 'reward-router[embedded,train]'"
        ) from error
    folder = data_dir / "demo"
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
        tasks = {recipe.name: progress.add_task(f"demo pool: {recipe.name}", total=1.0) for recipe in (*RECIPES, JUDGE)}

        def tell(name: str, share: float) -> None:
            progress.update(tasks[name], completed=share)

        judge = judge_training(folder / "models", progress=tell)
        models = make_demo_pool(folder / "models", progress=tell, beside=[] if judge is None else [judge])
        tell(JUDGE.name, 1.0)
    pool_file = folder / "pool.yaml"
    entries: tuple[ModelEntry | JudgeEntry | RuleEntry, ...] = (
        *(
            ModelEntry(name=model.name, path=model.directory.absolute(), rendering="template", chat_template="plain")
            for model in models
        ),
        JudgeEntry(
            name=JUDGE.name,
            kind="judge",
            path=(folder / "models" / JUDGE.name).absolute(),
            rubric="safety",
            verdict="logprobs",
        ),
        RuleEntry(name=RULE, kind="rule", builtin="sums", applies={"metadata.task": RULE_DOMAIN}),
    )
    # With vLLM each of them would take minutes to start: deploy/models/demo.yaml is for that.
    referee = RuleEntry(name=REFEREE, kind="rule", builtin="exact", options={"case": True, "punctuation": True})
    audit = AuditEntry(referee=(REFEREE,), rate=AUDIT_RATE, horizon=STREAM_PAIRS)
    pool = PoolFile(name="demo", worker="cpu", models=entries, referees=(referee,), audit=audit)
    dump_pool(pool, pool_file)
    if checkpoint is None:
        checkpoint = folder / "checkpoint"
        fresh = judge is not None or any(not model.reused for model in models)
        if fresh or not (checkpoint / "metadata.json").exists():
            with console.status("labelling offline pairs with the pool and training the checkpoint"):
                _train_checkpoint(folder, checkpoint)
    return pool_file, checkpoint


def demo_run(checkpoint: Path) -> str:
    """Name of the demo pool's run: what was learned from one checkpoint's prior is of no use to another one's."""
    return f"demo-{Checkpoint.load(checkpoint).digest[:12]}"


def _train_checkpoint(folder: Path, out: Path) -> None:
    from router_core.dataset import write_pairs
    from router_core.demo.domains import Split, generate_stream
    from router_core.demo.judge import judge_pairs
    from router_core.demo.label import label_pairs
    from router_core.encoder.registry import load_backbone
    from router_core.offline.train import train

    rng = np.random.default_rng(1)
    pairs = generate_stream(OFFLINE_PAIRS, rng, OFFLINE_WEIGHTS, split=Split.OFFLINE)
    pairs = label_pairs(pairs, [folder / "models" / recipe.name for recipe in RECIPES])
    pairs = [_with_rule(pair) for pair in judge_pairs(pairs, folder / "models" / JUDGE.name)]
    write_pairs(folder / "offline.jsonl", pairs)
    train(pairs, [*(recipe.name for recipe in RECIPES), JUDGE.name, RULE], load_backbone("static")).save(out)


def _with_rule(pair: LabelledPair) -> LabelledPair:
    """Return the pair with what the rule says; it abstains where it does not apply."""
    silent = replace(pair, abstained=pair.abstained | {RULE})
    if pair.domain != RULE_DOMAIN:
        return silent
    said = [sums_rule([], response, None, {}) for response in pair.instance.responses]
    scores = tuple(float(one) for one in said if one is not None)
    if len(scores) < len(said):
        return silent
    return replace(pair, scores={**pair.scores, RULE: scores}, verdicts={**pair.verdicts, RULE: verdict_of(scores)})


async def _route(stack: Stack, n: int, seed: int, console: Console) -> DemoResult:
    from router_core.demo.domains import generate_stream

    rng = np.random.default_rng(seed)
    stream, held_out = generate_stream(n, rng), generate_stream(EVALUATION_PAIRS, rng)
    run = f"demo-{int(time.time())}"
    async with GatewayClient(stack.url, connections=CONCURRENCY) as client:
        before = await _ask_batches(client, held_out, f"{run}-before", "bayesian")
        asked = await _stream(client, stream, run, console)
        report = await _quiesce(client, run)
        after = await _ask_batches(client, held_out, run, "bayesian")
        kinds = {model.name: model.kind for model in stack.pool.models}
        others = {}
        with console.status("the same stream through the other policies"):
            for policy in ("random", "majority", "offline"):
                others[policy] = await _ask_batches(client, stream, run, policy)
        # The majority has asked everybody.
        for name in kinds:
            others[f"single:{name}"] = [
                Asked(one.domain, name, one.said.get(name, 0.5), {}, int(name in one.said))
                for one in others["majority"]
            ]
    return DemoResult(before, asked, after, others, report, kinds)


async def _ask_batches(client: GatewayClient, pairs: Sequence[LabelledPair], run: str, policy: str) -> list[Asked]:
    """POST /reward/batch, no feedback."""
    out = []
    for start in range(0, len(pairs), BATCH):
        part = pairs[start : start + BATCH]
        items = [_item(pair) for pair in part]
        reply = await client.post("/reward/batch", {"items": items, "run": run, "policy": policy})
        for pair, result in zip(part, reply["results"], strict=True):
            if "error" in result:
                raise ConfigurationError(f"the gateway could not score a pair: {result['error']['message']}")
            out.append(_asked(pair, result))
    return out


async def _stream(client: GatewayClient, pairs: Sequence[LabelledPair], run: str, console: Console) -> list[Asked]:
    """POST /reward, pair by pair, with the right answer as reference for the rule; no feedback."""
    out: list[Asked] = []
    waiting = iter(pairs)
    columns = (
        TextColumn("routing, no feedback"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[recent]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(pairs), recent="")

        async def drain() -> None:
            for pair in waiting:
                request = {**_item(pair), "run": run, "reference": pair.instance.responses[pair.label]}
                out.append(_asked(pair, await client.post("/reward", request)))
                progress.update(task, advance=1, recent=f"right in the last 100: {_accuracy(out[-100:]):.2f}")

        await asyncio.gather(*(drain() for _ in range(CONCURRENCY)))
    return out


async def _quiesce(client: GatewayClient, run: str) -> RunReport:
    """Wait until every audit is made and learned from; returns the report.

    Raises:
        ConfigurationError: audits still wait after `AUDIT_SECONDS`.
    """
    deadline = time.monotonic() + AUDIT_SECONDS
    while time.monotonic() < deadline:
        report = RunReport.model_validate(await client.get(f"/report?run={run}"))
        posterior = await client.get(f"/posterior?run={run}")
        if not report.waiting and posterior["version"] >= report.audits:
            return report
        await asyncio.sleep(0.1)
    raise ConfigurationError(f"{report.waiting} audits wait for the referee {REFEREE!r}: see the logs beside the pool")


def _item(pair: LabelledPair) -> dict[str, Any]:
    """What a request says of a pair: its kind of task as a trainer may know it, and no label."""
    return {
        "prompt": pair.instance.prompt,
        "responses": pair.instance.responses,
        "metadata": {"task": pair.domain},
    }


def _asked(pair: LabelledPair, reply: dict[str, Any]) -> Asked:
    calls = sum(attempt["outcome"] in ASKED for attempt in reply["attempts"])
    said = {
        attempt["model"]: _right(verdict_of(attempt["rewards"]), pair.label)
        for attempt in reply["attempts"]
        if attempt["rewards"]
    }
    verdict = TIE if reply["preferred"] is None else reply["preferred"]
    return Asked(pair.domain, reply["model"], _right(verdict, pair.label), reply["timings"], calls, said)


def _right(verdict: int, label: int) -> float:
    return 0.5 if verdict == TIE else float(verdict == label)


def _accuracy(asked: Sequence[Asked]) -> float:
    return sum(item.correct for item in asked) / len(asked) if asked else float("nan")


def _calls(asked: Sequence[Asked]) -> float:
    """Scorers asked per pair."""
    return sum(item.calls for item in asked) / len(asked)


def _shares(asked: Sequence[Asked], models: Sequence[str]) -> dict[str, list[float]]:
    """Per domain, the share of each scorer among those that gave the rewards."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for item in asked:
        counts[item.domain][item.model] += 1
    return {
        domain: [counts[domain][model] / sum(counts[domain].values()) for model in models] for domain in sorted(counts)
    }


def _show(result: DemoResult, models: Sequence[str], console: Console) -> None:
    console.print()
    legend = Text("which scorer is asked, per domain:  ")
    for model, colour in zip(models, COLOURS, strict=False):
        legend.append(f"{_letter(model)} ", f"bold {colour}").append(f"{model}  ")
    console.print(legend)
    table = Table(box=None, padding=(0, 1))
    for column in ("domain", "", "share of each scorer", "right"):
        table.add_column(column)
    before, after = _shares(result.before, models), _shares(result.after, models)
    for domain in before:
        for label, shares, asked in (("before", before, result.before), ("after", after, result.after)):
            mine = [item for item in asked if item.domain == domain]
            table.add_row(
                domain if label == "before" else "", label, _bar(shares[domain], models), f"{_accuracy(mine):.2f}"
            )
    console.print(table)
    for line in explain_worse(result):
        console.print(line, highlight=False, soft_wrap=True)
    console.print()
    kinds = Table(title="which kind of scorer is asked for which kind of text, after the stream")
    for column in ("text", *KINDS):
        kinds.add_column(column, justify="left" if column == "text" else "right")
    for domain, by_kind in kind_shares(result.after, result.kinds).items():
        kinds.add_row(domain, *(f"{100 * share:.0f} %" if share else "–" for share in by_kind))
    console.print(kinds)
    singles = {name: part for name, part in result.others.items() if name.startswith("single:")}
    best = max(singles, key=lambda name: _accuracy(singles[name]))
    rows = (
        ("router, whole stream (learning)", result.stream),
        ("router, last third of the stream", result.stream[-len(result.stream) // 3 :]),
        (f"best single scorer ({best.removeprefix('single:')})", singles[best]),
        ("random router", result.others["random"]),
        ("offline prior alone, no audits", result.others["offline"]),
        ("majority vote", result.others["majority"]),
    )
    title = (
        f"{len(result.stream)} pairs routed over HTTP, no feedback, {result.report.audits} audits by the rule {REFEREE}"
    )
    scores = Table(title=title)
    for column in ("policy", "accuracy", "calls per pair"):
        scores.add_column(column, justify="left" if column == "policy" else "right")
    for name, part in rows:
        scores.add_row(name, f"{_accuracy(part):.3f}", f"{_calls(part):.3g}")
    console.print(scores)
    audited = Table(title="what the audits say: how often each is right, 95 % however often one looks")
    for column in ("scorer", "audits", "right", "bounds", "right on the stream"):
        audited.add_column(column, justify="left" if column == "scorer" else "right")
    # Of a scorer that does not apply to every pair, audits and this column speak of those to which it does.
    truth = {
        name.removeprefix("single:"): _accuracy([item for item in part if item.calls]) for name, part in singles.items()
    }
    for record in [*result.report.scorers, result.report.router]:
        found = record.accuracy
        if found is not None:
            actual = truth.get(record.model, _accuracy(result.stream))
            bounds = f"{found.low:.2f} – {found.high:.2f}"
            audited.add_row(record.model, str(found.audits), f"{found.value:.3f}", bounds, f"{actual:.3f}")
    console.print(audited)
    stages = Table(title="milliseconds per stage of POST /reward")
    for column in ("", "encode", "draw", "worker", "store", "total"):
        stages.add_column(column, justify="right")
    for label, q in (("median", 50), ("95 %", 95)):
        stages.add_row(label, *(f"{value[str(q)]:.2f}" for value in _latencies(result.stream).values()))
    console.print(stages)


def kind_shares(asked: Sequence[Asked], kinds: Mapping[str, str]) -> dict[str, list[float]]:
    """Return, per domain, the share of each of `KINDS` among the scorers that gave the rewards."""
    return {
        domain: [sum(share for share, name in zip(shares, kinds, strict=True) if kinds[name] == kind) for kind in KINDS]
        for domain, shares in _shares(asked, [*kinds]).items()
    }


def explain_worse(result: DemoResult) -> list[str]:
    """A sentence for each domain in which fewer pairs are right after the stream than before, and why that may be."""
    lines = []
    for domain in sorted({item.domain for item in result.before}):
        before, after = ([one for one in part if one.domain == domain] for part in (result.before, result.after))
        lost = _accuracy(before) - _accuracy(after)
        if lost > 0:
            noise = 2.0 * float(np.sqrt(0.5 / len(before)))
            reason = (
                f"within the noise of {len(before)} pairs (± {noise:.2f})"
                if lost <= noise
                else "more than noise; probably feedback of the other domains moved the posterior of an RM that "
                "both ask, and more pairs of this one move it back"
            )
            lines.append(f"{domain}: {lost:.2f} fewer right than before the stream: {reason}.")
    return lines


def _letter(model: str) -> str:
    """The letter that stands for a scorer in bars, so that they can be read without colours."""
    return model.removeprefix("rm-")[0].upper()


def _bar(shares: Sequence[float], models: Sequence[str]) -> Text:
    bar = Text()
    edges = np.rint(np.cumsum([0.0, *shares]) * BAR_CELLS).astype(int)
    for model, colour, low, high in zip(models, COLOURS, edges[:-1], edges[1:], strict=False):
        bar.append(_letter(model) * int(high - low), f"bold {colour}")
    return bar


def _latencies(asked: Sequence[Asked]) -> dict[str, dict[str, float]]:
    stages = ("encode_ms", "draw_ms", "worker_ms", "store_ms", "total_ms")
    return {
        stage: {str(q): float(np.percentile([item.timings[stage] for item in asked], q)) for q in (50, 95)}
        for stage in stages
    }


def _figures(result: DemoResult, models: Sequence[str]) -> dict[str, object]:
    return {
        "pairs": len(result.stream),
        "audits": result.report.audits,
        "audited_accuracy": {
            record.model: record.accuracy.value for record in result.report.scorers if record.accuracy is not None
        },
        "router_accuracy": _accuracy(result.stream),
        "router_accuracy_last_third": _accuracy(result.stream[-len(result.stream) // 3 :]),
        "before": {"accuracy": _accuracy(result.before), "shares": _shares(result.before, models)},
        "after": {
            "accuracy": _accuracy(result.after),
            "shares": _shares(result.after, models),
            "kinds": kind_shares(result.after, result.kinds),
        },
        "others": {name: {"accuracy": _accuracy(part), "calls": _calls(part)} for name, part in result.others.items()},
        "latency_ms": _latencies(result.stream),
        "models": list(models),
    }


def _plot(result: DemoResult, models: Sequence[str], path: Path) -> Path | None:
    """The same as a picture, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), gridspec_kw={"width_ratios": (3, 2)})
    before, after = _shares(result.before, models), _shares(result.after, models)
    labels = [f"{domain}\n{when}" for domain in before for when in ("before", "after")]
    rows = np.array([shares[domain] for domain in before for shares in (before, after)])
    base = np.zeros(len(rows))
    for k, model in enumerate(models):
        left.bar(labels, rows[:, k], bottom=base, label=model)
        base += rows[:, k]
    left.set_ylabel("share of each scorer")
    left.tick_params(axis="x", labelsize=7)
    left.legend(fontsize=7, ncols=len(models), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    window = max(len(result.stream) // 8, 20)
    correct = np.array([item.correct for item in result.stream])
    right.plot(np.convolve(correct, np.ones(window) / window, "valid"), label=f"router, mean of {window}")
    for name in ("random", "majority"):
        right.axhline(
            _accuracy(result.others[name]), linestyle="--", linewidth=1, label=name, color=f"C{len(right.lines)}"
        )
    best = max(_accuracy(part) for name, part in result.others.items() if name.startswith("single:"))
    right.axhline(best, linestyle=":", linewidth=1, label="best single scorer", color="black")
    right.set_xlabel("pairs routed")
    right.set_ylabel("verdict is right")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
