"""Judges in pool files."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.cli.launch import plan_workers
from service.errors import ConfigurationError
from service.pool import PoolFile, dump_pool, load_pool
from service.scorers.judge.client import JudgeScorer
from service.scorers.judge.entry import JudgeEntry
from service.scorers.registry import build_scorer
from service.settings import Settings


def load(folder: Path, fields: str) -> PoolFile:
    (folder / "pool.yaml").write_text(f"models: [{{name: j, kind: judge, {fields}}}]")
    return load_pool(folder / "pool.yaml")


def entry(folder: Path, fields: str) -> JudgeEntry:
    (found,) = load(folder, fields).models
    assert isinstance(found, JudgeEntry)
    return found


async def built(folder: Path, fields: str) -> JudgeScorer:
    pool = load(folder, fields)
    judge = build_scorer(pool.models[0], Settings(seed=0), pool)
    assert isinstance(judge, JudgeScorer)
    await judge.close()
    return judge


async def test_a_judge_needs_a_url_and_a_model(tmp_path: Path) -> None:
    judge = await built(tmp_path, "urls: ['http://h:1/v1/'], model: m")
    assert judge.config.urls == ("http://h:1",)
    assert (judge.kind, judge.timeout_seconds, judge.config.rubric.name) == ("judge", 60.0, "helpfulness")


async def test_a_judge_has_its_own_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-2")
    fields = (
        "urls: ['http://h:1'], model: m, api_key_env: JUDGE_KEY, timeout_seconds: 7, max_in_flight: 2, "
        "requests_per_minute: 9, tokens_per_minute: 900, applies: {metadata.task: [chat]}, "
        "mode: pointwise, verdict: text, comparisons: 5"
    )
    config = (await built(tmp_path, fields)).config
    assert (config.api_key, config.attempt_timeout_seconds, config.max_in_flight) == ("sk-2", 7.0, 2)
    assert config.tokens_per_minute == 900.0
    assert (config.requests_per_minute, config.mode, config.verdict, config.comparisons) == (
        9.0,
        "pointwise",
        "text",
        5,
    )


async def test_an_own_rubric_is_found_beside_the_pool_file(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("Judge politeness.")
    fields = "urls: ['http://h:1'], model: m, rubric: mine.jinja"
    assert entry(tmp_path, fields).rubric == str(tmp_path / "mine.jinja")
    await built(tmp_path, fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ("mode: pairwise", "judge 'j' has no `urls`, `path` or `model`"),
        ("urls: ['http://h:1']", "judge 'j' has no `model`"),
        ("urls: ['http://h:1'], model: m, mode: listwise", "'pairwise' or 'pointwise'"),
        ("urls: ['http://h:1'], model: m, extra_body: {logprobs: false}", "extra_body holds logprobs; use `verdict`"),
        ("urls: ['http://h:1'], model: m, label_mass: 2", "less than or equal to 1"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path: Path, fields: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        load(tmp_path, fields)
    assert sentence in str(raised.value)


async def test_a_judge_of_a_directory_is_started_by_up(tmp_path: Path) -> None:
    pool = load(tmp_path, "path: models/tiny")
    (start,) = plan_workers(pool, iter(range(8120, 8130)).__next__)
    words = f"worker --judge {tmp_path / 'models/tiny'} --name j --port 8120"
    assert " ".join(start.command).endswith(words)
    with pytest.raises(ConfigurationError, match="let `reward-router up` start it"):
        build_scorer(pool.models[0], Settings(), pool)
    placed = pool.model_copy(update={"models": (pool.models[0].served_at([start.url]),)})
    judge = build_scorer(placed.models[0], Settings(), placed)
    assert isinstance(judge, JudgeScorer)
    assert judge.config.options.model == "j"
    await judge.close()


async def test_a_rubric_that_is_not_there_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="use one of correctness"):
        await built(tmp_path, "urls: ['http://h:1'], model: m, rubric: helpfullness")


def test_a_judge_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    fields = "urls: ['http://h:1'], model: m, mode: pointwise, extra_body: {reasoning_effort: low}, rubric: safety"
    pool = load(tmp_path, fields)
    dump_pool(pool, tmp_path / "again.yaml")
    assert load_pool(tmp_path / "again.yaml") == pool
