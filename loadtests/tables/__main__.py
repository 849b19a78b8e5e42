"""The command `python -m loadtests.tables`: encode, fit, replay, then print, draw and write."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadtests.report import machine, use_one_blas_thread, write_json
from loadtests.tables.encodings import Encoded, TooLong, encode
from loadtests.tables.experiments import K4, K6, Fit, Job, Plan, Size, domains_of
from loadtests.tables.field import FIELD_SIZE, Field
from loadtests.tables.offline import TableTwo, offline_figures
from loadtests.tables.online import ablation_figures, curves, domain_figures, stream_figures
from loadtests.tables.page import page
from loadtests.tables.pictures import draw_calls, draw_curves, draw_offline
from loadtests.tables.sheets import markdown, show
from loadtests.tables.work import Material, Replayed, Tell, fit_tasks, replay_tasks, run_all, stacked
from router_core.checkpoint import Checkpoint
from router_core.dataset import load_pairs, pairs_digest, pool_names
from router_core.offline.train import TrainConfig
from router_core.records import LabelledPair
from router_core.replay import Curve
from service.cli.cache import encodings_directory

DEFAULT_DATA = "../shared/data/rb9_dev.jsonl"
DEFAULT_FIELD = "../shared/data/rb85_dev.jsonl"
ENCODERS = "static,minilm,smollm2-135m"
COMMAND, QUICK_COMMAND = "make tables", "python -m loadtests.tables --quick"
QUICK = TrainConfig(max_epochs=5, folds=2, members=2)
"""Training of `--quick`: a fit in a second."""

Bar = Callable[[str, int], Tell]
"""A progress bar of so many steps; what it gives is called after each."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.tables", description=__doc__)
    parser.add_argument("data", nargs="?", type=Path, default=Path(os.environ.get("RB9_DEV", DEFAULT_DATA)))
    parser.add_argument(
        "--field",
        type=Path,
        default=Path(os.environ.get("RB85_DEV", DEFAULT_FIELD)),
        help="JSONL of pairs with the verdicts of many RMs",
    )
    parser.add_argument("--encoders", default=ENCODERS, help=f"comma-separated, the router's first [{ENCODERS}]")
    parser.add_argument("--dealings", type=int, default=Size().dealings, help="of the folds, for the first encoder")
    parser.add_argument("--seeds", type=int, default=Size().seeds, help="passes per stream")
    parser.add_argument(
        "--quick", action="store_true", help="minutes: small fits, short plans; the figures mean little"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--cache", type=Path, help="directory of stored encodings [~/.cache/reward-router]")
    parser.add_argument("--encode-minutes", type=float, default=15.0, help="compute encodings that take no longer")
    parser.add_argument("--write", type=Path, metavar="DOCS", help="write DOCS/results.md and DOCS/figures/*.png")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--from", dest="saved", type=Path, help="a file of --json: what --parts does not measure")
    parser.add_argument(
        "--parts", help=f"comma-separated, of {', '.join(PARTS)} [all; with --from none: the page again]"
    )
    options = parser.parse_args(arguments)
    asked = options.parts if options.parts is not None else "" if options.saved is not None else ",".join(PARTS)
    options.parts = [name.strip() for name in asked.split(",") if name.strip()]
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"--parts {unknown[0]}: choose of {', '.join(PARTS)}")
    if options.saved is None and len(options.parts) < len(PARTS):
        parser.error("--parts leaves figures out: give the file that has them with --from")
    if options.seeds < 2 or options.dealings < 2:
        parser.error("--seeds and --dealings: give at least 2, or there is no spread to report")
    if "nine" in options.parts and not options.data.exists():
        parser.error(f"{options.data} does not exist: give a JSONL of recorded pairs (docs/data.md), or set RB9_DEV")
    if "field" in options.parts and not options.field.exists():
        parser.error(f"{options.field} does not exist: give --field a JSONL of many RMs' verdicts, or set RB85_DEV")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    options = parse(arguments)
    document: dict[str, Any] = {} if options.saved is None else json.loads(options.saved.read_text("utf-8"))
    if options.parts:
        use_one_blas_thread()
        began = time.perf_counter()
        for name in options.parts:
            document |= PARTS[name](options)
        document |= {
            "command": _command(options),
            "kept": [name for name in PARTS if name not in options.parts],
            "quick": options.quick,
            "machine": machine(),
            "minutes": (time.perf_counter() - began) / 60 + (document.get("minutes", 0.0) if options.saved else 0.0),
        }
        write_json(options.json, document)
    blocks = page(document)
    show(blocks)
    if options.write is not None:
        if options.parts:
            draw_offline(document["offline"], options.write / "figures")
            draw_calls(document, options.write / "figures")
        (options.write / "results.md").write_text(markdown(blocks), "utf-8")


