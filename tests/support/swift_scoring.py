"""ms-swift's own reward computation with our plugin against a running gateway, in a process of its own.

`python -m tests.support.swift_scoring --clients DIR` prints one JSON line; the gateway is named by the environment, as
for the plugin. DIR is filled by `make trainer-clients`. What runs is `compute_rewards_per_func` of ms-swift on its own
samples, with the plugin loaded by its `import_external_file`; no model is trained.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any


def samples(sample_class: Any) -> list[Any]:
    """Two prompts with two completions each, one with a system turn."""
    turns = [
        ([{"role": "user", "content": "a b c"}], ["a b", "a b c d"]),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "d e"}], ["f", "g h i"]),
    ]
    return [
        sample_class.from_row(
            {
                "messages": [*prompt, {"role": "assistant", "content": completion}],
                "prompt_id": str(index),
                "request_id": f"{index}-{completion}",
                "solution": f"solution {index}",
            }
        )
        for index, (prompt, completions) in enumerate(turns)
        for completion in completions
    ]


def main() -> None:
    """Score the samples, and print what ms-swift got."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", required=True)
    given = parser.parse_args()
    asked = [sys.executable, "-m", "service.trainers.ms_swift"]
    plugin = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    sys.path.append(given.clients)
    import torch
    from swift.rewards import orms
    from swift.rl_core.data import GRPOSample
    from swift.rl_core.grpo_algorithm import compute_rewards_per_func
    from swift.utils.utils import import_external_file

    import_external_file(plugin)
    function = orms["reward_router"](args=None)
    found = [
        compute_rewards_per_func(samples(GRPOSample), [function], [None], torch.device("cpu")).squeeze(1).tolist()
        for _ in range(2)
    ]
    shown = [[None if reward != reward else reward for reward in rewards] for rewards in found]
    sys.stdout.write("RESULT " + json.dumps(shown) + "\n")


if __name__ == "__main__":
    main()
