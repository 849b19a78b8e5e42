"""The page of `make tables`: every sentence follows the figures, every figure stands in a table, both forms render."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("torch")

from loadtests.tables.experiments import ALL, FIELD_POOLS, LEARNERS, PRIMARY, TUNED, VARIANTS
from loadtests.tables.page import page
from loadtests.tables.prose import against, against_zero, by_place, decided, listed, reached, standing
from loadtests.tables.sheets import Heading, Picture, Sheet, accuracy, difference, markdown, show, signed
from loadtests.tables.work import DOMAINS_HINDSIGHT, REFERENCES

POLICIES = ("bayesian", "bayesian:paper", *TUNED, "bayesian:none", "offline", "laser", "random", "majority", "uwo")
ROWS = (*POLICIES, *REFERENCES)


def gap(value: float, half: float = 0.01) -> dict[str, Any]:
    return {"difference": value, "ci95": [value - half, value + half], "p": 0.001 if abs(value) > half else 0.4}


def rows_of(ours: str, lead: float, names: tuple[str, ...] = ROWS) -> dict[str, Any]:
    policies = {
        name: {
            "accuracy": 0.9 if name == ours else 0.9 - lead,
            "ci95": [0.88, 0.92],
            "calls_per_instance": 4.0 if name in ("majority", "uwo") else 1.0,
            "regret": 0.08,
            "last_third": 0.91,
        }
        for name in names
    }
    minus = {name: gap(lead) for name in names if name != ours}
    return {"n": 100, "oracle": 0.98, "policies": policies, "minus": minus}


def document(lead: float = 0.05) -> dict[str, Any]:
    """A run in which ours leads everything by `lead`."""
    fit = {"n": 50, "said": 0.9, "right": 0.8, "bias": 0.05}
    fit |= {"negative_log_likelihood": 0.4, "expected_calibration_error": 0.02}
    table = rows_of("offline", lead) | {"pool": ["a", "b"], "calibration": {"code": fit, "": fit}}
    part = {"n": 50, "policies": table["policies"], "best_single": {"model": "a", "accuracy": 0.9}, "oracle": 0.97}
    stream = rows_of("bayesian", lead) | {"streams": 2, "length": [50]}
    learned = (*ROWS, *LEARNERS, "cascade:2", "stacked")
    wide = rows_of("offline", lead, learned) | {"pool": ["a", "b"], "calibration": {"code": fit, "": fit}}
    met = rows_of("bayesian", lead, learned) | {"streams": 2, "length": [50]}
    apart = rows_of("bayesian", lead, (*learned, DOMAINS_HINDSIGHT))
    field = {
        "data": {"digest": "e" * 64, "pairs": 1498, "groups": 900, "domains": {"chat": 273}, "subsets": 2},
        "folds": 3,
        "dealings": 2,
        "seeds": 2,
        "not_run": {},
        "offline": dict.fromkeys((*FIELD_POOLS, ALL), wide),
        "online": dict.fromkeys(FIELD_POOLS, met),
        "counts": {"2": {"offline": wide, "online": met, "draw_milliseconds": 0.4}},
        "transfer": {"S6": {"code": apart, "": apart}},
        "labels": {"32": met},
        "joins": {"0": met, "16": met},
    }
    unseen = rows_of("bayesian", lead, (*ROWS, DOMAINS_HINDSIGHT)) | {"offline_lead": gap(-0.1)}
    keys = ("in distribution", "long", "shift", "drift", "shift, loss", "K6, in distribution", "K9, in distribution")
    ablated = {name: {"accuracy": 0.88, "lost": gap(lead)} for name in ("offline", "bayesian")}
    columns = ("in distribution", "shift")
    return {
        "command": "make tables",
        "quick": False,
        "machine": {"cores": 2, "python": "3.11", "blas": "some 1.0", "versions": {"numpy": "2.0"}},
        "minutes": 12.3,
        "data": {"digest": "d" * 64, "pairs": 100, "groups": 60, "domains": {"code": 50, "math": 50}, "subsets": 2},
        "pools": {"K4": ["a", "b"], "K6": ["a", "c"], "K9": ["a", "b", "c"]},
        "folds": 5,
        "long_folds": 2,
        "dealings": 2,
        "shift_dealings": 3,
        "seeds": [0, 1],
        "fits": 9,
        "encoders": ["static"],
        "not_run": {"smollm2-135m": 240.0},
        "hyperparameters": {"lambda0": 100.0},
        "field": field,
        "offline": {name: table | {"subsets": {"go": part}} for name in ("K4", "K6", "K9")},
        "online": dict.fromkeys(keys, stream),
        "transfer": {pool: {"code": unseen, "": unseen} for pool in ("K4", "K9")},
        "labels": {"K4": {"64": stream, "128": stream}, "K9": {"64": stream}},
        "ablations": {
            variant.title: {
                column: {name: {"accuracy": 0.9} for name in ("offline", "bayesian")} if not number else ablated
                for column in columns
            }
            for number, variant in enumerate(VARIANTS)
        },
    }


def test_a_difference_is_a_win_only_if_its_interval_says_so() -> None:
    assert [standing(gap(value)) for value in (0.02, 0.005, -0.005, -0.02)] == [
        "better", "not told apart", "not told apart", "worse",
    ]  # fmt: skip
    assert [against_zero(gap(value)) for value in (0.02, 0.0, -0.02)] == ["yes", "not told apart", "no"]


def test_clauses_name_each_place_with_its_difference() -> None:
    assert by_place({"K4": gap(0.05), "K6": gap(0.03), "K9": gap(0.001)}) == (
        "better on K4 (+.050) and K6 (+.030); not told apart on K9 (+.001)"
    )
    assert against({"uwo": gap(-0.02), "laser": gap(0.04), "offline": gap(0.0)}) == (
        "better than laser (+.040); not told apart from offline (+.000); worse than uwo (−.020)"
    )
    assert listed(["a", "b", "c"]) == "a, b and c"


def test_a_target_is_reached_at_three_digits() -> None:
    assert reached(0.8996, 0.90) == "yes"
    assert reached(0.8994, 0.90) == "no, .001 short"


def test_figures_are_written_without_a_leading_zero() -> None:
    assert [accuracy(value) for value in (0.917, 1.0, 0.0)] == [".917", "1.000", ".000"]
    assert [signed(value) for value in (0.0123, -0.05, -0.0001)] == ["+.012", "−.050", "+.000"]
    assert difference(gap(0.02)) == "+.020 (+.010 … +.030)"


def test_the_page_says_that_ours_wins_when_it_does_and_loses_when_it_does() -> None:
    winning, losing = (markdown(page(document(lead))).replace("\n  ", " ") for lead in (0.05, -0.05))
    for text, verb in ((winning, "better"), (losing, "worse")):
        assert f"chosen in hindsight, our router is {verb} on K4" in text
        assert f"which asks all RMs, it is {verb} on K4" in text
        assert f"Under shift it earns .900: {verb} than offline" in text


def test_a_missed_target_is_said() -> None:
    missed = document()
    online = copy.deepcopy(missed["online"])
    online["shift"]["policies"]["bayesian"]["accuracy"] = 0.85
    text = markdown(page(missed | {"online": online}))
    row = next(line for line in text.splitlines() if "K4, online, shift" in line)
    assert row.endswith("| no, .060 short |")


def test_an_encoder_that_was_not_run_has_a_sentence_and_no_row() -> None:
    text = markdown(page(document())).replace("\n", " ")
    assert "`offline@smollm2-135m` was not run here" in text
    assert "about 4.0 hours" in text
    assert "| offline@smollm2" not in text


def test_how_the_pools_and_the_defaults_were_chosen_is_said_openly() -> None:
    text = markdown(page(document())).replace("\n  ", " ")
    assert "K4 and K6 were chosen after seeing the RMs' accuracies" in text
    assert "used to choose the defaults" in text
    assert "d" * 64 in text


def test_the_summary_counts_the_domains_in_which_the_best_rm_is_ahead() -> None:
    behind = " ".join(markdown(page(document(-0.05))).split())
    assert (
        "`bayesian` is below it in 2 of 2 rows (pool and domain), in 2 of them beyond the interval: code (K4)" in behind
    )
    slightly = " ".join(markdown(page(document(-0.005))).split())
    assert "below it in 2 of 2 rows (pool and domain), never beyond the interval." in slightly
    ahead = " ".join(markdown(page(document(0.05))).split())
    assert "below it in 0 of 2 rows (pool and domain)." in ahead


def test_primary_contrasts_are_decided_with_all_of_them_in_mind() -> None:
    assert [decided(gap(value), p) for value, p in ((0.1, 0.01), (-0.1, 0.01), (0.1, 0.06))] == [
        "better", "worse", "not told apart",
    ]  # fmt: skip
    sheet = next(b for b in page(document(0.05)) if isinstance(b, Sheet) and b.title == "Primary contrasts")
    assert len(sheet.rows) == len(PRIMARY)
    assert {row[-2] for row in sheet.rows} == {f"{0.001 * len(PRIMARY):.2g}"}
    assert sheet.rows[0][0] == "K9: offline − best single RM, in hindsight"


def test_what_the_evidence_leaves_out_is_said() -> None:
    text = " ".join(markdown(page(document())).split())
    first = text.index("K4")
    assert text.index("chosen after seeing the accuracies") < first + 200
    assert "Intervals leave out refitting" in text
    assert "Rows of papers have published scalars" in text
    assert all(name in text for name in TUNED)
    assert "| K9 | code | 50 | .900 | .800 | .050 | .400 | .020 |" in text


def test_the_85_come_with_how_their_pools_were_chosen_and_their_targets() -> None:
    blocks = page(document(-0.05))
    assert [type(block) for block in blocks[:2]] == [Heading, Picture]
    text = " ".join(markdown(blocks).split())
    assert "S6, S4, E5 and X4 were chosen for room after seeing the accuracies" in text
    targets = next(block for block in blocks if isinstance(block, Sheet) and block.title == "Targets, 85 RMs")
    verdicts = {row[0]: row[-1] for row in targets.rows}
    assert verdicts["S6, offline, `offline`: .885"] == "yes"
    assert verdicts["all 85, offline: not below the best RM by more than .003"] == "no"
    assert verdicts["N5, offline: not below the best RM"] == "no"


def test_a_quick_run_says_so() -> None:
    assert "A quick run" in markdown(page(document() | {"quick": True}))
    assert "A quick run" not in markdown(page(document()))


def test_what_lost_is_listed() -> None:
    text = markdown(page(document(-0.05))).replace("\n  ", " ")
    lost = text[text.index("## What lost") :]
    assert "shift: `bayesian` is worse than" in lost
    assert "offline routing alone is worse than the best RM of code" in lost


def test_both_forms_hold_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = page(document())
    show(blocks)
    printed, written = capsys.readouterr().out, markdown(blocks)
    for block in blocks:
        if isinstance(block, Sheet):
            assert all(len(row) == len(block.columns) for row in block.rows)
            assert f"**{block.title}**" in written
        elif isinstance(block, Heading):
            assert block.text in printed
        elif isinstance(block, Picture):
            assert f"]({block.path})" in written
    assert sum(isinstance(block, Sheet) for block in blocks) >= 15
