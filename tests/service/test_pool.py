"""What pool files may say, and the sentences on what they may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from router_core.records import Fact, Instance
from service.assembly import routing_given
from service.errors import ConfigurationError
from service.pool import PoolFile, dump_pool, load_pool
from service.scorers.rm.build import build_reward_model
from service.scorers.vllm_entry import RESERVED_ARGUMENTS
from service.settings import Settings


def load(folder: Path, text: str) -> PoolFile:
    (folder / "pool.yaml").write_text(text)
    return load_pool(folder / "pool.yaml")


def model(folder: Path, fields: str) -> PoolFile:
    return load(folder, f"models: [{{name: rm, {fields}}}]")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ("path: a, model: org/b", "both `path` and `model`"),
        ("path: a, recorded: b.jsonl", "both `path` and `recorded`"),
        ("path: a, revision: main", "no `model` of the hub"),
        ("urls: ['http://a:1'], replicas: 2", "its urls are its replicas"),
        ("path: a, reward_scale: 0", "reward_scale is 0.0; use a number other than 0"),
        ("path: a, reward_shift: .inf", "reward_shift is inf; use a finite number"),
        ("path: a, gpus: [0, 0]", "named twice"),
        ("path: a, gpus: [0, 1, 2], tensor_parallel: 2", "groups of tensor_parallel 2"),
        ("path: a, gpu_share: 1.5", "less than or equal to 1"),
        ("path: a, vllm_args: '--port 1'", "vllm_args holds --port"),
        ("path: a, vllm_args: ['--dtype=half']", "use `dtype`"),
        ("path: a, applies: {task: math}", "use `metadata.NAME` or `reference`"),
        ("path: a, applies: {metadata.: math}", "use `metadata.NAME` or `reference`"),
        ("path: a, applies: {reference: math}", "use true or false"),
    ],
)
def test_what_cannot_be_is_one_sentence_that_names_the_model_and_the_remedy(
    tmp_path: Path, fields: str, sentence: str
) -> None:
    with pytest.raises(ConfigurationError) as raised:
        model(tmp_path, fields)
    assert sentence in str(raised.value)
    assert "models.0" in str(raised.value)


def test_every_reserved_flag_says_what_to_use_instead(tmp_path: Path) -> None:
    for flag, remedy in RESERVED_ARGUMENTS.items():
        with pytest.raises(ConfigurationError) as raised:
            model(tmp_path, f"path: a, vllm_args: ['{flag}', '1']")
        assert remedy in str(raised.value)


def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    pool = load(
        tmp_path,
        "{name: p, worker: vllm, device: cpu, vllm_command: 'vllm --x', models: [{name: a, model: org/a, revision: r, "
        "licence: mit, replicas: 2, gpus: [0, 1], gpu_share: 0.4, vllm_args: '--y 1', env: {A: b}, reward_scale: 2}, "
        "{name: b, path: b}]}",
    )
    dump_pool(pool, tmp_path / "again.yaml")
    assert load_pool(tmp_path / "again.yaml") == pool
    assert pool.vllm_command == ("vllm", "--x")
    assert pool.models[1].source == str(tmp_path / "b")


def test_the_gateway_takes_the_score_transform_from_the_pool_file(tmp_path: Path) -> None:
    (entry,) = model(tmp_path, "urls: ['http://127.0.0.1:1'], reward_scale: -0.5, reward_shift: 3").models
    config = build_reward_model(entry, Settings()).config
    assert (config.reward_scale, config.reward_shift) == (-0.5, 3.0)


@pytest.mark.parametrize(
    ("applies", "facts", "reference", "admitted"),
    [
        ("{}", {}, None, True),
        ("{metadata.task: math}", {"task": "math"}, None, True),
        ("{metadata.task: math}", {"task": "code"}, None, False),
        ("{metadata.task: math}", {}, None, False),
        ("{metadata.task: [math, code]}", {"task": "code"}, None, True),
        ("{metadata.hard: true, reference: true}", {"hard": True}, "12", True),
        ("{metadata.hard: true, reference: true}", {"hard": True}, None, False),
        ("{reference: false}", {}, "12", False),
    ],
)
def test_applies_asks_for_facts(
    tmp_path: Path, applies: str, facts: dict[str, Fact], reference: str | None, admitted: bool
) -> None:
    (entry,) = model(tmp_path, f"path: a, applies: {applies}").models
    assert entry.admits(Instance("p", ("a", "b"), reference, facts)) is admitted


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ("kind: oracle", "kind 'oracle' is unknown; use one of 'rm', "),
        ("kind: http", "no `urls`"),
        ("kind: rule", "no `file`, `builtin` or `urls`"),
        ("kind: rule, builtin: math, file: 'a.py:f'", "both `file` and `builtin`"),
        ("kind: rule, file: a.py", "pattern"),
        ("kind: rule, builtin: math, dtype: half", "dtype"),
    ],
)
def test_each_kind_has_fields_of_its_own(tmp_path: Path, fields: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        model(tmp_path, fields)
    assert sentence in str(raised.value)
    assert "models.0" in str(raised.value)


def test_kinds_are_read_back_as_written(tmp_path: Path) -> None:
    pool = load(
        tmp_path,
        "models: [{name: rm, path: rm}, {name: sums, kind: rule, file: 'rules.py:sums', options: {places: 2}},"
        " {name: far, kind: http, urls: ['http://a:1']}]",
    )
    dump_pool(pool, tmp_path / "again.yaml")
    assert load_pool(tmp_path / "again.yaml") == pool
    assert [entry.name for entry in pool.reward_models] == ["rm"]
    assert pool.models[1].model_dump()["file"] == f"{tmp_path / 'rules.py'}:sums"
    assert pool.models[1].served_at(["http://b:1"]).urls == ("http://b:1",)


def test_combine_is_the_policy_of_requests_that_name_none(tmp_path: Path) -> None:
    models = "models: [{name: rule, kind: rule, builtin: math}, {name: rm, path: rm}]"
    pool = load(tmp_path, f"combine: 'gate:rule,rm'\n{models}")
    assert routing_given(Settings(), pool) == {"policy": "gate:rule,rm"}
    assert routing_given(Settings(policy="random"), pool) == {"policy": "random"}
    assert routing_given(Settings(), load(tmp_path, f"combine: route\n{models}")) == {}
    routed = load(tmp_path, f"combine: sum\nrouting: {{policy: random, v: 0.3}}\n{models}")
    assert routing_given(Settings(gamma=0.9), routed) == {"policy": "random", "v": 0.3, "gamma": 0.9}
    with pytest.raises(ConfigurationError, match="combine"):
        load(tmp_path, f"combine: average\n{models}")


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", bytes(range(256)), b"models: *nobody", b"[" * 3000, b"models: " + b"[" * 3000 + b"]" * 3000],
    ids=["utf-16", "bytes", "alias", "open brackets", "brackets"],
)
def test_a_file_that_is_not_yaml_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pool.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"pool\.yaml is not YAML"):
        load_pool(path)


AUDITED = "models: [{name: rm, path: a}]\nreferees: [{name: sums, kind: rule, builtin: math}]\naudit: {%s}"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ("referee: nobody", "referee 'nobody' is unknown: add it to `referees`, or name one of sums, rm, stacked"),
        ("referee: [sums, sums]", "name each once"),
        ("referee: stacked, ask: drawn", "set ask to 'all'"),
        ("referee: sums, rate: 1.5", "audit.rate"),
        ("referee: sums, schedule: late", "audit.schedule"),
        ("referee: sums, trust: 0.4", "audit.trust"),
        ("referee: sums, budget: 0", "audit.budget"),
        ("rate: 0.1", "audit.referee"),
    ],
)
def test_an_audit_that_cannot_be_names_its_field(tmp_path: Path, fields: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        load(tmp_path, AUDITED % fields)
    assert sentence in str(raised.value)


def test_referees_are_scorers_of_their_own(tmp_path: Path) -> None:
    pool = load(tmp_path, AUDITED % "referee: [sums, rm]")
    assert [entry.name for entry in pool.scorers] == ["rm", "sums"]
    assert (pool.audit.referee, pool.audit.plan.rate) == (("sums", "rm"), 0.05) if pool.audit else None
    dump_pool(pool, tmp_path / "again.yaml")
    assert load_pool(tmp_path / "again.yaml") == pool
    with pytest.raises(ConfigurationError, match="no `audit` that asks them"):
        load(tmp_path, AUDITED.split("audit")[0])
    with pytest.raises(ConfigurationError, match="named twice"):
        load(tmp_path, (AUDITED % "referee: rm").replace("sums", "rm"))
