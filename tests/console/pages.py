"""What the browser tests share: a gateway with a past, and a page that is watched for errors and foreign requests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.live import LiveGateway, live_gateway
from tests.support.processes import fetch
from tests.support.rules import call

AXE = (Path(__file__).parent / "axe.min.js").read_text()

DECISIONS = 60
"""Half of them short, half of them long: enough audits for two kinds of text."""

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
"""A prompt that would run if it were not escaped."""

EVERY = {"referee": "rm-c", "rate": 1.0, "schedule": "even"}

SECONDS = 20
"""Longest wait for what a page should show; tests that pass wait for less than three."""


@dataclass(frozen=True, slots=True)
class Story:
    """A gateway and what it was sent."""

    gateway: LiveGateway

    def get(self, path: str) -> Any:
        """GET what must be answered 200."""
        status, document = fetch(self.gateway.url + path)
        assert status == 200, document
        return document

    def send(self, *prompts: str, run: str | None = None) -> list[dict[str, Any]]:
        """Have pairs scored; the second response is the longer one, which every RM and the referee prefer."""
        items = [{"prompt": prompt, "responses": ["no", f"yes, {prompt}"]} for prompt in prompts]
        status, document = call(f"{self.gateway.url}/reward/batch", {"items": items, "run": run})
        assert status == 200, document
        results: list[dict[str, Any]] = document["results"]
        return results


@contextmanager
def open_story(server_url: str, **settings: Any) -> Iterator[Story]:
    """A gateway whose decisions are all audited, with sums and code in its past."""
    with live_gateway(server_url, audit=EVERY, console_texts=True, **settings) as gateway:
        story = Story(gateway)
        sums = [f"Compute {i} + {i}." for i in range(DECISIONS // 2)]
        code = ["def f(x):\n    return x\n" * 8 + f"# what does function {i} return?" for i in range(DECISIONS // 2)]
        story.send(*sums, *code)
        gateway.until(DECISIONS)
        yield story


@dataclass(slots=True)
class Watched:
    """One page, with what it complained of and whom it asked."""

    page: Any
    url: str
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    async def go(self, view: str) -> None:
        """Open a view, by its address."""
        await self.page.goto(f"{self.url}/#{view}")
        await self.page.wait_for_selector(".link.live")

    async def serious(self) -> list[str]:
        """Return axe's serious and critical findings."""
        if not await self.page.evaluate("'axe' in window"):
            await self.page.evaluate(AXE)
        found = await self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        return [
            f"{one['id']}: {node['html'][:200]}"
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]


@asynccontextmanager
async def watched(browser: Any, url: str, **options: Any) -> AsyncIterator[Watched]:
    """A page of a fresh context; it must have complained of nothing and asked nobody else by the end."""
    context = await browser.new_context(**options)
    context.set_default_timeout(1000 * SECONDS)
    page = await context.new_page()
    seen = Watched(page, url)
    page.on("console", lambda message: seen.problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: seen.problems.append(str(error)))
    page.on("request", lambda request: seen.requests.append(request.url))
    try:
        yield seen
    finally:
        await context.close()
    assert seen.problems == []
    assert [one for one in seen.requests if not one.startswith(f"{url}/")] == []
