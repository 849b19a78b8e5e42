"""docs/results.md from the figures of a run: a pure function of the JSON document that the command writes.

Knows the document's keys and nothing of how its figures were made. Called by the command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loadtests.tables.experiments import CHOSEN_FOR_ROOM, OURS, PRIMARY, TUNED, Contrast
from loadtests.tables.field_page import field_section
from loadtests.tables.pictures import CALLS
from loadtests.tables.prose import EQUALS, LOSES, against, against_zero, by_place, decided, listed, reached, standing
from loadtests.tables.sections import (
    Document,
    ablation_section,
    labels_section,
    offline_section,
    online_section,
    row_of,
    transfer_section,
)
from loadtests.tables.sheets import Block, Heading, Picture, Sheet, accuracy, difference, interval
from loadtests.tables.work import (
    BEST_HINDSIGHT,
    BEST_LEARNED,
    DOMAINS_HINDSIGHT,
    REFERENCES,
    SUBSETS_HINDSIGHT,
    SUBSETS_LEARNED,
)
from router_core.intervals import holm

PAPER = {"K4": 0.892, "K6": 0.903, "K9": 0.937}
"""The paper's own offline router (SmolLM2-135M-Instruct, fine-tuned) on 555 other pairs of these kinds, measured once
before this project; there the best single RM had .799, .879, .933 and majority .849, .898, .924.
"""
ONLINE_TARGETS = {"in distribution": 0.90, "shift": 0.91}

_KEPT = {
    "nine": "The figures of K4, K6 and K9 are those of an earlier run, kept by `--from`: rows that it did not have "
    "(`neural`, `dueling`, the paper's own offline stage) are missing in their tables.",
    "field": "The figures of the 85 RMs are those of an earlier run, kept by `--from`.",
}

ONE_CALL = ("offline", "laser", "bayesian:none", "bayesian:paper", *TUNED, "random")
ENSEMBLES = ("majority", "uwo")


def page(document: Document) -> list[Block]:
    """All blocks, in order."""
    blocks = [
        Heading("Results", 1),
        Picture(f"figures/{CALLS}", "accuracy against RM calls per pair, all pools"),
        "Written by `make tables`; do not edit. All figures are of one run on recorded pairs: published reward models "
        "(RMs), nine of them in one file and 85 in another, judged each pair once, so any routing can be judged "
        f"without asking them again. {listed(list(CHOSEN_FOR_ROOM))} are pools that were chosen after seeing the "
        "accuracies, so that there is room to gain; K9, N5, T6 and all 85 are not.",
        *(["**A quick run: small fits and short plans. These figures mean little.**"] if document["quick"] else []),
        *_in_short(document),
        *_measured(document),
        *offline_section(document),
        *field_section(document),
        *transfer_section(document),
        *labels_section(document),
        *online_section(document),
        *ablation_section(document),
        *_lost(document),
    ]
    cells = (cell for block in blocks if isinstance(block, Sheet) for row in block.rows for cell in row)
    return [*blocks, *_reading(document, sum(" … " in cell for cell in cells))]


def _in_short(document: Document) -> list[Block]:
    offline, online, transfer = document["offline"], document["online"], document["transfer"]

    def routers(name: str) -> str:
        return by_place({pool: table["minus"][name] for pool, table in offline.items()})

    def streamed(key: str) -> str:
        found = online[key]
        others = against({name: found["minus"][name] for name in (*ONE_CALL, BEST_HINDSIGHT, *ENSEMBLES)})
        return f"{accuracy(row_of(found, OURS)['accuracy'])}: {others}"

    def unseen(name: str) -> str:
        return listed(
            [f"{accuracy(row_of(found[''], name)['accuracy'])} on {pool}" for pool, found in transfer.items()]
        )

    lead = by_place({pool: found[""]["minus"][BEST_HINDSIGHT] for pool, found in transfer.items()})
    items = [
        "**K9 is all nine RMs. K4 and K6 are parts of it that were chosen after seeing the accuracies, so that a "
        "router has room to gain**: what is gained there says what routing can bring, not what to expect of a pool.",
        f"**Offline** (learn from labelled pairs, then ask one RM per pair): against the best single RM, chosen in "
        f"hindsight, our router is {routers(BEST_HINDSIGHT)}.",
        f"Against majority vote, which asks all RMs, it is {routers('majority')}; against UWO, which asks them all "
        f"too, {routers('uwo')}.",
        f"Against being told every pair's subset and asking the RM that was best there on the other folds, it is "
        f"{routers(SUBSETS_LEARNED)}.",
        f"**Online** (K4, one call, preference feedback), in distribution, `bayesian` earns "
        f"{streamed('in distribution')}.",
        f"Under shift it earns {streamed('shift')}.",
        f"**On a domain that the offline stage never saw**, `offline` earns {unseen('offline')}; `bayesian`, which "
        f"learns on the way, {unseen(OURS)}; `bayesian:none`, which learns on the way and had no offline stage, "
        f"{unseen('bayesian:none')}.",
        f"There the best RM of the domain, which nobody knows beforehand, earns {unseen(DOMAINS_HINDSIGHT)}. "
        f"{_behind(transfer)} Against one RM for all these streams, the best in hindsight, it is {lead}.",
        "*Better* and *worse*: the 95 % interval of the paired difference leaves out 0; *not told apart*: it does not. "
        "These intervals are not corrected for their number, and leave out that other labelled pairs would have made "
        "other fits. The contrasts below are.",
    ]
    return [
        Heading("In short: does routing beat every single RM, and the ensembles?"),
        "\n".join(f"* {item}" for item in items),
        *_primary(document),
        _summary(document),
        _targets(document),
        "The first three targets were measured on 555 other pairs of the same kinds, which are harder (best single RM "
        ".799, .879, .933 there): that they are exceeded here says less than the differences above.",
    ]


def _behind(transfer: Mapping[str, Document]) -> str:
    """How many (pool, domain) rows have `bayesian` below the domain's best RM, and which beyond the interval."""
    rows = {
        f"{domain} ({pool})": found["minus"][DOMAINS_HINDSIGHT]
        for pool, domains in transfer.items()
        for domain, found in domains.items()
        if domain
    }
    below = [name for name, found in rows.items() if found["difference"] < 0]
    worse = [name for name, found in rows.items() if standing(found) == LOSES]
    clear = (
        f", in {len(worse)} of them beyond the interval: {listed(worse)}" if worse else ", never beyond the interval"
    )
    return f"`bayesian` is below it in {len(below)} of {len(rows)} rows (pool and domain){clear if below else ''}."


