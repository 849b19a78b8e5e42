"""`replay` as people and programs run it: the document, its scenarios, what it says on standard error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

pytest.importorskip("torch")

from router_core.dataset import pairs_digest, write_pairs
from router_core.encoder.surface import SurfaceBackbone
from router_core.errors import DatasetError, UnknownPolicyError
from router_core.offline.train import TrainConfig, train
from router_core.records import LabelledPair, Signal
from router_core.replay import Delay, Scenario, make_plan, select, tabulate
from service.cli import app
from service.cli.replay import policy_names
from service.errors import ConfigurationError
from service.lab.replaying.over_http import _one_pass, _Stream
from service.lab.replaying.parts import Options, choose_parts
from tests.support.offline import POOL, two_domains

PAIRS, OTHERS = two_domains(80), two_domains(90, seed=1)


def run(*options: object) -> Result:
    return CliRunner().invoke(app, ["replay", *map(str, options), "--encoder", "surface", "--seeds", "2"])


def document(*options: object) -> dict[str, Any]:
    result = run(*options, "--json", "-")
    assert result.exit_code == 0, (result.output, result.exception)
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "data.jsonl", PAIRS)
    return tmp_path / "data.jsonl"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "ck"
    train(OTHERS, POOL, SurfaceBackbone(), TrainConfig(max_epochs=6, folds=2)).save(directory)
    return directory


def test_the_document_has_todays_keys_and_the_new_ones(data: Path, checkpoint: Path) -> None:
    found = document(data, "--checkpoint", checkpoint, "--policies", "all")
    assert found["n"] == 80
    assert set(found["policies"]) == {
        "single:coder", "single:talker", "random", "majority", "uwo", "laser", "bayesian:none", "offline",
        "bayesian:paper", "bayesian",
    }  # fmt: skip
    for row in found["policies"].values():
        assert set(row) == {"accuracy", "ci95", "calls_per_instance", "price_per_instance", "regret", "coverage"}
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
        assert row["regret"] == pytest.approx(found["oracle"] - row["accuracy"])
    assert set(found["best_single"]) == {"model", "accuracy"}
    assert found["data_digest"] == pairs_digest(PAIRS)
    assert found["signal"] == "preference"
    assert found["left_out"] == 0
    assert found["scenario"]["offline"][0]["offline_digest"] == pairs_digest(OTHERS)
    assert set(found["subsets"]) == {"code", "prose"}
    assert found["curve"]["policies"]["bayesian"]["step"][-1] == 80
    assert found["policies"]["uwo"]["calls_per_instance"] == 2.0
    assert found == document(data, "--checkpoint", checkpoint, "--policies", "all"), "the same again, in every digit"


def test_pairs_with_gaps_are_left_out_and_said_so(tmp_path: Path, checkpoint: Path) -> None:
    gaps = [replace(pair, verdicts={"coder": pair.verdicts["coder"]}, scores={"coder": pair.scores["coder"]})
            if i < 7 else pair for i, pair in enumerate(PAIRS)]  # fmt: skip
    write_pairs(tmp_path / "gaps.jsonl", gaps)
    result = run(tmp_path / "gaps.jsonl", "--checkpoint", checkpoint, "--json", "-")
    found = json.loads(result.stdout)
    assert (found["n"], found["left_out"], found["missing"]) == (73, 7, {"talker": 7})
    assert "7 of 80 pairs are not streamed" in result.stderr
    # A pool without the gap streams everything.
    assert document(tmp_path / "gaps.jsonl", "--checkpoint", checkpoint, "--pool", "coder")["n"] == 80


def test_the_checkpoints_pool_is_the_default_one(data: Path, tmp_path: Path) -> None:
    alone = train(OTHERS, POOL[:1], SurfaceBackbone(), TrainConfig(max_epochs=2, folds=2))
    alone.save(tmp_path / "one")
    assert document(data, "--checkpoint", tmp_path / "one")["pool"] == ["coder"]


@pytest.fixture
def quick_training(monkeypatch: pytest.MonkeyPatch) -> list[list[LabelledPair]]:
    """Training in a tenth of the time; what it was given is kept."""
    from router_core.offline import train as module

    given: list[list[LabelledPair]] = []
    real = module.train

    def quick(pairs: list[LabelledPair], pool: Any, backbone: Any, config: Any = None, features: Any = None) -> Any:
        given.append(list(pairs))
        return real(pairs, pool, backbone, TrainConfig(max_epochs=3, folds=2), features)

    monkeypatch.setattr(module, "train", quick)
    return given


def test_every_pair_is_streamed_once_in_cross_validation(data: Path, quick_training: list[list[LabelledPair]]) -> None:
    found = document(data, "--folds", 4, "--policies", "bayesian,single:coder")
    assert found["n"] == 80
    assert sum(part["streamed"] for part in found["scenario"]["offline"]) == 80
    assert [len(pairs) for pairs in quick_training] == [60] * 4
    single = np.mean([pair.correctness("coder") for pair in PAIRS])
    assert found["policies"]["single:coder"]["accuracy"] == pytest.approx(single)


def test_shift_learns_from_one_mixture_and_streams_another(
    data: Path, quick_training: list[list[LabelledPair]]
) -> None:
    found = document(data, "--shift", "code:0.8:0.1", "--policies", "bayesian,offline")
    streamed = found["subsets"]["code"]["n"] / found["n"]
    learned = np.mean([pair.domain == "code" for pair in quick_training[0]])
    assert streamed == pytest.approx(0.8, abs=0.03)
    assert learned == pytest.approx(0.1, abs=0.03)
    assert found["scenario"]["shift"] == {"domain": "code", "stream_share": 0.8, "offline_share": 0.1}


def test_domains_of_both_sides_are_kept_apart_in_folds_too(
    data: Path, quick_training: list[list[LabelledPair]]
) -> None:
    found = document(
        data, "--offline-domains", "prose", "--stream-domains", "code", "--folds", 2, "--policies", "offline"
    )
    assert {pair.domain for pairs in quick_training for pair in pairs} == {"prose"}
    assert list(found["subsets"]) == ["code"]
    assert found["n"] == 40


def test_another_file_may_be_learned_from_but_for_streamed_groups(
    data: Path, tmp_path: Path, quick_training: list[list[LabelledPair]]
) -> None:
    write_pairs(tmp_path / "train.jsonl", [*OTHERS, *[replace(pair, id="x" + pair.id) for pair in PAIRS[:5]]])
    result = run(data, "--train", tmp_path / "train.jsonl", "--policies", "bayesian", "--json", "-")
    assert json.loads(result.stdout)["n"] == 80
    assert quick_training == [OTHERS]
    assert "5 pairs" in result.stderr


def test_another_file_without_the_domain_is_learned_from_as_it_is(
    data: Path, tmp_path: Path, quick_training: list[list[LabelledPair]]
) -> None:
    prose = [pair for pair in OTHERS if pair.domain == "prose"]
    write_pairs(tmp_path / "prose.jsonl", prose)
    result = run(data, "--train", tmp_path / "prose.jsonl", "--shift", "code:1", "--policies", "offline", "--json", "-")
    assert list(json.loads(result.stdout)["subsets"]) == ["code"]
    assert quick_training == [prose]
    assert "nothing of 'code'" in result.stderr


def test_a_checkpoint_can_be_streamed_a_shifted_mixture(data: Path, checkpoint: Path) -> None:
    found = document(data, "--checkpoint", checkpoint, "--shift", "code:1", "--policies", "offline")
    assert list(found["subsets"]) == ["code"]


def test_scenarios_are_told_and_change_what_is_earned(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    words = [data, "--checkpoint", checkpoint, "--policies", "bayesian:none,random"]
    plain = document(*words)
    found = document(
        *words, "--drift", "--repeat", 2, "--delay", "geometric:4", "--missing", 0.25, "--signal", "loss",
        "--loss-separation", 2, "--curve", tmp_path / "curve.png",
    )  # fmt: skip
    assert found["signal"] == "loss (simulated)"
    assert found["scenario"]["simulated_loss"]["separation"] == 2.0
    told = {key: found["scenario"][key] for key in ("drift", "repeat", "delay", "missing")}
    assert told == {"drift": True, "repeat": 2, "delay": "geometric:4", "missing": 0.25}
    assert found["policies"]["bayesian:none"] != plain["policies"]["bayesian:none"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_is_printed_and_the_file_written(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    result = run(data, "--checkpoint", checkpoint, "--json", tmp_path / "new" / "out.json")
    assert result.exit_code == 0
    assert "oracle" in result.stdout
    assert json.loads((tmp_path / "new" / "out.json").read_text())["n"] == 80


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--folds", "2", "--train", "data.jsonl"], ConfigurationError, "give one"),
        (["--folds", "1"], ConfigurationError, "at least 2"),
        (["--shift", "code", "--stream-domains", "prose"], ConfigurationError, "give one"),
        (["--url", "http://127.0.0.1:1", "--folds", "2"], ConfigurationError, "its own checkpoint"),
        (["--shift", "poetry"], DatasetError, "names none"),
        (["--policies", "dictator"], UnknownPolicyError, "dictator"),
        (["--policies", ","], ConfigurationError, "names none"),
        (["--pool", "coder,stranger"], DatasetError, "stranger"),
        (["--limit", "1", "--policies", "random", "--drift"], DatasetError, "drift"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_with_a_remedy(
    data: Path, words: list[str], error: type[Exception], message: str
) -> None:
    result = run(data, *words)
    assert isinstance(result.exception, error), result.exception
    assert message in str(result.exception)


def test_shorthands_stand_for_policies_each_once() -> None:
    assert policy_names("singles,random,single:a", ["a", "b"]) == ["single:a", "single:b", "random"]
    assert policy_names("all", ["a"])[-1] == "bayesian"


def test_pairs_with_gaps_are_learned_from_all_the_same(quick_training: list[list[LabelledPair]]) -> None:
    gaps = [replace(pair, verdicts={"coder": pair.verdicts["coder"]}, scores={"coder": pair.scores["coder"]})
            if i < 10 else pair for i, pair in enumerate(PAIRS)]  # fmt: skip
    options = Options(folds=2, encoder="surface")
    parts = choose_parts(gaps, POOL, np.arange(10, 80), options, None, lambda _: None)
    assert sorted(np.concatenate([part.stream for part in parts]).tolist()) == list(range(10, 80))
    assert sum(len(pairs) for pairs in quick_training) == 80


class FakeGateway:
    """Answers like a gateway whose RMs are always asked in turn, and keeps what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    async def post(self, path: str, body: Any) -> Any:
        self.calls.append((path, body))
        if path == "/feedback":
            return {}
        items = body["items"] if path == "/reward/batch" else [body]
        replies = [
            {
                "decision_id": item["prompt"],
                "model": POOL[0],
                "preferred": 0 if i % 2 else None,
                "attempts": [{"outcome": "answered"}],
                "price": 1.0,
            }
            for i, item in enumerate(items)
        ]
        return {"results": replies} if path == "/reward/batch" else replies[0]


