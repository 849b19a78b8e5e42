"""Fine-tuning tiny transformers: it learns, resumes bit for bit, and leaves an ordinary checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from router_core.checkpoint import Checkpoint  # noqa: E402
from router_core.encoder.fuse import PairEncoder  # noqa: E402
from router_core.encoder.registry import load_backbone, load_checkpoint_backbone  # noqa: E402
from router_core.errors import CheckpointError, DatasetError, EncoderError, HyperparameterError  # noqa: E402
from router_core.offline.finetune import FinetuneConfig, FineTuned, fine_tune  # noqa: E402
from router_core.offline.finetune.loop import Loop  # noqa: E402
from router_core.offline.finetune.model import RoutingModel, TokenisedPair  # noqa: E402
from router_core.prior import CALIBRATED_HYPERPARAMETERS  # noqa: E402
from router_core.records import Instance, LabelledPair  # noqa: E402
from tests.support.transformers_dirs import save_transformer  # noqa: E402

POOL = ("coder", "talker")
QUICK = FinetuneConfig(
    epochs=2,
    learning_rate=1e-3,
    pairs_per_step=8,
    features=4,
    hidden=8,
    batch_tokens=256,
    standardise_pairs=16,
    save_every=3,
)


def two_kinds(n: int = 48, seed: int = 0) -> list[LabelledPair]:
    """Pairs whose prompt begins with x, on which `coder` is right, and with y, on which `talker` is."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(n):
        code = bool(i % 2)
        text = [" ".join(rng.choice(list("abcdefgh"), int(rng.integers(2, 9)))) for _ in range(3)]
        right = {"coder": code or bool(rng.random() < 0.1), "talker": not code or bool(rng.random() < 0.1)}
        verdicts = {name: 0 if good else 1 for name, good in right.items()}
        scores = {name: (float(verdict == 0), float(verdict == 1)) for name, verdict in verdicts.items()}
        instance = Instance(("x " if code else "y ") + text[0], (text[1] + (" x" if code else " y"), text[2]))
        pairs.append(LabelledPair(str(i), instance, 0, scores, verdicts, subset="xy"[code], group=str(i)))
    return pairs


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"torch:{save_transformer(tmp_path_factory.mktemp('bert'), 'bert')}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"torch:{save_transformer(tmp_path_factory.mktemp('llama'), 'llama', chat=True)}"


def run(spec: str, work: Path, config: FinetuneConfig = QUICK, **options: Any) -> FineTuned:
    return fine_tune(two_kinds(), POOL, load_backbone(spec), config, work, **options)


class StoppedError(Exception):
    pass


def stop_at(step: int) -> Any:
    def progress(done: int, of: int, loss: float) -> None:
        if done == step:
            raise StoppedError

    return progress


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_an_interrupted_run_ends_with_the_same_weights_bit_for_bit(bert: str, tmp_path: Path, mode: Any) -> None:
    config = replace(QUICK, mode=mode)
    whole = run(bert, tmp_path / "whole", config)
    with pytest.raises(StoppedError):
        run(bert, tmp_path / "cut", config, progress=stop_at(5))
    steps: list[int] = []
    again = run(bert, tmp_path / "cut", config, resume=True, progress=lambda done, of, loss: steps.append(done))
    assert steps[0] == 4, "it goes on from the state of step 3"
    assert again.checkpoint.digest == whole.checkpoint.digest
    assert again.checkpoint.encoder_files == whole.checkpoint.encoder_files
    np.testing.assert_array_equal(again.held_out.probabilities, whole.held_out.probabilities)


