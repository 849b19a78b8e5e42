"""`label` against real worker servers: what is written, what is asked twice, and what an interruption costs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from router_core.dataset import load_pairs, load_rows, write_pairs
from router_core.records import Instance, LabelledPair
from service.cli import app
from service.cli.label import FAILED_ROWS
from service.errors import ConfigurationError, NoWorkerError
from service.pool import PoolFile
from service.workers.recorded import recorded_app
from service.workers.rules.processes import RuleConfig
from service.workers.rules.server import RuleApp
from tests.conftest import free_port
from tests.service.scorers.judge_server import ScriptedJudge
from tests.service.scorers.worker_servers import RunningWorker, ScriptedWorker, error, is_probe, reply
from tests.support.live import live_gateway
from tests.support.offline import POOL, two_domains

Place = Callable[..., str]


@pytest.fixture
def place() -> Iterator[Place]:
    """Serve a worker until the test ends, telling it then if it has threads of its own to end; returns its URL."""
    running: list[tuple[RunningWorker, bool]] = []

    def start(worker: Any, port: int = 0, *, told: bool = False) -> str:
        running.append((RunningWorker(worker, port), told))
        return running[-1][0].url

    yield start
    for worker, told in running:
        worker.stop(force=not told)
    for worker, _ in running:
        worker.join()


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pool_file(folder: Path, urls: dict[str, str], **fields: object) -> Path:
    path = folder / "pool.yaml"
    path.write_text(yaml.safe_dump({"models": [{"name": n, "urls": [url], **fields} for n, url in urls.items()]}))
    return path


def bare(folder: Path, pairs: list[LabelledPair], **extra: object) -> Path:
    """The pairs as a file without any RM."""
    path = folder / "bare.jsonl"
    write_pairs(path, pairs)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "rm": {}, **extra}) + "\n" for row in rows))
    return path


def label(data: Path, pool: Path, out: Path, *options: str) -> Result:
    arguments = ["label", str(data), "--pool", str(pool), "--out", str(out), *options]
    return CliRunner().invoke(app, arguments)


def summary(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def prompts_asked(worker: ScriptedWorker) -> Counter[str]:
    """Scored (prompt, response) texts, health checks' left out."""
    asked: Counter[str] = Counter()
    for request in worker.requests:
        texts = request.get("input") or ["\n".join(message["content"] for message in request["messages"])]
        asked.update(text for text in texts if "question" in text)
    return asked


