"""`evaluate` as people and programs run it: the document, its determinism, what it says on standard error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

pytest.importorskip("torch")

# Before TrainConfig is replaced below: the module's own annotations are evaluated when it is imported.
import router_core.offline.table  # noqa: F401
from router_core.dataset import load_pairs, pairs_digest, write_pairs
from router_core.encoder.surface import SurfaceBackbone
from router_core.errors import DatasetError, EncoderError
from router_core.offline.train import TrainConfig, train
from router_core.records import LabelledPair
from service.cli import app
from tests.support.offline import POOL, two_domains

TRAIN, TEST = two_domains(120), two_domains(60, seed=1)
FAST = TrainConfig(max_epochs=12, folds=2, directions=4, hidden=8)


@pytest.fixture(autouse=True)
def _short_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command fits with the defaults, which take seconds each."""
    monkeypatch.setattr("router_core.offline.train.TrainConfig", lambda **given: replace(FAST, **given))


def evaluate(*options: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", "--encoder", "surface", *map(str, options)])


def document(*options: object) -> dict[str, Any]:
    result = evaluate(*options, "--json", "-")
    assert result.exit_code == 0, (result.output, result.exception)
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    write_pairs(tmp_path / "train.jsonl", TRAIN)
    write_pairs(tmp_path / "test.jsonl", TEST)
    return tmp_path / "train.jsonl", tmp_path / "test.jsonl"


def saved(path: Path, pairs: list[LabelledPair]) -> Path:
    write_pairs(path, pairs)
    return path


def test_the_document_holds_every_row_per_subset_and_in_all(files: tuple[Path, Path]) -> None:
    found = document("--train", files[0], "--test", files[1])
    assert found["n"] == 60
    assert list(found["policies"]) == [
        "single:coder", "single:talker", "random", "majority", "uwo",
        "stacked", "cascade:1.5", "cascade:2", "cascade:3",
            "offline", "offline:bt", "offline:cls", "offline:no-cls",
    ]  # fmt: skip
    for row in found["policies"].values():
        assert {"accuracy", "ci95", "calls_per_instance", "regret"} <= set(row)
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
    assert found["policies"]["offline"]["accuracy"] > found["best_single"]["accuracy"]
    assert {name: part["n"] for name, part in found["subsets"].items()} == {"code": 30, "prose": 30}
    assert set(found["subsets"]["code"]["policies"]) == set(found["policies"])
    assert found["subsets"]["code"]["best_single"]["model"] == "coder"
    assert (found["train_digest"], found["test_digest"]) == (pairs_digest(TRAIN), pairs_digest(TEST))
    assert (found["seeds"], found["scenario"], found["overlap"]) == ([0], "held-out", {"groups": 0, "pairs": 0})
    assert found["oracle"] >= found["best_per_subset"] >= found["best_single"]["accuracy"]
    assert {name: part["n"] for name, part in found["calibration"].items()} == {"code": 30, "prose": 30, "": 60}
    assert found["calibration"][""]["right"] == pytest.approx(found["policies"]["offline"]["accuracy"])


def test_equal_commands_write_equal_files_and_print_a_table(files: tuple[Path, Path], tmp_path: Path) -> None:
    outs = [tmp_path / "deep" / name for name in ("1.json", "2.json")]
    for out in outs:
        result = evaluate("--train", files[0], "--test", files[1], "--json", out)
        assert result.exit_code == 0
        assert "offline" in result.stdout
        assert "60 pairs, 2 RMs" in result.stdout
        assert "calibration of `offline`, on pairs that it has not seen" in result.stdout
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_no_cls_fits_the_one_router_without_the_classification_loss(files: tuple[Path, Path]) -> None:
    without = document("--train", files[0], "--test", files[1], "--no-cls")
    assert [name for name in without["policies"] if name.startswith("offline")] == ["offline"]
    assert without["config"]["lambda_cls"] == 0.0
    both = document("--train", files[0], "--test", files[1])
    assert without["policies"]["offline"] == both["policies"]["offline:no-cls"]
    assert without["paired"]["offline"] == both["paired"]["offline:no-cls"]


def test_the_pool_is_chosen_and_ordered_by_name(files: tuple[Path, Path]) -> None:
    found = document("--train", files[0], "--test", files[1], "--pool", "talker,coder", "--no-ablations")
    assert found["pool"] == ["talker", "coder"]
    alone = document("--train", files[0], "--test", files[1], "--pool", "coder", "--no-ablations")
    assert alone["policies"]["offline"]["accuracy"] == alone["policies"]["single:coder"]["accuracy"]
    result = evaluate("--train", files[0], "--test", files[1], "--pool", "coder,nobody")
    assert isinstance(result.exception, DatasetError)
    assert "'nobody'" in str(result.exception)


def test_another_encoder_is_another_row(files: tuple[Path, Path]) -> None:
    found = document("--train", files[0], "--test", files[1], "--encoder", "surface,words", "--no-ablations")
    assert [name for name in found["policies"] if name.startswith("offline")] == ["offline", "offline@words"]
    result = evaluate("--train", files[0], "--test", files[1], "--encoder", "surface,nonsense")
    assert isinstance(result.exception, EncoderError)


def test_several_seeds_are_averaged(files: tuple[Path, Path]) -> None:
    found = document("--train", files[0], "--test", files[1], "--seeds", 2, "--no-ablations")
    per_seed = found["per_seed"]["offline"]
    assert (found["seeds"], len(per_seed)) == ([0, 1], 2)
    assert found["policies"]["offline"]["accuracy"] == pytest.approx(sum(per_seed) / 2)


def test_without_a_test_it_cross_validates(files: tuple[Path, Path]) -> None:
    found = document("--train", files[0], "--folds", 3, "--no-ablations")
    assert (found["n"], found["scenario"], found["folds"]) == (120, "cross-validation", 3)
    assert found["policies"]["offline"]["accuracy"] > found["best_single"]["accuracy"]


def test_pairs_with_gaps_are_left_out_with_a_note_and_a_count(files: tuple[Path, Path], tmp_path: Path) -> None:
    gappy = saved(tmp_path / "gaps.jsonl", two_domains(60, seed=1, missing=0.3))
    result = evaluate("--train", files[0], "--test", gappy, "--no-ablations", "--json", "-")
    found = json.loads(result.stdout)
    assert 0 < found["left_out"] == 60 - found["n"]
    assert f"{found['left_out']} pairs were not judged" in result.stderr


def test_pairs_that_both_files_hold_are_said_aloud(files: tuple[Path, Path], tmp_path: Path) -> None:
    renamed = [replace(pair, id=f"again/{pair.id}", group="other") for pair in TRAIN[:5]]
    result = evaluate(
        "--train", files[0], "--test", saved(tmp_path / "leak.jsonl", TEST + renamed), "--no-ablations", "--json", "-"
    )
    assert json.loads(result.stdout)["overlap"] == {"groups": 1, "pairs": 5}
    assert "5 test pairs" in result.stderr


def test_a_checkpoint_is_judged_as_it_is(files: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = train(TRAIN, POOL, SurfaceBackbone(), FAST)
    digest = checkpoint.save(tmp_path / "checkpoint")
    found = document("--checkpoint", tmp_path / "checkpoint", "--test", files[1])
    assert (found["scenario"], found["checkpoint"], found["train_digest"]) == (
        "checkpoint", digest, pairs_digest(TRAIN),
    )  # fmt: skip
    assert "offline" in found["policies"]
    assert found["policies"]["majority"]["calls_per_instance"] == 2
    result = evaluate("--checkpoint", tmp_path / "checkpoint", "--test", files[0])
    assert "trained on these very pairs" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--checkpoint DIR"),
        (["--checkpoint", "x"], "--test FILE"),
        (["--checkpoint", "x", "--test", "y", "--train", "z"], "leave --train out"),
    ],
)
def test_what_is_judged_must_be_clear(options: list[str], words: str) -> None:
    result = evaluate(*options)
    assert result.exit_code == 2
    assert words in result.stderr


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    result = evaluate("--train", tmp_path / "absent.jsonl")
    assert isinstance(result.exception, DatasetError)
    assert "absent.jsonl" in str(result.exception)


