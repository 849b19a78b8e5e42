"""The journal: nothing that was appended is lost, and what was torn does no harm."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from router_core.records import Instance
from service.errors import ConfigurationError
from service.lab.labelling.journal import Answer, Journal, content_key, write_atomically

SCORED = Answer("key-1", "rm-a", scores=(0.1, -2.5e-300, 3.0))
REFUSED = Answer("key-2", "rm-a", reason="refused (400): “zu lang”")


def test_answers_are_there_again_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.partial"
    with Journal(path) as journal:
        journal.append([SCORED])
        journal.append([REFUSED])
    with Journal(path) as journal:
        assert journal.answers == {("key-1", "rm-a"): SCORED, ("key-2", "rm-a"): REFUSED}


def test_what_was_appended_stands_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.append([SCORED, REFUSED])
        assert path.read_bytes().count(b"\n") == 2


def test_the_last_answer_to_a_content_counts(tmp_path: Path) -> None:
    path = tmp_path / "j"
    again = Answer("key-1", "rm-a", scores=(9.0, 8.0))
    with Journal(path) as journal:
        journal.append([SCORED])
        journal.append([again])
    with Journal(path) as journal:
        assert journal.answers["key-1", "rm-a"] == again


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.append([REFUSED])
        whole = path.stat().st_size
        journal.append([SCORED])
    os.truncate(path, path.stat().st_size - cut)
    with Journal(path) as journal:
        assert list(journal.answers.values()) == [REFUSED]
        assert path.stat().st_size == whole
        journal.append([SCORED])
    with Journal(path) as journal:
        assert list(journal.answers.values()) == [REFUSED, SCORED]


def test_a_line_in_the_middle_that_is_no_answer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b'{"content": 7}\n{"content": "k", "model": "m", "scores": [1, 2]}\n')
    with pytest.raises(ConfigurationError, match="line 1"):
        Journal(path)


def test_two_runs_cannot_write_one_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "j"), pytest.raises(ConfigurationError, match="another run"):
        Journal(tmp_path / "j")
    with Journal(tmp_path / "j"):
        pass


def test_a_journal_that_cannot_be_opened_is_an_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="choose another --out"):
        Journal(tmp_path / "file" / "j")


def test_the_key_is_of_prompt_and_responses_in_their_order() -> None:
    keys = {
        content_key(Instance(prompt, responses))
        for prompt, responses in (("p", ("a", "b")), ("p", ("b", "a")), ("pa", ("b",)), ("p", ("a", "b", "")))
    }
    assert len(keys) == 4
    assert content_key(Instance("p", ("a", "b"))) in keys


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write_atomically(path, [b"old"])
    write_atomically(path, [b"new", b"lines"])
    assert path.read_bytes() == b"new\nlines\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigurationError, match="cannot be written"):
        write_atomically(tmp_path / "folder", [b"x"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "out.jsonl"]
