"""A real Prometheus for tests: Debian's package, or any `prometheus` and `promtool` on the PATH."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import yaml

from tests.conftest import free_port

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"

START_SECONDS = 60.0
"""Longest wait for the server on a busy machine."""


VARIABLES = {"$__rate_interval": "20s", "$run": ".*", "$model": ".*"}
"""What Grafana would put in the place of its variables, with everything chosen."""


def filled_in(expr: str) -> str:
    """A panel's expression as Grafana would send it."""
    for variable, value in VARIABLES.items():
        expr = expr.replace(variable, value)
    assert "$" not in expr, expr
    return expr


def tool(name: str) -> str:
    """Path of `prometheus` or `promtool`; skips the test where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}: `make setup-prometheus` installs Debian's package")
    return found


class Prometheus:
    """A server with our configuration and rules, of which only the addresses and the intervals are the test's.

    Args:
        folder: where its configuration, data and log go.
        targets: per job its `host:port` addresses; jobs that are not named keep no target.
    """

    def __init__(self, folder: Path, targets: dict[str, list[str]]) -> None:
        self._port = free_port()
        self._log = folder / "prometheus.log"
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text("utf-8"))
        config["global"].update(scrape_interval="2s", scrape_timeout="2s", evaluation_interval="1s")
        config["rule_files"] = [str(FOLDER / pattern) for pattern in config["rule_files"]]
        assert set(targets) <= {job["job_name"] for job in config["scrape_configs"]}
        for job in config["scrape_configs"]:
            for discovery in [key for key in job if key.endswith("_sd_configs") or key == "static_configs"]:
                del job[discovery]
            job["static_configs"] = [{"targets": targets.get(job["job_name"], [])}]
        path = folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(config), "utf-8")
        self._command = [
            tool("prometheus"),
            f"--config.file={path}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{self._port}",
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            assert time.monotonic() < deadline, self._log.read_text()[-3000:]
            time.sleep(0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/-/ready", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def get(self, path: str, **words: str) -> Any:
        """The `data` of an answer of its HTTP API."""
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(words)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{words}: {error.read().decode()}") from error

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of every series of the expression now, without those that are NaN."""
        series = [(item["metric"], float(item["value"][1])) for item in self.get("query", query=expr)["result"]]
        return [(labels, value) for labels, value in series if not math.isnan(value)]
