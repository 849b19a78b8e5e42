"""The compose file's vLLM commands, as vLLM's own command line reads them. Needs vLLM: VLLM_PYTHON names its Python."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

pytest.importorskip("dockerfile_parse", reason="needs reward-router[dev]")

from tests.support.compose import compose_config

READ = """
import json, sys
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

out = {}
for name, words in json.loads(sys.argv[1]).items():
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    validate_parsed_serve_args(args)
    fields = ("model_tag", "port", "runner", "convert", "dtype", "revision", "served_model_name", "max_model_len")
    out[name] = {field: getattr(args, field) for field in (*fields, "gpu_memory_utilization")}
print("PARSED " + json.dumps(out))
"""


@pytest.mark.slow
def test_vllm_understands_every_flag_and_reads_what_was_meant() -> None:
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.skip("needs vLLM: VLLM_PYTHON=… of an environment that has it")
    secrets = {"GATEWAY_API_KEY": "k", "GRAFANA_ADMIN_PASSWORD": "p"}
    services = compose_config("gpu", "judge", "encoder", variables=secrets)["services"]
    commands = {
        name: service["command"] for name, service in services.items() if service.get("entrypoint") == ["vllm", "serve"]
    }
    assert len(commands) == 10
    done = subprocess.run(
        [python, "-c", READ, json.dumps(commands)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("PARSED ")]
    for name, read in json.loads(line.removeprefix("PARSED ")).items():
        words = commands[name]
        assert read["model_tag"] == words[0]
        assert read["runner"] == ("auto" if name == "judge" else "pooling")
        assert read["convert"] == {"encoder": "embed", "judge": "auto"}.get(name, "classify")
        assert read["port"] == 8000
        assert read["max_model_len"] == int(words[words.index("--max-model-len") + 1])
        assert read["gpu_memory_utilization"] == float(words[words.index("--gpu-memory-utilization") + 1])
        assert read["served_model_name"] == [words[words.index("--served-model-name") + 1]]