async def over_http(policy: str, signal: Signal, scenario: Scenario) -> tuple[FakeGateway, Any]:
    table, gateway = tabulate(PAIRS, POOL), FakeGateway()
    plan = make_plan(table, scenario, 0)
    stream = _Stream(PAIRS, table, plan, scenario, signal, select(policy, POOL), "run")
    done = await _one_pass(gateway, stream, 1, lambda _: None, None)  # type: ignore[arg-type]
    return gateway, (plan, done)


async def test_feedback_over_http_is_late_and_missing_as_planned() -> None:
    scenario = Scenario(delay=Delay("constant", 3), missing=0.25)
    gateway, (plan, done) = await over_http("bayesian", Signal.PREFERENCE, scenario)
    sent = [body["decision_id"] for path, body in gateway.calls if path == "/feedback"]
    asked = [body["prompt"] for path, body in gateway.calls if path == "/reward"]
    assert asked == [PAIRS[i].instance.prompt for i in plan.order]
    assert sent == [asked[step] for step in plan.arrivals()]
    for step in plan.arrivals().tolist():
        place = [body.get("decision_id") for _, body in gateway.calls].index(asked[step])
        before = sum(path == "/reward" for path, _ in gateway.calls[:place])
        assert before == step + 4, "three more instances are drawn without it"
    assert set(done.correct.tolist()) == {0.5}