def test_a_run_that_was_stopped_before_its_first_state_starts_over(bert: str, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        run(bert, tmp_path / "cut", progress=stop_at(1))
    assert run(bert, tmp_path / "cut", resume=True).checkpoint.digest == run(bert, tmp_path / "w").checkpoint.digest


def test_resuming_with_other_settings_or_nothing_to_resume_is_refused(bert: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run to resume"):
        run(bert, tmp_path / "cut", resume=True)
    with pytest.raises(StoppedError):
        run(bert, tmp_path / "cut", progress=stop_at(5))
    with pytest.raises(CheckpointError, match=r"epochs \(2, now 3\)"):
        run(bert, tmp_path / "cut", replace(QUICK, epochs=3), resume=True)
    other = save_transformer(tmp_path / "other", "bert", seed=1)
    with pytest.raises(CheckpointError, match="weights"):
        run(f"torch:{other}", tmp_path / "cut", resume=True)


def test_a_folder_that_is_something_else_is_left_alone(bert: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match="is no fine-tuning run"):
        run(bert, tmp_path)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_it_learns_which_model_is_right_where(bert: str, llama: str, tmp_path: Path, kind: str) -> None:
    config = replace(QUICK, epochs=4, learning_rate=3e-3, head_learning_rate=1e-2, batch_tokens=512)
    tuned = fine_tune(two_kinds(96), POOL, load_backbone({"bert": bert, "llama": llama}[kind]), config, tmp_path / "w")
    assert tuned.checkpoint.metrics["routing_accuracy_cls"] > 0.9
    assert tuned.looks[-1].held_out_loss < tuned.looks[0].held_out_loss
    assert tuned.checkpoint.hyperparameters == CALIBRATED_HYPERPARAMETERS


def test_the_checkpoint_is_an_ordinary_one_that_carries_its_encoder(llama: str, tmp_path: Path) -> None:
    tuned = run(llama, tmp_path / "out.partial", replace(QUICK, max_tokens=12))
    tuned.checkpoint.save(tmp_path / "out")
    (tmp_path / "out.partial").rename(tmp_path / "gone")
    loaded = Checkpoint.load(tmp_path / "out")
    backbone = load_checkpoint_backbone(loaded)
    held_out = [two_kinds()[i].instance for i in tuned.validation]
    x = PairEncoder(backbone, loaded.fuse).encode(held_out)
    np.testing.assert_allclose(loaded.bt_scores(x), tuned.held_out.bt_scores, atol=1e-6)
    assert loaded.digest == tuned.checkpoint.digest
    assert loaded.select_pool(("talker",)).directory == tmp_path / "out"
    loaded.save(tmp_path / "copy")
    assert Checkpoint.load(tmp_path / "copy").digest == loaded.digest


def test_an_altered_or_missing_encoder_is_refused(bert: str, tmp_path: Path) -> None:
    run(bert, tmp_path / "work").checkpoint.save(tmp_path / "out")
    with pytest.raises(EncoderError, match="inside a checkpoint"):
        load_backbone("checkpoint:backbone")
    weights = tmp_path / "out/backbone/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="altered"):
        Checkpoint.load(tmp_path / "out")
    weights.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        Checkpoint.load(tmp_path / "out")


def test_how_a_batch_is_cut_into_passes_does_not_change_the_step(bert: str, tmp_path: Path) -> None:
    settings = replace(QUICK, dropout=0.0, epochs=1, balanced=True)
    weights = []
    for tokens in (1, 64, 4096):
        backbone = load_backbone(bert)
        tuned = fine_tune(two_kinds(), POOL, backbone, replace(settings, batch_tokens=tokens), tmp_path / str(tokens))
        weights.append(tuned.checkpoint.fuse.w1)
    np.testing.assert_allclose(weights[1], weights[0], atol=1e-4)
    np.testing.assert_allclose(weights[2], weights[0], atol=1e-4)


def test_lora_trains_few_weights_and_is_merged_at_the_end(bert: str, tmp_path: Path) -> None:
    before = load_backbone(bert)
    tuned = run(bert, tmp_path / "work", replace(QUICK, mode="lora", lora_rank=2))
    state = torch.load(tmp_path / "work/best.pt", weights_only=True)
    assert all("lora_" in name for name in state if name.startswith("transformer."))
    after = load_checkpoint_backbone(tuned.checkpoint)
    assert type(after.model) is type(before.model)  # type: ignore[attr-defined]
    assert np.abs(after.embed([("x a", "b")]) - before.embed([("x a", "b")])).max() > 1e-4


def test_mixed_precision_and_gradient_checkpointing_train_as_well(llama: str, tmp_path: Path) -> None:
    config = replace(QUICK, epochs=1)
    plain = run(llama, tmp_path / "plain", config)
    kept = run(llama, tmp_path / "checkpointed", replace(config, gradient_checkpointing=True))
    np.testing.assert_allclose(kept.checkpoint.fuse.w1, plain.checkpoint.fuse.w1, atol=1e-5)
    brain = run(llama, tmp_path / "bf16", replace(config, precision="bf16"))
    assert abs(brain.looks[-1].held_out_loss - plain.looks[-1].held_out_loss) < 0.05
    # Its first steps overflow and are left out until the scale of the loss has come down.
    half = run(llama, tmp_path / "fp16", replace(config, precision="fp16", epochs=4))
    assert half.looks[-1].held_out_loss < half.looks[0].held_out_loss
    for mixed in (brain, half):
        weights = load_checkpoint_backbone(mixed.checkpoint).model.state_dict()  # type: ignore[attr-defined]
        assert {value.dtype for value in weights.values()} == {torch.float32}


def test_patience_ends_a_run_and_the_best_weights_are_kept(bert: str, tmp_path: Path) -> None:
    config = replace(QUICK, epochs=30, learning_rate=0.05, head_learning_rate=0.5, patience=2)
    tuned = run(bert, tmp_path / "work", config)
    losses = [look.held_out_loss for look in tuned.looks]
    assert len(losses) < 60
    assert losses[-3] == min(losses)
    assert tuned.checkpoint.metrics["held_out_loss"] == min(losses)


def test_one_batch_has_the_branches_of_the_numpy_encoder(bert: str, tmp_path: Path) -> None:
    from router_core.encoder.fuse import two_branch

    backbone: Any = load_backbone(bert)
    texts = [[("x a", "b c"), ("x a", "d")], [("y", "e f g"), ("y", "h"), ("y", "a a")]]
    pairs = [TokenisedPair(tuple(tuple(backbone.token_ids(*text)) for text in group)) for group in texts]
    model = RoutingModel(backbone, torch.tensor([0.5, 0.5]), QUICK, torch.Generator().manual_seed(0)).eval()
    h = backbone.embed([text for group in texts for text in group])
    with torch.no_grad():
        np.testing.assert_allclose(model.branches(pairs).numpy(), two_branch(h, [2, 3]), atol=1e-5)


def test_verdicts_that_are_missing_are_masked(bert: str, tmp_path: Path) -> None:
    pairs = two_kinds()
    partial = [
        replace(pair, verdicts={"coder": pair.verdicts["coder"]}, scores={"coder": pair.scores["coder"]})
        for pair in pairs[:20]
    ] + pairs[20:]
    tuned = fine_tune(partial, POOL, load_backbone(bert), replace(QUICK, epochs=1), tmp_path / "work")
    assert np.isfinite(tuned.held_out.probabilities).all()


def test_what_cannot_be_trained_is_named(bert: str, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="cannot be fine-tuned"):
        run("surface", tmp_path / "a")
    with pytest.raises(EncoderError, match="single precision"):
        run(f"{bert}@bf16", tmp_path / "b")
    with pytest.raises(DatasetError, match="there are none"):
        fine_tune([], POOL, load_backbone(bert), QUICK, tmp_path / "c")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("dropout", 1.0),
        ("mode", "half"),
        ("precision", "int8"),
        ("lambda_bt", -1.0),
        ("learning_rate", 0),
    ],
)
def test_a_setting_outside_its_domain_is_named(field: str, value: Any) -> None:
    with pytest.raises(HyperparameterError, match=field):
        replace(QUICK, **{field: value})


def test_the_process_wide_generator_is_left_alone(bert: str, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    run(bert, tmp_path / "work", replace(QUICK, epochs=1, mode="lora"))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_loop_takes_every_pair_once_an_epoch_in_a_new_order(bert: str, tmp_path: Path) -> None:
    backbone: Any = load_backbone(bert)
    model = RoutingModel(backbone, torch.tensor([0.5]), QUICK, torch.Generator().manual_seed(0))
    pairs = [TokenisedPair(((1,), (2,)))] * 19
    loop = Loop(model, "cpu", (pairs, torch.ones(19, 1)), (pairs, torch.ones(19, 1)), QUICK, tmp_path)
    epochs = [np.concatenate([loop._batch(e * 3 + s) for s in range(3)]) for e in range(2)]
    for order in epochs:
        assert sorted(order) == list(range(19))
    assert list(epochs[0]) != list(epochs[1])
