"""The gateway answers what its OpenAPI document says, to requests that nobody thought of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fuzz.run import fuzz

if TYPE_CHECKING:
    from tests.conftest import ValkeyProcess


def test_answers_are_those_of_the_document(own_valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis", reason="needs the extra dev")
    found = fuzz(own_valkey_server.url, tmp_path, per_route=2, seed=0, phases="examples,coverage,fuzzing")
    assert found.ok, found.output
    assert found.cases > 300
