"""`check-scorer` on a real rule worker, and on services that do one thing wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from service.cli import app
from service.lab.conformance import CHECKS
from service.workers.rules.processes import RuleConfig
from service.workers.rules.server import RuleApp
from tests.service.scorers.worker_servers import RunningWorker

Json = dict[str, Any]


class Edited:
    """The rule worker with one thing changed on the way out.

    Args:
        edit: (path, request, status, document) to (status, document).
    """

    def __init__(self, edit: Callable[[str, Any, int, Any], tuple[int, Any]] | None = None) -> None:
        self._app = RuleApp(RuleConfig(rule="exact"), name="exact")
        self._edit = edit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or self._edit is None:
            await self._app(scope, receive, send)
            return
        parts: list[Json] = []
        message = await receive()
        body = message.get("body", b"")
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")

        async def again() -> Json:
            return {"type": "http.request", "body": body, "more_body": False}

        async def keep(message: Any) -> None:
            parts.append(message)

        await self._app(scope, again, keep)
        try:
            request = json.loads(body)
        except ValueError:
            request = None
        status, document = self._edit(scope["path"], request, parts[0]["status"], json.loads(parts[1]["body"]))
        content = json.dumps(document).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})


Serve = Callable[[Any], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    running: list[RunningWorker] = []

    def start(service: Any) -> str:
        running.append(RunningWorker(service))
        return running[-1].url

    yield start
    for worker in running:
        worker.stop(force=False)
    for worker in running:
        worker.join()


def check(url: str, *words: str) -> Result:
    return CliRunner().invoke(app, ["check-scorer", url, *words])


def test_our_own_worker_passes_every_check(serve: Serve, tmp_path: Path) -> None:
    item = {"prompt": "Capital of France?", "responses": ["Paris", "Rome"], "reference": "paris"}
    (tmp_path / "item.json").write_text(json.dumps(item))
    done = check(serve(Edited()), "--item", str(tmp_path / "item.json"))
    assert done.exit_code == 0, done.output
    assert f"{len(CHECKS)} of {len(CHECKS)} checks passed" in done.output


def scored(change: Callable[[list[Json], Any], object]) -> Callable[[str, Any, int, Any], tuple[int, Any]]:
    """Change the results of every answered request."""

    def edit(path: str, request: Any, status: int, document: Any) -> tuple[int, Any]:
        if path == "/score" and status == 200:
            change(document["results"], request)
        return status, document

    return edit


def each(change: Callable[[list[float]], list[Any]]) -> Callable[[str, Any, int, Any], tuple[int, Any]]:
    """Change the rewards of every result."""

    def changed(results: list[Json], request: Any) -> None:
        for one in results:
            if "rewards" in one:
                one["rewards"] = change(one["rewards"])

    return scored(changed)


def by_place(results: list[Json], request: Any) -> None:
    """Make the rewards depend on the place of the item."""
    for place, one in enumerate(results):
        if "rewards" in one:
            one["rewards"] = [reward + place for reward in one["rewards"]]


@pytest.mark.parametrize(
    ("edit", "sentence", "words"),
    [
        (lambda path, request, status, body: (404, {}) if path == "/health" else (status, body), "/health", "404"),
        (lambda path, request, status, body: (status, {}) if path == "/info" else (status, body), "/info", "name"),
        (each(lambda rewards: [*rewards, 0.0]), "one reward per response", "3 rewards to 2 responses"),
        (each(lambda rewards: [None] * len(rewards)), "one reward per response", "every reward is null"),
        (each(lambda rewards: [1e9] * len(rewards)), "one reward per response", "beyond the bound"),
        (each(lambda rewards: [float(index) for index in range(len(rewards))]), "Equal responses", "[0.0, 1.0]"),
        (scored(lambda results, _: results.reverse()), "order of the items", "3 rewards to 2 responses"),
        (scored(by_place), "order of the items", "in another place"),
        (scored(lambda results, _: results.append({"abstain": "x"})), "without items", "1 results to 0 items"),
        (lambda path, request, status, body: (500 if status == 400 else status, body), "malformed", "500"),
        (
            lambda path, request, status, body: (400, body) if "later" in (request or {}) else (status, body),
            "unknown fields",
            "400",
        ),
    ],
)
def test_what_a_service_does_wrong_is_named(serve: Serve, edit: Any, sentence: str, words: str) -> None:
    done = check(serve(Edited(edit)))
    assert done.exit_code == 1
    lines = done.output.splitlines()
    (at,) = [index for index, line in enumerate(lines) if line.startswith("FAIL") and sentence in line]
    assert words in lines[at + 1]


def test_a_service_that_ignores_its_key_fails(serve: Serve) -> None:
    done = check(serve(Edited()), "--api-key", "secret")
    assert done.exit_code == 1
    assert "without the key it answered 200" in done.output


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (b'{"prompt": "p", "responses": ["one"]}', "at least two texts in `responses`"),
        (b"[" * 100_000, "item.json is no JSON"),
        (b'{"prompt": "\xe9"}', "item.json is no JSON"),
    ],
)
def test_an_item_that_cannot_be_used_is_named(tmp_path: Path, item: bytes, words: str) -> None:
    (tmp_path / "item.json").write_bytes(item)
    done = check("http://127.0.0.1:1", "--item", str(tmp_path / "item.json"))
    assert words in str(done.exception)
