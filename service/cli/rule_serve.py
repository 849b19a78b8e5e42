"""The command line of a rule's worker. `service.cli.launch` starts it here, `service.cli.manifests` in a pod."""

from __future__ import annotations

import json

from service.scorers.rule.entry import RuleEntry


def rule_words(entry: RuleEntry, *, host: str, port: int) -> tuple[str, ...]:
    """What follows `reward-router`: `worker --rule …`.

    Args:
        entry: with `file` or `builtin`.
        host: address to listen on.
        port: its port.
    """
    words = ["worker", "--rule", str(entry.rule), "--name", entry.name, "--port", str(port), "--host", host]
    words += ["--processes", str(entry.processes), "--rule-seconds", f"{entry.rule_seconds:g}"]
    words += ["--memory-mb", str(entry.memory_mb)]
    if entry.options:
        words += ["--options", json.dumps(entry.options)]
    return tuple(words)
