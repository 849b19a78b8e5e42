"""What is changed of generated requests before they are sent; loaded by schemathesis.

The variable `FUZZ_DECISIONS` holds ids of real decisions, with commas between them: about half of the ids that are sent
become one of those.
"""

from __future__ import annotations

import os
from typing import Any

import schemathesis

DECISIONS = [one for one in os.environ.get("FUZZ_DECISIONS", "").split(",") if one]


def _sent(value: Any, name: str = "") -> Any:
    """Return JSON with real ids, and with 5 instead of 5.0: an integer to JSON Schema, and to no typed reader."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, list):
        return [_sent(one) for one in value]
    if isinstance(value, dict):
        return {key: _sent(one, key) for key, one in value.items()}
    if name == "decision_id" and isinstance(value, str) and DECISIONS and len(value) % 2 == 0:
        return DECISIONS[sum(value.encode(errors="replace")) % len(DECISIONS)]
    return value


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Return the body as it is sent."""
    return _sent(body)
