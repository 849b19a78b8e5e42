"""Every command that reads a data file, on every fault of such a file: a sentence that names the file, no traceback."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from service.cli import main

GOOD = {"id": "1", "prompt": "p", "response_a": "x", "response_b": "y", "label": "a", "rm": {"R": {"verdict": "a"}}}


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


DIRECTORY = b"(a directory)"

FAULTS: dict[str, bytes | None] = {
    "absent.jsonl": None,
    "directory.jsonl": DIRECTORY,
    "empty.jsonl": b"",
    "blank.jsonl": b"\n  \n",
    "mark.jsonl": b"\xef\xbb\xbf",
    "bytes.jsonl": bytes(range(256)),
    "utf16.jsonl": lines(GOOD).decode().encode("utf-16"),
    "surrogate.jsonl": lines({**GOOD, "prompt": "\ud83d"}),
    "list.jsonl": lines([1, 2]),
    "number.jsonl": b"1e999\n",
    "nested.jsonl": b"[" * 100_000,
    "fields.jsonl": lines({"chosen": "x", "rejected": "y"}),
    "null.jsonl": lines(dict.fromkeys(GOOD)),
    "label.jsonl": lines({**GOOD, "label": "z"}),
    "scores.jsonl": lines({**GOOD, "rm": {"R": {"score_a": "1"}}}),
    "absurd.jsonl": lines({**GOOD, "rm": {"R": {"score_a": 1e300, "score_b": 0}}}),
    "not-gzip.jsonl.gz": lines(GOOD),
    "torn.jsonl.gz": gzip.compress(lines(GOOD))[:-9],
    "not-zstd.jsonl.zst": lines(GOOD),
}
UNLABELLED: dict[str, bytes] = {
    "no-rm.jsonl": lines(*[{**GOOD, "id": str(i), "prompt": f"p{i}", "rm": {}} for i in range(9)]),
    "ties.jsonl": lines({**GOOD, "label": "tie"}),
    "no-label.jsonl": lines({**GOOD, "label": None}),
}
COMMANDS = {
    "train": "train FILE --out DIR/out",
    "train-lora": "train FILE --out DIR/out --finetune lora",
    "evaluate": "evaluate --train FILE",
    "evaluate-test": "evaluate --train DIR/good.jsonl --test FILE",
    "replay": "replay FILE",
    "replay-train": "replay DIR/good.jsonl --train FILE",
    "frontier": "frontier FILE",
    "label": "label FILE --pool DIR/pool.yaml --out DIR/labelled.jsonl",
    "label-earlier": "label DIR/good.jsonl --pool DIR/pool.yaml --out FILE",
    "worker": "worker --recorded FILE --model R",
    "ope": "ope FILE --policies random",
    "convert": "convert FILE --out DIR/out.jsonl",
}


def refused(words: str, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must end with an error; returns what it printed as an error, on one line."""
    named = words.replace("FILE", str(path)).replace("DIR", str(path.parent))
    monkeypatch.setattr(sys, "argv", ["reward-router", *named.split()])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def prepare(content: bytes | None, path: Path) -> None:
    (path.parent / "good.jsonl").write_bytes(lines(GOOD))
    (path.parent / "pool.yaml").write_text("models:\n  - {name: R, urls: ['http://127.0.0.1:9']}\n")
    if content is DIRECTORY:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_faulty_file_is_named(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if (command, name) == ("label-earlier", "absent.jsonl"):
        pytest.skip("an output need not exist")
    if command == "convert" and name in ("scores.jsonl", "absurd.jsonl"):
        pytest.skip("convert does not read scores")
    prepare(FAULTS[name], tmp_path / name)
    assert name in refused(COMMANDS[command], tmp_path / name, monkeypatch, capsys)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("name", UNLABELLED)
@pytest.mark.parametrize("command", ["train", "evaluate", "replay", "frontier"])
def test_pairs_that_teach_nothing_are_refused_with_the_remedy(
    command: str,
    name: str,
    pool: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(UNLABELLED[name], tmp_path / name)
    named = f"{COMMANDS[command]} --pool R" if pool else COMMANDS[command]
    said = refused(named, tmp_path / name, monkeypatch, capsys)
    assert ("run `reward-router label` first" in said) == (name == "no-rm.jsonl")
