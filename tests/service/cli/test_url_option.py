"""The option `--url` of the commands: the gateway that was started from here is found, whatever its port."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import typer

from service.cli import app
from service.cli.url_option import URL_VARIABLES, noted_url, usual_url
from tests.conftest import free_port
from tests.service.cli.test_key_option import commands

USUAL = "http://127.0.0.1:8080"


class Alive(BaseHTTPRequestHandler):
    """A gateway that is alive."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_ROUTER_DATA_DIR", str(tmp_path))


def test_a_gateway_on_another_port_is_found_while_it_answers(tmp_path: Path) -> None:
    assert usual_url() == USUAL
    server = HTTPServer(("127.0.0.1", 0), Alive)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with noted_url(tmp_path, url):
        assert usual_url() == url
    assert usual_url() == USUAL
    server.shutdown()
    server.server_close()


def test_a_note_that_a_killed_gateway_left_is_passed_over(tmp_path: Path) -> None:
    with noted_url(tmp_path, f"http://127.0.0.1:{free_port()}"):
        assert usual_url() == USUAL


def test_every_command_that_needs_a_gateway_looks_for_it() -> None:
    found = {
        name: parameter
        for name, command in commands(typer.main.get_command(app))
        for parameter in command.params
        if "--url" in parameter.opts and parameter.envvar
    }
    assert found.keys() == {"models", "report", "audit", "pool show", "pool diff", "pool apply"}
    assert all([*parameter.envvar] == [*URL_VARIABLES] for parameter in found.values())
