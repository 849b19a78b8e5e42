"""Preference data as published, to rows: what is taken for what, what is left out, and the files it comes in."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from router_core.dataset import read_rows
from router_core.errors import DatasetError
from router_core.records import TIE
from router_core.rows import Row
from service.cli import app
from service.lab.convert.convert import Account, convert_file

Q, GOOD, POOR = "What is 7 + 5?", "Twelve it is.", "13, I think."


def user(text: str = Q) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def written(tmp_path: Path, *records: Any) -> tuple[Account, list[Row]]:
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    account = convert_file(source, tmp_path / "pairs.jsonl")
    return account, read_rows(tmp_path / "pairs.jsonl").rows


ULTRA = [{"response": text, "overall_score": score} for text, score in ((POOR, 3.0), (GOOD, 8.5), ("?", 1))]
PUBLISHED: dict[str, dict[str, Any]] = {
    "trl strings": {"prompt": Q, "chosen": GOOD, "rejected": POOR},
    "trl messages": {"prompt": [user()], "chosen": [assistant(GOOD)], "rejected": [assistant(POOR)]},
    "trl implicit prompt": {"chosen": f"{Q} {GOOD}", "rejected": f"{Q} {POOR}"},
    "trl implicit messages": {"chosen": [user(), assistant(GOOD)], "rejected": [user(), assistant(POOR)]},
    "sharegpt": {
        "chosen": [{"from": "human", "value": Q}, {"from": "gpt", "value": GOOD}],
        "rejected": [{"from": "human", "value": Q}, {"from": "gpt", "value": POOR}],
    },
    "hh-rlhf": {
        "chosen": f"\n\nHuman: {Q}\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: {Q}\n\nAssistant: {POOR}",
    },
    "ultrafeedback": {"source": "s", "instruction": Q, "completions": ULTRA},
    "ultrafeedback binarized": {
        "prompt": Q,
        "prompt_id": "x",
        "chosen": [user(), assistant(GOOD)],
        "rejected": [user(), assistant(POOR)],
        "score_chosen": 8.5,
    },
    "rewardbench": {"prompt": Q, "chosen": GOOD, "rejected": POOR, "subset": "math-prm", "id": 3},
    "rewardbench 2": {"prompt": Q, "chosen": [GOOD], "rejected": [POOR, "?", "!"], "subset": "Math", "id": "7"},
    "helpsteer2": {"prompt": Q, "response_1": POOR, "response_2": GOOD, "preference_strength": 2},
    "helpsteer3": {"context": [user()], "response1": GOOD, "response2": POOR, "overall_preference": -1},
    "arena": {
        "conversation_a": [user(), assistant(POOR)],
        "conversation_b": [{**user(), "num_tokens": 5}, assistant(GOOD)],
        "winner": "model_b",
    },
    "arena columns": {
        "prompt": json.dumps([Q]),
        "response_a": json.dumps([GOOD]),
        "response_b": json.dumps([POOR]),
        "winner_model_a": 1,
        "winner_model_b": 0,
        "winner_tie": 0,
    },
    "arena of texts": {"prompt": Q, "response_a": POOR, "response_b": GOOD, "winner": "model_b"},
    "saferlhf": {"prompt": Q, "response_0": POOR, "response_1": GOOD, "better_response_id": 1},
    "ours": {"prompt": Q, "response_a": POOR, "response_b": GOOD, "label": "b"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_format_gives_prompt_responses_and_the_better_one(name: str, tmp_path: Path) -> None:
    account, [row] = written(tmp_path, PUBLISHED[name])
    assert row.label is not None
    assert (row.instance.prompt, row.instance.responses[row.label]) == (Q, GOOD)
    assert POOR in row.instance.responses
    [(_, rows)] = account.taken.values()
    assert (account.records, account.rows, rows, account.left_out) == (1, 1, 1, {})


def test_conversations_stay_conversations(tmp_path: Path) -> None:
    before = f"\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: {Q}\n\nAssistant: "
    system = {"role": "system", "content": "Be brief."}
    _, rows = written(
        tmp_path,
        {"chosen": before + GOOD, "rejected": before + POOR},
        {"prompt": [system, user()], "chosen": [assistant(GOOD)], "rejected": [assistant(POOR)]},
    )
    found = [[(turn.role, turn.text) for turn in row.instance.turns or ()] for row in rows]
    assert found[0] == [("user", "Hello"), ("assistant", "Hi"), ("user", Q)]
    assert found[1] == [("system", "Be brief."), ("user", Q)]
    assert [row.instance.responses[row.label] for row in rows] == [GOOD, GOOD]


@pytest.mark.parametrize(
    "record",
    [
        {
            "conversation_a": [user(), assistant("x")],
            "conversation_b": [user(), assistant("y")],
            "winner": "tie (bothbad)",
        },
        {"prompt": Q, "response_1": "x", "response_2": "y", "preference_strength": 0},
        {"prompt": Q, "response_a": "x", "response_b": "y", "winner_model_a": 0, "winner_model_b": 0},
        {"instruction": Q, "completions": [{"response": t, "overall_score": 4} for t in "xy"]},
    ],
)
def test_ties_are_labelled_ties(record: dict[str, Any], tmp_path: Path) -> None:
    account, [row] = written(tmp_path, record)
    assert (row.label, account.ties) == (TIE, 1)


def test_helpsteer_ratings_are_compared_by_prompt(tmp_path: Path) -> None:
    ratings = [{"prompt": Q, "response": text, "helpfulness": score} for text, score in ((POOR, 1), (GOOD, 4))]
    alone = {"prompt": "alone", "response": "x", "helpfulness": 2}
    torn = [{"prompt": "torn", "response": text, "helpfulness": float("nan")} for text in "xy"]
    account, [row] = written(tmp_path, *ratings, alone, *torn)
    assert row.label is not None
    assert row.instance.responses[row.label] == GOOD
    assert account.left_out == {"there are fewer than two responses": 1, "a score is missing or not a number": 1}


def test_what_is_no_preference_is_left_out_and_counted_by_reason(tmp_path: Path) -> None:
    good = PUBLISHED["trl strings"]
    bad: list[Any] = [
        {**good, "rejected": GOOD},
        {**good, "prompt": ""},
        {**good, "prompt": "\ud83d"},
        {**good, "rejected": None},
        {**good, "chosen": [assistant(GOOD), user("More?"), assistant("x")], "rejected": 7},
        {"chosen": "x", "rejected": "y"},
        {"prompt": Q, "response_1": "x", "response_2": "y", "preference_strength": "unknown"},
        {"prompt": Q, "response_a": "x", "response_b": "y", "winner": "neither"},
        {
            "conversation_a": [user(), assistant("x"), user("b"), assistant("c")],
            "conversation_b": [user()],
            "winner": "a",
        },
        {"instruction": Q, "completions": [{"response": "x", "overall_score": None}, {"response": "y"}]},
        {"instruction": Q, "completions": [None]},
        {**good, "prompt": "[{'role': 'user', 'content': 'x'}\n {'role': 'assistant'"},
        [],
        {"other": 1},
    ]
    account, rows = written(tmp_path, good, *bad, good)
    assert [row.id for row in rows] == ["source/1", f"source/{len(bad) + 2}"]
    assert sum(account.left_out.values()) == len(bad)
    assert account.left_out["responses are equal"] == 1
    assert account.left_out["the columns are of no known format"] == 2


def test_rows_of_ours_keep_every_field(tmp_path: Path) -> None:
    record = {**PUBLISHED["ours"], "id": "x", "rm": {"R": {"score_a": 1.0, "score_b": 2.0}}, "more": [1]}
    _, [row] = written(tmp_path, record)
    assert row.fields == record


def test_names_are_kept_and_ids_made_unique(tmp_path: Path) -> None:
    record = PUBLISHED["rewardbench"]
    _, rows = written(tmp_path, record, record, {**record, "id": None})
    assert [(row.id, row.subset) for row in rows] == [("3", "math-prm"), ("3#2", "math-prm"), ("source/3", "math-prm")]


def test_the_better_response_comes_first_about_as_often_as_last(tmp_path: Path) -> None:
    _, rows = written(tmp_path, *[{"prompt": f"{Q} {i}", "chosen": GOOD, "rejected": POOR} for i in range(200)])
    assert 70 < sum(row.label or 0 for row in rows) < 130


def test_csv_parquet_arrays_and_compressed_files_say_the_same(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [PUBLISHED["trl messages"], {**PUBLISHED["trl messages"], "prompt": [user('Second,\n"line"?')]}]
    account, rows = written(tmp_path, *records)
    array, table, sheet = tmp_path / "source.json", tmp_path / "source.parquet", tmp_path / "source.csv"
    array.write_bytes(b"\xef\xbb\xbf" + json.dumps(records).encode())
    parquet.write_table(pyarrow.Table.from_pylist(records), table)
    with sheet.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerow({name: json.dumps(value) for name, value in records[0].items()})
        writer.writerow({name: str(value) for name, value in records[1].items()})
    zipped = []
    for path in (array, table, sheet, tmp_path / "source.jsonl"):
        zipped.append(path.with_name(path.name + ".gz"))
        zipped[-1].write_bytes(gzip.compress(path.read_bytes()))
    for path in (array, table, sheet, *zipped):
        assert convert_file(path, tmp_path / "out.jsonl") == account, path
        assert [row.instance for row in read_rows(tmp_path / "out.jsonl").rows] == [row.instance for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"x", "ends in .jsonl"),
        ("a.parquet", b"x", "cannot be read as Parquet"),
        ("a.json", b"[1,", "is not a JSON array"),
        ("a.csv", b"\xff\xfe\x00", "is not CSV in UTF-8"),
        ("a.csv", b"prompt,chosen\nx,y\n", "columns are prompt, chosen; known are hh-rlhf"),
        ("a.jsonl", b"", "holds no record"),
        ("a.jsonl", b"[" * 100_000, "is not a JSON array"),
        ("a.jsonl.gz", b"x", "gzip"),
        ("a.jsonl", None, "cannot be read"),
    ],
)
def test_files_of_something_else_are_refused(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=said):
        convert_file(tmp_path / name, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command_says_what_it_took_for_what(tmp_path: Path) -> None:
    source, out = tmp_path / "source.jsonl", tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in [*PUBLISHED.values(), {"x": 1}]))
    result = CliRunner().invoke(app, ["convert", str(source), "--out", str(out)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "hh-rlhf dialogues, 1 rows: prompt: the turns that `chosen` and `rejected` share" in result.stdout
    assert "left out 1: the columns are of no known format" in lines
    assert lines[-1].startswith(f"{len(PUBLISHED)} rows of {len(PUBLISHED) + 1} records in {out}")
    result = CliRunner().invoke(app, ["convert", str(source), "--out", str(out), "--json", "-"])
    assert json.loads(result.stdout)["rows"] == len(PUBLISHED)
