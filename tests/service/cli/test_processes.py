"""How `up` asks whether a child answers."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from service.cli.processes import USUAL_PORT, answers, gateway_port
from service.errors import ConfigurationError


@contextmanager
def speaking(words: bytes) -> Iterator[str]:
    """A server that answers everything with these bytes."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            self.request.sendall(words)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/health"
        finally:
            server.shutdown()
            thread.join()


GOOD = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def test_our_own_children_are_asked_past_any_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with speaking(GOOD) as url:
        assert answers(url)


@pytest.mark.parametrize("words", [b"SSH-2.0-OpenSSH_9.2\r\n", b"", GOOD.replace(b"200 OK", b"503 Loading")])
def test_another_answer_is_not_yet(words: bytes) -> None:
    with speaking(words) as url:
        assert not answers(url)


def test_a_given_port_that_is_taken_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"--port {taken}: something listens there already"):
            gateway_port(taken, "127.0.0.1")
    assert gateway_port(taken, "127.0.0.1") == (taken, None)


def test_the_usual_port_where_it_is_taken_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        monkeypatch.setattr("service.cli.processes.USUAL_PORT", taken)
        port, warning = gateway_port(None, "127.0.0.1")
    assert port not in (taken, USUAL_PORT)
    assert warning is not None
    assert f"port {taken} is taken" in warning
    assert str(port) in warning
