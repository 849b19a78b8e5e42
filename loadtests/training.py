"""A whole training by a trainer's own launcher, through the gateway, on a CPU: does the run learn from its audits?

    python -m loadtests.training [--steps 40] [--json OUT]

ms-swift's `swift rlhf` (GRPO) trains a random Llama of 0.1 M parameters that writes bytes. Its rewards come from a
gateway that `reward-router up` starts, with three rules as scorers: one that is mostly right, one that has little to do
with the matter, and one that is always wrong. Nobody sends feedback: a referee audits half of the decisions. What the
trainer needs is fetched by `make trainer-clients`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from loadtests.report import describe, machine, table, write_json
from loadtests.training_rules import share_of_letters
from service.cli.up import running_stack
from service.lab.client import GatewayClient, GatewayError
from service.pool import PoolFile
from service.settings import EMBEDDED
from tests.support.fetch_trainers import FOLDER, is_there, trainer_named
from tests.support.trainer_processes import save_chatml_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RULES = Path(__file__).with_name("training_rules.py")
SCORERS = ("beginning", "length", "signs")
REFEREE = "letters"

AUDIT_RATE = 0.5
"""Share of the decisions that the referee looks at."""

GENERATIONS = 8
"""Completions per prompt, which one scorer rewards."""

PROMPTS_PER_STEP = 4
LONGEST = 24
"""Tokens of a completion: as many bytes."""

AUDIT_SECONDS = 60.0
"""Longest wait for the last audits."""

TRAINING_SECONDS = 1800.0


class TrainingError(Exception):
    """The trainer did not end well; holds the end of what it printed."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training left.

    Attributes:
        completions: the texts of each step, in order.
        rewards: the trainer's mean reward of each step.
        seconds: that it took.
    """

    completions: Sequence[Sequence[str]]
    rewards: Sequence[float]
    seconds: float


def save_policy(folder: Path) -> Path:
    """Save a random Llama of two layers with a tokenizer of single bytes."""
    import torch
    import transformers

    save_chatml_tokenizer(folder)
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    tokens: dict[str, Any] = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.LlamaConfig(**shape, **tokens, num_key_value_heads=4, max_position_embeddings=512)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = transformers.LlamaForCausalLM(config)
    # ms-swift 4.6 fails at a batch with an empty completion.
    policy.generation_config.min_new_tokens = 1
    policy.save_pretrained(folder)
    return folder


def train_ms_swift(url: str, run: str, folder: Path, steps: int) -> Trained:
    """Train by `swift rlhf`, told the gateway by the two variables of its page.

    Args:
        url: the gateway.
        run: name of the training run.
        folder: for the policy, the data set and the output; exists.
        steps: of the optimizer.

    Raises:
        TrainingError: ms-swift failed.
    """
    policy, data, output = save_policy(folder / "policy"), folder / "data.jsonl", folder / "output"
    rows = [{"messages": [{"role": "user", "content": f"Write a word that begins with {one}."}]} for one in "abcdefgh"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    asked = [sys.executable, "-m", "service.trainers.ms_swift"]
    plugin = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    words = {
        "rlhf_type": "grpo",
        "model": policy,
        "model_type": "llama",
        "template": "chatml",
        "dataset": data,
        "external_plugins": plugin,
        "reward_funcs": "reward_router",
        "num_generations": GENERATIONS,
        "per_device_train_batch_size": GENERATIONS * PROMPTS_PER_STEP,
        "max_completion_length": LONGEST,
        "max_steps": steps,
        "tuner_type": "full",
        "torch_dtype": "float32",
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "seed": 1,
        "logging_steps": 1,
        "log_completions": "true",
        "save_strategy": "no",
        "report_to": "none",
        "add_version": "false",
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        "load_from_cache_file": "false",
        "output_dir": output,
    }
    command = [sys.executable, "-m", "swift.cli.main", "rlhf"]
    command += [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(FOLDER / "swift"), str(ROOT))),
        "REWARD_ROUTER_CLIENT_URL": url,
        "REWARD_ROUTER_CLIENT_RUN": run,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "MODELSCOPE_CACHE": str(folder / "modelscope"),
        "OMP_NUM_THREADS": "1",
    }
    began = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TRAINING_SECONDS, check=False, env=environment, cwd=folder
    )
    if done.returncode:
        raise TrainingError(f"swift rlhf ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return _read(output, time.monotonic() - began)


def _read(output: Path, seconds: float) -> Trained:
    logged = [json.loads(line) for line in (output / "logging.jsonl").read_text("utf-8").splitlines()]
    written = [json.loads(line) for line in (output / "completions.jsonl").read_text("utf-8").splitlines()]
    texts = [[one.replace("<|im_end|>", "") for one in entry["completion"]] for entry in written]
    return Trained(texts, [float(one["reward"]) for one in logged if "reward" in one], seconds)


async def learned(url: str, run: str) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, float]]:
    """Return the run's report and posterior once its audits are done, and how often each scorer was drawn.

    Raises:
        GatewayError: the audits did not end, or there were none.
    """
    async with GatewayClient(url) as client:
        for _ in range(int(AUDIT_SECONDS)):
            report = await client.get(f"/report?run={run}")
            posterior = await client.get(f"/posterior?run={run}")
            if not report["waiting"] and posterior["version"] >= report["audits"] > 0:
                break
            await asyncio.sleep(1.0)
        else:
            raise GatewayError(f"the audits of run {run!r} did not end within {AUDIT_SECONDS:g} s")
        metrics = await client.text("/metrics")
    line = re.compile(
        r'^reward_router_draws_total\{model="([^"]+)",run="' + re.escape(run) + r'"\} (\S+)$', re.MULTILINE
    )
    drawn = line.findall(metrics)
    return report, posterior, {model: float(count) for model, count in drawn}


def measure(steps: int, folder: Path, console: Console) -> dict[str, Any]:
    """Start everything, train, and return what came of it."""
    pool = PoolFile.model_validate(
        {
            "name": "training",
            "models": [{"name": name, "kind": "rule", "file": f"{RULES}:{name}"} for name in SCORERS],
            "referees": [{"name": REFEREE, "kind": "rule", "file": f"{RULES}:{REFEREE}"}],
            "audit": {"referee": REFEREE, "rate": AUDIT_RATE, "horizon": steps * PROMPTS_PER_STEP},
        }
    )
    with running_stack(
        pool, None, data_dir=folder / "stack", host="127.0.0.1", port=0, worker_port=0, store_url=EMBEDDED,
        console=console, run="swift",
    ) as stack:  # fmt: skip
        trained = train_ms_swift(stack.url, stack.run, folder, steps)
        report, posterior, asked = asyncio.run(learned(stack.url, stack.run))
    letters = [sum(map(share_of_letters, texts)) / len(texts) for texts in trained.completions[: len(trained.rewards)]]
    return {
        "machine": machine(),
        "steps": len(trained.rewards),
        "seconds": trained.seconds,
        "letters": letters,
        "asked": asked,
        "report": report,
        "posterior": posterior,
    }


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    report, posterior, quarter = found["report"], found["posterior"], max(found["steps"] // 4, 1)
    [referee] = report["referees"]
    right = {one["model"]: one["accuracy"] for one in report["scorers"]}
    total = sum(found["asked"].values())
    table(
        f"Scorers: {total:.0f} decisions, {report['audits']} audits, {referee['ties']} of them ties",
        ["scorer", "share of the decisions", "right, by the referee", "events it learned from", "norm of its mean"],
        [
            (one["model"], found["asked"].get(one["model"], 0.0) / total,
             right[one["model"]]["value"] if right[one["model"]] else "-", one["feedbacks"], one["mean_norm"])
            for one in posterior["models"]
        ],
    )  # fmt: skip
    version = trainer_named("swift").requirements[0]
    table(
        f"{version}: swift rlhf, GRPO, {found['steps']} steps in {found['seconds']:.0f} s",
        ["", "value"],
        [
            ("posterior, events, before and after", f"0, {posterior['version']}"),
            ("letters in completions, first quarter of the steps", _mean(found["letters"][:quarter])),
            ("letters in completions, last quarter of the steps", _mean(found["letters"][-quarter:])),
        ],
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """Train, print the tables, and write JSON where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not is_there(trainer_named("swift")):
        parser.error(f"{trainer_named('swift').requirements[0]} is not there: run `make trainer-clients`")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given.steps, Path(folder), Console(stderr=True))
    print(describe(found["machine"]))
    show(found)
    write_json(given.json, found)


if __name__ == "__main__":
    main()
