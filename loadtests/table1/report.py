"""The table in the paper's form: for the terminal, as Markdown, as JSON, and learning curves as a picture.

Called by the command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.report import machine, table
from loadtests.table1.recipe import Recipe
from loadtests.table1.rows import CHECKER, SFT
from loadtests.table1.signal import asked_shares, signal_quality
from loadtests.table1.summary import RowSummary, average, estimate, summarise
from loadtests.table1.tasks import FAMILIES

Results = Sequence[Mapping[str, Any]]
_ROUTERS = ("laser", "bayesian:none", "offline", "bayesian", "bayesian:paper")


def print_table(results: Results, title: str) -> None:
    """Print the table and the cost per row."""
    summaries = summarise(results)
    table(title, ("row", *FAMILIES, "average", "vs ours", "right verdicts", "RM calls", "s"), map(_cells, summaries))


def _cells(row: RowSummary) -> list[str]:
    return [
        row.title,
        *(f"{100 * row.benchmarks[family].mean:.1f}" for family in FAMILIES),
        str(row.average),
        "–" if row.difference is None else f"{row.difference}",
        "–" if row.verdicts is None else str(row.verdicts),
        f"{row.calls:.0f}",
        f"{row.seconds:.0f}",
    ]


def as_json(results: Results, recipe: Recipe, checkpoint_digest: str) -> dict[str, Any]:
    """Everything that the page shows, for programs."""
    summaries = summarise(results)
    return {
        "recipe": asdict(recipe),
        "checkpoint": checkpoint_digest,
        "machine": machine(),
        "seeds": sorted({result["seed"] for result in results}),
        "rows": {row.policy: asdict(row) for row in summaries},
        "signal": {policy: asdict(signal_quality(runs)) for policy, runs in _routed(results).items()},
        "asked": {policy: asked_shares(runs, recipe.pool()) for policy, runs in _routed(results).items()},
        "curves": {row.policy: _curve(_of(results, row.policy)) for row in summaries if row.policy != SFT},
    }


def as_markdown(results: Results, recipe: Recipe, pool_accuracy: Mapping[str, Mapping[str, float]]) -> str:
    """The generated part of docs/table1.md.

    Args:
        results: of all rows and seeds.
        recipe: of the table.
        pool_accuracy: RM to family to accuracy on the offline pairs.
    """
    summaries = summarise(results)
    seeds = len({result["seed"] for result in results})
    d = recipe.dpo
    audited = f", or, in rows with audits, the checker's word on {recipe.audits:.0%} of the decisions and nothing else"
    if not recipe.audits:
        audited = ""
    parts = [
        f"{seeds} seeds; {d.steps} steps of {d.prompts} prompts, β = {d.beta}, learning rate {d.learning_rate:g}, "
        f"signal `{recipe.signal}`{audited}; {recipe.test_per_family} test prompts per benchmark, one response each at "
        f"temperature {d.temperature:g}. Accuracy in per cent, with 95 % intervals over seeds (Student's t).",
        _markdown(
            ("row", *FAMILIES, "average", "greedy", "minus BayesianRouter"),
            [
                [
                    row.title,
                    *(f"{100 * row.benchmarks[family].mean:.1f}" for family in FAMILIES),
                    f"**{row.average}**",
                    f"{100 * row.greedy.mean:.1f}",
                    "–" if row.difference is None else str(row.difference),
                ]
                for row in summaries
            ],
        ),
        "Share of right verdicts, where exactly one of the two responses is right, and cost of a run:",
        _markdown(
            ("row", *FAMILIES, "all", "RM calls", "calls per pair", "audits", "seconds", "waiting for the service"),
            [
                [
                    row.title,
                    *(f"{100 * row.verdicts_by_family[family]:.0f}" for family in FAMILIES),
                    str(row.verdicts),
                    f"{row.calls:.0f}",
                    f"{row.calls_per_pair:.2f}",
                    f"{row.audits:.0f}",
                    f"{row.seconds:.0f}",
                    f"{row.service_seconds:.0f}",
                ]
                for row in summaries
                if row.verdicts is not None and row.policy != CHECKER
            ],
        ),
        "The pool on the offline pairs (per cent right):",
        _markdown(
            ("reward model", *FAMILIES),
            [[name, *(_per_cent(row[f]) for f in FAMILIES)] for name, row in pool_accuracy.items()],
        ),
        "Whom the routers ask in the last third of the training (share of the best RM of each benchmark, per cent):",
        _markdown(("row", *FAMILIES), _best_shares(results, recipe, pool_accuracy)),
        "What the loss says: z of right verdicts against z of wrong ones, per third of the training:",
        _markdown(("row", "AUC", "correlation", "gap of mean z"), _signal_rows(results)),
    ]
    return "\n\n".join(parts) + "\n"


def _per_cent(share: float) -> str:
    return "–" if np.isnan(share) else f"{100 * share:.0f}"


def _best(recipe: Recipe, pool_accuracy: Mapping[str, Mapping[str, float]], family: str) -> int:
    """Return the arm that is best on the offline pairs; where there are none, the one that was made for the family."""
    known = [pool_accuracy[name][family] for name in recipe.pool()]
    if np.isnan(known).any():
        known = [float(family in specialist.own) for specialist in recipe.specialists]
    return int(np.argmax(known))


def _best_shares(results: Results, recipe: Recipe, pool_accuracy: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    pool = recipe.pool()
    best = {family: _best(recipe, pool_accuracy, family) for family in FAMILIES}
    rows = []
    for runs in _routed(results).values():
        shares = asked_shares(runs, pool)
        rows.append([runs[0]["row"], *(f"{100 * shares[family][best[family]]:.0f}" for family in FAMILIES)])
    return rows


def _signal_rows(results: Results) -> list[list[str]]:
    rows = []
    for runs in _routed(results).values():
        quality = signal_quality(runs)
        series = (quality.auc, quality.correlation, quality.gap)
        rows.append([runs[0]["row"], *(" → ".join(f"{value:.2f}" for value in values) for values in series)])
    return rows


def _routed(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    return {policy: runs for policy in ("random", *_ROUTERS) if (runs := _of(results, policy))}


def _of(results: Results, policy: str) -> list[Mapping[str, Any]]:
    return [result for result in results if result["policy"] == policy]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _curve(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    steps = [int(step) for step, _ in runs[0]["curve"]]
    points = [estimate([average(run["curve"][i][1]) for run in runs]) for i in range(len(steps))]
    return {
        "step": [float(step) for step in steps],
        "mean": [point.mean for point in points],
        "half_width": [point.half_width for point in points],
    }


def plot_curves(results: Results, out: Path) -> None:
    """Average accuracy along the training, one line a row, bands over seeds; told apart in black and white too."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    styles = [(line, mark) for line in ("-", "--", ":") for mark in ("o", "s", "^", "v", "x")]
    for row, (line, mark) in zip((r for r in summarise(results) if r.policy != SFT), styles, strict=False):
        curve = _curve(_of(results, row.policy))
        step, mean, width = (np.array(curve[key]) for key in ("step", "mean", "half_width"))
        wide = 2.5 if row.policy == "bayesian" else 1.2
        (drawn,) = axes.plot(step, 100 * mean, line, marker=mark, markersize=4, linewidth=wide, label=row.title)
        if np.isfinite(width).all():
            axes.fill_between(step, 100 * (mean - width), 100 * (mean + width), alpha=0.1, color=drawn.get_color())
    axes.set_xlabel("step of online DPO")
    axes.set_ylabel("right responses on held-out prompts, %")
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