def measure_nine(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the nine RMs with scores; their learning curves are drawn on the way."""
    pairs = load_pairs(options.data)
    size = Size(dealings=options.dealings, seeds=options.seeds)
    if options.quick:
        size = replace(size, shifts=1, seeds=2, config=QUICK)
    pools = {"K4": K4, "K6": K6, "K9": pool_names(pairs)}
    with _progress() as bar:
        material, left_out = _encoded(pairs, options.encoders, options, bar)
        encoders = list(material.encoded)
        plan = Plan(pairs, encoders[0], size)
        tables = {name: TableTwo(pairs, pool, encoders, size) for name, pool in pools.items()}
        online = plan.online(pools)
        transfer = plan.transfer({name: pools[name] for name in ("K4", "K9")})
        labels = plan.labels({name: pools[name] for name in ("K4", "K9")})
        ablations = plan.ablations(K4)
        jobs = {("online", key): job for key, job in online.items()}
        jobs |= {("transfer", key): job for key, job in transfer.items()}
        jobs |= {(pool, number): job for pool, by_number in labels.items() for number, job in by_number.items()}
        jobs |= {(title, column): job for title, (_, columns) in ablations.items() for column, job in columns.items()}
        fitted = _fit(tables.values(), jobs, material, options.workers, bar)
        replayed = _replay(jobs, fitted, material, options.workers, bar)
        step = bar("figures", len(tables) + len(online) + len(transfer) + len(labels) + len(ablations))
        document = {
            "offline": {
                name: _told(offline_figures(table.judged(fitted, material)), step) for name, table in tables.items()
            },
            "online": {key: _told(stream_figures(replayed["online", key]), step) for key in online},
            "transfer": {key: _told(domain_figures(replayed["transfer", key]), step) for key in transfer},
            "labels": {
                pool: _told({number: stream_figures(replayed[pool, number]) for number in by_number}, step)
                for pool, by_number in labels.items()
            },
            "ablations": {
                title: _told(_ablation(title, columns, replayed), step) for title, (_, columns) in ablations.items()
            },
        }
    if options.write is not None:
        lines: Mapping[str, Mapping[str, Curve]] = {key: curves(replayed["online", key]) for key in online}
        draw_curves(lines, {key: job.title for key, job in online.items()}, options.write / "figures")
    checkpoint = fitted[online["in distribution"].streams[0].fit]
    return {
        "data": _data_facts(pairs),
        "pools": {name: list(pool) for name, pool in pools.items()},
        "folds": size.folds,
        "long_folds": size.long_folds,
        "dealings": size.dealings,
        "shift_dealings": size.shifts,
        "seeds": list(range(size.seeds)),
        "fits": len(fitted),
        "encoders": encoders,
        "not_run": left_out,
        "hyperparameters": {
            name: getattr(checkpoint.hyperparameters, name)
            for name in ("lambda0", "sigma2", "v", "gamma", "adapt", "lambda_novel", "floor", "alarm_rate")
        },
        **document,
    }


def measure_field(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the 85 RMs, under `field`."""
    pairs = load_pairs(options.field)
    size = replace(FIELD_SIZE, shifts=1, seeds=2, config=QUICK) if options.quick else FIELD_SIZE
    with _progress() as bar:
        material, left_out = _encoded(pairs, options.encoders, options, bar)
        field = Field(pairs, list(material.encoded), size)
        fitted = _fit([*field.tables.values(), *field.by_count.values()], field.jobs, material, options.workers, bar)
        replayed = _replay(field.jobs, fitted, material, options.workers, bar)
        figures = field.figures(fitted, replayed, material)
    return {"field": {**figures, "data": _data_facts(pairs), "not_run": left_out, "fits": len(fitted)}}


PARTS: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"nine": measure_nine, "field": measure_field}
"""What a run measures, one file of pairs each."""


