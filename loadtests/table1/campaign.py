"""Every row with every seed: starts the service, trains policies against it, two at a time, and keeps each result.

Called by the command and by the tests.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loadtests.table1.dpo import History, train_online
from loadtests.table1.judge import Checker
from loadtests.table1.measure import accuracy, draw_test_tasks
from loadtests.table1.policy import Policy
from loadtests.table1.recipe import Artefacts, Recipe, digest_of
from loadtests.table1.rows import CHECKER, SFT, Row
from loadtests.table1.service_judge import ServiceJudge
from loadtests.table1.sft import load_policy
from loadtests.table1.stack import CHECKER as CHECKING
from loadtests.table1.stack import running_service
from loadtests.table1.vocabulary import Codec, build_tokenizer
from service.audit_entry import AuditEntry

_TEST_SEED = 100
"""The test prompts are the same for all rows and seeds. Those of 0 and 1 were seen while the set-up was chosen."""

Result = dict[str, Any]
"""One run, as it is kept: row, policy, seed, accuracies per benchmark, and the fields of `dpo.History`."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run to be made."""

    row: Row
    seed: int
    file: Path


def run_table(
    recipe: Recipe,
    artefacts: Artefacts,
    rows: Sequence[Row],
    seeds: Sequence[int],
    folder: Path,
    tell: Callable[[str], None],
    *,
    processes: int = 2,
    again: bool = False,
) -> list[Result]:
    """Results of all rows and seeds, from the kept ones where they are there.

    Args:
        recipe: of everything.
        artefacts: made from it.
        rows: which.
        seeds: of prompts, samples and draws; shared by the rows, so that rows can be compared seed by seed.
        folder: where results are kept.
        tell: told about each run.
        processes: runs at once, each on one thread.
        again: make all runs anew.
    """
    kept = folder / f"runs-{digest_of(recipe, artefacts.checkpoint_digest, source_digest())}"
    kept.mkdir(parents=True, exist_ok=True)
    jobs = [Job(row, seed, kept / f"{row.key}-{seed}.json") for seed in seeds for row in rows]
    missing = [job for job in jobs if again or not job.file.exists()]
    if missing:
        tell(f"{len(missing)} of {len(jobs)} runs to be made, {processes} at a time")
        with ExitStack() as stack:
            urls = {
                audited: stack.enter_context(_service(recipe, artefacts, stack, audited=audited, runs=len(missing)))
                for audited in sorted({job.row.audited for job in missing})
            }
            _run_all(missing, recipe, artefacts, urls, tell, processes)
    return [json.loads(job.file.read_text("utf-8")) for job in jobs]


def _service(
    recipe: Recipe, artefacts: Artefacts, stack: ExitStack, *, audited: bool, runs: int
) -> AbstractContextManager[str]:
    """The service for rows that learn from the recipe's signal, or for those that learn from audits alone."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    dpo = recipe.dpo
    audit = AuditEntry(referee=(CHECKING,), rate=recipe.audits, horizon=dpo.steps * dpo.prompts) if audited else None
    return running_service(
        artefacts.models, artefacts.checkpoint, folder, signal="preference" if audited else recipe.signal,
        seed=recipe.seed, max_runs=runs, audit=audit,
    )  # fmt: skip


def source_digest(root: Path = Path(__file__).parents[2]) -> str:
    """Digest of all source that a run passes through: what older code gave is never taken for what this code gives.

    Args:
        root: the folder that holds the packages.
    """
    files = sorted(
        file for package in ("loadtests/table1", "router_core", "service") for file in (root / package).rglob("*.py")
    )
    return digest_of([[file.relative_to(root).as_posix(), file.read_text("utf-8")] for file in files])


def _run_all(
    jobs: Sequence[Job],
    recipe: Recipe,
    artefacts: Artefacts,
    urls: Mapping[bool, str],
    tell: Callable[[str], None],
    processes: int,
) -> None:
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run_job, job, recipe, artefacts, urls[job.row.audited]) for job in jobs]
        for number, future in enumerate(as_completed(futures), start=1):
            tell(f"[{number}/{len(jobs)}] {future.result()}")


def run_job(job: Job, recipe: Recipe, artefacts: Artefacts, url: str) -> str:
    """Make one run in this process, write its result, and say in one line what came out."""
    torch.set_num_threads(1)
    codec = Codec(build_tokenizer())
    policy, history, waited, audits = _train(job, recipe, artefacts, url, codec)
    tasks = draw_test_tasks(recipe.test_per_family, _TEST_SEED)
    result: Result = {
        "row": job.row.title,
        "policy": job.row.policy,
        "seed": job.seed,
        "accuracy": accuracy(policy, codec, tasks, temperature=recipe.dpo.temperature, seed=job.seed),
        "greedy": accuracy(policy, codec, tasks, temperature=0.0, seed=job.seed),
        "service_seconds": waited,
        "audits": audits,
        **asdict(history),
    }
    unfinished = job.file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result) + "\n", "utf-8")
    unfinished.rename(job.file)
    mean = sum(result["accuracy"].values()) / len(result["accuracy"])
    return f"{job.row.title}, seed {job.seed}: {mean:.3f} in {history.seconds:.0f} s"


def _train(
    job: Job, recipe: Recipe, artefacts: Artefacts, url: str, codec: Codec
) -> tuple[Policy, History, float, int]:
    start = load_policy(artefacts.policy, recipe.policy)
    if job.row.policy == SFT:
        return start, History(), 0.0, 0
    # Other prompts than the table's: whoever looks at curves while choosing settings has not looked at the table.
    curve_tasks = draw_test_tasks(recipe.curve_per_family, _TEST_SEED + 1)
    signal = "audits" if job.row.audited else recipe.signal
    judging = (
        nullcontext(Checker())
        if job.row.policy == CHECKER
        else ServiceJudge(url, f"{job.row.key}-{job.seed}", job.row.policy, signal)
    )
    with judging as judge:
        policy, history = train_online(start, codec, judge, recipe.dpo, job.seed, curve_tasks)
        return policy, history, judge.seconds, judge.audits() if isinstance(judge, ServiceJudge) else 0
