"""A small stand-in for the Hugging Face hub: the few routes that its own client asks for a model's commit and files."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest


@dataclass
class Hub:
    """What the hub knows, and what it was asked.

    Attributes:
        commits: (model, branch, tag or commit) -> commit.
        files: model -> folder of its files; a model without one has none.
        asked: paths, in order.
        url: where it is.
    """

    commits: dict[tuple[str, str], str]
    files: dict[str, Path] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a GET."""
        self.asked.append(path)
        parts = path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            model, verb, revision = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else "revision", parts[5:]
            commit = self._commit(model, *revision)
            if commit is not None and verb == "tree":
                return 200, {}, json.dumps(self._tree(model)).encode()
            if commit is not None:
                return 200, {}, json.dumps({"id": model, "sha": commit, "siblings": []}).encode()
        elif len(parts) > 4 and parts[2] == "resolve":
            model, commit, file = "/".join(parts[:2]), self._commit("/".join(parts[:2]), parts[3]), "/".join(parts[4:])
            found = self.files[model] / file
            if commit is not None and found.is_file():
                return 200, {"X-Repo-Commit": commit, "ETag": f'"{_blob(found)}"'}, found.read_bytes()
        return 404, {"X-Error-Code": "RepoNotFound"}, b'{"error": "not found"}'

    def _commit(self, model: str, revision: str = "main") -> str | None:
        return self.commits.get((model, revision), revision if revision in self.commits.values() else None)

    def _tree(self, model: str) -> list[dict[str, object]]:
        files = sorted(path for path in self.files[model].iterdir() if path.is_file())
        return [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _blob(file)} for file in files]


def _blob(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()


@contextmanager
def running_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub on a free port, in the place of the real one for this process."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self, *, body: bool = True) -> None:
            status, headers, content = hub.answer(self.path)
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Connection", "close")
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        use_hub(hub.url, monkeypatch)
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def use_hub(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the hub's client, which reads its variables when it is imported, ask there, and not through a proxy."""
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@contextmanager
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub that takes connections and never answers, as behind a network that swallows what is sent."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        use_hub(url, monkeypatch)
        yield url
