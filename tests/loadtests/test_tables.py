"""`make tables`, what computes: no pair is judged by what has seen it, each fit is made once, references are honest."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from loadtests.tables import encodings
from loadtests.tables.encodings import Described, Encoded, TooLong, encode
from loadtests.tables.experiments import (
    K6,
    PAPER,
    TUNED,
    VARIANTS,
    Fit,
    Job,
    Plan,
    Size,
    Stream,
    Variant,
    domains_of,
)
from loadtests.tables.offline import PAPERS, TableTwo, minus, offline_figures
from loadtests.tables.online import ablation_figures, domain_figures, stream_figures
from loadtests.tables.work import (
    BEST_HINDSIGHT,
    BEST_LEARNED,
    DOMAINS_HINDSIGHT,
    SUBSETS_HINDSIGHT,
    SUBSETS_LEARNED,
    Material,
    Replayed,
    best_arm_per_subset,
    fit_tasks,
    hindsight_arms,
    priors_of,
    replay_tasks,
    run_all,
    stacked,
)
from router_core.checkpoint import Checkpoint
from router_core.combine import COMBINED
from router_core.dataset import write_pairs
from router_core.encoder.base import Block
from router_core.encoder.cache import CachedBackbone
from router_core.encoder.surface import SurfaceBackbone
from router_core.offline.train import TrainConfig, pair_features
from router_core.prior import CALIBRATED_LOSS_HYPERPARAMETERS
from router_core.records import LabelledPair, Signal
from router_core.replay import tabulate
from tests.support.offline import POOL, two_domains
from tests.support.replay import pair

ROOT = Path(__file__).parents[2]
FAST = TrainConfig(max_epochs=8, folds=2, members=1, directions=4, context=2, hidden=8)
SIZE = Size(folds=3, dealings=2, shifts=2, labelled=(12, 24, 1000), seeds=2, config=FAST)


@pytest.fixture(scope="module")
def pairs() -> list[LabelledPair]:
    return two_domains(90)


@pytest.fixture(scope="module")
def material(pairs: list[LabelledPair]) -> Material:
    backbone = SurfaceBackbone()
    described = Described(backbone.spec, backbone.dim, backbone.blocks)
    return Material(pairs, {"surface": Encoded(described, pair_features(pairs, backbone))})


@pytest.fixture(scope="module")
def plan(pairs: list[LabelledPair]) -> Plan:
    return Plan(pairs, "surface", SIZE)


@pytest.fixture(scope="module")
def fitted(pairs: list[LabelledPair], material: Material, plan: Plan) -> dict[Fit, Checkpoint]:
    needed = TableTwo(pairs, POOL, ["surface"], SIZE).needed()
    needed += [stream.fit for stream in (*plan.shifted(POOL), *plan.without_a_domain(POOL))]
    return run_all(fit_tasks(needed, material), workers=1)


def streams_of(plan: Plan) -> list[Stream]:
    few = [stream for streams in plan.few_labels(POOL).values() for stream in streams]
    return [
        *(*plan.in_distribution(POOL), *plan.shifted(POOL), *plan.without_a_domain(POOL), *plan.folds(POOL, 2, 0)),
        *few,
    ]


def replayed_of(job: Job, fitted: dict[Fit, Checkpoint], material: Material) -> Replayed:
    traces = run_all(replay_tasks({"job": job}, fitted, material), workers=1)
    return stacked(job, [traces["job", number] for number in range(len(job.streams))], material)


def test_no_stream_holds_a_group_that_its_offline_stage_learned_from(plan: Plan, pairs: list[LabelledPair]) -> None:
    for stream in streams_of(plan):
        learned = {pairs[i].group for i in stream.fit.rows}
        assert stream.rows
        assert learned
        assert not learned & {pairs[i].group for i in stream.rows}


def test_each_dealing_streams_every_pair_once(plan: Plan, pairs: list[LabelledPair]) -> None:
    streams = plan.in_distribution(POOL)
    assert len(streams) == 6
    for dealt in (streams[:3], streams[3:]):
        assert sorted(i for stream in dealt for i in stream.rows) == list(range(len(pairs)))
    assert [stream.fit.config.seed for stream in streams] == [0, 0, 0, 1, 1, 1]


def test_a_shifted_stream_is_mostly_code_and_its_offline_data_hardly(plan: Plan, pairs: list[LabelledPair]) -> None:
    for stream in plan.shifted(POOL):
        share = [np.mean([pairs[i].domain == "code" for i in rows]) for rows in (stream.rows, stream.fit.rows)]
        assert share == pytest.approx([0.8, 0.1], abs=0.03)


def test_more_labelled_pairs_hold_the_fewer_and_stream_the_same(plan: Plan, pairs: list[LabelledPair]) -> None:
    few = plan.few_labels(POOL)
    assert list(few) == [12, 24]
    assert [stream.fit.config.seed for stream in few[12]] == [0, 1]
    for fewer, more in zip(few[12], few[24], strict=True):
        assert len(fewer.fit.rows) == 12
        assert set(fewer.fit.rows) < set(more.fit.rows)
        assert fewer.rows == more.rows
        assert len(fewer.rows) == pytest.approx(0.6 * len(pairs), abs=4)


def test_a_domain_that_is_left_out_is_streamed_and_not_learned_from(plan: Plan, pairs: list[LabelledPair]) -> None:
    streams = plan.without_a_domain(POOL)
    assert [{pairs[i].domain for i in stream.rows} for stream in streams] == [{"prose"}, {"code"}]
    assert [{pairs[i].domain for i in stream.fit.rows} for stream in streams] == [{"code"}, {"prose"}]
    assert domains_of(pairs) == ("prose", "code")


def test_an_incomplete_pair_is_learned_from_and_not_streamed() -> None:
    gaps = two_domains(60, missing=0.3)
    complete = {i for i, each in enumerate(gaps) if len(each.verdicts) == len(POOL)}
    streams = Plan(gaps, "surface", SIZE).folds(POOL, 3, 0)
    assert {i for stream in streams for i in stream.rows} == complete
    assert {i for stream in streams for i in stream.fit.rows} - complete


def test_the_streams_in_distribution_take_the_fits_of_table_two(plan: Plan, pairs: list[LabelledPair]) -> None:
    needed = TableTwo(pairs, POOL, ["surface"], SIZE).needed()
    assert len(needed) == 12  # two dealings of our router, one of no-CLS and of the paper's, three folds each
    assert {stream.fit for stream in plan.in_distribution(POOL)} <= set(needed)


def test_a_fit_that_is_needed_twice_is_one_task(plan: Plan, material: Material) -> None:
    fits = [stream.fit for stream in plan.in_distribution(POOL)]
    assert len(fit_tasks(fits + fits, material)) == 6


def test_workers_give_what_one_process_gives_in_the_order_of_the_tasks() -> None:
    tasks = {number: partial(mul, number, number) for number in range(5)}
    told: list[None] = []
    assert run_all(tasks, workers=2, tell=lambda: told.append(None)) == run_all(tasks, workers=1)
    assert list(run_all(tasks, workers=2)) == [0, 1, 2, 3, 4]
    assert len(told) == 5


def test_a_task_that_fails_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        run_all({"bad": lambda: 1 // 0}, workers=1)


def test_table_two_holds_every_row_and_agrees_with_the_fits(
    pairs: list[LabelledPair], material: Material, fitted: dict[Fit, Checkpoint]
) -> None:
    table = TableTwo(pairs, POOL, ["surface"], SIZE)
    judged = table.judged(fitted, material)
    assert set(judged.rows) == {
        "single:coder", "single:talker", "random", "majority", "uwo", "offline", "offline:bt", "offline:cls",
        "offline:no-cls", BEST_LEARNED, BEST_HINDSIGHT, SUBSETS_LEARNED, SUBSETS_HINDSIGHT, *COMBINED, PAPERS,
    }  # fmt: skip
    fit = table.needed()[0]
    outside = np.setdiff1d(np.arange(len(pairs)), fit.rows)
    x = fitted[fit].fuse.apply(material.encoded["surface"].features[outside])
    arms = fitted[fit].class_probabilities(x).argmax(axis=1)
    assert judged.rows["offline"][0, outside].tolist() == judged.table.correctness[outside, arms].tolist()
    found = offline_figures(judged)
    assert found["policies"]["offline"]["accuracy"] > found["policies"]["random"]["accuracy"] + 0.1
    assert "offline" not in found["minus"]
    gap = found["policies"]["offline"]["accuracy"] - found["policies"]["majority"]["accuracy"]
    assert found["minus"]["majority"]["difference"] == pytest.approx(gap)


def test_an_unplanned_fit_is_refused(pairs: list[LabelledPair], material: Material) -> None:
    with pytest.raises(KeyError):
        TableTwo(pairs, POOL, ["surface"], SIZE).judged({}, material)


def test_the_learned_best_rm_of_a_subset_is_that_of_the_other_pairs() -> None:
    learned = [
        pair(0, 0, {"left": 0, "right": 1}, subset="a"),
        pair(1, 0, {"left": 1, "right": 0}, subset="b"),
        pair(2, 0, {"left": 1, "right": 0}, subset="b"),
        pair(3, 0, {"right": 1}, subset="c"),
    ]
    judged = [pair(i, 0, {"left": 1, "right": 0}, subset=name) for i, name in enumerate("abcd", 4)]
    # Of c only `right` is known, and it is wrong there; of d nothing is: the best of all, `right` with 2 of 4.
    assert best_arm_per_subset(learned, judged, ("left", "right")).tolist() == [0, 1, 1, 1]


def test_the_best_rm_of_a_subset_in_hindsight_is_that_of_the_judged_pairs() -> None:
    judged = [
        pair(i, 0, {"left": int(name == "b"), "right": int(name == "a")}, subset=name) for i, name in enumerate("aabb")
    ]
    assert hindsight_arms(tabulate(judged, ("left", "right"))).tolist() == [0, 0, 1, 1]


def test_stacked_streams_keep_each_pair_with_its_own_stream(
    plan: Plan, pairs: list[LabelledPair], material: Material, fitted: dict[Fit, Checkpoint]
) -> None:
    job = Job("shift", plan.shifted(POOL), ("offline", "bayesian", "random"), (0, 1))
    replayed = replayed_of(job, fitted, material)
    sizes = [len(stream.rows) for stream in job.streams]
    assert len(replayed.table) == sum(sizes)
    stream = job.streams[1]
    x = fitted[stream.fit].fuse.apply(material.encoded["surface"].features[list(stream.rows)])
    right = tabulate([pairs[i] for i in stream.rows], POOL).correctness
    expected = right[np.arange(sizes[1]), fitted[stream.fit].class_probabilities(x).argmax(axis=1)]
    assert replayed.traces["offline"].correct[0, sizes[0] :].tolist() == expected.tolist()
    passes = zip(replayed.traces["bayesian"].passes, replayed.traces[SUBSETS_LEARNED].passes, strict=True)
    assert all(ours.order.tolist() == theirs.order.tolist() for ours, theirs in passes)
    found = stream_figures(replayed)
    assert found["streams"] == 2
    assert found["length"] == sorted(set(sizes))
    assert found["policies"]["bayesian"]["regret"] == pytest.approx(
        found["oracle"] - found["policies"]["bayesian"]["accuracy"]
    )


def test_figures_per_domain_take_that_domain_s_own_best_rm(
    plan: Plan, material: Material, fitted: dict[Fit, Checkpoint]
) -> None:
    job = Job("unseen", plan.without_a_domain(POOL), ("offline", "bayesian"), (0, 1))
    replayed = replayed_of(job, fitted, material)
    found = domain_figures(replayed)
    assert list(found) == ["prose", "code", ""]
    for domain, best in (("prose", 1), ("code", 0)):
        rows = [i for i, name in enumerate(replayed.table.domains) if name == domain]
        accuracy = replayed.table.correctness[rows, best].mean()
        assert found[domain]["policies"][BEST_HINDSIGHT]["accuracy"] == pytest.approx(accuracy)
        assert found[domain]["policies"][DOMAINS_HINDSIGHT]["accuracy"] == pytest.approx(accuracy)
        lead = found[domain]["policies"]["offline"]["accuracy"] - accuracy
        assert found[domain]["offline_lead"]["difference"] == pytest.approx(lead)
    total = sum(found[domain]["n"] * found[domain]["policies"]["bayesian"]["accuracy"] for domain in ("prose", "code"))
    assert found[""]["policies"]["bayesian"]["accuracy"] == pytest.approx(total / found[""]["n"])
    each, one = (found[""]["policies"][name]["accuracy"] for name in (DOMAINS_HINDSIGHT, BEST_HINDSIGHT))
    assert each > one + 0.1


def test_a_variant_changes_the_prior_that_it_names_and_no_other(plan: Plan, fitted: dict[Fit, Checkpoint]) -> None:
    checkpoint = fitted[plan.shifted(POOL)[0].fit]
    default = priors_of(checkpoint, Variant(), Signal.PREFERENCE)(None)
    assert default.hyper == checkpoint.hyperparameters
    assert priors_of(checkpoint, Variant(), Signal.LOSS)(None).hyper == CALIBRATED_LOSS_HYPERPARAMETERS
    strong = priors_of(checkpoint, Variant(hyper=(("lambda0", 7.0), ("adapt", False))), Signal.PREFERENCE)
    assert (strong(None).hyper.lambda0, strong(None).hyper.adapt) == (7.0, False)
    assert strong(None).hyper.v == default.hyper.v
    assert strong("none").hyper == priors_of(checkpoint, Variant(), Signal.PREFERENCE)("none").hyper
    tuned = priors_of(checkpoint, Variant(), Signal.PREFERENCE, paper=(("v", 0.1),))
    assert (tuned("paper").hyper.v, tuned("paper").hyper.lambda0) == (0.1, 1.0)
    assert tuned(None).hyper == default.hyper
    features = priors_of(checkpoint, Variant(features=True), Signal.PREFERENCE)(None)
    assert (features.first, features.n_weights, features.d) == (0, checkpoint.fuse.learned, checkpoint.d)
    assert default.first == checkpoint.fuse.features


def test_a_tuned_row_is_the_papers_form_with_other_scalars(
    plan: Plan, material: Material, fitted: dict[Fit, Checkpoint]
) -> None:
    job = Job("shift", plan.shifted(POOL)[:1], ("bayesian", PAPER, *TUNED), (0, 1))
    traces = replayed_of(job, fitted, material).traces
    assert {PAPER, *TUNED} <= set(traces)
    for name in TUNED:
        assert (traces[PAPER].asked != traces[name].asked).any()
        assert traces[name].calls_per_instance == 1


def test_every_variant_names_settings_that_exist(plan: Plan) -> None:
    ablations = plan.ablations(POOL)
    assert len(ablations) == len(VARIANTS) > 8
    for variant, columns in ablations.values():
        for job in columns.values():
            assert {stream.fit.config for stream in job.streams} == {
                replace(FAST, **dict(variant.config), seed=seed) for seed in {s.fit.config.seed for s in job.streams}
            }


def test_an_ablation_tells_what_the_change_lost(plan: Plan, material: Material, fitted: dict[Fit, Checkpoint]) -> None:
    job = Job("default", plan.shifted(POOL), ("offline", "bayesian"), (0, 1))
    default = replayed_of(job, fitted, material)
    wild = replayed_of(replace(job, variant=Variant(hyper=(("v", 50.0),))), fitted, material)
    assert "lost" not in ablation_figures(default, default)["bayesian"]
    found = ablation_figures(wild, default)
    assert found["offline"]["lost"]["difference"] == 0
    lost = default.traces["bayesian"].correct.mean() - wild.traces["bayesian"].correct.mean()
    assert found["bayesian"]["lost"]["difference"] == pytest.approx(lost)
    assert (default.traces["bayesian"].asked != wild.traces["bayesian"].asked).any()


def test_a_difference_of_unequal_seeds_averages_the_fewer() -> None:
    rows = {"ours": np.array([[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]]), "one": np.array([[0.0, 1.0, 0.0, 1.0]])}
    assert minus(rows, ["", "", "", ""], "ours")["one"]["difference"] == pytest.approx(0.625 - 0.5)
    assert minus(rows, ["", "", "", ""], "one")["ours"]["difference"] == pytest.approx(0.5 - 0.625)


class Counting:
    """A backbone that counts the texts that it computes."""

    spec, dim, blocks = "counting", 2, (Block(2, dense=True),)

    def __init__(self) -> None:
        self.computed = 0

    def embed(self, conversations: Any) -> Any:
        self.computed += len(conversations)
        return np.array([[len(p), len(r)] for p, r in conversations], dtype=np.float32).reshape(-1, 2)


def test_stored_encodings_are_taken_and_missing_ones_are_timed(
    pairs: list[LabelledPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = Counting()
    monkeypatch.setattr(encodings, "load_backbone", lambda *_, **__: CachedBackbone(backbone, tmp_path))
    refused = encode(pairs, "counting", tmp_path, limit_minutes=0.0)
    assert isinstance(refused, TooLong)
    assert refused.minutes > 0
    first = encode(pairs, "counting", tmp_path, limit_minutes=60.0)
    assert isinstance(first, Encoded)
    before = backbone.computed
    again = encode(pairs, "counting", tmp_path, limit_minutes=0.0)
    assert isinstance(again, Encoded)
    # A cache is recognised by what the backbone makes of a few fixed texts; none of the pairs' is computed again.
    assert backbone.computed - before <= 8
    assert np.array_equal(first.features, again.features)


def test_a_described_backbone_never_embeds() -> None:
    with pytest.raises(RuntimeError, match="features must be given"):
        Described("x", 2, ()).embed([("a", "b")])


@pytest.mark.long  # a hundred small fits and as many streams: a minute of one core
def test_the_whole_command_writes_page_pictures_and_figures(tmp_path: Path) -> None:
    names = (*K6, "seventh", "eighth", "ninth")
    rows = []
    for each in two_domains(120):
        verdicts = {name: each.verdicts[POOL[k % 2]] for k, name in enumerate(names)}
        scores = {name: each.scores[POOL[k % 2]] for k, name in enumerate(names)}
        rows.append(replace(each, verdicts=verdicts, scores=scores))
    write_pairs(tmp_path / "pairs.jsonl", rows)
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "loadtests.tables", str(tmp_path / "pairs.jsonl"), "--quick"]
    command += ["--field", str(tmp_path / "pairs.jsonl")]
    command += ["--encoders", "surface,static", "--write", str(tmp_path), "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert set(document["offline"]) == {"K4", "K6", "K9"}
    assert document["offline"]["K9"]["policies"]["offline@static"]["accuracy"] > 0.5
    page = (tmp_path / "results.md").read_text()
    for file in re.findall(r"\]\((figures/[\w.-]+)\)", page):
        assert 0 < (tmp_path / file).stat().st_size < 150_000
    again = subprocess.run(
        [sys.executable, "-m", "loadtests.tables", "--from", str(out), "--write", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "results.md").read_text() == page


def test_the_command_refuses_what_has_no_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from loadtests.tables.__main__ import parse

    with pytest.raises(SystemExit):
        parse([str(tmp_path / "none.jsonl")])
    assert "does not exist" in capsys.readouterr().err
    saved = tmp_path / "figures.json"
    saved.write_text(json.dumps({}))
    with pytest.raises(SystemExit):
        parse(["--from", str(saved), "--seeds", "1"])
    assert parse(["--from", str(saved)]).saved == saved
