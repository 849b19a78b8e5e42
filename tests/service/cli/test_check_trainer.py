"""`check-trainer` against a running gateway, one whose RMs are away, and something that is no gateway."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from service.cli import app
from service.lab.trainer_conformance import recordings
from service.trainers.protocols import PROTOCOLS
from service.trainers.shim import UrlProtocol
from tests.conftest import ValkeyProcess, free_port
from tests.docs.tables import ROOT
from tests.support.live import LiveGateway, live_gateway


@pytest.fixture
def gateway(valkey_server: ValkeyProcess) -> Iterator[LiveGateway]:
    with live_gateway(valkey_server.url) as running:
        yield running


def test_every_trainer_gets_its_rewards(gateway: LiveGateway) -> None:
    result = CliRunner().invoke(app, ["check-trainer", gateway.url])
    assert result.exit_code == 0, result.output
    assert f"{len(recordings())} of {len(recordings())} requests would work" in result.output
    assert all(f"{one.trainer}: its example" in result.output for one in PROTOCOLS)


def test_a_gateway_without_its_models_fails_all_but_the_empty_batch(valkey_server: ValkeyProcess) -> None:
    with live_gateway(valkey_server.url, trainer_patience_seconds=0) as gateway:
        for arm in gateway.arms:
            arm.available = False
        result = CliRunner().invoke(app, ["check-trainer", gateway.url])
    assert result.exit_code == 1
    assert f"1 of {len(recordings())} requests would work" in result.output
    assert "status 503" in result.output


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda one: one.trainer)
def test_every_protocol_is_replayed_in_all_its_shapes(protocol: UrlProtocol) -> None:
    of_it = [one for one in recordings() if one.path == protocol.path]
    assert {one.trainer for one in of_it} == {protocol.trainer}
    assert {"its example", "templated text, several turns"} < {one.what for one in of_it}


def test_every_trainer_with_a_page_is_named() -> None:
    named = ", ".join(one.trainer for one in recordings())
    pages = {path.stem for path in (ROOT / "docs/trainers").glob("*.md")} - {"index"}
    assert {page for page in pages if page.replace("-", " ") not in named.lower().replace("-", " ")} == set()


def test_nobody_at_the_address_is_said() -> None:
    result = CliRunner().invoke(app, ["check-trainer", f"http://127.0.0.1:{free_port()}"])
    assert result.exit_code == 1
    assert "ConnectError" in result.output