def _command(options: argparse.Namespace) -> str:
    """What a reader must say to get the same page."""
    if options.quick:
        return QUICK_COMMAND
    parts = "" if len(options.parts) == len(PARTS) else f" --parts {','.join(options.parts)} --from EARLIER"
    if options.encoders == ENCODERS and not parts:
        return COMMAND
    return f"python -m loadtests.tables --encoders {options.encoders}{parts}"


def _encoded(
    pairs: Sequence[LabelledPair], specs: str, options: argparse.Namespace, bar: Bar
) -> tuple[Material, dict[str, float]]:
    """Every encoder's features; and the minutes of those that would take too long."""
    names = [name.strip() for name in specs.split(",") if name.strip()]
    cache = encodings_directory(options.cache)
    assert cache is not None
    encoded: dict[str, Encoded] = {}
    left_out: dict[str, float] = {}
    step = bar("encoding", len(names))
    for name in names:
        found = encode(pairs, name, cache, options.encode_minutes)
        if isinstance(found, TooLong):
            left_out[name] = found.minutes
        else:
            encoded[name] = found
        step()
    return Material(pairs, encoded), left_out


def _fit(
    tables: Iterable[TableTwo], jobs: Mapping[Any, Job], material: Material, workers: int, bar: Bar
) -> dict[Fit, Checkpoint]:
    needed = [fit for table in tables for fit in table.needed()]
    needed += [stream.fit for job in jobs.values() for stream in job.streams]
    tasks = fit_tasks(needed, material)
    return run_all(tasks, workers, bar("fitting", len(tasks)))


def _replay(
    jobs: Mapping[Any, Job], fitted: Mapping[Fit, Checkpoint], material: Material, workers: int, bar: Bar
) -> dict[Any, Replayed]:
    tasks = replay_tasks(jobs, fitted, material)
    traces = run_all(tasks, workers, bar("streaming", len(tasks)))
    return {
        key: stacked(job, [traces[key, number] for number in range(len(job.streams))], material)
        for key, job in jobs.items()
    }


def _ablation(title: str, columns: Mapping[str, Job], replayed: Mapping[Any, Replayed]) -> dict[str, Any]:
    return {column: ablation_figures(replayed[title, column], replayed["default", column]) for column in columns}


def _data_facts(pairs: Sequence[LabelledPair]) -> dict[str, Any]:
    return {
        "digest": pairs_digest(pairs),
        "pairs": len(pairs),
        "groups": len({pair.group or pair.id for pair in pairs}),
        "domains": {name: sum(pair.domain == name for pair in pairs) for name in domains_of(pairs)},
        "subsets": len({pair.subset for pair in pairs}),
    }


def _told(figures: Any, step: Tell) -> Any:
    step()
    return figures


@contextmanager
def _progress() -> Iterator[Bar]:
    """Bars on a terminal, else a line at every tenth."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def bar(title: str, total: int) -> Tell:
            task = progress.add_task(title, total=total)
            began, marks, done = (
                time.perf_counter(),
                {total * tenth // 10 for tenth in range(1, 11)},
                itertools.count(1),
            )

            def tell() -> None:
                progress.advance(task)
                number = next(done)
                if not console.is_terminal and number in marks:
                    console.print(f"{title}: {number} of {total}, {time.perf_counter() - began:.0f} s", highlight=False)

            return tell

        yield bar


if __name__ == "__main__":
    main()