def _primary(document: Document) -> list[Block]:
    """The contrasts of `PRIMARY`, with p-values for all of them together."""
    found = [_contrast(document, contrast) for contrast in PRIMARY]
    adjusted = holm([difference["p"] for _, difference in found])
    rows = [
        (
            title,
            *_difference_row(difference),
            *(f"{p:.2g}" for p in (difference["p"], together)),
            decided(difference, together),
        )
        for (title, difference), together in zip(found, adjusted, strict=True)
    ]
    return [
        "**Primary contrasts.** Fixed in the code before this run (`PRIMARY` in `loadtests/tables/experiments.py`), "
        "though after others on the same pairs. *p, Holm* is adjusted for all of them; below .05 the first row named "
        "is *better* or *worse*. Everything else on this page is secondary.",
        Sheet("Primary contrasts", ("contrast", "difference", "95 % interval", "p", "p, Holm", "decided"), tuple(rows)),
    ]


def _contrast(document: Document, contrast: Contrast) -> tuple[str, Mapping[str, Any]]:
    """Its title, and the difference."""
    part = document[contrast.part][contrast.key]
    if contrast.part == "offline":
        return f"{contrast.key}: offline − {contrast.other}", part["minus"][contrast.other]
    if contrast.part == "online":
        where = contrast.key if contrast.key.startswith("K") else f"K4, {contrast.key}"
        return f"{where}: bayesian − {contrast.other}", part["minus"][contrast.other]
    return f"{contrast.key}, domains never seen: bayesian − {contrast.other}", part[""]["minus"][contrast.other]


