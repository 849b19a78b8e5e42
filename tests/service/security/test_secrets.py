"""No prompt, response, key or URL password is in a log, an error, `/models` or the metrics, whatever goes wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from service.cli.store_option import holds_password
from service.errors import ConfigurationError
from service.pool import PoolFile
from service.scorers.transport.http import HttpPool
from service.settings import Settings
from service.telemetry import JsonFormatter
from tests.service.scorers.worker_servers import ScriptedWorker, Serve, error, is_probe
from tests.support.asgi import running
from tests.support.gateway import fresh_run, small_encoder

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess

PROMPT = 'The patient\'s name is "Zebedee Quux",\nand the diagnosis is secret.'
RESPONSE = "Tell nobody: the launch code is 00000000."
KEY = "rr_a-very-secret-key"
PASSWORD = "hunter2-and-more"
SECRETS = ("Zebedee", "Quux", "diagnosis", "launch code", "Tell nobody", KEY, PASSWORD)


class _Lines(logging.Handler):
    """Keeps every line as it is written to standard error."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(JsonFormatter())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@contextmanager
def logged() -> Iterator[list[str]]:
    """Lines of every logger, down to debug."""
    root, handler = logging.getLogger(), _Lines()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield handler.lines
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def assert_none(text: str, where: str) -> None:
    for secret in SECRETS:
        assert secret not in text, f"{where}: {text[:600]}"


def echo(worker: ScriptedWorker, status: int, form: Any) -> Any:
    """What a server answers that is well, and quotes its input."""

    def answer(request: Any) -> Any:
        if is_probe(request):
            return worker.lengths(request)
        return status, error(f"cannot read {form(request)}", status)

    return answer


ECHOES = {
    "as JSON": json.dumps,
    "as Python": repr,
    "its beginning": lambda request: repr(request)[:90],
    "the words alone": lambda request: f"{PROMPT} / {RESPONSE}",
}


@pytest.mark.parametrize("form", ECHOES.values(), ids=ECHOES)
@pytest.mark.parametrize("status", [400, 422, 500, 503])
async def test_a_worker_that_quotes_its_input_tells_nobody(
    serve: Serve, valkey_server: ValkeyProcess, status: int, form: Any
) -> None:
    from service.app import create_app

    worker = ScriptedWorker("rm-a")
    url = serve(worker)
    pool = PoolFile.model_validate({"models": [{"name": "rm-a", "urls": [url]}]})
    settings = Settings(
        store_url=valkey_server.url,
        run=fresh_run(),
        new_run_wait_seconds=0,
        api_keys=(KEY,),
        trainer_patience_seconds=0,
    )
    headers = {"authorization": f"Bearer {KEY}"}
    with logged() as lines:
        async with running(create_app(settings, pool, encoder=small_encoder())) as client:
            worker.answer = echo(worker, status, form)
            body = {"prompt": PROMPT, "responses": [RESPONSE, "b"]}
            bodies = {
                "/reward": body,
                "/reward/batch": {"items": [body, body]},
                "/get_reward": {"query": [PROMPT + RESPONSE], "prompts": [PROMPT]},
            }
            for path, document in bodies.items():
                response = await client.post(path, document, **headers)
                assert_none(response.body.decode(), path)
            for document in (
                {**body, "prompt": [{"role": "user", "content": {"text": PROMPT}}]},
                {**body, "prompt": [{"role": PROMPT.split(), "content": PROMPT}]},
                {**body, "responses": [[{"role": "assistant", "content": "x", "tool_calls": [RESPONSE]}]]},
                {"prompt": PROMPT, "response": RESPONSE},
            ):
                response = await client.post("/reward", document, **headers)
                assert response.status == 422
                assert_none(response.body.decode(), "malformed")
            for path in ("/models", "/metrics", "/readyz", "/healthz", "/openapi.json", "/docs"):
                assert_none((await client.get(path, **headers)).body.decode(), path)
            wrong = await client.get("/models", authorization=f"Bearer {PASSWORD}")
            assert wrong.status == 401
            assert_none(wrong.body.decode(), "401")
    assert worker.questions
    assert lines
    assert_none("\n".join(lines), "log")


@pytest.mark.parametrize("scheme", ["http", "ftp", "https", "h ttp"])
def test_a_workers_url_with_a_password_is_refused_without_it(scheme: str) -> None:
    with pytest.raises(ValueError, match="URL") as refused:
        HttpPool(f"{scheme}://user:{PASSWORD}@host:99999x/v1?q#f")
    assert_none(str(refused.value), "error")


async def test_a_stores_password_is_in_no_error_and_no_line() -> None:
    from service.app import create_app

    url = f"redis://user:{PASSWORD}@127.0.0.1:1/0"
    assert holds_password(url)
    settings = Settings(store_url=url, run=fresh_run(), api_keys=(KEY,))
    assert_none(repr(settings.model_copy(update={"store_url": ""})), "repr")
    pool = PoolFile.model_validate({"models": [{"name": "rm-a", "urls": ["http://127.0.0.1:1"]}]})
    with logged() as lines:
        async with running(create_app(settings, pool, encoder=small_encoder())) as client:
            headers = {"authorization": f"Bearer {KEY}"}
            for path in ("/readyz", "/metrics", "/models", "/posterior"):
                assert_none((await client.get(path, **headers)).body.decode(), path)
            response = await client.post("/reward", {"prompt": PROMPT, "responses": [RESPONSE]}, **headers)
            assert response.status == 503
            assert_none(response.body.decode(), "/reward")
    assert_none("\n".join(lines), "log")
    for wrong in (
        f"redis://user:{PASSWORD}@host:port/0",
        f"redis+cluster://u:{PASSWORD}@:x",
        f"nonsense://u:{PASSWORD}@h",
    ):
        with pytest.raises(ConfigurationError) as refused:
            create_app(Settings(store_url=wrong), pool, encoder=small_encoder())
        assert_none(str(refused.value), wrong)
