"""What checking a key costs a request, in µs of CPU: `python -m loadtests.keys`.

In turns in one process: no keys, one plain key compared in constant time (what a gateway did before keys were hashed),
and a ring of 1, 100 and 10,000 hashed keys.
"""

from __future__ import annotations

import hmac
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from service.handlers.keys import key_of
from service.keys.access import Scope
from service.keys.file import KeyFile, KeyLimits, entry_of, new_key, write_key_file
from service.keys.ring import KeyRing

CALLS = 20_000
TURNS = 7

Headers = Sequence[tuple[bytes, bytes]]


def main() -> None:
    """Print the table."""
    key = new_key()
    headers = [(b"host", b"h"), (b"content-type", b"application/json"), (b"authorization", b"Bearer " + key.encode())]
    known = key.encode()
    ways: dict[str, Callable[[], object]] = {
        "no keys": lambda: KeyRing.find(open_to_all, key_of(headers)),
        "one plain key, compared": lambda: hmac.compare_digest(key_of(headers), known),
    }
    open_to_all = KeyRing()
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 100, 10_000):
            path = Path(folder) / f"{count}.json"
            limits = KeyLimits(instances_per_minute=10**9, max_in_flight=10)
            entries = [entry_of(new_key(), f"k{index}", [Scope.READ]) for index in range(count - 1)]
            write_key_file(path, KeyFile([entry_of(key, "mine", list(Scope), limits=limits), *entries]))
            ways[f"{count} hashed keys, with limits"] = _checked(KeyRing(path=path), headers)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(TURNS):
        for name, way in ways.items():
            started = time.process_time()
            for _ in range(CALLS):
                way()
            best[name] = min(best[name], (time.process_time() - started) / CALLS)
    for name, seconds in best.items():
        print(f"{name:32} {seconds * 1e6:6.2f} µs")


def _checked(ring: KeyRing, headers: Headers) -> Callable[[], object]:
    def check() -> None:
        access = ring.find(key_of(headers))
        access.check_scope(Scope.REWARD)
        access.enter()
        access.check_run("default")
        access.leave()

    return check


if __name__ == "__main__":
    main()
