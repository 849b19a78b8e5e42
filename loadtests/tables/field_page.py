"""The sections of docs/results.md about the 85 RMs. Knows the document's part `field`. Called by `page`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loadtests.tables.experiments import ALL, CHOSEN_FOR_ROOM, OURS
from loadtests.tables.prose import listed, reached
from loadtests.tables.sections import Document, policy_sheet, row_of
from loadtests.tables.sheets import Block, Heading, Sheet, accuracy, difference, interval
from loadtests.tables.work import BEST_HINDSIGHT, BEST_LEARNED, DOMAINS_HINDSIGHT, SUBSETS_LEARNED

TARGETS = (
    ("S6", "offline", "offline", 0.885),
    ("S6", "offline", "stacked", 0.89),
    ("S6", "offline", "cascade:2", 0.895),
    ("S6", "online", OURS, 0.89),
)
"""Pool, part, row, accuracy that was to be reached."""
TOLERATED = 0.003
"""By which `offline` may be below the best RM where all 85 can be asked."""
ROOM = [name for name in CHOSEN_FOR_ROOM if not name.startswith("K")]


def field_section(document: Document) -> list[Block]:
    """All blocks about the 85 RMs."""
    field = document["field"]
    data = field["data"]
    domains = listed([f"{count} {name}" for name, count in data["domains"].items()])
    blocks: list[Block] = [
        Heading("85 published RMs"),
        f"{data['pairs']:,} RewardBench pairs in {data['groups']} groups ({domains}) with the verdicts of 85 RMs; no "
        f"scores, so no `uwo`. Digest `{data['digest']}`. {field['folds']} grouped folds, dealt once (S6: "
        f"{field['dealings']} times); online {field['seeds']} passes per stream. **{listed(ROOM)} were chosen for room "
        "after seeing the accuracies. N5 (middling) and T6 (the best) were chosen by their leaderboard's published "
        "scores, though after the accuracies on these pairs had been seen**: a router has nothing to gain there, and "
        "must not lose. In every pool the kinds "
        "of texts are learned from the verdicts of all 85 on the training folds. `offline, the paper's` is the "
        "paper's offline stage on our frozen encoder: one network, hard verdicts, both losses, the Bradley-Terry head.",
        *_summary(field),
        _targets(field),
        *_not_run(field),
    ]
    for pool, table in field["offline"].items():
        title = f"{pool}, offline: {len(table['pool'])} RMs, {table['n']:,} pairs"
        shown = table if pool != ALL else _without_singles(table)
        blocks.append(policy_sheet(title, shown, "offline", seeds=False))
    for pool, found in field["online"].items():
        blocks.append(policy_sheet(f"{pool}, online", found, OURS, seeds=True))
    return [*blocks, *_counts(field), *_domains(field), *_transfer(field), *_labels(field), *_joins(field)]


def _not_run(field: Document) -> list[Block]:
    return [
        f"`{encoder}` was not run on these pairs: its encodings are not in the cache, and would take about "
        f"{minutes:.0f} minutes."
        for encoder, minutes in field["not_run"].items()
    ]


def _summary(field: Document) -> list[Block]:
    rows = []
    names = (
        BEST_HINDSIGHT,
        BEST_LEARNED,
        "majority",
        SUBSETS_LEARNED,
        "offline",
        "cascade:1.5",
        "cascade:2",
        "stacked",
    )
    for pool, table in field["offline"].items():
        cells = [accuracy(row_of(table, name)["accuracy"]) if name in table["policies"] else "–" for name in names]
        online = field["online"].get(pool) or field["counts"][str(len(table["pool"]))]["online"]
        rows.append(
            (
                pool,
                *cells,
                accuracy(row_of(online, OURS)["accuracy"]),
                accuracy(table["oracle"]),
                difference(table["minus"][BEST_HINDSIGHT]),
            )
        )
    columns = ("pool", *names, "bayesian, online", "oracle", "offline − best single RM")
    return [Sheet("The 85 RMs in short", columns, tuple(rows))]


def _targets(field: Document) -> Sheet:
    rows = []
    for pool, part, name, target in TARGETS:
        if pool in field[part] and name in field[part][pool]["policies"]:
            row = row_of(field[part][pool], name)
            cells = (accuracy(row["accuracy"]), interval(*row["ci95"]), reached(row["accuracy"], target))
            rows.append((f"{pool}, {part}, `{name}`: {accuracy(target)}", *cells))
    for pool in (ALL, "N5", "T6"):
        if pool in field["offline"]:
            found = field["offline"][pool]["minus"][BEST_HINDSIGHT]
            allowed = TOLERATED if pool == ALL else 0.0
            low = found["ci95"][0]
            verdict = (
                "yes" if found["difference"] >= -allowed else "within noise" if low <= 0 <= found["ci95"][1] else "no"
            )
            title = f"{pool}, offline: not below the best RM" + (
                f" by more than {accuracy(allowed)}" if allowed else ""
            )
            text, _, rest = difference(found).partition(" (")
            rows.append((title, text, rest.removesuffix(")"), verdict))
    return Sheet("Targets, 85 RMs", ("target", "measured", "95 % interval", "reached"), tuple(rows))


def _without_singles(table: Document) -> dict[str, Any]:
    """The table without its 85 single RMs."""
    kept = {name: row for name, row in table["policies"].items() if not name.startswith("single:")}
    return {**table, "policies": kept}


def _counts(field: Document) -> list[Block]:
    rows = []
    for count, found in field["counts"].items():
        offline = found["offline"]
        names = ("random", BEST_LEARNED, BEST_HINDSIGHT, "majority", "offline", "cascade:2", "stacked")
        cells = [accuracy(row_of(offline, name)["accuracy"]) if name in offline["policies"] else "–" for name in names]
        calls = row_of(offline, "cascade:2")["calls_per_instance"] if "cascade:2" in offline["policies"] else None
        rows.append(
            (
                count,
                *cells,
                accuracy(row_of(found["online"], OURS)["accuracy"]),
                difference(offline["minus"][BEST_HINDSIGHT]),
                "–" if calls is None else f"{calls:.2f}",
                f"{found['draw_milliseconds']:.2f}",
            )
        )
    columns = (
        "K",
        "random",
        BEST_LEARNED,
        BEST_HINDSIGHT,
        "majority, K calls",
        "offline",
        "cascade:2",
        "stacked, K calls",
    )
    return [
        Heading("How many RMs", 3),
        "Pools drawn by a seed, each part of the next. `offline` and `bayesian` make one call per pair, whatever K is; "
        "*draw* is the median time to draw for one pair with its propensities, in milliseconds on this machine.",
        Sheet(
            "By the number of RMs",
            (*columns, "bayesian", "offline − best single RM", "calls of cascade:2", "draw, ms"),
            tuple(rows),
        ),
    ]


def _domains(field: Document) -> list[Block]:
    rows = []
    for pool, table in field["offline"].items():
        for name, part in table["calibration"].items():
            figures = [
                f"{part[key]:.3f}".removeprefix("0") for key in ("said", "right", "bias", "negative_log_likelihood")
            ]
            rows.append((pool, name or "all", str(part["n"]), *figures))
    return [
        Heading("By domain", 3),
        "*Right* is `offline`'s accuracy on the domain; *said* what its offsets promised, *bias* the gap per RM, NLL "
        "of all RMs.",
        Sheet("The 85 RMs by domain", ("pool", "domain", "pairs", "said", "right", "bias", "NLL"), tuple(rows)),
    ]


def _transfer(field: Document) -> list[Block]:
    shown = (
        OURS,
        "offline",
        "bayesian:paper",
        "bayesian:none",
        "neural",
        "dueling",
        "majority",
        BEST_LEARNED,
        DOMAINS_HINDSIGHT,
    )
    blocks: list[Block] = [Heading("A domain never seen, of the 85 RMs", 3)]
    for pool, domains in field["transfer"].items():
        rows = [
            (name or "all", str(found["n"]), *(accuracy(row_of(found, row)["accuracy"]) for row in shown))
            for name, found in domains.items()
        ]
        blocks.append(Sheet(f"{pool}, one domain left out", ("left out", "pairs", *shown), tuple(rows)))
    return blocks


def _labels(field: Document) -> list[Block]:
    shown = ("offline", OURS, "bayesian:none", "majority", BEST_LEARNED)
    rows = [_row(number, found, shown) for number, found in field["labels"].items()]
    return [
        Heading("Labelled pairs, S6", 3),
        "A third of the pairs is streamed, so that no more than some 998 of the 1,498 can be labelled. All 85 RMs' "
        "verdicts on the labelled pairs teach the kinds of texts.",
        Sheet("S6 by labelled pairs", ("labelled", *shown), tuple(rows)),
    ]


def _joins(field: Document) -> list[Block]:
    rows = [_row(count, found, ("offline", OURS)) for count, found in field["joins"].items()]
    return [
        Heading("An RM that joins", 3),
        "Each RM of S6 joins the five others once, with so many verdicts on the training pairs. Without any it is "
        "taken to be as good as the others are on average: offline it is never asked, online it is tried.",
        Sheet("S6, the sixth RM by its verdicts", ("verdicts", "offline", OURS), tuple(rows)),
    ]


def _row(name: str, found: Mapping[str, Any], shown: tuple[str, ...]) -> tuple[str, ...]:
    return (name, *(accuracy(row_of(found, row)["accuracy"]) for row in shown))