def _summary(document: Document) -> Sheet:
    """Offline, one pool a row."""
    names = (BEST_HINDSIGHT, "majority", "uwo", SUBSETS_LEARNED, SUBSETS_HINDSIGHT, "offline")
    rows = []
    for pool, table in document["offline"].items():
        cells = [accuracy(row_of(table, name)["accuracy"]) for name in names]
        online = document["online"].get("in distribution" if pool == "K4" else f"{pool}, in distribution")
        rows.append(
            (
                pool,
                *cells,
                "–" if online is None else accuracy(row_of(online, OURS)["accuracy"]),
                accuracy(table["oracle"]),
            )
        )
    return Sheet(
        "Accuracy: how often is the verdict right?",
        ("pool", *names[:-1], "router, offline", "bayesian, online", "oracle"),
        tuple(rows),
    )


def _targets(document: Document) -> Sheet:
    """What was to be reached, and whether it is."""
    rows = []
    for pool, target in PAPER.items():
        row = row_of(document["offline"][pool], "offline")
        rows.append(
            (
                f"{pool}, offline: {accuracy(target)}, the paper's router on other pairs",
                *_measured_row(row),
                reached(row["accuracy"], target),
            )
        )
    for name in (SUBSETS_HINDSIGHT, SUBSETS_LEARNED):
        for pool, table in document["offline"].items():
            found = table["minus"][name]
            rows.append((f"{pool}, offline: not below the {name}", *_difference_row(found), against_zero(found)))
    for key, target in ONLINE_TARGETS.items():
        row = row_of(document["online"][key], OURS)
        rows.append((f"K4, online, {key}: {accuracy(target)}", *_measured_row(row), reached(row["accuracy"], target)))
    for pool in ("K9",):
        found = document["offline"][pool]["minus"][BEST_HINDSIGHT]
        rows.append((f"{pool}, offline: not below the {BEST_HINDSIGHT}", *_difference_row(found), against_zero(found)))
        found = document["online"][f"{pool}, in distribution"]["minus"][BEST_HINDSIGHT]
        rows.append((f"{pool}, online: not below the {BEST_HINDSIGHT}", *_difference_row(found), against_zero(found)))
    for pool, domains in document["transfer"].items():
        for name in (DOMAINS_HINDSIGHT, BEST_HINDSIGHT, BEST_LEARNED):
            found = domains[""]["minus"][name]
            which = f"{name} (one for all)" if name == BEST_HINDSIGHT else name
            title = f"{pool}, online, domains never seen: not below the {which}"
            rows.append((title, *_difference_row(found), against_zero(found)))
    return Sheet("Targets", ("target", "measured", "95 % interval", "reached"), tuple(rows))


def _measured(document: Document) -> list[Block]:
    data, facts = document["data"], document["machine"]
    domains = listed([f"{count} {name}" for name, count in data["domains"].items()])
    hyper = ", ".join(f"{name} = {value}" for name, value in document["hyperparameters"].items())
    versions = ", ".join(
        f"{name} {facts['versions'][name]}" for name in ("numpy", "scipy", "torch") if name in facts["versions"]
    )
    return [
        Heading("What was measured"),
        f"* Command: `{document['command']}`, {document['minutes']:.0f} minutes on {facts['cores']} shared cores, "
        f"{document['fits']} fits of the offline stage.\n"
        f"* Data: {data['pairs']:,} pairs in {data['groups']} groups ({domains}; {data['subsets']} subsets), digest "
        f"`{data['digest']}`.\n"
        f"* Splits: groups are never divided. {document['folds']} folds, dealt {document['dealings']} times (seeds of "
        f"the folds and of the fits on them: 0 to {document['dealings'] - 1}) for encoder `{document['encoders'][0]}`, "
        f"once for the others. Online: {len(document['seeds'])} passes per stream, seeds {document['seeds'][0]} to "
        f"{document['seeds'][-1]}.\n"
        f"* Online settings of the first checkpoint: {hyper}.\n"
        f"* Python {facts['python']}, {versions}, {facts['blas']}; one thread a process.",
        *(_KEPT[name] for name in document.get("kept", ())),
        *(f"Pool {name}: {', '.join(members)}." for name, members in document["pools"].items() if name != "K9"),
        *(f"Pool {name}: {', '.join(members)}." for name, members in document["field"].get("pools", {}).items()),
    ]


