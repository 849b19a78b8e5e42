"""What `up` finds before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import app
from service.cli.preflight import check_start
from service.errors import ConfigurationError
from service.pool import load_pool
from tests.service.cli.test_ope import checkpoint


def test_a_checkpoint_of_other_scorers_is_said_before_anything_starts(tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "checkpoint")
    (tmp_path / "pool.yaml").write_text("models: [{name: stranger, urls: ['http://127.0.0.1:1']}]")
    words = ["up", "--pool", str(tmp_path / "pool.yaml"), "--checkpoint", str(tmp_path / "checkpoint"), "--dry-run"]
    done = CliRunner().invoke(app, [*words, "--data-dir", str(tmp_path / "data")])
    assert "does not fit the pool (stranger)" in str(done.exception)
    assert not (tmp_path / "data").exists()


def test_a_wrong_signal_is_said_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_text("models: [{name: a, urls: ['http://127.0.0.1:1']}]")
    pool = load_pool(tmp_path / "pool.yaml")
    assert check_start(pool, None, "mine", "reward").run == "mine"
    with pytest.raises(ConfigurationError, match="setting signal"):
        check_start(pool, None, None, "praise")
