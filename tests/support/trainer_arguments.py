"""Command lines as verl and ms-swift read them, in a process of its own: nothing is trained.

`python -m tests.support.trainer_arguments --clients DIR verl|swift WORD...` prints one JSON line of what the words
became. verl's are composed by hydra with verl's own configuration; ms-swift's are parsed by the parser that it makes of
its `RLHFArguments`. DIR is filled by `make trainer-clients`. Both refuse a name that they do not know.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def of_verl(clients: Path, words: list[str]) -> Any:
    """The whole configuration."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(clients / "verl/trainer/config"), version_base=None):
        return OmegaConf.to_container(compose("ppo_trainer", overrides=words), resolve=False)


def of_swift(words: list[str]) -> Any:
    """What was given, by name."""
    from swift.arguments import RLHFArguments
    from swift.utils.utils import HfArgumentParser, _patch_get_type_hints

    with _patch_get_type_hints():
        parser = HfArgumentParser([RLHFArguments])
    given = vars(parser.parse_args(words))
    return {word[2:]: given[word[2:]] for word in words if word.startswith("--")}


def main() -> None:
    """Read the words, and print what they became."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", required=True, type=Path)
    parser.add_argument("trainer", choices=["verl", "swift"])
    parser.add_argument("words", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    sys.path.append(str(given.clients))
    found = of_verl(given.clients, given.words) if given.trainer == "verl" else of_swift(given.words)
    sys.stdout.write("RESULT " + json.dumps(found, default=str) + "\n")


if __name__ == "__main__":
    main()
