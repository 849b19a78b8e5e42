"""The command `pool`: show, compare and change the pool of a live run, over HTTP with a real worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import Result
from typer.testing import CliRunner

from service.cli import app
from service.lab.client import GatewayError
from tests.service.scorers.worker_servers import ScriptedWorker
from tests.support.live import live_gateway

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess
    from tests.service.scorers.worker_servers import Serve


def command(*words: object) -> Result:
    return CliRunner().invoke(app, ["pool", *map(str, words)])


def test_a_pool_file_is_compared_and_applied(valkey_server: ValkeyProcess, tmp_path: Path, serve: Serve) -> None:
    file = tmp_path / "pool.yaml"
    with live_gateway(valkey_server.url) as gateway:
        url = serve(ScriptedWorker("rm-d"))
        file.write_text(
            f"models: [{{name: rm-a, price: 2.0}}, {{name: rm-b}}, {{name: rm-d, urls: ['{url}']}}]\n"
            "routing: {v: 0.1, max_calls: 2}\n"
        )
        where = ("--url", gateway.url, "--run", gateway.run)
        unopened = command("diff", file, *where)
        assert unopened.exit_code == 1, unopened.output
        for words in (
            "retire rm-c",
            "add rm-d (starts from nothing)",
            "rm-a: price default -> 2.0",
            "v default -> 0.1",
        ):
            assert words in unopened.output
        assert "pool version 0" in command("show", *where).output
        with pytest.raises(GatewayError, match="version 0"):
            CliRunner().invoke(app, ["pool", "apply", str(file), "--expect", "7", *where], catch_exceptions=False)
        done = command("apply", file, "--expect", "0", *where)
        assert done.exit_code == 0, done.output
        assert "applied as event" in done.output
        assert "cannot be asked" not in done.output
        same = command("diff", file, *where)
        assert (same.exit_code, "nothing to change" in same.output) == (0, True)
        shown = command("show", *where).output
        for words in ("pool version 1", "v 0.1", "rm-c: retired", "rm-d: on probation", "would change:"):
            assert words in shown
        arms = json.loads(command("show", "--json", *where).stdout)["arms"]
        assert [arm["name"] for arm in arms] == ["rm-a", "rm-b", "rm-c", "rm-d"]
        text = file.read_text()
        file.write_text(text.replace("rm-d", "rm-e"))
        wrong = command("apply", file, *where)
        assert wrong.exit_code == 0, wrong.output
        assert f"rm-e: {url}: serves rm-d, not 'rm-e'" in wrong.output
