"""What `up` finds before it starts anything."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from typer.testing import CliRunner

from router_core.checkpoint import WEIGHTS_FILE
from service.cli import app
from service.cli.preflight import check_start
from service.errors import ConfigurationError
from service.gateway import build_gateway
from service.pool import PoolFile, load_pool
from service.settings import read_settings, store_directory
from service.stores.embedded import EmbeddedStore
from service.stores.redis import RedisStore
from tests.service.cli.test_ope import checkpoint


def test_a_checkpoint_of_other_scorers_is_said_before_anything_starts(tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "checkpoint")
    (tmp_path / "pool.yaml").write_text("models: [{name: stranger, urls: ['http://127.0.0.1:1']}]")
    words = ["up", "--pool", str(tmp_path / "pool.yaml"), "--checkpoint", str(tmp_path / "checkpoint"), "--dry-run"]
    done = CliRunner().invoke(app, [*words, "--data-dir", str(tmp_path / "data")])
    assert (done.exit_code, "does not fit the pool (stranger)" in done.output) == (1, True)
    assert not (tmp_path / "data").exists()


def test_a_wrong_signal_is_said_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_text("models: [{name: a, urls: ['http://127.0.0.1:1']}]")
    pool = load_pool(tmp_path / "pool.yaml")
    assert check_start(pool, None, "mine", signal="reward").settings.run == "mine"
    with pytest.raises(ConfigurationError, match="setting signal"):
        check_start(pool, None, None, signal="praise")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A data directory whose store holds the run `mine` of the pool a, b, with the signal `reward`."""
    with EmbeddedStore(store_directory(tmp_path / "data")) as store:

        async def open_run() -> None:
            opened = RedisStore(store.url, window_seconds=60)
            settings = read_settings(signal="reward", run="mine")
            gateway = build_gateway(settings, _pool(tmp_path, "a", "b"), store=opened)
            template = gateway.runs.template
            await opened.open_run("mine", template.fingerprint(template.terms()).encode())
            await gateway.stop()

        asyncio.run(open_run())
    return tmp_path


def _pool(folder: Path, *names: str) -> PoolFile:
    entries = ", ".join(f"{{name: {name}, urls: ['http://127.0.0.1:9']}}" for name in names)
    (folder / "pool.yaml").write_text(f"models: [{entries}]")
    return load_pool(folder / "pool.yaml")


def _up(folder: Path, *words: str) -> str:
    """Error of `up`, or what it printed."""
    given = ["up", "--pool", str(folder / "pool.yaml"), "--data-dir", str(folder / "data"), "--run", "mine", *words]
    done = CliRunner().invoke(app, given)
    if "--dry-run" in words:
        return f"{'fits' if 'FAILS  settings' not in done.output else 'fails'}\n{done.output}"
    return str(done.exception)


def test_another_pool_than_the_runs_is_said_before_anything_starts(kept: Path) -> None:
    _pool(kept, "a", "c")
    said = _up(kept, "--dry-run")
    assert "run 'mine' goes on with the pool that it has (a, b)" in said
    assert "retire b; add c (starts from nothing)" in said
    assert not (kept / "data" / "logs").exists()


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_another_signal_than_the_runs_is_said_before_anything_starts(kept: Path, dry: list[str]) -> None:
    _pool(kept, "a", "b")
    assert "was opened with the signal 'reward'" in _up(kept, *dry, "--signal", "loss")
    assert not (kept / "data" / "logs").exists()


def test_a_dry_run_of_what_the_run_has_fits(kept: Path) -> None:
    _pool(kept, "a", "b")
    assert _up(kept, "--dry-run").startswith("fits")
    assert _up(kept, "--dry-run", "--signal", "reward").startswith("fits")


def test_a_dry_run_finds_settings_that_exclude_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pool(tmp_path, "a", "b")
    monkeypatch.setenv("REWARD_ROUTER_PRIOR", "calibrated")
    assert "a checkpoint holds, and none is given" in _up(tmp_path, "--dry-run")
    assert not (tmp_path / "data").exists()


def test_a_missing_checkpoint_is_called_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere: the directory does not exist"):
        check_start(_pool(tmp_path, "a"), tmp_path / "nowhere", None)
    checkpoint().save(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / WEIGHTS_FILE).unlink()
    with pytest.raises(ConfigurationError, match=f"it lacks the file {WEIGHTS_FILE}"):
        check_start(_pool(tmp_path, "a"), tmp_path / "checkpoint", None)