def _lost(document: Document) -> list[Block]:
    """What is worse than something simpler, or than something that was not chosen."""
    changes = _told_apart(
        {
            f"{title} ({column})": found[column][OURS]["lost"]
            for title, found in document["ablations"].items()
            for column in found
            if "lost" in found[column][OURS]
        }
    )
    items = ["* No change above can be told apart from the defaults."]
    if changes:
        told = f"* Of the changes above: with the defaults `bayesian` is {against(changes)}."
        items = [f"{told} The others cannot be told apart from noise."]
    for pool, domains in document["transfer"].items():
        found = {domain: part for domain, part in domains.items() if domain}
        worse = [domain for domain, part in found.items() if standing(part["offline_lead"]) == LOSES]
        if worse:
            items.append(
                f"* {pool}: trained without it, offline routing alone is worse than the best RM of {listed(worse)}: "
                "labelled pairs of one kind teach little about another."
            )
    few = {
        f"{pool}, {number} labelled pairs": found
        for pool, by_number in document["labels"].items()
        for number, found in by_number.items()
    }
    for key, found in [*few.items(), *document["online"].items()]:
        losing = {name: d for name, d in found["minus"].items() if name not in REFERENCES and standing(d) == LOSES}
        if losing:
            items.append(f"* {key}: `bayesian` is {against(losing)}.")
    equal = [key for key, found in document["online"].items() if standing(found["minus"]["offline"]) == EQUALS]
    if equal:
        items.append(f"* Learning online cannot be told apart from the offline router alone on: {'; '.join(equal)}.")
    return [Heading("What lost, and what brought nothing"), "\n".join(items)]


def _told_apart(changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {name: found for name, found in changes.items() if standing(found) != EQUALS}


def _reading(document: Document, differences: int) -> list[Block]:
    return [
        Heading("How far to trust these figures"),
        "* **K4 and K6 were chosen after seeing the RMs' accuracies**, so that a router has room to gain. K9, all "
        "nine, stands beside them: a router has little to gain there.\n"
        "* **The same pairs were used to choose the defaults** of `train` and of the online stage "
        "(docs/experiments.md), by grouped cross-validation. So these figures are mildly optimistic.\n"
        "* The best single RM and the best RM per subset *in hindsight* are chosen on the judged pairs, which favours "
        "them; the *learned* ones are what could be had in earnest.\n"
        "* A tie counts one half. Intervals are 95 %: Wilson's at the effective number of pairs, with "
        "Student's quantile over groups and seeds; Student's for differences.\n"
        "* **Intervals leave out refitting.** They count pairs and passes, and fits as far as the folds were dealt "
        f"again ({document['dealings']} times offline, not at all where a domain is left out). How much refitting "
        "moves these figures: docs/soundness.md.\n"
        f"* {differences} differences on this page have intervals without correction: about one in twenty that are "
        "nothing will look like something. The primary contrasts are corrected.\n"
        "* **Rows of papers have published scalars**, ours were chosen on these pairs: `bayesian:paper`, `laser` and "
        f"`uwo` might do better with others. {listed([f'`{name}`' for name in TUNED])} say how much better the first.\n"
        "* Recorded pairs are met in random order but where drift is named, and the RMs' verdicts do not depend on "
        "what was routed before: no policy is trained here. docs/table1.md trains one.",
    ]


def _measured_row(row: Mapping[str, Any]) -> Sequence[str]:
    return accuracy(row["accuracy"]), interval(*row["ci95"])


def _difference_row(found: Mapping[str, Any]) -> Sequence[str]:
    text, _, rest = difference(found).partition(" (")
    return text, rest.removesuffix(")")
