"""What the Dockerfile builds, once per session: tests/deploy runs it as processes."""

from __future__ import annotations

from pathlib import Path

import pytest

NETWORK_WORDS = ("No matching distribution", "Could not fetch URL", "Connection", "Temporary failure")


@pytest.fixture(scope="session")
def gateway_bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Executables of the gateway's image: its build steps, run here. Skips where packages cannot be had."""
    pytest.importorskip("dockerfile_parse", reason="needs reward-router[dev]")
    from tests.support.compose import StackError, build

    try:
        return build("build-gateway", tmp_path_factory.mktemp("image"))
    except StackError as error:
        if any(word in str(error) for word in NETWORK_WORDS[1:]) or "from versions: none" in str(error):
            pytest.skip(f"the package index cannot be reached: {str(error)[-300:]}")
        raise