async def test_laser_asks_over_http_in_batches_and_losses_are_simulated() -> None:
    gateway, _ = await over_http("laser", Signal.LOSS, Scenario(batch=16))
    batches = [body["items"] for path, body in gateway.calls if path == "/reward/batch"]
    assert [len(items) for items in batches] == [16] * 5
    losses = [body["loss"] for path, body in gateway.calls if path == "/feedback"]
    assert len(losses) == 80
    assert min(losses) > 0


def test_audits_stand_for_feedback(data: Path, checkpoint: Path) -> None:
    words = (data, "--checkpoint", checkpoint, "--policies", "bayesian,offline")
    found = document(*words, "--audit", "0.5:even", "--referee-accuracy", "0.9", "--audit-ask", "drawn")
    said = found["scenario"]["audits"]
    assert (said["rate"], said["schedule"], said["accuracy"], said["ask_all"]) == (0.5, "even", 0.9, False)
    calls = document(*words, "--audit", "0.5")["policies"]
    assert calls["bayesian"]["calls_per_instance"] > 1.3
    assert calls["offline"]["calls_per_instance"] == 1.0


def test_audits_that_cannot_be_are_refused(data: Path) -> None:
    assert "--missing 1" in str(run(data, "--audit", "0.1", "--url", "http://127.0.0.1:1").exception)
    assert "RATE" in str(run(data, "--audit", "often").exception)