def test_subsets_are_columns_where_they_fit(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    wide = evaluate("--train", files[0], "--test", files[1], "--no-ablations").stdout
    monkeypatch.setenv("COLUMNS", "80")
    narrow = evaluate("--train", files[0], "--test", files[1], "--no-ablations").stdout
    assert "per subset\n" not in wide
    assert "prose" in wide.splitlines()[2]
    assert "per subset" in narrow
    assert load_pairs(files[1]) == TEST


def test_the_rows_that_are_named_are_shown_and_others_refused(files: tuple[Path, Path]) -> None:
    found = document("--train", files[0], "--test", files[1], "--policies", "offline,cascade:1.2,majority")
    assert list(found["policies"]) == ["majority", "cascade:1.2", "offline"]
    assert 1.0 <= found["policies"]["cascade:1.2"]["calls_per_instance"] <= 1.5
    refused = CliRunner().invoke(app, ["evaluate", "--train", str(files[0]), "--policies", "cascade:0.5"])
    assert refused.exit_code != 0
    assert "at least 1" in str(refused.exception)


def test_prices_count_in_every_row_and_change_whom_a_cascade_asks(files: tuple[Path, Path]) -> None:
    wanted = ("--train", files[0], "--test", files[1], "--no-ablations")
    equal, dear = document(*wanted)["policies"], document(*wanted, "--price", "coder=4")["policies"]
    assert (dear["single:coder"]["price_per_instance"], dear["majority"]["price_per_instance"]) == (4.0, 5.0)
    assert dear["random"]["price_per_instance"] == 2.5
    assert dear["stacked"]["price_per_instance"] == 5.0
    assert dear["stacked"]["accuracy"] == equal["stacked"]["accuracy"]
    # Routing asks as ever, and pays; a cascade asks cheaper arms. Its multiplier is that of the training pairs, and few
    # pairs of two kinds of text do not keep to a budget exactly.
    assert dear["offline"]["accuracy"] == equal["offline"]["accuracy"]
    assert dear["offline"]["price_per_instance"] > 2.0
    assert dear["cascade:1.5"]["price_per_instance"] < dear["offline"]["price_per_instance"]
    result = evaluate(*wanted, "--price", "nobody=2")
    assert result.exit_code == 2
    assert "NAME=PRICE" in result.output


def test_a_replay_paces_its_budget_in_price(files: tuple[Path, Path]) -> None:
    words = ["replay", str(files[1]), "--train", str(files[0]), "--encoder", "surface", "--seeds", "1", "--json", "-"]
    result = CliRunner().invoke(app, [*words, "--policies", "cascade:2,single:coder,majority", "--price", "coder=4"])
    assert result.exit_code == 0, (result.output, result.exception)
    rows = json.loads(result.stdout)["policies"]
    assert rows["single:coder"]["price_per_instance"] == 4.0
    assert rows["majority"]["price_per_instance"] == 5.0
    assert rows["cascade:2"]["price_per_instance"] < 3.0


def test_abstaining_is_counted_as_abstaining(files: tuple[Path, Path], tmp_path: Path) -> None:
    """`talker` has nothing to say of code: it is never asked there, and judged on prose alone."""

    def silent(pair: LabelledPair) -> LabelledPair:
        told = {name: value for name, value in pair.verdicts.items() if name != "talker"}
        scores = {name: value for name, value in pair.scores.items() if name != "talker"}
        return replace(pair, verdicts=told, scores=scores, abstained=frozenset({"talker"}))

    given = [[silent(one) if one.domain == "code" else one for one in part] for part in (TRAIN, TEST)]
    train_file, test_file = (saved(tmp_path / f"{i}.jsonl", part) for i, part in enumerate(given))
    assert load_pairs(test_file) == given[1]
    found = document("--train", train_file, "--test", test_file)
    assert (found["n"], found["left_out"]) == (60, 0)
    talker = found["policies"]["single:talker"]
    assert talker["coverage"] == 0.5
    assert (
        talker["accuracy"]
        == document("--train", *files[:1], "--test", files[1])["subsets"]["prose"]["policies"]["single:talker"][
            "accuracy"
        ]
    )
    code = found["subsets"]["code"]["policies"]
    assert code["offline"]["accuracy"] == code["single:coder"]["accuracy"] == code["majority"]["accuracy"]
    assert found["policies"]["majority"]["calls_per_instance"] == 1.5
    assert "answers" in evaluate("--train", train_file, "--test", test_file).stdout
