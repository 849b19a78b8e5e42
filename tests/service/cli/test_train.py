"""`reward-router train`: a checkpoint with its card, options that fit each other, fine-tuning that can be resumed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")

from router_core.checkpoint import Checkpoint
from router_core.dataset import write_pairs
from router_core.encoder.fuse import PairEncoder
from router_core.encoder.registry import load_checkpoint_backbone
from router_core.records import Instance, LabelledPair
from service.cli import app
from service.encoders.build import load_pair_encoder
from service.errors import ConfigurationError
from service.settings import read_settings
from service.telemetry import Telemetry
from tests.support.transformers_dirs import save_transformer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(40):
        right = {"a": bool(i % 2), "b": not i % 2}
        scores = {name: (1.0, rng.random()) if good else (0.0, 0.5) for name, good in right.items()}
        verdicts = {name: int(not good) for name, good in right.items()}
        words = [" ".join(rng.choice(list("abcdefgh"), 5)) for _ in range(3)]
        instance = Instance(("x1; " if i % 2 else "y, ") + words[0], (words[1], words[2] + " z"))
        pairs.append(LabelledPair(str(i), instance, 0, scores, verdicts, subset="s", group=str(i)))
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    write_pairs(path, pairs)
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"torch:{save_transformer(tmp_path_factory.mktemp('bert'), 'bert')}"


def invoke(*words: object) -> str:
    result = CliRunner().invoke(app, ["train", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        CliRunner().invoke(app, ["train", *map(str, words)], catch_exceptions=False)
    return str(caught.value)


def test_a_frozen_encoder_gives_a_checkpoint_with_its_card(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = json.loads(invoke(data, "--out", out, "--encoder", "surface", "--json"))
    checkpoint = Checkpoint.load(out)
    assert printed["digest"] == checkpoint.digest
    assert printed["pairs"] == 40
    assert checkpoint.digest in (out / "README.md").read_text("utf-8")
    assert (out / "calibration.png").is_file()


def test_without_the_classification_loss_the_prior_is_the_papers(data: Path, tmp_path: Path) -> None:
    invoke(data, "--out", tmp_path / "out", "--encoder", "surface", "--no-cls", "--balanced", "--lambda-bt", 2)
    assert Checkpoint.load(tmp_path / "out").prior_form == "paper"
    card = (tmp_path / "out/README.md").read_text("utf-8")
    assert "| lambda_cls | 0.0 |" in card
    assert "| lambda_bt | 2.0 |" in card
    assert "| balanced | true |" in card


def test_a_frozen_transformer_is_read_once(data: Path, bert: str, tmp_path: Path) -> None:
    invoke(data, "--out", tmp_path / "one", "--encoder", bert, "--cache", tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.sqlite")
    written = file.stat().st_mtime_ns
    invoke(data, "--out", tmp_path / "two", "--encoder", bert, "--cache", tmp_path / "cache")
    assert file.stat().st_mtime_ns == written
    invoke(data, "--out", tmp_path / "three", "--encoder", bert, "--no-cache")
    digests = {Checkpoint.load(tmp_path / name).digest for name in ("one", "two")}
    assert len(digests) == 1


def test_fine_tuning_leaves_a_checkpoint_with_its_encoder_and_no_state(data: Path, bert: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    invoke(
        *(data, "--out", out, "--encoder", bert, "--finetune", "lora", "--epochs", 1, "--lora-rank", 2),
        *("--precision", "bf16", "--pairs-per-step", 8, "--learning-rate", 1e-3, "--gradient-checkpointing"),
    )
    checkpoint = Checkpoint.load(out)
    backbone = load_checkpoint_backbone(checkpoint)
    assert backbone.spec == "checkpoint:backbone"
    assert np.isfinite(backbone.embed([("a", "b")])).all()
    encoder = load_pair_encoder(read_settings(), checkpoint, Telemetry())
    assert isinstance(encoder, PairEncoder)
    assert encoder.encode([Instance("x", ("a", "b"))]).shape == (1, checkpoint.d)
    assert not (tmp_path / "out.partial").exists()
    assert "(fine-tuned)" in (out / "README.md").read_text("utf-8")


def test_an_interrupted_run_is_kept_until_it_is_resumed(
    data: Path, bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from router_core.offline.finetune.loop import Loop

    words = (data, "--out", tmp_path / "out", "--encoder", bert, "--finetune", "full", "--epochs", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_look", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert CliRunner().invoke(app, ["train", *map(str, words)]).exit_code != 0
    assert not (tmp_path / "out").exists()
    assert "--resume" in refused(*words)
    invoke(*words, "--resume")
    Checkpoint.load(tmp_path / "out")


def test_options_that_do_not_fit_are_refused_before_any_work(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "add --finetune" in refused(data, "--out", out, "--epochs", 3)
    assert "add --finetune" in refused(data, "--out", out, "--resume")
    assert "--lora-rank" in refused(data, "--out", out, "--finetune", "full", "--lora-rank", 4)
    assert "nothing to learn" in refused(data, "--out", out, "--lambda-bt", 0, "--no-cls")
    (tmp_path / "thesis.tex").write_text("")
    assert "is not a checkpoint" in refused(data, "--out", tmp_path)
    assert not out.exists()


def test_consensus_needs_no_label(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for i in range(80):
        label = int(rng.integers(2))
        said = [label if rng.random() < accuracy else 1 - label for accuracy in (0.95, 0.9, 0.7)]
        rm = {name: {"verdict": "ab"[verdict]} for name, verdict in zip("xyz", said, strict=True)}
        words = [" ".join(rng.choice(list("abcdefgh"), int(rng.integers(2, 9)))) for _ in range(3)]
        texts = dict(zip(("prompt", "response_a", "response_b"), words, strict=True))
        shown = {"label": "ab"[label]} if i < 20 else {}
        lines.append(json.dumps({"id": str(i), **texts, "rm": rm, **shown}))
    for name, rows in (("some.jsonl", lines), ("none.jsonl", lines[20:])):
        (tmp_path / name).write_text("\n".join(rows))
    words = ("--out", tmp_path / "c", "--consensus", "--json")
    some = json.loads(invoke(tmp_path / "some.jsonl", *words))
    assert (some["consensus_pairs"], some["consensus_labels"]) == (60, 20)
    assert some["consensus_observed"] > 0.8
    none = json.loads(invoke(tmp_path / "none.jsonl", *words))
    assert none["consensus_pairs"] == 60
    assert "estimated from the agreement" in (tmp_path / "c" / "README.md").read_text()
    assert "--finetune" in refused(tmp_path / "none.jsonl", *words, "--finetune", "full")


def test_few_pairs_start_from_the_shipped_kinds_unless_told_not_to(data: Path, tmp_path: Path) -> None:
    digests = {
        option: json.loads(invoke(data, "--out", tmp_path / option, "--json", f"--{option}"))["digest"]
        for option in ("shipped-kinds", "no-shipped-kinds")
    }
    assert digests["shipped-kinds"] != digests["no-shipped-kinds"]


def test_the_accuracy_is_told_beside_the_best_single_and_majority(data: Path, tmp_path: Path) -> None:
    said = " ".join(invoke(data, "--out", tmp_path / "checkpoint").split())
    # Each of the two RMs is right on half of the pairs, and they are never right together.
    assert "on the same 40 pairs the best single RM (a) has 0.500, majority vote 0.500" in said
    assert "![calibration of each RM](calibration.png)" in (tmp_path / "checkpoint" / "README.md").read_text()


def test_too_few_pairs_are_refused_with_how_many_one_needs(data: Path, tmp_path: Path) -> None:
    lines = data.read_text().splitlines()
    (tmp_path / "five.jsonl").write_text("\n".join(lines[:5]))
    assert "5 pairs are too few to learn from: give at least 16; four reward models" in refused(
        tmp_path / "five.jsonl", "--out", tmp_path / "checkpoint"
    )
    assert not (tmp_path / "checkpoint").exists()