@pytest.mark.parametrize("fields", [{}, {"rendering": "template"}])
@pytest.mark.parametrize("n_responses", [2, 3])
def test_the_rows_come_out_with_every_models_scores_and_verdicts(
    tmp_path: Path, place: Place, fields: dict[str, str], n_responses: int
) -> None:
    pairs = two_domains(30, n_responses=n_responses)
    url = place(recorded_app(pairs, POOL))
    out = tmp_path / "labelled.jsonl"
    done = summary(label(bare(tmp_path, pairs, source="kept"), pool_file(tmp_path, dict.fromkeys(POOL, url), **fields),
                         out, "--json", "-"))  # fmt: skip
    assert load_pairs(out) == pairs
    assert {row.fields["source"] for row in load_rows(out)} == {"kept"}
    assert done["models"]["coder"]["scored"] == 30
    right = [pair.correctness("coder") for pair in pairs]
    assert done["models"]["coder"]["accuracy"] == pytest.approx(sum(right) / 30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.jsonl", "labelled.jsonl", "pool.yaml"]


def test_a_real_transformer_scores_what_fits_and_refuses_the_rest(tmp_path: Path, place: Place) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from router_core.demo.label import label_pairs
    from service.workers.cpu import cpu_app
    from tests.service.workers.test_cpu import build

    directory = build(tmp_path / "tiny")
    pairs = [
        LabelledPair(str(i), Instance(f"question {i}", ("one fox", "two dogs" if i else "dog " * 400)), 0, {}, {})
        for i in range(6)
    ]
    pool = pool_file(tmp_path, {"tiny": place(cpu_app([directory], threads=1), told=True)})
    out = tmp_path / "out.jsonl"
    done = summary(label(bare(tmp_path, pairs), pool, out, "--json", "-"))
    assert (done["models"]["tiny"]["scored"], done["models"]["tiny"]["missing"]) == (5, {"refused": 1})
    for found, expected in zip(load_pairs(out)[1:], label_pairs(pairs[1:], [directory]), strict=True):
        assert found.scores["tiny"] == pytest.approx(expected.scores["tiny"], abs=1e-4)


def test_judges_and_rules_are_asked_like_reward_models(tmp_path: Path, place: Place) -> None:
    texts = [
        ("What is 7 + 5?", "7 + 5 = 12", "7 + 5 = 13", "7 + 5 = 12"),
        ("Name a fruit.", "A pear, or an apple.", "x", None),
    ]
    data, out, pool = tmp_path / "bare.jsonl", tmp_path / "labelled.jsonl", tmp_path / "pool.yaml"
    data.write_text(
        "".join(
            json.dumps({"id": p, "prompt": p, "response_a": a, "response_b": b, "label": "a", "reference": r, "rm": {}})
            + "\n"
            for p, a, b, r in texts
        )
    )
    judge, quality = ScriptedJudge("judge-model"), {"7 + 5 = 12": 2.0, "A pear, or an apple.": 1.0}
    judge.quality = lambda text: quality.get(text, 0.0)
    entries: list[dict[str, Any]] = [
        {"name": "rm", "urls": [place(ScriptedWorker())]},
        {"name": "judge", "kind": "judge", "urls": [place(judge)], "model": "judge-model"},
        {"name": "sums", "kind": "rule", "urls": [place(RuleApp(RuleConfig(rule="sums"), name="sums"), told=True)]},
        {"name": "key", "kind": "rule", "urls": [place(RuleApp(RuleConfig(rule="exact"), name="key"), told=True)]},
    ]
    pool.write_text(yaml.safe_dump({"models": entries}))
    done = summary(label(data, pool, out, "--json", "-"))
    sums, fruit = (json.loads(line) for line in out.read_text().splitlines())
    assert (sums["rm"]["judge"]["score_a"], sums["rm"]["judge"]["score_b"]) == (pytest.approx(1.0), pytest.approx(-1.0))
    assert [(sums["rm"][rule]["score_a"], sums["rm"][rule]["score_b"]) for rule in ("sums", "key")] == [(1.0, 0.0)] * 2
    assert [fruit["rm"][rule] for rule in ("sums", "key")] == [{"abstained": True}] * 2
    assert fruit["rm"]["judge"]["verdict"] == "a"
    # To abstain is no failure.
    assert all(reason.startswith("refused (abstained)") for reason in fruit["rm_missing"].values())
    assert set(fruit["rm_missing"]) == {"sums", "key"}
    assert done["models"]["judge"]["scored"] == 2


def test_a_scorer_is_asked_only_where_it_applies(tmp_path: Path, place: Place) -> None:
    worker = ScriptedWorker()
    data, out, pool = tmp_path / "bare.jsonl", tmp_path / "labelled.jsonl", tmp_path / "pool.yaml"
    row = {"response_a": "a", "response_b": "bb", "label": "a", "rm": {}}
    facts = [{"metadata": {"task": task}} for task in ("math", "chat")]
    data.write_text(
        "".join(json.dumps({"id": f"{i}", "prompt": f"question {i}", **row, **facts[i]}) + "\n" for i in (0, 1))
    )
    entry = {"name": "rm", "urls": [place(worker)], "applies": {"metadata.task": "math"}}
    pool.write_text(yaml.safe_dump({"models": [entry]}))
    done = summary(label(data, pool, out, "--json", "-"))
    assert (done["models"]["rm"]["scored"], done["models"]["rm"]["missing"]) == (1, {"refused (abstained)": 1})
    maths, chat = (json.loads(line) for line in out.read_text().splitlines())
    assert "score_a" in maths["rm"]["rm"]
    assert chat["rm"]["rm"] == {"abstained": True}
    assert sorted(prompts_asked(worker)) == ["question 0\na", "question 0\nbb"]


def test_a_model_that_is_added_later_is_the_only_one_that_is_asked(tmp_path: Path, place: Place) -> None:
    first, second = ScriptedWorker("rm-a"), ScriptedWorker("rm-b")
    urls = {"rm-a": place(first), "rm-b": place(second)}
    pool, out = pool_file(tmp_path, urls), tmp_path / "out.jsonl"
    data = bare(tmp_path, two_domains(10))
    assert summary(label(data, pool, out, "--models", "rm-a", "--json", "-"))["models"]["rm-a"]["asked"] == 10
    asked = len(prompts_asked(first))
    done = summary(label(data, pool, out, "--json", "-"))
    assert {name: row["asked"] for name, row in done["models"].items()} == {"rm-a": 0, "rm-b": 10}
    assert (len(prompts_asked(first)), len(prompts_asked(second))) == (asked, 20)
    assert all(set(pair.scores) == {"rm-a", "rm-b"} for pair in load_pairs(out))
    assert summary(label(out, pool, out, "--json", "-"))["models"]["rm-b"]["asked"] == 0
    assert summary(label(out, pool, out, "--again", "--json", "-"))["models"]["rm-b"]["asked"] == 10


def test_rows_that_hold_a_models_scores_are_not_asked(tmp_path: Path, place: Place) -> None:
    pairs = two_domains(30, missing=0.5)
    worker = ScriptedWorker("coder")
    data = tmp_path / "partial.jsonl"
    write_pairs(data, pairs)
    pool = pool_file(tmp_path, {"coder": place(worker)})
    done = summary(label(data, pool, tmp_path / "out.jsonl", "--json", "-"))
    without = [pair for pair in pairs if "coder" not in pair.scores]
    assert 0 < len(without) == done["models"]["coder"]["asked"] < 30
    for before, after in zip(pairs, load_pairs(tmp_path / "out.jsonl"), strict=True):
        lengths = tuple(float(len(text)) for text in before.instance.responses)
        assert after.scores == {"coder": lengths, **before.scores}


def test_what_a_model_refuses_is_noted_counted_and_not_asked_again(tmp_path: Path, place: Place) -> None:
    worker = ScriptedWorker("rm")

    def answer(request: dict[str, Any]) -> tuple[int, Any]:
        text = request["messages"][0]["content"]
        if text in ("question 0/3", "question 0/7"):
            return 400, error("This model's maximum context length is 512 tokens", 400)
        return worker.lengths(request)

    worker.answer = answer
    pool, out = pool_file(tmp_path, {"rm": place(worker)}), tmp_path / "out.jsonl"
    data = bare(tmp_path, two_domains(10))
    done = summary(label(data, pool, out, "--json", "-"))
    assert (done["models"]["rm"]["scored"], done["models"]["rm"]["missing"]) == (8, {"refused (400)": 2})
    refused = [row.fields for row in load_rows(out) if "rm_missing" in row.fields]
    assert [fields["id"] for fields in refused] == ["0/3", "0/7"]
    assert "maximum context length" in refused[0]["rm_missing"]["rm"]
    assert ["rm" in pair.scores for pair in load_pairs(out)].count(False) == 2
    for data_again in (data, out):
        again = summary(label(data_again, pool, out, "--json", "-"))
        assert (again["models"]["rm"]["asked"], again["models"]["rm"]["missing"]) == (0, {"refused (400)": 2})
    worker.answer = worker.lengths
    assert summary(label(data, pool, out, "--retry-missing", "--json", "-"))["models"]["rm"]["asked"] == 2
    assert not any("rm_missing" in row.fields for row in load_rows(out))


@pytest.mark.parametrize("rows", [10, 1])
def test_a_row_on_which_a_model_fails_is_noted_and_passed_and_said_at_the_end(
    tmp_path: Path, place: Place, rows: int
) -> None:
    worker = ScriptedWorker("rm")

    def answer(request: dict[str, Any]) -> tuple[int, Any]:
        if request["messages"][0]["content"] == "question 0/0":
            return 500, error("EngineCore encountered an issue", 500)
        return worker.lengths(request)

    worker.answer = answer
    pool, out = pool_file(tmp_path, {"rm": place(worker)}), tmp_path / "out.jsonl"
    data = bare(tmp_path, two_domains(10)[:rows])
    for asked in (rows, 0):
        result = label(data, pool, out, "--json", "-")
        assert result.exit_code == FAILED_ROWS
        model = json.loads(result.stdout)["models"]["rm"]
        assert (model["asked"], model["scored"], model["missing"]) == (asked, rows - 1, {"failed": 1})
        assert result.stderr.splitlines()[-1].startswith("failed: rm on 1 rows; `rm_missing`")
    (failed,) = [row.fields for row in load_rows(out) if "rm_missing" in row.fields]
    assert "EngineCore encountered an issue" in failed["rm_missing"]["rm"]
    worker.answer = worker.lengths
    assert summary(label(data, pool, out, "--retry-missing", "--json", "-"))["models"]["rm"]["asked"] == 1


def test_equal_responses_are_a_tie_with_equal_scores(tmp_path: Path, place: Place) -> None:
    worker = ScriptedWorker("rm")
    given = iter(range(1000))
    worker.answer = lambda request: (200, reply([float(next(given) if not is_probe(request) else 0)]))
    pool, out = pool_file(tmp_path, {"rm": place(worker)}), tmp_path / "out.jsonl"
    pair = LabelledPair(id="same", instance=Instance("p", ("a", "a")), label=0, scores={}, verdicts={})
    summary(label(bare(tmp_path, [pair]), pool, out, "--json", "-"))
    (row,) = load_rows(out)
    assert len(set(row.scores["rm"])) == 1
    assert row.fields["rm"]["rm"]["verdict"] == "tie"


def test_rows_without_label_are_scored_passed_on_and_said(tmp_path: Path, place: Place) -> None:
    data = bare(tmp_path, two_domains(3))
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    del rows[1]["label"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = label(data, pool_file(tmp_path, {"rm": place(ScriptedWorker("rm"))}), tmp_path / "out.jsonl")
    assert result.exit_code == 0
    assert "1 of 3 rows have no label" in " ".join(result.stderr.split())
    assert [(row.label is None, "rm" in row.scores) for row in load_rows(tmp_path / "out.jsonl")] == [
        (False, True),
        (True, True),
        (False, True),
    ]


def test_a_worker_that_is_away_ends_the_run_after_the_others_and_nothing_is_lost(tmp_path: Path, place: Place) -> None:
    present, late = ScriptedWorker("rm-a"), ScriptedWorker("rm-b")
    port = free_port()
    pool = pool_file(tmp_path, {"rm-a": place(present), "rm-b": f"http://127.0.0.1:{port}"})
    data, out = bare(tmp_path, two_domains(10)), tmp_path / "out.jsonl"
    result = label(data, pool, out, "--patience", "0.2")
    assert isinstance(result.exception, NoWorkerError)
    assert "'rm-b' has been away" in str(result.exception)
    assert "10 answers are kept" in str(result.exception)
    assert not out.exists()
    asked = sum(prompts_asked(present).values())
    place(late, port)  # type: ignore[call-arg]
    done = summary(label(data, pool, out, "--json", "-"))
    assert {name: row["asked"] for name, row in done["models"].items()} == {"rm-a": 0, "rm-b": 10}
    assert sum(prompts_asked(present).values()) == asked
    assert all(set(pair.scores) == {"rm-a", "rm-b"} for pair in load_pairs(out))


def test_a_worker_that_fails_for_a_while_is_waited_for(tmp_path: Path, place: Place) -> None:
    worker = ScriptedWorker("rm")
    failed = 0

    def answer(request: dict[str, Any]) -> tuple[int, Any]:
        nonlocal failed
        if len(worker.requests) > 12 and failed < 5:
            failed += 1
            return 503, error("restarting", 503)
        return worker.lengths(request)

    worker.answer = answer
    data, out = bare(tmp_path, two_domains(20)), tmp_path / "out.jsonl"
    done = summary(label(data, pool_file(tmp_path, {"rm": place(worker)}), out, "--json", "-"))
    assert failed == 5
    assert done["models"]["rm"] == {
        "asked": 20,
        "scored": 20,
        "missing": {},
        "accuracy": done["models"]["rm"]["accuracy"],
    }


@pytest.mark.parametrize(
    ("worker", "words"),
    [
        (ScriptedWorker("other"), "serves other, not 'rm'"),
        ("unauthorised", "401"),
        ("two labels", "2 classes"),
    ],
)
def test_a_worker_that_cannot_be_used_is_said_at_once(tmp_path: Path, place: Place, worker: Any, words: str) -> None:
    if isinstance(worker, str):
        answers = {"unauthorised": (401, error("Unauthorized", 401)), "two labels": (200, reply([0.5], classes=2))}
        kind, worker = worker, ScriptedWorker("rm")
        worker.answer = lambda _: answers[kind]
    result = label(bare(tmp_path, two_domains(3)), pool_file(tmp_path, {"rm": place(worker)}), tmp_path / "out.jsonl")
    assert isinstance(result.exception, ConfigurationError)
    assert words in str(result.exception)


def test_an_output_with_other_rows_is_not_overwritten(tmp_path: Path, place: Place) -> None:
    out = tmp_path / "out.jsonl"
    write_pairs(out, two_domains(3, seed=5))
    before = out.read_bytes()
    result = label(bare(tmp_path, two_domains(3)), pool_file(tmp_path, {"rm": place(ScriptedWorker("rm"))}), out)
    assert isinstance(result.exception, ConfigurationError)
    assert "3 rows that the input has not" in str(result.exception)
    assert out.read_bytes() == before


def test_an_unknown_model_and_one_without_a_worker_are_refused(tmp_path: Path) -> None:
    data, out = bare(tmp_path, two_domains(3)), tmp_path / "out.jsonl"
    pool = tmp_path / "pool.yaml"
    pool.write_text(yaml.safe_dump({"models": [{"name": "rm"}]}))
    assert "--models names nobody, the pool holds rm" in str(label(data, pool, out, "--models", "nobody").exception)
    assert "has no `urls`" in str(label(data, pool, out).exception)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, place: Place, stop: signal.Signals) -> None:
    worker = ScriptedWorker("rm")
    worker.delay = 0.05
    data, out, n, concurrency = bare(tmp_path, two_domains(60)), tmp_path / "out.jsonl", 60, 2
    pool, journal = pool_file(tmp_path, {"rm": place(worker)}), tmp_path / "out.jsonl.partial"
    command = ["label", str(data), "--pool", str(pool), "--out", str(out), "--concurrency", str(concurrency)]
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 8:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(stop)
    _, words = process.communicate(timeout=30)
    if stop is signal.SIGKILL:
        # A machine that went down in the middle of a line.
        with journal.open("ab") as file:
            file.write(b'{"content":"torn","mod')
    else:
        assert process.returncode == 130
        assert b"are kept in" in words
    kept = journal.read_bytes().count(b"\n")
    assert 8 <= kept < n
    assert not out.exists()
    worker.delay = 0.0
    done = summary(label(data, pool, out, "--json", "-"))
    assert done["models"]["rm"]["asked"] == n - kept
    assert all("rm" in pair.scores for pair in load_pairs(out))
    assert not journal.exists()
    asked = prompts_asked(worker)
    assert len(asked) == 2 * n
    assert sum(asked.values()) <= 2 * n + 2 * concurrency


def test_a_gateways_pool_is_asked_through_the_gateway(tmp_path: Path, place: Place, valkey_url: str) -> None:
    url = place(recorded_app(two_domains(11), POOL))
    models = [{"name": name, "urls": [url]} for name in POOL]
    referee = {"name": "checker", "urls": ["http://127.0.0.1:9"]}
    pool = PoolFile.model_validate({"models": models, "referees": [referee], "audit": {"referee": "checker"}})
    out, data = tmp_path / "out.jsonl", bare(tmp_path, two_domains(12))
    with live_gateway(valkey_url, pool=pool, api_keys=("secret",)) as gateway:
        words = ["label", str(data), "--url", gateway.url, "--out", str(out), "--json", "-"]
        refused = CliRunner().invoke(app, words)
        assert "API key missing or wrong" in str(refused.exception)
        done = CliRunner().invoke(app, [*words, "--api-key", "secret"])
        shown = CliRunner().invoke(app, ["models", "--url", gateway.url, "--api-key", "secret"], env={"COLUMNS": "200"})
        learned = CliRunner().invoke(app, ["runs", "--store", valkey_url])
    assert done.exit_code == 0, done.output
    # A referee is no arm, and is not asked for labels.
    (row,) = [line for line in shown.output.splitlines() if "checker" in line and "│" in line]
    assert "referee" in row
    assert "label-" in learned.output
    rows = load_rows(out)
    assert [row.scores for row in rows[:11]] == [pair.scores for pair in two_domains(12)[:11]]
    assert rows[11].fields["rm_missing"]["coder"].startswith("refused")


def test_label_needs_one_of_pool_and_gateway(tmp_path: Path) -> None:
    data = bare(tmp_path, two_domains(2))
    done = CliRunner().invoke(app, ["label", str(data), "--out", str(tmp_path / "out.jsonl")])
    assert "give --url GATEWAY of a running gateway, or --pool FILE" in str(done.exception)
