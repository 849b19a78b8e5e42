"""The recorded pairs that the experiments on real data read: RB9_DEV, else ../shared/data/rb9_dev.jsonl."""

from __future__ import annotations

import os
from pathlib import Path

from router_core.dataset import load_pairs
from router_core.records import LabelledPair

DEFAULT_DATA = "../shared/data/rb9_dev.jsonl"


def recorded() -> list[LabelledPair]:
    """All of them.

    Raises:
        SystemExit: the file is not there.
    """
    path = Path(os.environ.get("RB9_DEV", DEFAULT_DATA))
    if not path.exists():
        raise SystemExit(f"{path} does not exist: set RB9_DEV to a JSONL of recorded pairs (docs/data.md)")
    return load_pairs(path)
