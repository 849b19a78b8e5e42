"""Fixtures of the tests that look at the console in a real browser: Debian's Chromium, driven by Playwright.

One browser for the whole file, and a fresh context, without anything stored, for each test.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from playwright.async_api import async_playwright

from tests.console.pages import Story, open_story

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Any]:
    """A headless Chromium."""
    binary = shutil.which("chromium")
    if binary is None:
        pytest.skip("needs Chromium: `make setup-chromium` installs Debian's as root")
    async with async_playwright() as playwright:
        opened = await playwright.chromium.launch(executable_path=binary, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        await opened.close()


@pytest.fixture(scope="module")
def story(valkey_server: ValkeyProcess) -> Iterator[Story]:
    """A gateway that has decided and audited, and shows texts."""
    with open_story(valkey_server.url) as opened:
        yield opened
