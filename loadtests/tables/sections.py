"""The sections of docs/results.md that hold the tables: offline, transfer, labelled pairs, online, ablations.

Knows the document's keys and nothing of how its figures were made. Called by `page`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loadtests.tables.experiments import OURS, TUNED
from loadtests.tables.pictures import CURVES, OFFLINE
from loadtests.tables.sheets import Block, Heading, Picture, Sheet, accuracy, difference, interval
from loadtests.tables.work import BEST_HINDSIGHT, BEST_LEARNED, DOMAINS_HINDSIGHT, SUBSETS_LEARNED

Document = Mapping[str, Any]
"""What the command writes as JSON, or a part of it."""


def offline_section(document: Document) -> list[Block]:
    blocks: list[Block] = [
        Heading("Offline routing (the paper's Table 2)"),
        "Every pair is routed by a fit that saw neither it nor its group. `offline` is our router as `train` makes it; "
        "`offline:bt`, `offline:cls` the same fit routed by one head; `offline:no-cls` fitted without the "
        "classification loss; `offline@ENCODER` on another backbone. `Learned` rows choose their RM on the other "
        "folds: the best RM, or the best RM of the pair's subset, which they are told. `In hindsight` rows choose it "
        "on the judged pairs themselves. The last column is `offline` minus the row, pair by pair.",
    ]
    for pool, table in document["offline"].items():
        blocks.append(
            policy_sheet(f"{pool}: {len(table['pool'])} RMs, {table['n']:,} pairs", table, "offline", seeds=False)
        )
    blocks += [
        *_not_run(document),
        Picture(f"figures/{OFFLINE}", "accuracy of every row, with 95 % intervals"),
        _subset_sheet(document["offline"]["K4"]),
        *_calibration(document),
    ]
    return blocks


def _calibration(document: Document) -> list[Block]:
    rows = [
        (
            pool,
            name or "all",
            str(part["n"]),
            *(accuracy(part[key]) for key in ("said", "right")),
            *(f"{part[key]:.3f}".removeprefix("0") for key in _FIT),
        )
        for pool, table in document["offline"].items()
        for name, part in table["calibration"].items()
    ]
    return [
        "Does an offset mean what it says, on every kind of text? *Said* and *right* are of the RM that `offline` "
        "asks; *bias* is the gap between promise and outcome per RM without its sign; the negative log-likelihood "
        "(NLL, in nats) and the expected calibration error (ECE) are of all RMs. Neither fit nor calibration saw these "
        "pairs.",
        Sheet(
            "Calibration per domain", ("pool", "domain", "pairs", "said", "right", "bias", "NLL", "ECE"), tuple(rows)
        ),
    ]


_FIT = ("bias", "negative_log_likelihood", "expected_calibration_error")


def _not_run(document: Document) -> Iterable[str]:
    for encoder, minutes in document["not_run"].items():
        duration = f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{minutes:.0f} minutes"
        yield (
            f"`offline@{encoder}` was not run here: its encodings are not in the cache, and would take about "
            f"{duration} on this machine (from a timed sample of texts)."
        )


def _subset_sheet(table: Document) -> Sheet:
    shown = ("majority", "uwo", SUBSETS_LEARNED, "offline")
    rows = [
        (
            name,
            str(part["n"]),
            part["best_single"]["model"],
            accuracy(part["best_single"]["accuracy"]),
            *(accuracy(part["policies"][row]["accuracy"]) for row in shown),
            interval(*part["policies"]["offline"]["ci95"]),
            accuracy(part["oracle"]),
        )
        for name, part in table["subsets"].items()
    ]
    columns = ("subset", "pairs", "best RM, in hindsight", "it", *shown, "95 % of offline", "oracle")
    return Sheet("K4, per subset", columns, tuple(rows))


def transfer_section(document: Document) -> list[Block]:
    shown = (OURS, "offline", "bayesian:none", "laser", "majority", "uwo", BEST_LEARNED, DOMAINS_HINDSIGHT)
    blocks: list[Block] = [
        Heading("A domain never seen"),
        "Harder data of another kind: the offline stage learns from all domains but one, and that one is streamed. "
        f"`{BEST_LEARNED}` is the RM that is best on the domains learned from; `{DOMAINS_HINDSIGHT}` is chosen on each "
        "stream itself, and nobody knows it beforehand. One offline fit each: no interval counts that another would "
        "have come out otherwise.",
    ]
    for pool, domains in document["transfer"].items():
        rows = [
            (name or "all", str(found["n"]), *_compared(found, shown, DOMAINS_HINDSIGHT))
            for name, found in domains.items()
        ]
        columns = ("left out", "pairs", *shown, *_differences(DOMAINS_HINDSIGHT))
        blocks.append(Sheet(f"{pool}, one domain left out", columns, tuple(rows)))
    return blocks


def labels_section(document: Document) -> list[Block]:
    shown = (OURS, "offline", "bayesian:none", "majority", BEST_HINDSIGHT)
    blocks: list[Block] = [
        Heading("How many labelled pairs?"),
        "The same streams after offline stages that learned from ever more pairs of the same kinds, fewer being part "
        f"of more ({document['shift_dealings']} dealings). `majority` learns from none; `bayesian:none` takes from "
        "them how its context is scaled, and no labels.",
    ]
    for pool, by_number in document["labels"].items():
        rows = [
            (number, *_compared(found, shown, BEST_HINDSIGHT), accuracy(row_of(found, OURS)["last_third"]))
            for number, found in by_number.items()
        ]
        columns = ("labelled", *shown, *_differences(BEST_HINDSIGHT), "bayesian, last third")
        length = max(max(found["length"]) for found in by_number.values()) if by_number else 0
        blocks.append(Sheet(f"{pool}, streams of {length:,} pairs by labelled pairs", columns, tuple(rows)))
    return blocks


def online_section(document: Document) -> list[Block]:
    online = document["online"]
    first = [key for key in online if not key.startswith(("K6", "K9"))]
    names = list(online["in distribution"]["policies"])
    rows = [
        (
            name,
            *(
                accuracy(row_of(online[key], name)["accuracy"]) if name in online[key]["policies"] else "–"
                for key in first
            ),
        )
        for name in names
    ]
    blocks: list[Block] = [
        Heading("Online"),
        "K4 but where another pool is named; feedback `preference` but where the loss is: then a simulated DPO loss, "
        "whose noise is an assumption (docs/replay.md). *Shift*: 10 % of the offline pairs are code, 80 % of the "
        f"stream ({document['shift_dealings']} dealings). *Drift*: domains come in phases. *Delay 64*: feedback comes "
        "64 instances late. *30 % missing*: so much of it never comes. *Long*: two folds, so that a stream is half of "
        "the data; drift and the loss signal use the same streams. "
        "`bayesian+shadow=0.1` asks every RM for a tenth of the pairs. Rows of papers have the scalars that were "
        "published for other data: `bayesian:paper` λ₀ = σ² = v = 1, `laser` α = .1, `uwo` .5 times the variance. Ours "
        f"were chosen on these pairs; so were those of {_tuned()}: the paper's form on equal terms. None of its "
        "settings is good both there and on unseen domains (docs/soundness.md).",
        Sheet("K4, accuracy over each stream", ("policy", *first), tuple(rows)),
        "In each table below, regret is per instance against the oracle, `last third` the accuracy over the last third "
        "of the streams, and the last column `bayesian` minus the row, pair by pair.",
    ]
    for key, found in online.items():
        title = key if key.startswith(("K6", "K9")) else f"K4, {key}"
        streams = "stream" if found["streams"] == 1 else "streams"
        length = " or ".join(f"{n:,}" for n in found["length"][-2:])
        blocks.append(policy_sheet(f"{title}: {found['streams']} {streams} of {length} pairs", found, OURS, seeds=True))
        if key in CURVES:
            blocks.append(Picture(f"figures/{CURVES[key]}", f"{title}: accuracy and regret along the stream"))
    return blocks


def _tuned() -> str:
    """Names and scalars of the rows of `TUNED`."""
    scalars = {name: ", ".join(f"{key} = {value:g}" for key, value in changes) for name, changes in TUNED.items()}
    return " and ".join(f"`{name}` ({text})" for name, text in scalars.items())


def ablation_section(document: Document) -> list[Block]:
    columns = list(document["ablations"]["default"])
    header = ["change"]
    for column in columns:
        header += [f"offline, {column}", f"bayesian, {column}", f"default − it, {column}"]
    rows = []
    for title, found in document["ablations"].items():
        cells = [title]
        for column in columns:
            ours = found[column][OURS]
            lost = difference(ours["lost"]) if "lost" in ours else ""
            cells += [accuracy(found[column]["offline"]["accuracy"]), accuracy(ours["accuracy"]), lost]
        rows.append(tuple(cells))
    return [
        Heading("What makes the difference"),
        "K4, one change at a time, fewer passes than above. The differences are `bayesian` with the defaults minus "
        "`bayesian` with the change, pair by pair: positive means that the change loses.",
        Sheet("Ablations", tuple(header), tuple(rows)),
    ]


def policy_sheet(title: str, found: Document, ours: str, *, seeds: bool) -> Sheet:
    """Rows by accuracy, the oracle below."""
    rows = []
    for name, row in sorted(found["policies"].items(), key=lambda item: -item[1]["accuracy"]):
        rows.append(
            (
                f"**{name}**" if name == ours else name,
                accuracy(row["accuracy"]),
                interval(*row["ci95"]),
                accuracy(row["regret"]),
                *((accuracy(row["last_third"]),) if seeds else ()),
                f"{row['calls_per_instance']:.3g}",
                difference(found["minus"][name]) if name in found["minus"] else "",
            )
        )
    rows.append(("oracle", accuracy(found["oracle"]), "", accuracy(0.0), *(("",) if seeds else ()), "", ""))
    last = ("last third",) if seeds else ()
    return Sheet(title, ("row", "accuracy", "95 % interval", "regret", *last, "RM calls", f"{ours} − it"), tuple(rows))


def _differences(best: str) -> tuple[str, str]:
    """Names of the columns of differences that `_compared` makes."""
    return "bayesian − offline", f"bayesian − {best}"


def _compared(found: Document, shown: Iterable[str], best: str) -> tuple[str, ...]:
    """The accuracies of the rows that are shown, and the differences to `offline` and to the row `best`."""
    differences = (difference(found["minus"][name]) for name in ("offline", best))
    return (*(accuracy(row_of(found, row)["accuracy"]) for row in shown), *differences)


def row_of(found: Document, name: str) -> Mapping[str, Any]:
    row: Mapping[str, Any] = found["policies"][name]
    return row
